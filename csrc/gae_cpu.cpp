// gae on the CPU: a row is one serial chain, rows run in parallel.
#include "gae.h"
#include "parallel.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

float element(const void* base, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(base)[i]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(base)[i]);
    default:
      return static_cast<const float*>(base)[i];
  }
}

void gae_row(const GaeArgs& a, int64_t row) {
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
    const float reward = element(a.rewards, a.rewards_dtype, b * a.rewards_row + t * a.rewards_step);
    const float value = element(a.values, a.values_dtype, b * a.values_row + t * a.values_step);
    state = gae_step(state, reward, value, a.gamma, a.lambda);
    advantages[t] = state.advantage;
    returns[t] = state.advantage + value;
  }
}

}  // namespace

void gae_cpu(const GaeArgs& a) {
  // Packed rows are short as a rule; 4096 steps are about 15 us.
  const int64_t per_row = a.cu_seqlens ? (a.steps / (a.rows + 1) + 1) : a.steps;
  const int64_t grain = 4096 / (per_row + 1) + 1;
  parallel_rows(a.rows, grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) gae_row(a, row);
  });
  if (!a.cu_seqlens) return;
  // Steps before the first and after the last segment belong to no row.
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) a.advantages[t] = a.returns[t] = 0.0f;
  };
  clear(0, a.cu_seqlens[0]);
  clear(a.cu_seqlens[a.rows], a.steps);
}

}  // namespace ic::IC_ISA
