// What attention's kernels share on the GPU: 16-bit tiles in shared memory, their products on the
// tensor cores, the logits, and the one way in which a row's keys are folded.
//
// A row's bits depend on its own keys and their positions alone, so that training, prefill and
// decode agree: tiles of 64 keys begin at multiples of 64 in the sequence; eight of them, a segment,
// share a running maximum (online softmax); segments are joined in order. Which other rows a block
// holds, how a call cuts the queries, and whether segments are formed by one block or by several
// makes no difference, nor do tiles in which a row sees nothing: e^0 and 0 are exact.
//
// Layout of the products (mma m16n8k16): a warp holds kRowTiles x 16 rows. With g = lane / 4 and
// c = 2 (lane % 4), accumulator x[i][j][2 h + b] is row 16 i + g + 8 h, column 8 j + c + b.
#pragma once

#include "attention.h"
#include "gpu.cuh"

namespace ic {

void attention_forward_cuda(const AttentionArgs&, void* stream);
void attention_paged_cuda(const AttentionArgs&, void* stream);
void attention_plain_cuda(const AttentionArgs&, void* stream);
void attention_mma_backward_cuda(const AttentionBackwardArgs&, void* stream);
void attention_plain_backward_cuda(const AttentionBackwardArgs&, void* stream);
int64_t attention_forward_workspace(const AttentionArgs&);
int64_t attention_paged_workspace(const AttentionArgs&);

constexpr int kKeyTile = 64;
constexpr int kSegmentTiles = 8;
constexpr int kSegment = kKeyTile * kSegmentTiles;
constexpr int kKeyColumns = kKeyTile / 8;  // accumulators of a row tile of logits
constexpr float kLog2e = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
constexpr float kMinusInf = -__builtin_inff();

// The head dims for which there is code; others are padded with zeros.
inline int attention_padded_dim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// body.run<T, kDim>() for the element type and the padded head dim.
template <class Body>
void attention_dispatch(Dtype dtype, int64_t dim, const Body& body) {
  const auto of_type = [&](auto element) {
    using T = decltype(element);
    switch (attention_padded_dim(dim)) {
      case 64:
        return body.template run<T, 64>();
      case 128:
        return body.template run<T, 128>();
      default:
        return body.template run<T, 256>();
    }
  };
  if (dtype == Dtype::kBFloat16) return of_type(BFloat16{});
  return of_type(Float16{});
}

// ---- tiles of rows in shared memory, kDim elements of 16 bits each

// Chunks of 16 bytes are swizzled over the eight of a 128-byte line, so that ldmatrix meets no bank
// twice.
template <int kDim>
IC_GPU uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ (row & 7)) << 4));
}

// Whether rows of a tensor begin at multiples of 16 bytes.
IC_GPU bool aligned_rows(const AttentionTensor& t) {
  const int64_t strides = (t.batch | t.token | t.head) * 2;
  return ((reinterpret_cast<uintptr_t>(t.data) | static_cast<uintptr_t>(strides)) & 15) == 0;
}

// Starts loading kRows rows of which the first `rows` exist (the others become 0), dim elements of
// each; row(i) is where row i lies. All kThreads threads of the block call it. What they load is
// there for all of them after cp_async_wait and a barrier.
template <int kDim, int kRows, int kThreads, class Row>
IC_GPU void load_tile(unsigned char* tile, int rows, int dim, bool aligned, const Row& row) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    const bool real = r < rows && chunk * 8 < dim;
    unsigned char* to = tile + chunk_offset<kDim>(r, chunk);
    const uint16_t* from = real ? row(r) + chunk * 8 : nullptr;
    if (aligned) {
      cp_async16(smem_address(to), from, real);
    } else {
      uint16_t x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = real ? from[e] : uint16_t{0};
      uint4 all;
      memcpy(&all, x, sizeof all);
      *reinterpret_cast<uint4*>(to) = all;
    }
  }
}

