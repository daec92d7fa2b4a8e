// cross_entropy: softmax cross entropy of (N, V) logits, its gradient formed with it or later.
//
// With y = softcap tanh(x / softcap), or x; lse = log sum_j e^y[j]; t the row's target; w the class
// weights, or 1; s = label_smoothing; z = z_loss; a row that is not ignored:
//   loss = (1 - s) w[t] (lse - y[t]) + s / V sum_j w[j] (lse - y[j]) + z lse^2
//   dloss / dy[j] = p[j] ((1 - s) w[t] + s / V sum w + 2 z lse) - s / V w[j] - (1 - s) w[t] [j = t]
//   dy / dx = 1 - (y / softcap)^2
// The true class is formed with expm1(y[t] - lse), so that p[t] near 1 does not cancel.
// Ignored rows: loss 0, gradient 0, logits not read. `total` is the sum of w[t] over the other
// rows.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct CrossEntropyArgs {
  const void* logits;        // (N, V), row stride logits_row, element type dtype
  const int64_t* targets;    // (N,), in [0, V) or ignore_index
  const float* weight;       // (V,); null: 1
  const float* total;        // divides the gradient (a total of 0: gradient 0); null: 1
  const float* grad_output;  // one, or one per row (grad_output_row = 1); null: 1
  float* losses;             // (N,), before any reduction; null: form the gradient from `stats`
  float* stats;  // (N, 2): max y, sum e^(y - max). Written with the losses, read without; may be
                 // null with losses
  void* grad;    // (N, V), row stride grad_row, type grad_dtype; may be logits; null: none
  int64_t rows, vocab, logits_row, grad_row, grad_output_row;
  int64_t ignore_index;
  Dtype dtype, grad_dtype;  // grad_dtype: dtype, or bfloat16 for float32 logits
  float label_smoothing, z_loss, softcap;
  int threads;
};

// The sum of w[t] over the rows that are not ignored. On CUDA, where nobody waits to check them,
// targets out of range count 1, or 0 with weights: their loss is NaN.
struct CrossEntropyTotalArgs {
  const int64_t* targets;  // (N,)
  const float* weight;     // (V,); null: 1
  float* total;
  int64_t rows, vocab, ignore_index;
};

// loss = sum of losses / total, 0 where the total is 0.
struct CrossEntropyReduceArgs {
  const float* losses;  // (N,)
  const float* total;   // null: 1
  float* loss;
  int64_t rows;
};

IC_CPU_KERNEL(cross_entropy_cpu, CrossEntropyArgs)
void cross_entropy_cuda(const CrossEntropyArgs&, void* stream);
void cross_entropy_total_cuda(const CrossEntropyTotalArgs&, void* stream);
void cross_entropy_reduce_cuda(const CrossEntropyReduceArgs&, void* stream);

}  // namespace ic
