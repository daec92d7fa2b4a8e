// ppo_advantage: rewards from scores and KL, GAE, and whitening (Ouyang et al. 2022, arXiv:2203.02155, section
// 3.5; Huang et al. 2024, arXiv:2403.17031).
//
//   reward[t] = -kl_coef (logprob[t] - ref[t]) on unmasked steps, + clamp(score, +-reward_clip) at score_index
//   whiten_rewards: (reward - mean) rsqrt(var + 1e-8) + mean over unmasked steps
//   advantages, returns: gae.h; whiten: (advantage - mean) rsqrt(var + 1e-8) over unmasked steps
//
// Moments are float64, each row's own first, then merged in the order of the rows (Chan et al. 1979): the same
// bits for any number of threads.
#pragma once

#include "gae.h"

namespace ic {

struct Moments {
  double count, mean, m2;
};

struct PpoAdvantageArgs {
  // Contiguous float32, (B, T) or, with cu_seqlens, packed (N,).
  const float* scores;         // (B,)
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* mask;         // 1 = a step of the response
  const int64_t* score_index;  // (B,) within the row, -1: not paid; null: the last unmasked step
  float* rewards;
  Moments* row_moments;        // (B,) workspace
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

IC_CPU_KERNEL(ppo_advantage_cpu, PpoAdvantageArgs)
IC_CPU_KERNEL(whiten_cpu, WhitenArgs)

}  // namespace ic
