// trunk: all layers of a decoder over a paged cache in one call, on the CPU, without gradient.
//
//   x = embed[token] + positions[p]                  positions: GPT-2 only
//   each layer:  x, y = x + branch, norm1(x + branch)   in the first one: x, norm1(x)
//                branch = out(attention(qkv(y)))        keys and values join the cache
//                x, y = x + branch, norm2(x + branch)
//                branch = down(act(up(y)))
//   hidden = norm(x + branch)
//
// The kernels are those of the ops add_norm, linear, attention_paged_, swiglu and gelu, called one
// after the other, so the bits are those of GPT._layers (instructcore/model.py), which says the
// same in Python for training and for CUDA. To feed one token to a small model, that Python takes
// longer than the arithmetic, and the pool's threads fall asleep between two kernels.
#pragma once

#include <stdint.h>

#include "attention.h"
#include "dtype.h"

namespace ic {

struct TrunkNorm {
  const float *weight, *bias;  // (C,); bias null: RMSNorm
};

struct TrunkLinear {
  const void *weight, *bias;  // (rows, columns) and (rows,) of the compute type; bias null: none
  int64_t rows, columns;
  int64_t panel;  // the weight is packed so; 0: rows as they are
};

struct TrunkLayer {
  TrunkNorm norm1, norm2;
  const float *q_norm, *k_norm;  // (D,), of each head; null: none
  TrunkLinear qkv, out, up, down;
  void *keys, *values;  // of the cache
};

struct TrunkArgs {
  const int64_t* tokens;   // (N,), within the vocabulary
  const float* embed;      // (V, C)
  const float* positions;  // (context, C); null: none
  const TrunkLayer* layers;
  int64_t count;
  TrunkNorm norm;
  void* hidden;  // (N, C) of the compute type
  // N is its `queries`; the tensors of a layer are filled in here, strides of the cache excepted.
  AttentionArgs attention;
  int64_t width, mlp_width;  // C, F
  bool gated;                // up has 2F rows, [gate, up]; else F, for gelu
  float eps;
};

void trunk_cpu(const TrunkArgs&);

}  // namespace ic
