// gae's row on the CPU, for the ops that hold a row in cache anyway.
#pragma once

#include "gae.h"
#include "simd.h"

namespace ic::IC_ISA {

IC_INLINE float gae_element(const void* base, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(base)[i]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(base)[i]);
    default:
      return static_cast<const float*>(base)[i];
  }
}

IC_INLINE Vec gae_elements(const void* base, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return load(static_cast<const BFloat16*>(base) + i);
    case Dtype::kFloat16:
      return load(static_cast<const Float16*>(base) + i);
    default:
      return load(static_cast<const float*>(base) + i);
  }
}

// The recurrence over sixteen unmasked steps at once: A = delta + c A' is a suffix scan, whose
// terms are c, c^2, c^4 and c^8 apart, and what comes after the last step enters by c^16 .. c.
struct GaeScan {
  explicit GaeScan(float gamma, float lambda) : gamma(broadcast(gamma)) {
    float c = gamma * lambda, power[kLanes];
    for (int i = kLanes - 1; i >= 0; --i) power[i] = i == kLanes - 1 ? c : c * power[i + 1];
    powers = load(power);
    for (Vec& a : apart) a = broadcast(c), c *= c;
  }

  IC_INLINE Vec advantages(Vec reward, Vec value, GaeState after) const {
    const Vec next = select(iota() == broadcast_int(kLanes - 1), broadcast(after.next_value),
                            shift_down<1>(value));
    Vec a = fma(gamma, next, reward - value);
    a = fma(apart[0], shift_down<1>(a), a);
    a = fma(apart[1], shift_down<2>(a), a);
    a = fma(apart[2], shift_down<4>(a), a);
    a = fma(apart[3], shift_down<8>(a), a);
    return fma(powers, broadcast(after.advantage), a);
  }

  Vec gamma, powers, apart[4];
};

// Whether the flags of sixteen steps are all 1, or all 0.
IC_INLINE bool gae_all(const uint8_t* flags, bool set) {
  uint64_t eight[2];
  __builtin_memcpy(eight, flags, sizeof eight);
  const uint64_t want = set ? 0x0101010101010101 : 0;
  return eight[0] == want && eight[1] == want;
}

// Sixteen steps are taken at once where they are unmasked, nothing ends and they lie side by side.
// They are counted from the last unmasked step on, so that padding changes no bit.
IC_INLINE void gae_row(const GaeArgs& a, int64_t row) {
  const bool packed = a.cu_seqlens != nullptr;
  const int64_t first = packed ? a.cu_seqlens[row] : 0;
  const int64_t last = packed ? a.cu_seqlens[row + 1] : a.steps;
  const int64_t b = packed ? 0 : row;
  float* advantages = a.advantages + b * a.steps;
  float* returns = a.returns + b * a.steps;
  const uint8_t* mask = a.mask ? a.mask + b * a.mask_row : nullptr;
  const uint8_t* dones = a.dones ? a.dones + b * a.dones_row : nullptr;
  const bool dense = a.rewards_step == 1 && a.values_step == 1 && (!mask || a.mask_step == 1) &&
                     (!dones || a.dones_step == 1);
  const GaeScan scan(a.gamma, a.lambda);
  GaeState state{a.bootstrap ? a.bootstrap[row] : 0.0f, 0.0f};
  for (int64_t t = last - 1; t >= first; --t) {
    const int64_t begin = t + 1 - kLanes;
    if (dense && begin >= first && (!mask || gae_all(mask + begin, true)) &&
        (!dones || gae_all(dones + begin, false))) {
      const Vec reward = gae_elements(a.rewards, a.rewards_dtype, b * a.rewards_row + begin);
      const Vec value = gae_elements(a.values, a.values_dtype, b * a.values_row + begin);
      const Vec advantage = scan.advantages(reward, value, state);
      store(advantages + begin, advantage);
      store(returns + begin, advantage + value);
      state = {lanes_of(value)[0], lanes_of(advantage)[0]};
      t = begin;
      continue;
    }
    if (dones && dones[t * a.dones_step]) state = {0.0f, 0.0f};
    if (mask && !mask[t * a.mask_step]) {
      advantages[t] = returns[t] = 0.0f;
      continue;
    }
    const float reward =
        gae_element(a.rewards, a.rewards_dtype, b * a.rewards_row + t * a.rewards_step);
    const float value = gae_element(a.values, a.values_dtype, b * a.values_row + t * a.values_step);
    state = gae_step(state, reward, value, a.gamma, a.lambda);
    advantages[t] = state.advantage;
    returns[t] = state.advantage + value;
  }
}

// Packed steps before the first and after the last row belong to no row.
IC_INLINE void gae_clear_gaps(const GaeArgs& a) {
  if (!a.cu_seqlens) return;
  for (int64_t t = 0; t < a.cu_seqlens[0]; ++t) a.advantages[t] = a.returns[t] = 0.0f;
  for (int64_t t = a.cu_seqlens[a.rows]; t < a.steps; ++t) a.advantages[t] = a.returns[t] = 0.0f;
}

}  // namespace ic::IC_ISA
