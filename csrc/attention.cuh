// What attention's kernels share on the GPU: 16-bit tiles in shared memory, their products on the
// tensor cores, the logits, and the one way in which a row's keys are folded.
//
// A row's bits depend on its own keys and their positions alone, so that training, prefill and
// decode agree: folds of 32 keys begin at multiples of 32 in the sequence; sixteen of them, a
// segment, share a running maximum (online softmax); segments are joined in order. Which other rows
// a block holds, how a call cuts the queries, and whether segments are formed by one block or by
// several makes no difference, nor do folds in which a row sees nothing: e^0 and 0 are exact, and
// the end takes -0 to 0.
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

constexpr int kKeyTile = 64;  // keys that are loaded together
constexpr int kFold = 32;  // keys that are folded together: their logits are in registers at once
constexpr int kSegmentTiles = 8, kSegment = kKeyTile * kSegmentTiles;
constexpr int kKeyColumns = kKeyTile / 8, kFoldColumns = kFold / 8;  // accumulators of a row tile
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
  constexpr int kChunks = kDim / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0 && (kStep & (kStep - 1)) == 0);
  if (aligned) {
    const int first = static_cast<int>(threadIdx.x) / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const bool inside = chunk * 8 < dim;
    const uint32_t to = smem_address(tile), own = chunk_offset<kDim>(first, chunk);
#pragma unroll 4
    for (int r = 0; r < kRows; r += kStep) {  // first < kStep has no bit in common with r
      const bool real = inside && first + r < rows;
      cp_async16(to + (own ^ ((r & 7) << 4)) + r * kDim * 2,
                 row(real ? first + r : 0) + (inside ? chunk * 8 : 0), real);
    }
    return;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    uint32_t words[4] = {};
    if (r < rows && chunk * 8 < dim) {
      const uint16_t* from = row(r) + chunk * 8;
#pragma unroll
      for (int w = 0; w < 4; ++w)
        words[w] = from[2 * w] | static_cast<uint32_t>(from[2 * w + 1]) << 16;
    }
    *reinterpret_cast<uint4*>(tile + chunk_offset<kDim>(r, chunk)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The address that a lane passes to ldmatrix_x4 for 16 rows from `row` (a multiple of 8) on and the
// two chunks from `chunk` (even) on: of tiles (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7,
// chunk 1), (8-15, 1). One exclusive or and one addition from what a lane knows.
template <int kDim>
IC_GPU uint32_t rows_then_chunks(uint32_t tile, int row, int chunk) {
  const int lane = lane_index();
  const uint32_t own = chunk_offset<kDim>(lane % 16, lane / 16);
  return tile + static_cast<uint32_t>(row * kDim * 2) + (own ^ static_cast<uint32_t>(chunk << 4));
}

// The same with tiles (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (8-15, 1).
template <int kDim>
IC_GPU uint32_t chunks_then_rows(uint32_t tile, int row, int chunk) {
  const int lane = lane_index();
  const uint32_t own = chunk_offset<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  return tile + static_cast<uint32_t>(row * kDim * 2) + (own ^ static_cast<uint32_t>(chunk << 4));
}

// ---- products

// x += A B^T: A the rows of tile `a` from a_row on, B 8 kColumns rows of tile `b` from b_row on,
// over kDim.
template <class T, int kDim, int kRowTiles, int kColumns>
IC_GPU void multiply_rows(float (&x)[kRowTiles][kColumns][4], uint32_t a, int a_row, uint32_t b,
                          int b_row = 0) {
#pragma unroll 4  // more would take registers
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t rows[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      ldmatrix_x4(rows[i], rows_then_chunks<kDim>(a, a_row + 16 * i, 2 * k));
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      uint32_t columns[4];
      ldmatrix_x4(columns, chunks_then_rows<kDim>(b, b_row + 16 * j, 2 * k));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k16<T>(x[i][2 * j], rows[i], columns[0], columns[1]);
        mma_m16n8k16<T>(x[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// Accumulators as the A operand of a product over their columns 16 k .. 16 k + 15.
template <class T, int kColumns>
IC_GPU void as_operand(uint32_t (&a)[4], const float (&x)[kColumns][4], int k) {
  a[0] = pack2<T>(x[2 * k][0], x[2 * k][1]);
  a[1] = pack2<T>(x[2 * k][2], x[2 * k][3]);
  a[2] = pack2<T>(x[2 * k + 1][0], x[2 * k + 1][1]);
  a[3] = pack2<T>(x[2 * k + 1][2], x[2 * k + 1][3]);
}

// o += P V: P rounded to T, V 8 kKeys rows of tile `v` from v_row on, of which 8 kColumns elements
// from chunk `first` on.
template <class T, int kDim, int kRowTiles, int kColumns, int kKeys>
IC_GPU void multiply_values(float (&o)[kRowTiles][kColumns][4],
                            const float (&p)[kRowTiles][kKeys][4], uint32_t v, int first,
                            int v_row = 0) {
#pragma unroll
  for (int k = 0; k < kKeys / 2; ++k) {
    uint32_t rows[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) as_operand<T>(rows[i], p[i], k);
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      uint32_t columns[4];
      ldmatrix_x4_trans(columns, rows_then_chunks<kDim>(v, v_row + 16 * k, first + 2 * j));
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

// Before such a tile of values is multiplied: outputs whose row sees something not finite in their
// column become NaN. first, first_key: of the tile's part that the outputs take, of its row 0.
template <class T, int kDim, int kRowTiles, int kColumns, class Seen>
IC_GPU void mark_not_finite(float (&o)[kRowTiles][kColumns][4], const unsigned char* v, int first,
                            int first_key, const Seen& seen, int rows = kKeyTile) {
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    const int key = first_key + row;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const uint32_t bad = not_finite<T>(*reinterpret_cast<const uint32_t*>(
          v + chunk_offset<kDim>(row, first + j) + lane_index() % 4 * 4));
      if (bad == 0) continue;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool sees = key >= seen.first(i, e / 2) && key < seen.end(i, e / 2);
          if (sees && (e % 2 ? bad >> 16 : bad & 0xffffu)) o[i][j][e] = __int_as_float(0x7fffffff);
        }
      }
    }
  }
}

// Then all threads of the block, between barriers: what is not finite becomes 0.
template <class T, int kDim, int kRows, int kThreads>
IC_GPU void clear_not_finite(unsigned char* tile) {
  uint32_t* words = reinterpret_cast<uint32_t*>(tile);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim / 2; i += kThreads)
    words[i] &= ~not_finite<T>(words[i]);
}

// ---- packed sequences, without a word from the host

// Tile `number` of a packed tensor's sequences, in tiles of `rows`: sequence b has the numbers from
// cu[b] / rows + b on, at least as many as it has tiles. `tile` may lie past its sequence.
struct PackedTile {
  int64_t sequence, tile;

  IC_GPU PackedTile(const int32_t* cu, int64_t sequences, int64_t rows, int64_t number)
      : sequence(0) {
    for (int64_t count = sequences; count > 1;) {
      const int64_t half = count / 2, b = sequence + half;
      if (cu[b] / rows + b <= number) {
        sequence = b;
        count -= half;
      } else {
        count = half;
      }
    }
    tile = number - (cu[sequence] / rows + sequence);
  }
};

// Rows of a packed tensor that belong to no sequence, before the first and after the last: a block
// for each calls clear(row).
template <class Clear>
IC_GPU void each_gap(const int32_t* cu, int64_t sequences, int64_t tokens, const Clear& clear) {
  const int64_t begin = cu[0], end = cu[sequences];
  for (int64_t gap = blockIdx.x; gap < begin + tokens - end; gap += gridDim.x)
    clear(gap < begin ? gap : end + gap - begin);
}

// Zeros in all heads of a row of a tensor of 16-bit elements that is aligned.
template <int kThreads>
IC_GPU void clear_row(const AttentionTensor& t, int64_t row, int64_t heads, int64_t dim) {
  uint16_t* to = static_cast<uint16_t*>(t.data) + row * t.token;
  const int64_t chunks = dim / 8;
  for (int64_t i = threadIdx.x; i < heads * chunks; i += kThreads)
    *reinterpret_cast<uint4*>(to + i / chunks * t.head + i % chunks * 8) = make_uint4(0, 0, 0, 0);
}

// No more numbers than this; n is the tensor's tokens.
inline int64_t packed_tiles(int64_t n, int64_t sequences, int64_t rows) {
  return sequences > 0 ? n / rows + sequences : 0;
}

// A sequence whose keys are its queries: what they see are the queries.
IC_GPU AttentionSequence mirrored(const AttentionSequence& s) {
  AttentionSequence m = s;
  m.queries = s.keys;
  m.keys = s.queries;
  m.position0 = -s.position0;
  m.left = s.right;
  m.right = s.left;
  return m;
}

// ---- logits, in units of log 2

// tanh within 2e-7. Without a branch: the logits of a tile are in registers all at once.
IC_GPU float tanh_of(float x) {
  const float e = exp2_approx(__fmul_rn(x, 2.0f * kLog2e));
  return __fadd_rn(1.0f, -__fdividef(2.0f, __fadd_rn(e, 1.0f)));
}

struct LogitRule {
  float scale;    // of q . k: plain, or what goes into tanh
  float softcap;  // 0: plain
  float slope;    // a key

  LogitRule() = default;
  IC_GPU LogitRule(const AttentionArgs& a, int64_t sequence, int64_t head) {
    softcap = a.softcap * kLog2e;
    scale = a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
    slope = a.slopes ? a.slopes[sequence * a.slopes_batch + head] * kLog2e : 0.0f;
  }
  IC_GPU bool plain() const { return softcap == 0.0f && slope == 0.0f; }
  // Every product rounds by itself: what the compiler fuses must not depend on the kernel.
  IC_GPU float capped(float product) const {
    const float x = __fmul_rn(product, scale);
    return softcap > 0.0f ? __fmul_rn(softcap, tanh_of(x)) : x;
  }
  IC_GPU float logit(float product, int distance, int) const {
    return fmaf(-slope, fabsf(static_cast<float>(distance)), capped(product));
  }
};

// The same for rows that take the heads of a group together: a slope for each, of row g + 8 h.
struct GroupedLogitRule : LogitRule {
  float slopes[2];

  IC_GPU GroupedLogitRule(const AttentionArgs& a, const AttentionSequence& s, int64_t kv_head,
                          int64_t row)
      : LogitRule(a, s.index, kv_head * s.group) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t head = kv_head * s.group + (row + 8 * h + lane_index() / 4) % s.group;
      slopes[h] = LogitRule(a, s.index, head).slope;
    }
  }
  IC_GPU bool plain() const { return softcap == 0.0f && slopes[0] == 0.0f && slopes[1] == 0.0f; }
  IC_GPU float logit(float product, int distance, int h) const {
    return fmaf(-slopes[h], fabsf(static_cast<float>(distance)), capped(product));
  }
};

// Where a thread's rows stand: row 16 i + g + 8 h of its warp at position(i, h), seeing keys first
// .. end - 1 of the sequence. For one head at a time, rows being queries.
struct RowsSeen {
  int position0, left, right, keys;  // position0: of row g

  IC_GPU RowsSeen(const AttentionSequence& s, int64_t row)
      : position0(static_cast<int>(s.position0 + row) + lane_index() / 4),
        left(static_cast<int>(s.left < kFar ? s.left : kFar)),
        right(static_cast<int>(s.right < kFar ? s.right : kFar)),
        keys(static_cast<int>(s.keys)) {}
  IC_GPU int position(int i, int h) const { return position0 + 16 * i + 8 * h; }
  IC_GPU int first(int i, int h) const { return position(i, h) - left; }
  IC_GPU int end(int i, int h) const { return min(keys, position(i, h) + right + 1); }

 private:
  static constexpr int kFar = 1 << 30;
};

// The same for rows that take the heads of a group together. Rows past the sequence see nothing.
struct GroupedRowsSeen {
  int at[2], from[2], to[2];

  IC_GPU GroupedRowsSeen(const AttentionSequence& s, int64_t row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = row + 8 * h + lane_index() / 4;
      const bool real = r < s.rows();
      at[h] = static_cast<int>(s.position(r));
      from[h] = real ? static_cast<int>(s.first_seen(r)) : 0;
      to[h] = real ? static_cast<int>(s.end_seen(r)) : 0;
    }
  }
  IC_GPU int position(int, int h) const { return at[h]; }
  IC_GPU int first(int, int h) const { return from[h]; }
  IC_GPU int end(int, int h) const { return to[h]; }
};

