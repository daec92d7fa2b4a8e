// ppo_advantage: rewards from scores and KL, GAE, and whitening (Ouyang et al. 2022,
// arXiv:2203.02155, section 3.5; Huang et al. 2024, arXiv:2403.17031).
//
//   reward[t] = -kl_coef (logprob[t] - ref[t]) on unmasked steps, + clamp(score, +-reward_clip) at
//   score_index whiten_rewards: (reward - mean) rsqrt(var + 1e-8) + mean over unmasked steps
//   advantages, returns: gae.h; whiten: (advantage - mean) rsqrt(var + 1e-8) over unmasked steps
//
// Moments are float64, each row's own first, then merged in the order of the rows (Chan et al.
// 1979); on CUDA each tile's own, then merged in the order of the tiles. So the same bits for any
// number of threads.
#pragma once

#include "gae.h"

namespace ic {

struct Moments {
  double count, mean, m2;
};

struct PpoAdvantageArgs {
  // Contiguous float32, (B, T) or, with cu_seqlens, packed (N,).
  const float* scores;  // (B,)
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* mask;         // 1 = a step of the response
  const int64_t* score_index;  // (B,) within the row, -1: not paid; null: the last unmasked step
  float* rewards;
  Moments* row_moments;        // (B,) workspace on the CPU
  float* stats;                // (3,): count, mean, M2 of the advantages before whitening
  GaeArgs gae;                 // rewards, values, mask, cu_seqlens, ... and the two outputs
  float kl_coef, reward_clip;  // reward_clip < 0: none
  bool whiten_rewards, whiten, unbiased;
};

struct WhitenArgs {
  const float* advantages;  // (count,) contiguous
  const uint8_t* mask;      // null: all
  const float* mean;        // 0-d
  const float* var;         // 0-d
  float* out;
  int64_t count;
  int threads;
};

// Chan's rule for the moments of two samples together.
IC_HOST_DEVICE Moments merge_moments(Moments a, Moments b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count),
          a.m2 + b.m2 + delta * delta * (a.count * b.count / count)};
}

IC_HOST_DEVICE float kl_reward(float kl_coef, float logprob, float ref_logprob) {
  return -kl_coef * (logprob - ref_logprob);
}

IC_HOST_DEVICE float clipped_score(float score, float clip) {  // NaN stays; clip < 0: none
  if (clip < 0) return score;
  if (score > clip) return clip;
  return score < -clip ? -clip : score;
}

IC_HOST_DEVICE float whiten_factor(float var) { return 1.0f / __builtin_sqrtf(var + 1e-8f); }

IC_HOST_DEVICE float whitened(float x, float mean, float factor, float shift) {
  return (x - mean) * factor + shift;
}

// On CUDA: gae's, two whitenings, where each row is paid, and moments by warps (gae_slots: where a
// block's tile is cut short, up to 7 without steps).
IC_HOST_DEVICE int64_t ppo_advantage_workspace_bytes(int64_t rows, int64_t steps, bool packed) {
  const int64_t slots = gae_tiles(rows, steps, packed, kGaeWarpTile) + (packed ? 0 : 7 * rows);
  return gae_workspace_bytes(rows, steps, packed) + 2 * 8 + rows * 8 +
         slots * static_cast<int64_t>(sizeof(Moments));
}

IC_CPU_KERNEL(ppo_advantage_cpu, PpoAdvantageArgs)
IC_CPU_KERNEL(whiten_cpu, WhitenArgs)
void ppo_advantage_cuda(const PpoAdvantageArgs&, void* stream);
void whiten_cuda(const WhitenArgs&, void* stream);

}  // namespace ic
