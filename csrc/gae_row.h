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

IC_INLINE void gae_row(const GaeArgs& a, int64_t row) {
  const bool packed = a.cu_seqlens != nullptr;
  const int64_t first = packed ? a.cu_seqlens[row] : 0;
  const int64_t last = packed ? a.cu_seqlens[row + 1] : a.steps;
  const int64_t b = packed ? 0 : row;
  float* advantages = a.advantages + b * a.steps;
  float* returns = a.returns + b * a.steps;
  GaeState state{a.bootstrap ? a.bootstrap[row] : 0.0f, 0.0f};
  for (int64_t t = last - 1; t >= first; --t) {
    if (a.dones && a.dones[b * a.dones_row + t * a.dones_step]) state = {0.0f, 0.0f};
    if (a.mask && !a.mask[b * a.mask_row + t * a.mask_step]) {
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
