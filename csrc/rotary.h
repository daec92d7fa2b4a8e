// rotary: rotary position embedding of packed heads, and its gradient.
//
// Pairs are neighbours: (x[2i], x[2i + 1]) of a head of token n, at position p = positions[n],
// turns by the angle whose cosine and sine are cos[p, i] and sin[p, i]:
//   y[2i] = x[2i] cos - x[2i + 1] sin     y[2i + 1] = x[2i + 1] cos + x[2i] sin
// Each product is rounded by itself, as in attention_paged_: a token has the same bits in both.
// The gradient turns back (sin -> -sin).
// Source: Su et al. 2021, arXiv:2104.09864.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

// Heads of every token, (N, heads, D), last stride 1.
struct RotaryPart {
  const void* from;
  void* to;
  int64_t from_row, from_head, to_row, to_head, heads;
  bool turned;  // else copied
};

struct RotaryArgs {
  RotaryPart parts[3];
  const float *cos, *sin;    // (positions, D / 2)
  const int32_t* positions;  // (N,)
  int64_t rows, dim;
  bool back;
  Dtype dtype;
  int threads;
};

IC_CPU_KERNEL(rotary_cpu, RotaryArgs)

}  // namespace ic
