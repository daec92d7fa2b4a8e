// gae: generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).
//
// Each row runs backwards over its steps with a state (V', A'), starting at (bootstrap or 0, 0):
//   dones[t]:    (V', A') <- (0, 0) first, masked or not
//   unmasked t:  A = r + gamma V' - V + gamma lambda A';  advantage = A, return = A + V;  (V', A')
//   <- (V, A) masked t:    advantage = return = 0; r and V are not looked at; the state passes
//   through
// Rows are (B, T) with any strides, or segments of a packed (N,) given by cu_seqlens.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct GaeArgs {
  const void* rewards;     // (B, T) or (N,), element type rewards_dtype
  const void* values;      // like rewards, element type values_dtype
  const uint8_t* mask;     // 1 = a real step; null: all are
  const uint8_t* dones;    // 1 = the episode terminates after this step; null: none does
  const float* bootstrap;  // (B,) value after the last step; null: 0
  const int32_t*
      cu_seqlens;     // (B + 1,): row b is steps [cu[b], cu[b + 1]) of a packed (N,); null: (B, T)
  float* advantages;  // contiguous, of rewards' shape; written everywhere
  float* returns;     // like advantages
  int64_t rows, steps;                                         // B and T; steps = N when packed
  int64_t rewards_row, rewards_step, values_row, values_step;  // strides in elements
  int64_t mask_row, mask_step, dones_row, dones_step;
  Dtype rewards_dtype, values_dtype;
  float gamma, lambda;
  int threads;
  uint8_t* workspace;  // gae_workspace_bytes() on CUDA
};

struct GaeState {
  float next_value, advantage;
};

// One unmasked step of the recurrence, for both back ends.
IC_HOST_DEVICE GaeState gae_step(GaeState after, float reward, float value, float gamma,
                                 float lambda) {
  const float delta = reward + gamma * after.next_value - value;
  return {value, delta + gamma * lambda * after.advantage};
}

// On CUDA a row is cut into tiles of steps, counted from its end, so that a row's bits do not
// depend on the rows beside it. Tiles hand the state on through the workspace: kGaeStateBytes for
// each, and a counter.
constexpr int64_t kGaeWarpTile = 256, kGaeBlockTile = 2048, kGaeStateBytes = 32;

// At most so many tiles of `tile` steps. In a packed (N,) row b has the numbers from cu[b] / tile +
// b on, as many as it needs: ceil(length / tile) <= cu[b + 1] / tile - cu[b] / tile + 1.
IC_HOST_DEVICE int64_t gae_tiles(int64_t rows, int64_t steps, bool packed, int64_t tile) {
  return packed ? steps / tile + rows : rows * ((steps + tile - 1) / tile);
}

IC_HOST_DEVICE int64_t gae_workspace_bytes(int64_t rows, int64_t steps, bool packed) {
  return kGaeStateBytes * (1 + gae_tiles(rows, steps, packed, kGaeWarpTile));
}

IC_CPU_KERNEL(gae_cpu, GaeArgs)
void gae_cuda(const GaeArgs&, void* stream);

}  // namespace ic
