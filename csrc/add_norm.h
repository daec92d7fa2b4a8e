// add_norm: a residual addition and the norm of its result, and their gradients.
//
//   t = x + branch, or x               the residual stream, float32
//   y = (t - mean) rstd weight + bias  LayerNorm: rstd = 1 / sqrt(mean((t - mean)^2) + eps)
//   y = t rstd weight                  RMSNorm, without bias: the same with 0 for mean(t)
// Backward, with n[c] = (t[c] - mean) rstd and g = dy weight:
//   dt = rstd (g - mean(g) - n mean(g n)) + what comes through t itself; no mean(g) for RMSNorm
//   dweight = sum over rows of dy n        dbias = sum over rows of dy
// Sources: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct AddNormArgs {
  const void* x;       // (N, C), row stride x_row; float32 where there is a branch
  const void* branch;  // (N, C), row stride branch_row; null: none
  const float* weight;
  const float* bias;  // null: RMSNorm
  float* total;       // (N, C) t; null without a branch
  void* y;            // (N, C)
  float* stats;       // (N, 2): mean, rstd
  int64_t rows, width, x_row, branch_row;
  Dtype x_dtype, branch_dtype, y_dtype;
  float eps;
  int threads;
};

struct AddNormGradArgs {
  const void* grad_y;       // (N, C), row stride grad_row
  const float* grad_total;  // (N, C), row stride grad_total_row; null: 0
  const void* total;        // t, (N, C), row stride total_row
  const float *weight, *stats;
  void* grad_x;        // (N, C), of t's type
  void* grad_branch;   // (N, C), the same in y's type; null: not wanted
  float* sums;         // workspace: add_norm_sums(rows) x 2 x C
  float* grad_weight;  // (C,)
  float* grad_bias;    // (C,); null: RMSNorm
  int64_t rows, width, grad_row, grad_total_row, total_row;
  Dtype total_dtype, y_dtype;
  int threads;
};

// Rows are summed in so many blocks of fixed size, then block by block: the bits do not depend on
// the threads.
constexpr int64_t kAddNormRows = 64;
constexpr int64_t add_norm_sums(int64_t rows) { return (rows + kAddNormRows - 1) / kAddNormRows; }

IC_CPU_KERNEL(add_norm_cpu, AddNormArgs)
IC_CPU_KERNEL(add_norm_backward_cpu, AddNormGradArgs)

}  // namespace ic