// Products become logits; hidden ones, where `partial`, become -inf whatever they are.
template <int kRowTiles, int kColumns, class Rule, class Seen>
IC_GPU void to_logits(float (&x)[kRowTiles][kColumns][4], const Rule& rule, int first_key,
                      bool partial, const Seen& seen) {
  const int key = first_key + 2 * (lane_index() % 4);
  const bool plain = rule.plain();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int distance = seen.position(i, h) - key;
#pragma unroll
      for (int e = 0; e < 2 * kColumns; ++e) {
        float& y = x[i][e / 2][2 * h + e % 2];
        y = plain ? __fmul_rn(y, rule.scale) : rule.logit(y, distance - 8 * (e / 2) - e % 2, h);
      }
      if (!partial) continue;
      const int first = seen.first(i, h) - key, end = seen.end(i, h) - key;
#pragma unroll
      for (int e = 0; e < 2 * kColumns; ++e) {
        const int at = 8 * (e / 2) + e % 2;
        if (at < first || at >= end) x[i][e / 2][2 * h + e % 2] = kMinusInf;
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

// Logits of kFold more keys become weights against the new maximum; `keep` is what the sums so far
// are to be multiplied by.
template <int kRowTiles>
IC_GPU void fold_keys(RowFold<kRowTiles>& fold, float (&x)[kRowTiles][kFoldColumns][4],
                      float (&keep)[kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fold.max[i][h];
#pragma unroll
      for (int j = 0; j < kFoldColumns; ++j)
        top = fmaxf(top, fmaxf(x[i][j][2 * h], x[i][j][2 * h + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float base = finite_or_zero(top);
      keep[i][h] = exp2_approx(fold.max[i][h] - base);
      fold.max[i][h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kFoldColumns; ++j) {
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

// The sums so far against the new maxima. Mostly these are the old ones: a warp looks first.
template <int kRowTiles, int kColumns>
IC_GPU void scale_rows(float (&o)[kRowTiles][kColumns][4], const float (&factor)[kRowTiles][2]) {
  bool changed = false;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) changed |= factor[i][0] != 1.0f || factor[i][1] != 1.0f;
  if (!__any_sync(kAllLanes, changed)) return;
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

// The end of a row: its weighted values become its output; and its lse.
struct RowEnd {
  float factor, lse;

  // `sink`: the head's, in units of log 1, or -inf.
  IC_GPU RowEnd(float max, float sum, float sink) {
    if (max == kMinusInf && sum == 0.0f) {  // no key
      factor = 0.0f;
      lse = sink;
      return;
    }
    const float sink2 = __fmul_rn(sink, kLog2e), top = fmaxf(max, sink2);
    const float keep = exp2_approx(__fadd_rn(max, -top));
    sum = fmaf(sum, keep, exp2_approx(__fadd_rn(sink2, -top)));
    factor = keep / sum;
    lse = __fmul_rn(__fadd_rn(top, log2f(sum)), kLn2);
  }
  IC_GPU float operator()(float x) const { return fmaf(x, factor, 0.0f); }
};

}  // namespace ic
