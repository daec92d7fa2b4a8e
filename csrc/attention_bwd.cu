// attention's backward on tensor cores: 16-bit elements, dense or packed sequences. Three kernels:
//
//   row_sums       delta = dout . out - dlse of each query row and head; 0 where it sees no key
//   grad_keys      a block takes 128 keys (64 where D > 128) of a key/value head and walks, for
//                  each query head of the group, the tiles of 32 queries that see any of them
//   grad_queries   a block takes 128 query rows (64) of a head and walks the tiles of 32 keys
//
// Each gradient is summed in float32 registers by one block, in the order of the heads and tiles,
// so nothing is added atomically and a row's bits depend on its own sequence alone. The price is
// that both kernels form p and dlogit: seven products instead of five.
//
// In grad_keys p and dlogit are transposed, keys being the rows, so that they go from accumulators
// to the next product's A operand (Dao 2023, arXiv:2307.08691). Of eight warps four form p and dv
// += p^T dout, four dlogit and dk += dlogit^T q: two products each, for twice the keys that a warp
// could hold both gradients of. The first four pass p softcap' to the others through shared memory,
// a tile ahead (where there is room), so that the exponentials of some pass under the products of
// others.
//
// FLOPs: 14 D for each pair that is seen, of which 10 D count. Bytes: q, dout, out, k, v and three
// gradients once; then, mostly from L2, 4 D for each query and block of keys, and for each key and
// block of queries: about 200 FLOPs a byte, half as many where D > 128. Bound by the tensor cores:
// on an H200 mma.sync reaches about 62 % of wgmma's 989 TFLOP/s, of which 5/7 count: 440. At D 128
// ldmatrix takes about as long as the products, so 250 is what to expect (FlashAttention-2: 166,
// causal, on an H100).
#include "attention.cuh"

namespace ic {
namespace {

constexpr int kTile = 32;  // queries or keys that arrive together
constexpr int kTileColumns = kTile / 8;
constexpr int kRowWarps = 4;  // warps that have rows of their own

template <int kDim>
struct KeyShape {
  static constexpr int kThreads = 2 * kRowWarps * kWarp;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kRowWarps * kWarpRows;
  static constexpr int kLag = kDim <= 128 ? 1 : 0;  // tiles that the second four warps are behind
  static constexpr int kStages = 2 + kLag;
  static constexpr int kBlocks = 1;  // at a time on a multiprocessor
  static constexpr int kRowBytes = kRows * kDim * 2, kTileBytes = kTile * kDim * 2;
  static constexpr int kPassedBytes = kRows * kTile * 4;
  static constexpr int kSharedBytes =
      2 * kRowBytes + kStages * 2 * kTileBytes + (1 + kLag) * kPassedBytes;
};

template <int kDim>
struct QueryShape {
  static constexpr int kThreads = kRowWarps * kWarp;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kRowWarps * kWarpRows;
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;
  static constexpr int kRowBytes = kRows * kDim * 2, kTileBytes = kTile * kDim * 2;
  static constexpr int kSharedBytes = 2 * kRowBytes + 2 * 2 * kTileBytes;
};

// ---- which rows

// What some rows see: any(column) of kTile columns from there on something, !partial(column) all.
struct Reach {
  int first, end, all_first, all_end;

