// attention's forward on tensor cores: 16-bit elements, dense or packed sequences.
//
// A block of four warps takes 128 query rows of a head (64 where D > 128), a warp 32 (16). It walks
// the tiles of 64 keys that any of its rows sees: while the tensor cores work on one, the next
// one's keys and values arrive by cp.async in the other of two stages; one barrier a tile. Logits,
// weights and outputs stay in registers (Dao 2023, arXiv:2307.08691). After each segment of 512
// keys the outputs so far are set aside, in L2, and joined with the next (attention.cuh says why):
// 4 bytes read and written for each 1024 D operations, a twentieth of the time. Blocks are as many
// as run at once and draw their tiles by ticket, those with the most keys first.
//
// FLOPs: 4 D for each pair that is seen. Bytes: q, out and lse once; keys and values once a block,
// mostly from L2. Intensity is T / 2 FLOPs a byte and more: bound by the tensor cores from T = 500.
// On an H200 mma.sync reaches about 62 % of the 989 TFLOP/s of wgmma; ldmatrix feeds 32 rows with
// every 16 bytes a lane reads, half of what shared memory can give at that rate. FlashAttention-2,
// built alike, reaches 306 TFLOP/s causal and 365 without a mask at D 128, T 8k (H100): so should
// this.
#include "attention.cuh"

namespace ic {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

template <int kDim>
struct Shape {
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;  // at a time on a multiprocessor
  static constexpr int kColumns = kDim / 8;
  static constexpr int kTileBytes = kKeyTile * kDim * 2;
  static constexpr int kSharedBytes = kRows * kDim * 2 + 4 * kTileBytes;
  static constexpr int64_t kAsideFloats =
      kRows * (kDim + 8);  // outputs; maxima and sums, in 4 lanes
};
constexpr int kTicketFloats = 32;  // a line for the ticket

// A block's rows: those of one head from `row` of the sequence on; none if rows <= 0. It lies in
// shared memory: registers are what this kernel is short of.
struct Work {
  AttentionSequence sequence;
  LogitRule rule;
  int64_t head, row;
  int rows;
  const uint16_t *q, *k, *v;               // row `row`; key 0 of the sequence
  int first_tile, end_tile;                // tiles of keys that some row sees
  int all_from, all_to;                    // keys that every row sees
  int warp_from[kWarps], warp_to[kWarps];  // keys that some row of a warp sees
};

IC_GPU void find_work(const AttentionArgs& a, int64_t unit, int rows, Work* w) {
  int64_t tile, b;
  if (a.cu_q) {
    const PackedTile packed(a.cu_q, a.sequences, rows, unit / a.heads);
    b = packed.sequence;
    tile = packed.tile;
  } else {
    b = unit / a.heads % a.sequences;
    tile = unit / a.heads / a.sequences;
  }
  AttentionSequence s = attention_sequence(a, b);
  s.group = 1;
  w->sequence = s;
  w->rule = LogitRule(a, b, unit % a.heads);
  w->head = unit % a.heads;
  w->row = ((s.queries + rows - 1) / rows - 1 - tile) * rows;  // the last rows see most
  w->rows = w->row < 0 ? 0 : static_cast<int>(min(s.queries - w->row, int64_t{rows}));
  const auto at = [&](const AttentionTensor& t, int64_t token, int64_t head) {
    return static_cast<const uint16_t*>(t.data) + b * t.batch + token * t.token + head * t.head;
  };
  const int64_t kv_head = w->head / (a.heads / a.kv_heads);
  w->q = at(a.q, s.first_query + w->row, w->head);
  w->k = at(a.k, s.first_key, kv_head);
  w->v = at(a.v, s.first_key, kv_head);
  const int64_t last = w->row + w->rows - 1;
  w->end_tile = static_cast<int>((s.end_seen(last) + kKeyTile - 1) / kKeyTile);
  w->first_tile = min(static_cast<int>(s.first_seen(w->row) / kKeyTile), w->end_tile);
  w->all_from = static_cast<int>(s.first_seen(last));
  w->all_to = static_cast<int>(s.end_seen(w->row));
  for (int i = 0; i < kWarps; ++i) {
    const int64_t first = w->row + i * (rows / kWarps);
    w->warp_from[i] = static_cast<int>(s.first_seen(first));
    w->warp_to[i] = static_cast<int>(s.end_seen(first + rows / kWarps - 1));
  }
}

IC_GPU void clear_gaps(const AttentionArgs& a) {
  each_gap(a.cu_q, a.sequences, a.queries, [&](int64_t row) {
    clear_row<kThreads>(a.out, row, a.heads, a.dim);
    for (int64_t h = threadIdx.x; h < a.heads; h += kThreads)
      a.lse[h * a.queries + row] = kMinusInf;
  });
}

template <class T, int kDim>
class Tile {
  using S = Shape<kDim>;
  using Outputs = float[S::kRowTiles][S::kColumns][4];
  using Fold = RowFold<S::kRowTiles>;

