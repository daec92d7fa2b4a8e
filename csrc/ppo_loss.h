// ppo_loss: PPO's clipped policy loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7), clipped
// value loss, entropy bonus and k3 KL term, their gradients and statistics, in one sweep.
//
//   d = clamp(logprob - old, +-20), rho = e^d
//   policy = max(-rho A, -clip(rho, ratio_low, ratio_high) A); where A < 0 at most -dual_clip A;
//   times weight value  = max((v - R)^2, (old_v + clip(v - old_v, +-value_clip) - R)^2) / 2 kl =
//   e^(ref - logprob) - 1 - (ref - logprob) loss   = sum over unmasked tokens of w (policy +
//   value_coef value - entropy_coef entropy + kl_coef kl),
//            over the normalizer
//
// Tokens are cut into segments: a row each where w depends on the row ("sequence"), else fixed
// blocks; on CUDA always blocks. A segment's sums are its own; they are added in order, so bits do
// not depend on the threads. Packed tokens outside every row count nowhere and have gradient 0.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

// Order of PPOStats' sums (instructcore/ops/ppo_loss.py).
enum PpoStatistic : int {
  kCount,
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKl,
  kApproxKl,
  kRatio,
  kClipped,
  kValueClipped,
  kReturns,
  kReturnsSquared,
  kError,
  kErrorSquared,
  kStatistics,
};
constexpr int kPpoSums = kStatistics + 1;  // and the weighted loss

struct PpoLossArgs {
  // Contiguous float32 (tokens,); a null pointer is a term that is not there.
  const float *logprobs, *old_logprobs, *advantages;
  const uint8_t* mask;
  const float *values, *old_values, *returns, *entropy, *ref_logprobs, *weights;
  const int32_t* cu_seqlens;  // (segments + 1,): rows of a packed (N,) for `by_sequence`
  const float* normalizer;    // 0-d; null: the unmasked tokens, or the non-empty sequences
  float* loss;                // 0-d
  float* sums;                // (kStatistics,)
  float *grad_logprobs, *grad_values, *grad_entropy;  // (tokens,) of the loss; null: not wanted
  double* workspace;  // ppo_loss_workspace() of them; (segments, kPpoSums) on the CPU
  int64_t tokens, segments,
      segment_tokens;  // segment_tokens (of each but the last): unless cu_seqlens
  bool by_sequence;
  float ratio_low, ratio_high, dual_clip, value_clip_range;  // dual_clip, value_clip < 0: none
  float value_coef, entropy_coef, kl_coef;
  int threads;
};

// On CUDA: tokens of a block, in the sweep and in the count.
constexpr int64_t kPpoChunk = 2048, kPpoCountChunk = 16384;

constexpr int64_t ppo_chunks(int64_t tokens, int64_t chunk) { return (tokens + chunk - 1) / chunk; }

// Doubles of workspace on CUDA: the scale, counts, the chunks' sums.
constexpr int64_t ppo_loss_workspace(int64_t tokens, int64_t segments, bool by_sequence) {
  return 1 + (by_sequence ? segments : ppo_chunks(tokens, kPpoCountChunk)) +
         ppo_chunks(tokens, kPpoChunk) * kPpoSums;
}

IC_CPU_KERNEL(ppo_loss_cpu, PpoLossArgs)
void ppo_loss_cuda(const PpoLossArgs&, void* stream);

}  // namespace ic