// The address that a lane passes to ldmatrix_x4 for 16 rows from `row` on and the two chunks from
// `chunk` on: of tiles (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (8-15, 1).
template <int kDim>
IC_GPU uint32_t rows_then_chunks(uint32_t tile, int row, int chunk) {
  const int lane = lane_index();
  return tile + chunk_offset<kDim>(row + lane % 16, chunk + lane / 16);
}

// The same with tiles (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (8-15, 1).
template <int kDim>
IC_GPU uint32_t chunks_then_rows(uint32_t tile, int row, int chunk) {
  const int lane = lane_index();
  return tile + chunk_offset<kDim>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
}

// ---- products

// x += A B^T: A rows a_row .. of tile `a`, B the kKeyTile rows of tile `b`, over kDim.
template <class T, int kDim, int kRowTiles>
IC_GPU void multiply_rows(float (&x)[kRowTiles][kKeyColumns][4], uint32_t a, int a_row,
                          uint32_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t rows[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      ldmatrix_x4(rows[i], rows_then_chunks<kDim>(a, a_row + 16 * i, 2 * k));
#pragma unroll
    for (int j = 0; j < kKeyColumns / 2; ++j) {
      uint32_t columns[4];
      ldmatrix_x4(columns, chunks_then_rows<kDim>(b, 16 * j, 2 * k));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k16<T>(x[i][2 * j], rows[i], columns[0], columns[1]);
        mma_m16n8k16<T>(x[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// Accumulators as the A operand of a product over their columns 16 k .. 16 k + 15.
template <class T>
IC_GPU void as_operand(uint32_t (&a)[4], const float (&x)[kKeyColumns][4], int k) {
  a[0] = pack2<T>(x[2 * k][0], x[2 * k][1]);
  a[1] = pack2<T>(x[2 * k][2], x[2 * k][3]);
  a[2] = pack2<T>(x[2 * k + 1][0], x[2 * k + 1][1]);
  a[3] = pack2<T>(x[2 * k + 1][2], x[2 * k + 1][3]);
}

// o += P V: P rounded to T, V the kKeyTile rows of tile `v`, of which 8 kColumns elements from
// chunk `first` on.
template <class T, int kDim, int kRowTiles, int kColumns>
IC_GPU void multiply_values(float (&o)[kRowTiles][kColumns][4],
                            const float (&p)[kRowTiles][kKeyColumns][4], uint32_t v, int first) {
#pragma unroll
  for (int k = 0; k < kKeyTile / 16; ++k) {
    uint32_t rows[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) as_operand<T>(rows[i], p[i], k);
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      uint32_t columns[4];
      ldmatrix_x4_trans(columns, rows_then_chunks<kDim>(v, 16 * k, first + 2 * j));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k16<T>(o[i][2 * j], rows[i], columns[0], columns[1]);
        mma_m16n8k16<T>(o[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// ---- what is not finite behind the mask: 0 times it is not 0 on a tensor core

// Infinities and NaN of two 16-bit elements, as 0xffff each.
template <class T>
IC_GPU uint32_t not_finite(uint32_t both) {
  constexpr uint32_t kExponent = __is_same(T, BFloat16) ? 0x7f80u : 0x7c00u;
  const uint32_t low = (both & kExponent) == kExponent ? 0xffffu : 0u;
  const uint32_t high = ((both >> 16) & kExponent) == kExponent ? 0xffff0000u : 0u;
  return low | high;
}

// Whether this thread's share of a tile holds something that is not finite. For
// __syncthreads_or.
template <class T, int kDim, int kRows, int kThreads>
IC_GPU bool any_not_finite(const unsigned char* tile) {
  const uint4* chunks = reinterpret_cast<const uint4*>(tile);
  uint32_t found = 0;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim / 8; i += kThreads) {
    const uint4 c = chunks[i];
    found |= not_finite<T>(c.x) | not_finite<T>(c.y) | not_finite<T>(c.z) | not_finite<T>(c.w);
  }
  return found != 0;
}

// multiply_values for a tile that is not finite everywhere: what is not counts as 0 for the rows
// that do not see it and makes the others NaN. seen(i, h, column): whether row 16 i + g + 8 h sees
// the key.
template <class T, int kDim, int kRowTiles, int kColumns, class Seen>
IC_GPU void multiply_values_seen(float (&o)[kRowTiles][kColumns][4],
                                 const float (&p)[kRowTiles][kKeyColumns][4], uint32_t v, int first,
                                 const Seen& seen) {
  constexpr uint32_t kOne = __is_same(T, BFloat16) ? 0x3f80u : 0x3c00u;
  const int c = 2 * (lane_index() % 4);
#pragma unroll 1
  for (int k = 0; k < kKeyTile / 16; ++k) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t rows[4], sees[4];
#pragma unroll
      for (int n = 0; n < kKeyTile / 16; ++n)  // a register array takes no run-time index
        if (n == k) as_operand<T>(rows, p[i], n);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = 16 * k + part / 2 * 8 + c;
        sees[part] = (seen(i, part % 2, column) ? kOne : 0u) |
                     (seen(i, part % 2, column + 1) ? kOne << 16 : 0u);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) {
        uint32_t columns[4], bad[4];
        ldmatrix_x4_trans(columns, rows_then_chunks<kDim>(v, 16 * k, first + 2 * j));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          bad[e] = not_finite<T>(columns[e]);
          columns[e] &= ~bad[e];
          bad[e] &= kOne | kOne << 16;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float count[4] = {};
          mma_m16n8k16<T>(o[i][2 * j + half], rows, columns[2 * half], columns[2 * half + 1]);
          mma_m16n8k16<T>(count, sees, bad[2 * half], bad[2 * half + 1]);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (count[e] > 0.0f) o[i][2 * j + half][e] = __int_as_float(0x7fffffff);
        }
      }
    }
  }
}

// ---- logits, in units of log 2

struct LogitRule {
  float scale;    // of q . k: plain, or what goes into tanh
  float softcap;  // 0: plain
  float slope;    // a key

  IC_GPU LogitRule(const AttentionArgs& a, int64_t sequence, int64_t head) {
    softcap = a.softcap * kLog2e;
    scale = a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
    slope = a.slopes ? a.slopes[sequence * a.slopes_batch + head] * kLog2e : 0.0f;
  }
  IC_GPU bool plain() const { return softcap == 0.0f && slope == 0.0f; }
  // Every product rounds by itself: what the compiler fuses must not depend on the kernel.
  IC_GPU float capped(float product) const {
    const float x = __fmul_rn(product, scale);
    return softcap > 0.0f ? __fmul_rn(softcap, tanhf(x)) : x;
  }
  IC_GPU float logit(float product, int64_t distance) const {
    return fmaf(-slope, fabsf(static_cast<float>(distance)), capped(product));
  }
};

// What a thread's rows see: keys first .. end - 1, from key 0 of the sequence on.
template <int kRowTiles>
struct RowsSeen {
  int first[kRowTiles][2], end[kRowTiles][2];

  // Rows from `row` on; those past the sequence see nothing.
  IC_GPU RowsSeen(const AttentionSequence& s, int64_t row) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = row + 16 * i + 8 * h + lane_index() / 4;
        const bool real = r < s.rows();
        first[i][h] = real ? static_cast<int>(s.first_seen(r)) : 0;
        end[i][h] = real ? static_cast<int>(s.end_seen(r)) : 0;
      }
    }
  }
  IC_GPU bool sees(int i, int h, int key) const { return key >= first[i][h] && key < end[i][h]; }
};

// Products become logits; hidden ones, where `partial`, become -inf whatever they are.
template <int kRowTiles>
IC_GPU void to_logits(float (&x)[kRowTiles][kKeyColumns][4], const LogitRule& rule,
                      const AttentionSequence& s, int64_t row, int first_key, bool partial,
                      const RowsSeen<kRowTiles>& seen) {
  const int c = 2 * (lane_index() % 4);
  const bool plain = rule.plain();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = row + 16 * i + 8 * h + lane_index() / 4;
      const int64_t past = plain ? 0 : s.position(r) - (first_key + c);
#pragma unroll
      for (int j = 0; j < kKeyColumns; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float& y = x[i][j][2 * h + b];
          y = plain ? __fmul_rn(y, rule.scale) : rule.logit(y, past - 8 * j - b);
          if (partial && !seen.sees(i, h, first_key + 8 * j + c + b)) y = kMinusInf;
        }
      }
    }
  }
}

