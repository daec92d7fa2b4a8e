// token_logprobs: log-probability of each row's target, the row's entropy, lse and top-1, in one
// read of the (N, V) logits; and their gradient.
//
// With y = x / T, lse = log sum_j e^y[j], l[j] = y[j] - lse, p = e^l, a row that is neither masked
// nor ignored:
//   logprob   = l[t]
//   entropy H = -sum_j p[j] l[j]
//   top1      = t is the lowest argmax
//   dx[j]     = (g_logprob ([j = t] - p[j]) - g_entropy p[j] (l[j] + H)) / T
// Other rows: all outputs 0, gradient 0, logits not read.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct TokenLogprobsArgs {
  const void* logits;        // (N, V), row stride logits_row, element type dtype
  const int64_t* targets;    // (N,), in [0, V) or ignore_index
  const uint8_t* mask;       // (N,), 0 = masked; null: none is
  const float* temperature;  // one, or one per row (temperature_row = 1)
  float* logprobs;           // (N,)
  float* entropy;            // (N,); null: not asked for
  float* lse;                // (N,)
  bool* top1;                // (N,)
  float* stats;              // (N, 2): max x, sum e^((x - max) / T)
  int64_t rows, vocab, logits_row, temperature_row;
  int64_t ignore_index;
  Dtype dtype;
  int threads;
};

struct TokenLogprobsGradArgs {
  const TokenLogprobsArgs* forward;  // its stats, and entropy where grad_entropy is given, are read
  const float* grad_logprobs;        // (N,); null: 0
  const float* grad_entropy;         // (N,); null: 0
  void* grad;                        // (N, V), row stride grad_row, type grad_dtype; may be logits
  int64_t grad_row;
  Dtype grad_dtype;  // dtype, or bfloat16 for float32 logits
};

IC_CPU_KERNEL(token_logprobs_cpu, TokenLogprobsArgs)
IC_CPU_KERNEL(token_logprobs_backward_cpu, TokenLogprobsGradArgs)
void token_logprobs_cuda(const TokenLogprobsArgs&, void* stream);
void token_logprobs_backward_cuda(const TokenLogprobsGradArgs&, void* stream);

}  // namespace ic