 public:
  IC_GPU Tile(const AttentionArgs& args, const Work& work, unsigned char* shared, float* aside)
      : a_(args), w_(work), q_(shared), aside_(reinterpret_cast<float4*>(aside) + threadIdx.x) {}

  IC_GPU void run() {
    const RowsSeen seen(w_.sequence, w_.row + warp_index() * S::kWarpRows);
    Outputs o = {};
    Fold fold;
    fold.clear();
    bool set_aside = false;

    int tile = w_.first_tile;
    load<S::kRows>(q_, w_.q, a_.q, w_.rows);
    if (tile < w_.end_tile) load_keys(tile);
    cp_async_commit();
    for (;;) {
      const int segment_end = min(w_.end_tile, (tile / kSegmentTiles + 1) * kSegmentTiles);
      for (; tile < segment_end; ++tile) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < w_.end_tile) load_keys(tile + 1);
        cp_async_commit();
        const int begin = tile * kKeyTile;
        const bool partial = begin < w_.all_from || begin + kKeyTile > w_.all_to;
        if (partial &&
            __syncthreads_or(any_not_finite<T, kDim, kKeyTile, kThreads>(values(tile)))) {
          mark_not_finite<T, kDim>(o, values(tile), 0, begin, seen);
          __syncthreads();
          clear_not_finite<T, kDim, kKeyTile, kThreads>(values(tile));
          __syncthreads();
        }
#pragma unroll 1
        for (int half = 0; half < kKeyTile; half += kFold) {
          const int key = begin + half;
          if (key >= w_.warp_to[warp_index()] || key + kFold <= w_.warp_from[warp_index()])
            continue;
          float x[S::kRowTiles][kFoldColumns][4] = {}, keep[S::kRowTiles][2];
          multiply_rows<T, kDim>(x, smem_address(q_), warp_index() * S::kWarpRows,
                                 smem_address(keys(tile)), half);
          to_logits(x, w_.rule, key, partial, seen);
          fold_keys(fold, x, keep);
          scale_rows(o, keep);
          multiply_values<T, kDim>(o, x, smem_address(values(tile)), 0, half);
        }
      }
      fold.quad_sum();
      if (set_aside) join(fold, o);
      if (tile >= w_.end_tile) break;
      put_aside(fold, o);
      set_aside = true;
    }
    cp_async_wait<0>();
    __syncthreads();  // where there was no tile, queries may still arrive
    finish(fold, o);
  }

 private:
  IC_GPU unsigned char* keys(int tile) const {
    return q_ + S::kRows * kDim * 2 + tile % 2 * 2 * S::kTileBytes;
  }
  IC_GPU unsigned char* values(int tile) const { return keys(tile) + S::kTileBytes; }

  template <int kRows>
  IC_GPU void load(unsigned char* to, const uint16_t* from, const AttentionTensor& t,
                   int rows) const {
    load_tile<kDim, kRows, kThreads>(to, rows, static_cast<int>(a_.dim), aligned_rows(t),
                                     [&](int i) { return from + i * t.token; });
  }
  IC_GPU void load_keys(int tile) const {
    const int64_t begin = int64_t{tile} * kKeyTile;
    const int rows = static_cast<int>(min(w_.sequence.keys - begin, int64_t{kKeyTile}));
    load<kKeyTile>(keys(tile), w_.k + begin * a_.k.token, a_.k, rows);
    load<kKeyTile>(values(tile), w_.v + begin * a_.v.token, a_.v, rows);
  }

  // What was put aside joins a segment. (Joining with nothing would change nothing.)
  IC_GPU void join(Fold& fold, Outputs& o) const {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      const float4* from = aside_ + i * (S::kColumns + 1) * kThreads;
      const float4 rows = from[S::kColumns * kThreads];  // (max, sum) twice
      const FoldJoin low(rows.x, fold.max[i][0]), high(rows.z, fold.max[i][1]);
      fold.max[i][0] = low.max;
      fold.max[i][1] = high.max;
      fold.sum[i][0] = low(rows.y, fold.sum[i][0]);
      fold.sum[i][1] = high(rows.w, fold.sum[i][1]);
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) {
        if (j % 4 == 0) __syncwarp();  // no more loads in flight than there are registers for
        const float4 before = from[j * kThreads];
        float(&x)[4] = o[i][j];
        x[0] = low(before.x, x[0]);
        x[1] = low(before.y, x[1]);
        x[2] = high(before.z, x[2]);
        x[3] = high(before.w, x[3]);
      }
    }
  }

  IC_GPU void put_aside(Fold& fold, Outputs& o) const {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      float4* to = aside_ + i * (S::kColumns + 1) * kThreads;
      to[S::kColumns * kThreads] =
          make_float4(fold.max[i][0], fold.sum[i][0], fold.max[i][1], fold.sum[i][1]);
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) {
        float(&x)[4] = o[i][j];
        to[j * kThreads] = make_float4(x[0], x[1], x[2], x[3]);
        x[0] = x[1] = x[2] = x[3] = 0.0f;
      }
    }
    fold.clear();
  }

  // Writes the warp's rows, by way of its rows of the query tile for 16 bytes at a time.
  IC_GPU void finish(const Fold& fold, const Outputs& o) const {
    const AttentionSequence& s = w_.sequence;
    const int lane = computed_here(lane_index()), tile_row = warp_index() * S::kWarpRows;
    const int rows = w_.rows - tile_row;
    const float sink = a_.sinks ? a_.sinks[w_.head] : kMinusInf;
    __syncwarp();  // the last tile's ldmatrix have read the queries
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = 16 * i + 8 * h + lane / 4;
        const RowEnd end(fold.max[i][h], fold.sum[i][h], sink);
        if (lane % 4 == 0 && r < rows)
          a_.lse[attention_lse_index(a_, s, w_.head, w_.row + tile_row + r)] = end.lse;
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) {
          unsigned char* to = q_ + chunk_offset<kDim>(tile_row + r, j) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(to) = pack2<T>(end(o[i][j][2 * h]), end(o[i][j][2 * h + 1]));
        }
      }
    }
    __syncwarp();
    uint16_t* out = static_cast<uint16_t*>(a_.out.data) + s.index * a_.out.batch +
                    (s.first_query + w_.row + tile_row) * a_.out.token + w_.head * a_.out.head;
    for (int i = lane; i < S::kWarpRows * S::kColumns; i += kWarp) {
      const int r = i / S::kColumns, chunk = i % S::kColumns;
      if (8 * chunk < a_.dim && r < rows)
        *reinterpret_cast<uint4*>(out + r * a_.out.token + chunk * 8) =
            *reinterpret_cast<const uint4*>(q_ + chunk_offset<kDim>(tile_row + r, chunk));
    }
  }

  const AttentionArgs& a_;
  const Work& w_;
  unsigned char* const q_;
  float4* const aside_;  // this thread's first
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    forward(const AttentionArgs a, int64_t units) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(Work, work, 1);
  if (a.cu_q) clear_gaps(a);
  for (;;) {
    const int64_t unit = draw_ticket(reinterpret_cast<uint32_t*>(a.workspace));
    if (unit >= units) return;
    if (threadIdx.x == 0) find_work(a, unit, Shape<kDim>::kRows, work);
    __syncthreads();
    float* aside = a.workspace + kTicketFloats + blockIdx.x * Shape<kDim>::kAsideFloats;
    if (work->rows > 0) Tile<T, kDim>(a, *work, shared, aside).run();
    __syncthreads();  // before the next ticket, and the next tile's loads
  }
}