  IC_GPU int first_tile() const { return first / kTile; }
  IC_GPU int end_tile() const { return (end + kTile - 1) / kTile; }
  IC_GPU bool any(int column) const { return column < end && column + kTile > first; }
  IC_GPU bool partial(int column) const { return column < all_first || column + kTile > all_end; }
};

IC_GPU Reach reach_of(const AttentionSequence& s, int64_t row, int rows) {
  if (rows <= 0) return {0, 0, 0, 0};
  const int64_t last = row + rows - 1;
  return {static_cast<int>(s.first_seen(row)), static_cast<int>(s.end_seen(last)),
          static_cast<int>(s.first_seen(last)), static_cast<int>(s.end_seen(row))};
}

// A block's rows: those of one head from `row` of the sequence on; none if rows <= 0. Where they
// are keys, the sequence is mirrored: `queries` is the number of keys, and what they see are
// queries. It lies in shared memory: registers are what these kernels are short of.
struct Work {
  AttentionSequence sequence;
  int64_t head, row;
  int rows;
  Reach all, of_warp[kRowWarps];
};

// Tiles of `rows` in a tensor of `tokens`.
inline int64_t tiles_of(const int32_t* cu, int64_t tokens, int64_t sequences, int64_t rows) {
  return cu ? packed_tiles(tokens, sequences, rows) : sequences * ((tokens + rows - 1) / rows);
}

// Of a block among `tiles` a head. Those that see most come first: a causal mask's first keys and
// last queries.
template <bool kKeys>
IC_GPU void find_work(const AttentionArgs& a, int64_t tiles, int rows, Work* w) {
  const int32_t* cu = kKeys ? a.cu_k : a.cu_q;
  const int64_t number = blockIdx.x % tiles;
  int64_t b, tile;
  if (cu) {
    const PackedTile packed(cu, a.sequences, rows, number);
    b = packed.sequence;
    tile = packed.tile;
  } else {
    const int64_t each = tiles / a.sequences;
    b = number / each;
    tile = number % each;
  }
  AttentionSequence s = attention_sequence(a, b);
  s.group = 1;
  if (kKeys) s = mirrored(s);
  if (!kKeys) tile = (s.queries + rows - 1) / rows - 1 - tile;
  w->sequence = s;
  w->head = blockIdx.x / tiles;
  w->row = tile * rows;
  w->rows = tile < 0 ? 0 : static_cast<int>(min(s.queries - w->row, int64_t{rows}));
  w->all = reach_of(s, w->row, w->rows);
  const int each = rows / kRowWarps;
  for (int i = 0; i < kRowWarps; ++i)
    w->of_warp[i] = reach_of(s, w->row + i * each, min(w->rows - i * each, each));
}

IC_GPU uint16_t* row_of(const AttentionTensor& t, const AttentionSequence& s, int64_t token,
                        int64_t head) {
  return static_cast<uint16_t*>(t.data) + s.index * t.batch + token * t.token + head * t.head;
}

template <int kDim, int kRows, int kThreads>
IC_GPU void load_rows(unsigned char* to, const AttentionTensor& t, const uint16_t* from, int rows,
                      int64_t dim) {
  load_tile<kDim, kRows, kThreads>(to, rows, static_cast<int>(dim), aligned_rows(t),
                                   [&](int i) { return from + i * t.token; });
}

// ---- logits again

// e^(logit - lse), lse in units of log 2; *change: the same times softcap'. Without a branch: the
// logits of a tile are in registers all at once.
template <bool kPlain>
IC_GPU float weight_of(const LogitRule& rule, float product, int distance, float lse,
                       float* change) {
  if constexpr (kPlain) return *change = exp2_approx(fmaf(product, rule.scale, -lse));
  const bool caps = rule.softcap > 0.0f;
  const float x = product * rule.scale, y = tanh_of(x);
  const float logit =
      fmaf(-rule.slope, fabsf(static_cast<float>(distance)), caps ? rule.softcap * y : x);
  const float p = exp2_approx(logit - lse);
  *change = caps ? p * fmaf(-y, y, 1.0f) : p;
  return p;
}

// Hidden pairs become 0, whatever they are. column: the thread's first.
template <int kRowTiles>
IC_GPU void hide(float (&x)[kRowTiles][kTileColumns][4], int column, const RowsSeen& seen) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = seen.first(i, h) - column, end = seen.end(i, h) - column;
#pragma unroll
      for (int e = 0; e < 2 * kTileColumns; ++e) {
        const int at = 8 * (e / 2) + e % 2;
        if (at < first || at >= end) x[i][e / 2][2 * h + e % 2] = 0.0f;
      }
    }
  }
}

// ---- the end of a block: a warp's sums become rows of a gradient