// ---- the fold

// Of each row that the thread has a part of: the largest logit, and the sum of the weights
// 2^(logit - max), of which every lane of a quad holds its own columns until quad_sum.
template <int kRowTiles>
struct RowFold {
  float max[kRowTiles][2], sum[kRowTiles][2];

  IC_GPU void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      max[i][0] = max[i][1] = kMinusInf;
      sum[i][0] = sum[i][1] = 0.0f;
    }
  }
  IC_GPU void quad_sum() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[i][h] += shuffle_xor(sum[i][h], 1);
        sum[i][h] += shuffle_xor(sum[i][h], 2);
      }
    }
  }
};

// A maximum to subtract: of a row that has seen nothing, 0.
IC_GPU float finite_or_zero(float max) { return max == kMinusInf ? 0.0f : max; }

// Logits of one more tile become weights against the new maximum; `keep` is what the sums so far
// are to be multiplied by.
template <int kRowTiles>
IC_GPU void fold_tile(RowFold<kRowTiles>& fold, float (&x)[kRowTiles][kKeyColumns][4],
                      float (&keep)[kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fold.max[i][h];
#pragma unroll
      for (int j = 0; j < kKeyColumns; ++j)
        top = fmaxf(top, fmaxf(x[i][j][2 * h], x[i][j][2 * h + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float base = finite_or_zero(top);
      keep[i][h] = exp2_approx(fold.max[i][h] - base);
      fold.max[i][h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeyColumns; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float& y = x[i][j][2 * h + b];
          y = exp2_approx(__fadd_rn(y, -base));
          sum += y;
        }
      }
      fold.sum[i][h] = fmaf(fold.sum[i][h], keep[i][h], sum);
    }
  }
}

template <int kRowTiles, int kColumns>
IC_GPU void scale_rows(float (&o)[kRowTiles][kColumns][4], const float (&factor)[kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[i][j][e] *= factor[i][e / 2];
    }
  }
}

// How what has been folded before (a) and a segment (b) become one.
struct FoldJoin {
  float max, a, b;

  IC_GPU FoldJoin(float max_a, float max_b) : max(fmaxf(max_a, max_b)) {
    const float base = finite_or_zero(max);
    a = exp2_approx(max_a - base);
    b = exp2_approx(max_b - base);
  }
  IC_GPU float operator()(float x, float y) const { return fmaf(x, a, __fmul_rn(y, b)); }
};

// The end of a row: what its weighted values are to be multiplied by, and its lse.
struct RowEnd {
  float factor, lse;

  // `sink`: the head's, in units of log 1, or -inf.
  IC_GPU RowEnd(float max, float sum, float sink) {
    if (max == kMinusInf && sum == 0.0f) {  // no key
      factor = 0.0f;
      lse = sink;
      return;
    }
    const float sink2 = sink * kLog2e, top = fmaxf(max, sink2);
    const float keep = exp2_approx(max - top);
    sum = fmaf(sum, keep, exp2_approx(sink2 - top));
    factor = keep / sum;
    lse = (top + log2f(sum)) * kLn2;
  }
};

}  // namespace ic
