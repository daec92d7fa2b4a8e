// rotary: heads of a packed tensor turned by the angles of their positions.
//
//   a' = a cos - b sin,  b' = b cos + a sin     for the pairs (a, b) of a head, angle i for pair i
//
// Pairs are (2 i, 2 i + 1), or (i, i + D / 2). Each product and each sum rounds to float32, as in
// attention_paged_ and plain torch; the result rounds once to the element type. The gradient is the
// turn back, by -sin. Source: Su et al. 2021, arXiv:2104.09864.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

struct RotaryArgs {
  const void* x;             // (N, heads, D); strides of a token and a head below
  void* out;                 // (N, heads, D), contiguous
  const float *cos, *sin;    // (positions, D / 2)
  const int32_t* positions;  // (N,)
  int64_t tokens, heads, dim, token, head;
  int64_t turned;  // so many heads turn; the others are copied
  bool interleaved, back;
  Dtype dtype;  // of x and out
  int threads;
};

IC_CPU_KERNEL(rotary_cpu, RotaryArgs)

}  // namespace ic