// At least one block: a packed tensor without a sequence has rows to clear. No more than rows, of
// all heads: so many at most have work, however many sequences are empty.
template <class S>
int64_t blocks_at_most(const AttentionArgs& a) {
  const int64_t most = int64_t{multiprocessors()} * S::kBlocks;
  const int64_t rows = (a.cu_q ? 1 : a.sequences) * a.queries * a.heads;
  return rows < 1 ? 1 : rows < most ? rows : most;
}

struct Launch {
  const AttentionArgs& a;
  Stream stream;

  template <class T, int kDim>
  void run() const {
    using S = Shape<kDim>;
    const int64_t tiles = a.cu_q ? packed_tiles(a.queries, a.sequences, S::kRows)
                                 : a.sequences * ((a.queries + S::kRows - 1) / S::kRows);
    const int64_t units = tiles * a.heads;
    IC_CHECK(units < int64_t{1} << 31, "attention: too many rows for one call, got ", a.sequences,
             " sequences of ", a.queries, " queries and ", a.heads, " heads");
    IC_CHECK(S::kSharedBytes <= max_shared_bytes(), "attention: a head dim of ", a.dim, " takes ",
             S::kSharedBytes, " bytes of shared memory, this GPU has ", max_shared_bytes());
    if (a.queries == 0) return;
    const int64_t most = blocks_at_most<S>(a);
    const int64_t blocks = units < 1 ? 1 : units < most ? units : most;
    zero_on_stream(a.workspace, sizeof(uint32_t), stream);
    launch(forward<T, kDim>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), S::kSharedBytes,
           stream, a, units);
  }
};

}  // namespace

int64_t attention_forward_workspace(const AttentionArgs& a) {
  const auto floats = [&](auto shape) {
    using S = decltype(shape);
    return kTicketFloats + (a.keys <= kSegment ? 0 : blocks_at_most<S>(a) * S::kAsideFloats);
  };
  const int64_t dim = attention_padded_dim(a.dim);
  return dim == 64 ? floats(Shape<64>{}) : dim == 128 ? floats(Shape<128>{}) : floats(Shape<256>{});
}

void attention_forward_cuda(const AttentionArgs& a, void* stream) {
  attention_dispatch(a.dtype, a.dim, Launch{a, stream});
}

}  // namespace ic