// By way of the rows of `tile` from tile_row on, which only this warp reads, for 16 bytes at a
// time.
template <class T, int kDim, int kRowTiles>
IC_GPU void store_rows(const float (&sums)[kRowTiles][kDim / 8][4], float scale,
                       unsigned char* tile, int tile_row, int rows, uint16_t* out, int64_t stride,
                       int64_t dim) {
  constexpr int kChunks = kDim / 8;
  const int lane = lane_index();
  __syncwarp();  // the last ldmatrix of these rows are over
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned char* to =
            tile + chunk_offset<kDim>(tile_row + 16 * i + 8 * h + lane / 4, j) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) =
            pack2<T>(sums[i][j][2 * h] * scale, sums[i][j][2 * h + 1] * scale);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kRowTiles * kChunks; i += kWarp) {
    const int r = i / kChunks, chunk = i % kChunks;
    if (r < rows && 8 * chunk < dim)
      *reinterpret_cast<uint4*>(out + r * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + chunk_offset<kDim>(tile_row + r, chunk));
  }
}

// ---- delta

constexpr int kSumThreads = 256, kSinkThreads = 512;

// Rows of no sequence.
IC_GPU void clear_gaps(const AttentionTensor& t, const int32_t* cu, const AttentionArgs& a,
                       int64_t tokens, int64_t heads) {
  each_gap(cu, a.sequences, tokens,
           [&](int64_t row) { clear_row<kSumThreads>(t, row, heads, a.dim); });
}

template <class T>
IC_GPU void load8(float (&x)[8], const uint16_t* from, bool aligned) {
  uint32_t words[4];
  if (aligned) {
    const uint4 all = load16_streaming(from);
    memcpy(words, &all, sizeof all);
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w)
      words[w] = from[2 * w] | static_cast<uint32_t>(from[2 * w + 1]) << 16;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 two = unpack2<T>(words[w]);
    x[2 * w] = two.x;
    x[2 * w + 1] = two.y;
  }
}

// The sequence that row n of a packed tensor belongs to; -1: none.
IC_GPU int64_t sequence_of(const int32_t* cu, int64_t sequences, int64_t n) {
  int64_t b = 0;
  for (int64_t count = sequences; count > 1;) {
    const int64_t half = count / 2;
    const bool later = cu[b + half] <= n;
    b += later ? half : 0;
    count = later ? count - half : half;
  }
  return sequences > 0 && cu[b] <= n && n < cu[b + 1] ? b : -1;
}

// kDim / 8 lanes for each row, less than 2^31 rows.
template <class T, int kDim>
__global__ void __launch_bounds__(kSumThreads)
    row_sums(const AttentionBackwardArgs args, uint32_t rows) {
  constexpr uint32_t kLanes = kDim / 8;
  const AttentionArgs& a = args.forward;
  if (a.cu_q) clear_gaps(args.grad_q, a.cu_q, a, a.queries, a.heads);
  if (a.cu_k) {
    clear_gaps(args.grad_k, a.cu_k, a, a.keys, a.kv_heads);
    clear_gaps(args.grad_v, a.cu_k, a, a.keys, a.kv_heads);
  }
  const uint32_t row = blockIdx.x * (kSumThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const uint32_t token = row / static_cast<uint32_t>(a.heads);
  const int64_t head = row - token * static_cast<uint32_t>(a.heads);
  int64_t b = -1, t = token;
  if (row < rows && a.cu_q) {
    b = sequence_of(a.cu_q, a.sequences, token);
    if (b >= 0) t -= a.cu_q[b];
  } else if (row < rows) {
    b = token / static_cast<uint32_t>(a.queries);
    t -= b * a.queries;
  }
  bool sees = b >= 0;
  float sum = 0.0f;
  int64_t to = head * a.queries + token;  // of a packed tensor
  if (sees) {
    AttentionSequence s = attention_sequence(a, b);
    s.group = 1;
    sees = s.end_seen(t) > s.first_seen(t);
    to = attention_lse_index(a, s, head, t);
    if (sees && lane * 8 < a.dim) {
      const int64_t from = s.first_query + t;
      float x[8], y[8];
      load8<T>(x, row_of(args.grad_out, s, from, head) + lane * 8, aligned_rows(args.grad_out));
      load8<T>(y, row_of(a.out, s, from, head) + lane * 8, true);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = fmaf(x[e], y[e], sum);
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
  if (lane != 0 || row >= rows) return;
  a.workspace[to] = !sees ? 0.0f : args.grad_lse ? sum - args.grad_lse[to] : sum;
}

// dsink = -sum over the rows that see a key of e^(sink - lse) delta. A block for each head; rows in
// double, so that it hardly matters how many there are.
__global__ void __launch_bounds__(kSinkThreads) sum_sinks(const AttentionBackwardArgs args) {
  const AttentionArgs& a = args.forward;
  const int64_t head = blockIdx.x, sequences = a.cu_q ? 1 : a.sequences;
  const float sink = a.sinks[head];
  double sum = 0.0;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t first = (b * a.heads + head) * a.queries;
    for (int64_t t = threadIdx.x; t < a.queries; t += kSinkThreads) {
      const float delta = a.workspace[first + t];
      if (delta != 0.0f)  // of a row that sees a key
        sum -= static_cast<double>(exp2_approx((sink - a.lse[first + t]) * kLog2e)) *
               static_cast<double>(delta);
    }
  }
  sum = block_sum<kSinkThreads / kWarp>(sum);
  if (threadIdx.x == 0) args.grad_sinks[head] = static_cast<float>(sum);
}

// ---- dk and dv: rows are keys, columns queries

// Products of k and q become p; p times softcap' goes to `passed`. lse: from the
// thread's first column on.
template <bool kPlain, int kThreads, int kRowTiles>
IC_GPU void to_weights(float (&x)[kRowTiles][kTileColumns][4], float4* passed,
                       const LogitRule& rule, const float* lse, int column, const RowsSeen& seen) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      float change[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int distance = seen.position(i, e / 2) - (column + 8 * j + e % 2);
        x[i][j][e] = weight_of<kPlain>(rule, x[i][j][e], distance, lse[8 * j + e % 2], &change[e]);
      }
      passed[(i * kTileColumns + j) * kThreads] =
          make_float4(change[0], change[1], change[2], change[3]);
    }
  }
}

