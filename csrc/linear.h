// linear: y = x W^T + b on the CPU, and the products of its backward.
//
//   forward:  y[m][n]  = round(b[n] + sum over k of x[m][k] W[n][k])      x (M, K), W (N, K)
//   input:    dx[m][k] = round(sum over n of dy[m][n] W[n][k])
//   weight:   dW[n][k] = round(sum over m of dy[m][n] x[m][k])
//   bias:     db[n]    = round(sum over m of dy[m][n]), pairwise
//
// Sums are float32 and have one order whatever the shapes, threads and tiles: blocks of
// kLinearBlock words, each one chain from its first to its last, added up in their order. A word is
// a term, or two where two bfloat16 matrices are multiplied (tile.h). So a row of y or dx has the
// same bits in any batch. Chains of 64 keep the error within twice that of torch, whose chains are
// shorter but not in one order; of 128 they do not. The matrix unit makes one chain of groups of 32
// terms, which is closer still (tile.h).
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

constexpr int64_t kLinearBlock = 64;  // words

struct LinearMatrix {
  void* data;
  int64_t row;  // stride in elements; a column's is 1
  Dtype dtype;
};

enum class LinearForm : int {
  kForward,  // c = a b^T: a is x, b is W
  kInput,    // c = a b: a is dy, b is W
  kWeight,   // c = a^T b: a is dy, b is x
};

struct LinearArgs {
  LinearForm form;
  LinearMatrix a, b, c;
  int64_t rows, columns, depth;  // of c, and of the sums
  int64_t panel;     // kForward: b is packed in panels of so many columns (LinearPackArgs); 0: not
  const void* bias;  // (columns,); null: 0
  Dtype bias_dtype;
  bool accumulate;  // c, which is float32, has the sum added to it
  int threads;
};

// W (rows, depth) of bfloat16 in the order in which a product reads it: for each `panel` of rows
// its words, the same one of all rows side by side. A weight that many products read, each with few
// rows, is packed once for all; the bits are the same.
struct LinearPackArgs {
  LinearMatrix from;
  void* to;  // (ceil(rows / panel), ceil(depth / 2), panel) words; columns past the last row are 0
             // up to a multiple of 16, then unwritten
  int64_t rows, depth, panel;
  int threads;
};
// As many columns as a tile has (tile.h), so that a panel is read in one go: the matrix unit takes
// two of its registers, AVX-512 four of its.
inline int64_t linear_panel() {
#if defined(__x86_64__)
  if (has_matrix_unit()) return 32;
  if (current_isa() >= Isa::x86_64_v4) return 64;
#endif
  return 16;
}

struct LinearBiasArgs {
  LinearMatrix grad;  // dy (rows, columns)
  void* out;          // (columns,)
  Dtype out_dtype;
  int64_t rows, columns;
  bool accumulate;
  int threads;
};

IC_CPU_KERNEL(linear_cpu, LinearArgs)
IC_CPU_KERNEL(linear_pack_cpu, LinearPackArgs)
IC_CPU_KERNEL(linear_bias_cpu, LinearBiasArgs)

}  // namespace ic
