// activation: the nonlinear functions between a model's matrix products, and their gradients.
//
// Both are f(x) = x s with s = sigmoid(u(x)), and so f'(x) = s + x s (1 - s) u'(x):
//   silu:  u = x
//   gelu:  u = 2 sqrt(2 / pi) (x + 0.044715 x^3): the tanh form, (1 + tanh z) / 2 = sigmoid(2 z)
// SwiGLU's rows are [gate, up]: out = silu(gate) up. Backward, with g the output's gradient:
//   d gate = g up silu'(gate)     d up = g silu(gate)
// Sources: Shazeer 2020, arXiv:2002.05202 (SwiGLU); Hendrycks and Gimpel 2016, arXiv:1606.08415.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct ActivationArgs {
  const void* x;     // (N, F), or (N, 2F) = [gate, up] if gated; row stride x_row
  const void* grad;  // of the output, (N, F), row stride grad_row; null: forward
  void* out;         // forward: (N, F); backward: d x, in the form of x; row stride out_row
  int64_t rows, width, x_row, grad_row, out_row;  // width is F
  bool gated;                                     // SwiGLU; else gelu
  Dtype dtype;                                    // of all three
  int threads;
};

IC_CPU_KERNEL(activation_cpu, ActivationArgs)

}  // namespace ic