// Products of v and dout become dlogit, by what to_weights passed.
template <int kThreads, int kRowTiles>
IC_GPU void to_changes(float (&x)[kRowTiles][kTileColumns][4], const float4* passed,
                       const float* delta) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      const float4 all = passed[(i * kTileColumns + j) * kThreads];
      const float change[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][j][e] = change[e] * (x[i][j][e] - delta[8 * j + e % 2]);
    }
  }
}

// A tile of queries: of which head, from which on.
struct TileAt {
  int head, column;

  // Through all tiles of a head, then the next head.
  IC_GPU TileAt next(int first, int end) const {
    return column + kTile < end ? TileAt{head, column + kTile} : TileAt{head + 1, first};
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(KeyShape<kDim>::kThreads, KeyShape<kDim>::kBlocks)
    grad_keys(const AttentionBackwardArgs args, int64_t tiles) {
  using S = KeyShape<kDim>;
  constexpr int kPairs = kRowWarps * kWarp;  // of a thread that forms p and one that forms dlogit
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(Work, work, 1);
  SHARED_ARRAY(float, of_columns, S::kStages * 2 * kTile);  // lse in units of log 2, then delta
  const AttentionArgs& a = args.forward;
  if (threadIdx.x == 0) find_work<true>(a, tiles, S::kRows, work);
  __syncthreads();
  if (work->rows <= 0) return;
  const AttentionSequence& s = work->sequence;
  // Either dv, from k, q, then dout; or dk, from v, dout, then q.
  const bool of_keys = warp_index() >= kRowWarps;
  const int tile_row = warp_index() % kRowWarps * S::kWarpRows;
  unsigned char* const own = shared + (of_keys ? S::kRowBytes : 0);
  unsigned char* const stages = shared + 2 * S::kRowBytes;
  float4* const passed =
      reinterpret_cast<float4*>(stages + S::kStages * 2 * S::kTileBytes) + threadIdx.x % kPairs;
  const Reach &block = work->all, &warp = work->of_warp[warp_index() % kRowWarps];
  const auto stage = [&](int n) { return stages + n % S::kStages * (2 * S::kTileBytes); };
  const auto load = [&](int n, TileAt at) {
    const int64_t token = s.first_query + at.column;
    const int rows = min(static_cast<int>(s.keys) - at.column, kTile);
    load_rows<kDim, kTile, S::kThreads>(stage(n), a.q, row_of(a.q, s, token, at.head), rows, a.dim);
    load_rows<kDim, kTile, S::kThreads>(stage(n) + S::kTileBytes, args.grad_out,
                                        row_of(args.grad_out, s, token, at.head), rows, a.dim);
  };
  // A thread's part of tile n's lse and delta, to be put in place later.
  const auto load_column = [&](TileAt at) {
    const int thread = static_cast<int>(threadIdx.x), t = at.column + thread % kTile;
    if (thread >= 2 * kTile || t >= s.keys) return 0.0f;
    const int64_t index = attention_lse_index(a, s, at.head, t);
    return thread < kTile ? a.lse[index] * kLog2e : a.workspace[index];
  };
  const auto put_column = [&](int n, float value) {
    if (threadIdx.x < 2 * kTile) of_columns[n % S::kStages * 2 * kTile + threadIdx.x] = value;
  };
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int first = block.first_tile() * kTile;
  const int count = max(block.end_tile() - block.first_tile(), 0) * group;
  TileAt at{static_cast<int>(work->head) * group, first}, at_before = at;
  const int64_t token = s.first_key + work->row;
  load_rows<kDim, S::kRows, S::kThreads>(shared, a.k, row_of(a.k, s, token, work->head), work->rows,
                                         a.dim);
  load_rows<kDim, S::kRows, S::kThreads>(shared + S::kRowBytes, a.v,
                                         row_of(a.v, s, token, work->head), work->rows, a.dim);
  if (count > 0) {
    load(0, at);
    put_column(0, load_column(at));
  }
  cp_async_commit();

  float sums[S::kRowTiles][kDim / 8][4] = {};
#pragma unroll 1
  for (int n = 0; n < count + S::kLag; ++n) {
    cp_async_wait<0>();
    __syncthreads();
    const TileAt at_next = at.next(first, block.end);
    float of_next = 0.0f;
    if (n + 1 < count) {
      load(n + 1, at_next);
      of_next = load_column(at_next);
    }
    cp_async_commit();
    if (n < count && block.partial(at.column) &&
        __syncthreads_or(any_not_finite<T, kDim, 2 * kTile, S::kThreads>(stage(n)))) {
      mark_not_finite<T, kDim>(sums, stage(n) + (of_keys ? 0 : S::kTileBytes), 0, at.column,
                               RowsSeen(s, work->row + tile_row), kTile);
      __syncthreads();
      clear_not_finite<T, kDim, 2 * kTile, S::kThreads>(stage(n));
      __syncthreads();
    }

    const int m = of_keys ? n - S::kLag : n;
    const TileAt here = of_keys && S::kLag > 0 ? at_before : at;
    const bool works = m >= 0 && m < count && warp.any(here.column);
    const uint32_t queries = smem_address(stage(max(m, 0))), douts = queries + S::kTileBytes;
    const int column = here.column + lane_index() % 4 * 2;
    float4* const slot = passed + (m & S::kLag) * (S::kPassedBytes / 16);
    const float* const of_column =
        of_columns + (max(m, 0) % S::kStages * 2 + of_keys) * kTile + lane_index() % 4 * 2;
    float x[S::kRowTiles][kTileColumns][4] = {};
    if (works) {
      multiply_rows<T, kDim>(x, smem_address(own), tile_row, of_keys ? douts : queries);
      if (!of_keys) {
        const RowsSeen seen(s, work->row + tile_row);
        const LogitRule rule(a, s.index, here.head);
        if (rule.plain()) {
          to_weights<true, kPairs>(x, slot, rule, of_column, column, seen);
        } else {
          to_weights<false, kPairs>(x, slot, rule, of_column, column, seen);
        }
      }
    }
    if constexpr (S::kLag == 0) __syncthreads();
    if (works) {
      if (of_keys) to_changes<kPairs>(x, slot, of_column);
      if (warp.partial(here.column)) hide(x, column, RowsSeen(s, work->row + tile_row));
      multiply_values<T, kDim>(sums, x, of_keys ? queries : douts, 0);
    }
    if (n + 1 < count) put_column(n + 1, of_next);
    at_before = at;
    at = at_next;
  }
  cp_async_wait<0>();
  __syncthreads();
  const AttentionTensor& gradient = of_keys ? args.grad_k : args.grad_v;
  store_rows<T, kDim>(sums, of_keys ? a.scale : 1.0f, own, tile_row, work->rows - tile_row,
                      row_of(gradient, s, token + tile_row, work->head), gradient.token, a.dim);
}

// ---- dq

// From products x of q and k and y = dout . v - delta, dlogit in x. rows: (lse in units of log 2,
// delta) from the thread's first row on.
template <bool kPlain, int kRowTiles>
IC_GPU void to_row_changes(float (&x)[kRowTiles][kTileColumns][4],
                           const float (&y)[kRowTiles][kTileColumns][4], const LogitRule& rule,
                           const float2* rows, int column, const RowsSeen& seen) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float lse = rows[16 * i + 8 * h].x;
      const int distance = seen.position(i, h) - column;
#pragma unroll
      for (int e = 0; e < 2 * kTileColumns; ++e) {
        float &z = x[i][e / 2][2 * h + e % 2], change;
        weight_of<kPlain>(rule, z, distance - 8 * (e / 2) - e % 2, lse, &change);
        z = change * y[i][e / 2][2 * h + e % 2];
      }
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(QueryShape<kDim>::kThreads, QueryShape<kDim>::kBlocks)
    grad_queries(const AttentionBackwardArgs args, int64_t tiles) {
  using S = QueryShape<kDim>;
  static_assert(S::kRows <= S::kThreads, "a thread for each row's lse and delta");
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(Work, work, 1);
  SHARED_ARRAY(float2, of_row, S::kRows);
  const AttentionArgs& a = args.forward;
  if (threadIdx.x == 0) find_work<false>(a, tiles, S::kRows, work);
  __syncthreads();
  if (work->rows <= 0) return;
  const AttentionSequence& s = work->sequence;
  const int64_t kv_head = work->head / (a.heads / a.kv_heads);
  const int tile_row = warp_index() * S::kWarpRows;
  const int64_t warp_row = work->row + tile_row;
  unsigned char* const stages = shared + 2 * S::kRowBytes;
  const auto stage = [&](int n) { return stages + n % 2 * (2 * S::kTileBytes); };
  const auto load = [&](int n) {  // keys, then values
    const int64_t key = int64_t{n} * kTile, token = s.first_key + key;
    const int rows = static_cast<int>(min(s.keys - key, int64_t{kTile}));
    load_rows<kDim, kTile, S::kThreads>(stage(n), a.k, row_of(a.k, s, token, kv_head), rows, a.dim);
    load_rows<kDim, kTile, S::kThreads>(stage(n) + S::kTileBytes, a.v,
                                        row_of(a.v, s, token, kv_head), rows, a.dim);
  };
  const Reach &block = work->all, &warp = work->of_warp[warp_index()];

  const int64_t token = s.first_query + work->row;
  load_rows<kDim, S::kRows, S::kThreads>(shared, a.q, row_of(a.q, s, token, work->head), work->rows,
                                         a.dim);
  load_rows<kDim, S::kRows, S::kThreads>(shared + S::kRowBytes, args.grad_out,
                                         row_of(args.grad_out, s, token, work->head), work->rows,
                                         a.dim);
  if (block.first_tile() < block.end_tile()) load(block.first_tile());
  cp_async_commit();

  if (threadIdx.x < S::kRows) {
    const int64_t t = min(work->row + threadIdx.x, s.queries - 1);
    const int64_t at = attention_lse_index(a, s, work->head, t);
    of_row[threadIdx.x] = make_float2(a.lse[at] * kLog2e, a.workspace[at]);
  }
  float sums[S::kRowTiles][kDim / 8][4] = {};
#pragma unroll 1
  for (int n = block.first_tile(); n < block.end_tile(); ++n) {
    cp_async_wait<0>();
    __syncthreads();
    if (n + 1 < block.end_tile()) load(n + 1);
    cp_async_commit();
    const int tile_column = n * kTile, column = tile_column + lane_index() % 4 * 2;
    if (block.partial(tile_column) &&
        __syncthreads_or(any_not_finite<T, kDim, kTile, S::kThreads>(stage(n)))) {
      mark_not_finite<T, kDim>(sums, stage(n), 0, tile_column, RowsSeen(s, warp_row), kTile);
      __syncthreads();
      clear_not_finite<T, kDim, kTile, S::kThreads>(stage(n));
      __syncthreads();
    }
    if (!warp.any(tile_column)) continue;
    const uint32_t keys = smem_address(stage(n)), values = keys + S::kTileBytes;
    const float2* const rows = of_row + tile_row + lane_index() / 4;
    float x[S::kRowTiles][kTileColumns][4] = {}, y[S::kRowTiles][kTileColumns][4];
#pragma unroll
    for (int e = 0; e < 4 * kTileColumns * S::kRowTiles; ++e) {
      const int i = e / (4 * kTileColumns);
      y[i][e / 4 % kTileColumns][e % 4] = -rows[16 * i + 8 * (e / 2 % 2)].y;
    }
    multiply_rows<T, kDim>(x, smem_address(shared), tile_row, keys);
    multiply_rows<T, kDim>(y, smem_address(shared + S::kRowBytes), tile_row, values);
    const RowsSeen seen(s, warp_row);
    const LogitRule rule(a, s.index, work->head);
    if (rule.plain()) {
      to_row_changes<true>(x, y, rule, rows, column, seen);
    } else {
      to_row_changes<false>(x, y, rule, rows, column, seen);
    }
    if (warp.partial(tile_column)) hide(x, column, seen);
    multiply_values<T, kDim>(sums, x, keys, 0);
  }
  cp_async_wait<0>();
  __syncthreads();
  store_rows<T, kDim>(sums, a.scale, shared, tile_row, work->rows - tile_row,
                      row_of(args.grad_q, s, token + tile_row, work->head), args.grad_q.token,
                      a.dim);
}

// ---- launches

struct Launch {
  const AttentionBackwardArgs& args;
  Stream stream;

  template <class T, int kDim>
  void run() const {
    using K = KeyShape<kDim>;
    using Q = QueryShape<kDim>;
    const AttentionArgs& a = args.forward;
    const int most = max_shared_bytes(), needed = max(K::kSharedBytes, Q::kSharedBytes);
    IC_CHECK(needed <= most, "attention: the backward of a head dim of ", a.dim, " takes ", needed,
             " bytes of shared memory, this GPU has ", most);
    // At least one block: a packed tensor without a sequence has rows to clear.
    const int64_t rows = (a.cu_q ? 1 : a.sequences) * a.queries * a.heads;
    constexpr int kSumRows = kSumThreads / (kDim / 8);
    launch(row_sums<T, kDim>, grid((rows + kSumRows) / kSumRows, rows), dim3(kSumThreads), 0,
           stream, args, rows);
    if (args.grad_sinks) launch(sum_sinks, grid(a.heads), dim3(kSinkThreads), 0, stream, args);
    const int64_t keys = tiles_of(a.cu_k, a.keys, a.sequences, K::kRows);
    if (keys > 0)
      launch(grad_keys<T, kDim>, grid(keys * a.kv_heads), dim3(K::kThreads), K::kSharedBytes,
             stream, args, keys);
    const int64_t queries = tiles_of(a.cu_q, a.queries, a.sequences, Q::kRows);
    if (queries > 0)
      launch(grad_queries<T, kDim>, grid(queries * a.heads), dim3(Q::kThreads), Q::kSharedBytes,
             stream, args, queries);
  }

  dim3 grid(int64_t blocks, int64_t rows = 0) const {
    const AttentionArgs& a = args.forward;
    IC_CHECK((blocks | rows) < int64_t{1} << 31, "attention: too many rows for one call, got ",
             a.sequences, " sequences of ", a.queries, " queries and ", a.heads, " heads");
    return dim3(static_cast<unsigned>(blocks));
  }
};

}  // namespace

void attention_mma_backward_cuda(const AttentionBackwardArgs& args, void* stream) {
  attention_dispatch(args.forward.dtype, args.forward.dim, Launch{args, stream});
}

}  // namespace ic
