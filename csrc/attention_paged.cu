// attention over a paged cache, of 16-bit elements: decode steps and chunks of a prefill in one
// launch, which also appends the new keys and values.
//   turn      new keys by their angles, in calls of many new tokens
//   attend    attention and the append
//   combine   joins the parts of rows that several blocks have worked on
//
// The query heads of a key/value head share its keys: row r is query r / group, head r % group. A
// block of four warps takes one unit of work at a time:
//   - a sequence of up to 64 rows (a decode step) is cut into its segments of 512 keys: a unit for
//     each and key/value head. It leaves the row maxima, sums and float32 outputs of its segment in
//     slots of the workspace; `combine` joins them in order and ends the rows.
//   - a longer one is cut into tiles of 64 rows, whose segments the block joins itself, like the
//     dense kernel (attention_fwd.cu); so is one with a single segment, or without slots.
// Bits are the same either way (attention.cuh). Up to 16 rows are in all four warps: each forms all
// logits, and a fourth of the outputs. More are 16 in each warp.
//
// Units are counted on the device from cu_seqlens_q and cache_seqlens, a thread for each sequence:
// a wide block table costs nothing but workspace. Slots are dealt out in the same way; where there
// are not enough (1 MiB a multiprocessor at most) the first sequences go without. Tiles of 64 keys
// and values arrive by cp.async in one of two stages while the other is at work; where their rows
// lie is looked up two tiles ahead. What is new comes from k_new and v_new, never from the cache:
// keys are turned on the way into shared memory, or before (`turn`) where many tiles of rows would
// do it again. The unit that has a token's first row and its key writes it to the cache.
//
// Bytes: keys and values that are seen, once for each tile of rows (decode: once); 4 (D + 4) for
// each row and segment, written and read: 0.4 % of the keys' and values' a row. FLOPs: 4 D for each
// pair that is seen; decode has one a byte for each query head of a key/value head and is bound by
// memory: B 32, 4096 keys, 8 key/value heads, D 128 are 537 MB, 112 us at the 4.8 TB/s of an H200.
// 85 % of a copy's bandwidth is what it should reach: two blocks a multiprocessor keep 64 KB on the
// way, where 36 KB hide 1 us; 2048 units on 264 blocks are 7.8 rounds. Prefill is bound by
// ldmatrix, which feeds 16 rows with every read of a key or value, half of the dense kernel's: 200
// TFLOP/s at D 128.
#include "attention.cuh"

namespace ic {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kRows = 64;        // of a tile
constexpr int kSharedRows = 16;  // up to so many are in every warp

template <int kDim>
struct Shape {
  static constexpr int kBlocks = kDim == 64 ? 3 : kDim == 128 ? 2 : 1;  // on a multiprocessor
  static constexpr int kTileBytes = kKeyTile * kDim * 2;
  static constexpr int kPlaces = 2 * kKeyTile;  // of a tile's keys and values
  static constexpr int kSharedBytes =
      kRows * kDim * 2 + 4 * kTileBytes + 2 * kPlaces * static_cast<int>(sizeof(void*));
  // For each thread of a block: its outputs, and (max, sum) of two rows.
  static constexpr int64_t kAsideFloats = kThreads * (kDim / 8 + 1) * 4;
  static constexpr int64_t kSlotFloats = kDim + 4;  // of a row: outputs, max, sum; 16-byte aligned
};

// What `combine` needs to know of a token: its row of head 0 has, in segment i of key/value head h,
// slot first + (h segments + i) rows.
struct alignas(16) TokenSlots {
  int64_t first;
  int32_t rows, segments;  // 0 segments: there is nothing to do
};

// With more than a segment of keys: TokenSlots of each token, an aside of each block, slots.
struct Workspace {
  TokenSlots* tokens;  // null: no sequence has more than a segment
  float *asides, *slots;
  int64_t capacity;  // slots
  bool turned;       // k_new has been turned
};

// ---- units of work

// What a block works on: rows row .. row + rows - 1 of a key/value head, and their tiles of keys.
struct Work {
  AttentionSequence sequence;
  int64_t kv_head, row;
  int64_t slot;  // of its first row; -1: the block ends its rows itself
  int rows, held;
  int first_tile, end_tile;
  int all_from, all_to;  // what every row sees
  TokenSlots tokens;     // of token 0; `segments` is -1 where another unit tells
};

// The tiles of keys that rows of a sequence see.
struct KeyTiles {
  int first, end;

  IC_GPU KeyTiles(const AttentionSequence& s, int64_t row, int64_t rows) {
    end = static_cast<int>((s.end_seen(row + rows - 1) + kKeyTile - 1) / kKeyTile);
    first = min(static_cast<int>(s.first_seen(row)) / kKeyTile, end);
  }
  IC_GPU int first_segment() const { return first / kSegmentTiles; }
  IC_GPU int segments() const {
    return first == end ? 0 : (end - 1) / kSegmentTiles - first_segment() + 1;
  }
};

// The sum of `value` over threads 0 .. this one; `total`: over all.
IC_GPU int64_t block_scan(int64_t value, int64_t* total) {
  SHARED_ARRAY(int64_t, of_warp, kWarps);
  const int lane = lane_index(), warp = warp_index();
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t before = shuffle_up(value, offset);
    if (lane >= offset) value += before;
  }
  if (lane == kWarp - 1) of_warp[warp] = value;
  __syncthreads();
  *total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) value += of_warp[w];
    *total += of_warp[w];
  }
  __syncthreads();  // before of_warp is written again
  return value;
}

// Sequences are counted kThreads at a time, by a thread each.
struct Counts {
  int first[kThreads + 1];  // unit of each of them, and of the next
  int next;                 // sequence
  int64_t slots_left;       // that it and those after it would take
};

// Finds units by their numbers, which increase from call to call. All threads of the block call it.
class Units {
 public:
  IC_GPU Units(const AttentionArgs& args, int64_t capacity, Counts* counts)
      : a_(args), capacity_(capacity), counts_(*counts) {
    int64_t slots = 0;
    if (capacity > 0)
      for (int64_t b = threadIdx.x; b < a_.sequences; b += kThreads)
        slots += slots_of(attention_sequence(a_, b));
    slots = block_sum<kWarps>(slots);
    if (threadIdx.x == 0) {
      counts_.first[kThreads] = counts_.next = 0;
      counts_.slots_left = slots;
    }
    __syncthreads();
  }

  // False: there is no such unit. After a barrier *work is there for all.
  IC_GPU bool find(int unit, Work* work) {
    while (unit >= counts_.first[kThreads]) {
      if (counts_.next >= a_.sequences) return false;
      count();
    }
    const int first = counts_.first[threadIdx.x];
    if (unit >= first && unit < counts_.first[threadIdx.x + 1]) fill(unit - first, work);
    return true;
  }

 private:
  // Slots that a sequence takes if it is cut into its segments.
  IC_GPU int64_t slots_of(const AttentionSequence& s) const {
    if (s.queries == 0 || s.rows() > kRows) return 0;
    const int segments = KeyTiles(s, 0, s.rows()).segments();
    return segments > 1 ? a_.kv_heads * segments * s.rows() : 0;
  }
  static IC_GPU int64_t row_tiles(const AttentionSequence& s) {
    return (s.rows() + kRows - 1) / kRows;
  }

  // The next kThreads sequences.
  IC_GPU void count() {
    const int before = counts_.first[kThreads], next = counts_.next;
    const int64_t left = counts_.slots_left, b = int64_t{next} + threadIdx.x;
    int64_t slots = 0, units = 0, segments = 0, total;
    if (b < a_.sequences) {
      const AttentionSequence s = attention_sequence(a_, b);
      slots = capacity_ > 0 ? slots_of(s) : 0;
      segments = slots > 0 ? slots / (a_.kv_heads * s.rows()) : 0;
      units = row_tiles(s);
    }
    // Those that get slots are the last: units of the others take longer, and come first.
    const int64_t after = left - block_scan(slots, &total);
    const int64_t left_then = left - total;
    slot_ = slots > 0 && after + slots <= capacity_ ? static_cast<int>(after) : -1;
    if (slot_ >= 0) units = segments;
    const int end = before + static_cast<int>(block_scan(units * a_.kv_heads, &total));
    counts_.first[threadIdx.x + 1] = end;
    if (threadIdx.x == 0) {
      counts_.first[0] = before;
      counts_.next = next + kThreads;
      counts_.slots_left = left_then;
    }
    __syncthreads();
  }

  IC_GPU void fill(int unit, Work* w) const {
    const int b = counts_.next - kThreads + static_cast<int>(threadIdx.x);
    const AttentionSequence s = attention_sequence(a_, b);
    const int kv_heads = static_cast<int>(a_.kv_heads), part = unit / kv_heads;
    w->kv_head = unit % kv_heads;
    w->held = a_.pages.cache_seqlens[b];
    w->slot = -1;
    w->row = slot_ < 0 ? (row_tiles(s) - 1 - part) * kRows : 0;  // the last rows see most
    w->rows = static_cast<int>(min(s.rows() - w->row, int64_t{kRows}));
    w->tokens = {0, 0, w->kv_head == 0 && (slot_ < 0 || part == 0) ? 0 : -1};
    const KeyTiles tiles(s, w->row, w->rows);
    w->first_tile = tiles.first;
    w->end_tile = tiles.end;
    if (slot_ >= 0) {
      const int segments = tiles.segments();
      const int segment = tiles.first_segment() + part;
      w->first_tile = max(tiles.first, segment * kSegmentTiles);
      w->end_tile = min(tiles.end, (segment + 1) * kSegmentTiles);
      w->slot = slot_ + (w->kv_head * segments + part) * w->rows;
      if (w->tokens.segments == 0) w->tokens = {slot_, w->rows, segments};
    }
    w->all_from = static_cast<int>(s.first_seen(w->row + w->rows - 1));
    w->all_to = static_cast<int>(s.end_seen(w->row));
    w->sequence = s;
  }

  const AttentionArgs& a_;
  const int64_t capacity_;
  Counts& counts_;
  int slot_ = -1;  // the first of this thread's sequence
};

// ---- rows, four elements at a time

IC_GPU uint2 load4(const uint16_t* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint2*>(from);
  return make_uint2(from[0] | static_cast<uint32_t>(from[1]) << 16,
                    from[2] | static_cast<uint32_t>(from[3]) << 16);
}

IC_GPU void store4(uint16_t* to, uint2 x, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint2*>(to) = x;
    return;
  }
  to[0] = static_cast<uint16_t>(x.x);
  to[1] = static_cast<uint16_t>(x.x >> 16);
  to[2] = static_cast<uint16_t>(x.y);
  to[3] = static_cast<uint16_t>(x.y >> 16);
}

// Elements i .. i + 3 of a row, turned by the angles of a position: of one half of the row, or two
// pairs. Each product rounds by itself, as on the CPU.
template <class T>
IC_GPU uint2 turned4(const AttentionArgs& a, const uint16_t* row, int position, int i,
                     bool aligned) {
  const int half = static_cast<int>(a.dim) / 2;
  const bool between = a.pages.interleaved, first = i < half;
  const int pair = between ? i / 2 : first ? i : i - half;
  const int64_t angle = int64_t{position} * half + pair;
  const float *cos = a.pages.cos + angle, *sin = a.pages.sin + angle;
  const uint2 own = load4(row + i, aligned);
  uint2 other = make_uint2(own.x << 16 | own.x >> 16, own.y << 16 | own.y >> 16);
  if (!between) other = load4(row + (first ? i + half : pair), aligned);
  const auto turn = [&](float x, float y, int e) {
    const int at = between ? e / 2 : e;
    const bool minus = between ? e % 2 == 0 : first;
    return __fadd_rn(__fmul_rn(x, cos[at]), __fmul_rn(y, minus ? -sin[at] : sin[at]));
  };
  float2 x = unpack2<T>(own.x), y = unpack2<T>(other.x);
  const uint32_t low = pack2<T>(turn(x.x, y.x, 0), turn(x.y, y.y, 1));
  x = unpack2<T>(own.y), y = unpack2<T>(other.y);
  return make_uint2(low, pack2<T>(turn(x.x, y.x, 2), turn(x.y, y.y, 3)));
}

// load_tile where rows from `turned` on are turned by the angles of position(i).
template <class T, int kDim, int kTileRows, class Row, class Position>
IC_GPU void load_turned(const AttentionArgs& a, unsigned char* tile, int rows, int turned,
                        bool aligned, const Row& row, const Position& position) {
  const int dim = static_cast<int>(a.dim);
  if (turned >= rows) return load_tile<kDim, kTileRows, kThreads>(tile, rows, dim, aligned, row);
  constexpr int kFours = kDim / 4;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kFours; i += kThreads) {
    const int r = i / kFours, four = i % kFours;
    const bool real = r < rows && 4 * four < dim;
    unsigned char* to = tile + chunk_offset<kDim>(r, four / 2) + four % 2 * 8;
    if (aligned && real && r < turned) {
      if (four % 2 == 0) cp_async16(smem_address(to), row(r) + 4 * four);
      continue;
    }
    uint2 x = make_uint2(0, 0);
    if (real && r < turned) x = load4(row(r) + 4 * four, false);
    if (real && r >= turned) x = turned4<T>(a, row(r), position(r), 4 * four, aligned);
    *reinterpret_cast<uint2*>(to) = x;
  }
}

IC_GPU bool aligned_pages(const AttentionTensor& cache, int64_t block, const AttentionTensor& add) {
  return aligned_rows(cache) && aligned_rows(add) && block % 8 == 0;
}

// ---- a unit

template <class T, int kDim, bool kShared>
class Tile {
  using S = Shape<kDim>;
  static constexpr int kColumns = kShared ? kDim / 32 : kDim / 8;
  using Outputs = float[1][kColumns][4];
  using Fold = RowFold<1>;

 public:
  IC_GPU Tile(const AttentionArgs& args, const Workspace& workspace, const Work& work,
              unsigned char* shared)
      : a_(args),
        space_(workspace),
        w_(work),
        q_(shared),
        tile_row_(kShared ? 0 : warp_index() * 16),
        first_chunk_(kShared ? warp_index() * kColumns : 0) {}

  IC_GPU void run() {
    const AttentionSequence& s = w_.sequence;
    const int first_tile = w_.first_tile, end_tile = w_.end_tile;
    const int64_t warp_row = w_.row + tile_row_;
    // What any row of this warp sees.
    const int warp_from = static_cast<int>(s.first_seen(warp_row));
    const int warp_to = tile_row_ < w_.rows ? static_cast<int>(s.end_seen(warp_row + 15)) : 0;

    const GroupedLogitRule rule(a_, s, w_.kv_head, warp_row);
    const GroupedRowsSeen seen(s, warp_row);
    Outputs o = {};
    Fold fold;
    fold.clear();

    places(first_tile)[threadIdx.x] = place(first_tile);
    places(first_tile + 1)[threadIdx.x] = place(first_tile + 1);
    __syncthreads();
    if (first_tile < end_tile) load_keys(first_tile);
    load_queries();
    cp_async_commit();
    append();
    for (int tile = first_tile;;) {
      const int segment_end = min(end_tile, (tile / kSegmentTiles + 1) * kSegmentTiles);
      for (; tile < segment_end; ++tile) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < end_tile) load_keys(tile + 1);
        cp_async_commit();
        const uint16_t* later = place(tile + 2);
        const int begin = tile * kKeyTile;
        const bool partial = begin < w_.all_from || begin + kKeyTile > w_.all_to;
        if (partial &&
            __syncthreads_or(any_not_finite<T, kDim, kKeyTile, kThreads>(values(tile)))) {
          mark_not_finite<T, kDim>(o, values(tile), first_chunk_, begin, seen);
          __syncthreads();
          clear_not_finite<T, kDim, kKeyTile, kThreads>(values(tile));
          __syncthreads();
        }
#pragma unroll 1
        for (int half = 0; half < kKeyTile; half += kFold) {
          const int key = begin + half;
          if (key >= warp_to || key + kFold <= warp_from) continue;
          float x[1][kFoldColumns][4] = {}, keep[1][2];
          multiply_rows<T, kDim>(x, smem_address(q_), tile_row_, smem_address(keys(tile)), half);
          to_logits(x, rule, key, partial, seen);
          fold_keys(fold, x, keep);
          scale_rows(o, keep);
          multiply_values<T, kDim>(o, x, smem_address(values(tile)), first_chunk_, half);
        }
        places(tile + 2)[threadIdx.x] = later;
      }
      fold.quad_sum();
      if ((tile - 1) / kSegmentTiles > w_.first_tile / kSegmentTiles) join(fold, o);
      if (tile >= end_tile) break;
      put_aside(fold, o);
    }
    cp_async_wait<0>();
    if (w_.slot >= 0) return leave(fold, o);
    finish(fold, o);
  }

 private:
  IC_GPU unsigned char* keys(int tile) const {
    return q_ + kRows * kDim * 2 + tile % 2 * 2 * S::kTileBytes;
  }
  IC_GPU unsigned char* values(int tile) const { return keys(tile) + S::kTileBytes; }
  // Where a tile's keys and then its values lie.
  IC_GPU const uint16_t** places(int tile) const {
    return reinterpret_cast<const uint16_t**>(q_ + kRows * kDim * 2 + 4 * S::kTileBytes) +
           tile % 2 * S::kPlaces;
  }

  IC_GPU bool turns_keys() const { return a_.pages.cos && !space_.turned; }

  IC_GPU uint16_t* cache_row(const AttentionTensor& cache, int64_t block_stride, int key) const {
    const AttentionPages& p = a_.pages;
    const int size = static_cast<int>(p.block_size);
    const int64_t block = p.block_table[w_.sequence.index * p.table_row + key / size];
    return static_cast<uint16_t*>(cache.data) + block * block_stride + key % size * cache.token +
           w_.kv_head * cache.head;
  }
  IC_GPU const uint16_t* new_row(const AttentionTensor& t, int key) const {
    return static_cast<const uint16_t*>(t.data) +
           (w_.sequence.first_query + key - w_.held) * t.token + w_.kv_head * t.head;
  }

  // This thread's of a tile's places; null past the sequence.
  IC_GPU const uint16_t* place(int tile) const {
    const AttentionPages& p = a_.pages;
    const int key = tile * kKeyTile + static_cast<int>(threadIdx.x) % kKeyTile;
    if (tile >= w_.end_tile || key >= w_.sequence.keys) return nullptr;
    const bool value = threadIdx.x >= kKeyTile;
    if (key >= w_.held) return new_row(value ? p.v_new : p.k_new, key);
    return value ? cache_row(a_.v, p.v_block, key) : cache_row(a_.k, p.k_block, key);
  }

  IC_GPU void load_keys(int tile) const {
    const AttentionPages& p = a_.pages;
    const int begin = tile * kKeyTile;
    const int rows = static_cast<int>(min(w_.sequence.keys - begin, int64_t{kKeyTile}));
    const uint16_t* const* at = places(tile);
    load_turned<T, kDim, kKeyTile>(
        a_, keys(tile), rows, turns_keys() ? max(w_.held - begin, 0) : kKeyTile,
        aligned_pages(a_.k, p.k_block, p.k_new), [&](int i) { return at[i]; },
        [&](int i) { return begin + i; });
    load_tile<kDim, kKeyTile, kThreads>(values(tile), rows, static_cast<int>(a_.dim),
                                        aligned_pages(a_.v, p.v_block, p.v_new),
                                        [&](int i) { return at[kKeyTile + i]; });
  }

  IC_GPU void load_queries() const {
    const AttentionSequence& s = w_.sequence;
    const int group = static_cast<int>(s.group), row = static_cast<int>(w_.row);
    const uint16_t* q = static_cast<const uint16_t*>(a_.q.data) + s.first_query * a_.q.token +
                        w_.kv_head * group * a_.q.head;
    load_turned<T, kDim, kShared ? kSharedRows : kRows>(
        a_, q_, w_.rows, a_.pages.cos ? 0 : kRows, aligned_rows(a_.q),
        [&](int i) {
          const int r = row + i;
          return q + r / group * a_.q.token + r % group * a_.q.head;
        },
        [&](int i) { return w_.held + (row + i) / group; });
  }

  // Tokens of which this unit has the first row and the key: into the cache.
  IC_GPU void append() const {
    const AttentionSequence& s = w_.sequence;
    const AttentionPages& p = a_.pages;
    const int group = static_cast<int>(s.group);
    const int first = static_cast<int>(w_.row + group - 1) / group;
    const int end = static_cast<int>(w_.row + w_.rows + group - 1) / group;
    if (space_.tokens && w_.tokens.segments >= 0)
      for (int t = first + static_cast<int>(threadIdx.x); t < end; t += kThreads)
        space_.tokens[s.first_query + t] = {w_.tokens.first + t * group, w_.tokens.rows,
                                            w_.tokens.segments};
    if (!p.k_new.data) return;
    const int from = max(w_.held + first, w_.first_tile * kKeyTile);
    const int to = min(w_.held + end, w_.end_tile * kKeyTile);
    const int fours = static_cast<int>(a_.dim) / 4;
    const bool aligned_k = aligned_pages(a_.k, p.k_block, p.k_new);
    const bool aligned_v = aligned_pages(a_.v, p.v_block, p.v_new);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (to - from) * fours; i += kThreads) {
      const int key = from + i / fours, at = i % fours * 4;
      const uint16_t* row = new_row(p.k_new, key);
      const uint2 k =
          turns_keys() ? turned4<T>(a_, row, key, at, aligned_k) : load4(row + at, aligned_k);
      store4(cache_row(a_.k, p.k_block, key) + at, k, aligned_k);
      const uint2 v = load4(new_row(p.v_new, key) + at, aligned_v);
      store4(cache_row(a_.v, p.v_block, key) + at, v, aligned_v);
    }
  }

  // What was put aside joins a segment's fold.
  IC_GPU void join(Fold& fold, Outputs& o) const {
    const float4* from = aside();
    const float4 rows = from[kColumns * kThreads];  // (max, sum) twice
    const FoldJoin low(rows.x, fold.max[0][0]), high(rows.z, fold.max[0][1]);
    fold.max[0][0] = low.max;
    fold.max[0][1] = high.max;
    fold.sum[0][0] = low(rows.y, fold.sum[0][0]);
    fold.sum[0][1] = high(rows.w, fold.sum[0][1]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j % 8 == 0) __threadfence_block();  // no more loads ahead than there are registers for
      const float4 before = from[j * kThreads];
      float(&x)[4] = o[0][j];
      x[0] = low(before.x, x[0]);
      x[1] = low(before.y, x[1]);
      x[2] = high(before.z, x[2]);
      x[3] = high(before.w, x[3]);
    }
  }

  IC_GPU void put_aside(Fold& fold, Outputs& o) const {
    float4* to = aside();
    to[kColumns * kThreads] =
        make_float4(fold.max[0][0], fold.sum[0][0], fold.max[0][1], fold.sum[0][1]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float(&x)[4] = o[0][j];
      to[j * kThreads] = make_float4(x[0], x[1], x[2], x[3]);
      x[0] = x[1] = x[2] = x[3] = 0.0f;
    }
    fold.clear();
  }
  IC_GPU float4* aside() const {
    return reinterpret_cast<float4*>(space_.asides + blockIdx.x * S::kAsideFloats) + threadIdx.x;
  }

  // A segment's fold goes to its slots.
  IC_GPU void leave(const Fold& fold, const Outputs& o) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = tile_row_ + 8 * h + lane_index() / 4;
      if (r >= w_.rows) continue;
      float* to = space_.slots + (w_.slot + r) * S::kSlotFloats;
      float2* columns = reinterpret_cast<float2*>(to + 8 * first_chunk_ + lane_index() % 4 * 2);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        columns[4 * j] = make_float2(o[0][j][2 * h], o[0][j][2 * h + 1]);
      if (first_chunk_ == 0 && lane_index() % 4 == 0)
        *reinterpret_cast<float2*>(to + kDim) = make_float2(fold.max[0][h], fold.sum[0][h]);
    }
  }

  // Ends the rows.
  IC_GPU void finish(const Fold& fold, const Outputs& o) const {
    const AttentionSequence& s = w_.sequence;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = tile_row_ + 8 * h + lane_index() / 4;
      if (r >= w_.rows) continue;
      const int64_t t = (w_.row + r) / s.group,
                    head = w_.kv_head * s.group + (w_.row + r) % s.group;
      const RowEnd end(fold.max[0][h], fold.sum[0][h], a_.sinks ? a_.sinks[head] : kMinusInf);
      if (first_chunk_ == 0 && lane_index() % 4 == 0)
        a_.lse[attention_lse_index(a_, s, head, t)] = end.lse;
      uint16_t* out = static_cast<uint16_t*>(a_.out.data) + (s.first_query + t) * a_.out.token +
                      head * a_.out.head;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int column = 8 * (first_chunk_ + j);
        if (column < a_.dim)
          *reinterpret_cast<uint32_t*>(out + column + lane_index() % 4 * 2) =
              pack2<T>(end(o[0][j][2 * h]), end(o[0][j][2 * h + 1]));
      }
    }
  }

  const AttentionArgs& a_;
  const Workspace& space_;
  const Work& w_;
  unsigned char* const q_;
  const int tile_row_, first_chunk_;  // of this warp
};

IC_GPU void clear_gaps(const AttentionArgs& a, const Workspace& space) {
  each_gap(a.cu_q, a.sequences, a.queries, [&](int64_t row) {
    clear_row<kThreads>(a.out, row, a.heads, a.dim);
    for (int64_t h = threadIdx.x; h < a.heads; h += kThreads)
      a.lse[h * a.queries + row] = kMinusInf;
    if (space.tokens && threadIdx.x == 0) space.tokens[row] = {0, 0, 0};
  });
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    attend(const AttentionArgs a, const Workspace space) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(Work, work, 1);
  SHARED_ARRAY(Counts, counts, 1);
  clear_gaps(a, space);
  Units units(a, space.capacity, counts);
  for (int unit = static_cast<int>(blockIdx.x); units.find(unit, work);
       unit += static_cast<int>(gridDim.x)) {
    __syncthreads();
    if (work->sequence.rows() <= kSharedRows) {
      Tile<T, kDim, true>(a, space, *work, shared).run();
    } else {
      Tile<T, kDim, false>(a, space, *work, shared).run();
    }
    __syncthreads();  // before the next unit takes the place of this one
  }
}

// ---- turn: a block for each token

template <class T>
__global__ void __launch_bounds__(kThreads) turn(const AttentionArgs a, uint16_t* keys) {
  const int token = static_cast<int>(blockIdx.x);
  if (token < a.cu_q[0] || token >= a.cu_q[a.sequences]) return;
  int64_t b = 0;  // the last sequence that begins at the token or before
  for (int64_t count = a.sequences; count > 1;) {
    const int64_t half = count / 2;
    if (a.cu_q[b + half] <= token) b += half;
    count -= half;
  }
  const int position = a.pages.cache_seqlens[b] + token - a.cu_q[b];
  const AttentionTensor& k = a.pages.k_new;
  const uint16_t* from = static_cast<const uint16_t*>(k.data) + token * k.token;
  const int dim = static_cast<int>(a.dim), n = static_cast<int>(a.kv_heads) * dim;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < n; i += kThreads * 4)
    store4(keys + int64_t{token} * n + i,
           turned4<T>(a, from + i / dim * k.head, position, i % dim, aligned_rows(k)), true);
}

// ---- combine: a warp for each row, a lane for kDim / 32 of its columns

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) combine(const AttentionArgs a, const Workspace space) {
  constexpr int kColumns = kDim / kWarp, kAhead = 32 / kColumns;  // slots on the way at a time
  const int64_t warp = int64_t{blockIdx.x} * kWarps + warp_index();
  const int64_t token = warp / a.heads, head = warp % a.heads;
  if (token >= a.queries) return;
  const TokenSlots slots = space.tokens[token];
  const int64_t group = a.heads / a.kv_heads;
  const float* from =
      space.slots + Shape<kDim>::kSlotFloats *
                        (slots.first + head / group * slots.segments * slots.rows + head % group);
  const int64_t step = slots.rows * Shape<kDim>::kSlotFloats;
  const int column = lane_index() * kColumns;
  if (slots.segments == 0) return;

  float max = kMinusInf, sum = 0.0f, o[kColumns] = {};
#pragma unroll 1
  for (int segment = 0; segment < slots.segments; segment += kAhead) {
    float2 ends[kAhead], x[kAhead][kColumns / 2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool real = segment + i < slots.segments;  // otherwise what joins is empty
      const float* at = from + (segment + i) * step;
      ends[i] = make_float2(kMinusInf, 0.0f);
      if (real) ends[i] = *reinterpret_cast<const float2*>(at + kDim);
#pragma unroll
      for (int c = 0; c < kColumns / 2; ++c) {
        x[i][c] = make_float2(0.0f, 0.0f);
        if (real) x[i][c] = *reinterpret_cast<const float2*>(at + column + 2 * c);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const FoldJoin join(max, ends[i].x);
      max = join.max;
      sum = join(sum, ends[i].y);
#pragma unroll
      for (int c = 0; c < kColumns / 2; ++c) {
        o[2 * c] = join(o[2 * c], x[i][c].x);
        o[2 * c + 1] = join(o[2 * c + 1], x[i][c].y);
      }
    }
  }
  const RowEnd end(max, sum, a.sinks ? a.sinks[head] : kMinusInf);
  if (lane_index() == 0) a.lse[head * a.queries + token] = end.lse;
  uint16_t* out = static_cast<uint16_t*>(a.out.data) + token * a.out.token + head * a.out.head;
#pragma unroll
  for (int c = 0; c < kColumns; c += 2)
    if (column + c < a.dim)
      *reinterpret_cast<uint32_t*>(out + column + c) = pack2<T>(end(o[c]), end(o[c + 1]));
}

// ---- launches

// The workspace's parts in floats. Slots have 1 MiB for each multiprocessor at most, 8 units of 64
// rows for each of its two blocks at D 128: enough to share the work evenly.
struct Sizes {
  static constexpr int64_t kSpareFloats = int64_t{1} << 18;
  static constexpr int64_t kFewTokens =
      8;  // a sequence: new keys are turned by those who read them
  int64_t keys = 0, tokens = 0, asides = 0, slots = 0, capacity = 0;

  Sizes(const AttentionArgs& a, int blocks, int64_t aside_floats, int64_t slot_floats) {
    if (a.queries > kFewTokens * a.sequences) keys = a.queries * a.kv_heads * a.dim / 2;
    const int64_t segments = (a.keys + kSegment - 1) / kSegment, group = a.heads / a.kv_heads;
    if (segments <= 1) return;
    const int64_t rows = a.queries * group, most_rows = a.sequences * kRows;
    const int64_t wanted = (rows < most_rows ? rows : most_rows) * a.kv_heads * segments;
    const int64_t most = int64_t{multiprocessors()} * kSpareFloats / slot_floats;
    capacity = wanted < most ? wanted : most;
    tokens = a.queries * static_cast<int64_t>(sizeof(TokenSlots) / sizeof(float));
    asides = blocks * aside_floats;
    slots = capacity * slot_floats;
  }
  template <int kDim>
  static Sizes of(const AttentionArgs& a) {
    using S = Shape<kDim>;
    return Sizes(a, multiprocessors() * S::kBlocks, S::kAsideFloats, S::kSlotFloats);
  }
  int64_t total() const { return keys + tokens + asides + slots; }
};

struct Launch {
  const AttentionArgs& a;
  Stream stream;

  template <class T, int kDim>
  void run() const {
    using S = Shape<kDim>;
    IC_CHECK(a.queries * a.heads < int64_t{1} << 31, "attention_paged_: too many rows, got ",
             a.queries, " queries of ", a.heads, " heads");
    IC_CHECK(S::kSharedBytes <= max_shared_bytes(), "attention_paged_: a head dim of ", a.dim,
             " takes ", S::kSharedBytes, " bytes of shared memory, this GPU has ",
             max_shared_bytes());
    const Sizes sizes = Sizes::of<kDim>(a);
    Workspace space{};
    space.capacity = sizes.capacity;
    if (sizes.capacity > 0) {
      space.asides = a.workspace;
      space.slots = space.asides + sizes.asides;
      space.tokens = reinterpret_cast<TokenSlots*>(space.slots + sizes.slots);
    }
    AttentionArgs args = a;
    if (a.pages.cos && sizes.keys > 0) {
      uint16_t* keys = reinterpret_cast<uint16_t*>(a.workspace + sizes.total() - sizes.keys);
      launch(turn<T>, dim3(static_cast<unsigned>(a.queries)), dim3(kThreads), 0, stream, a, keys);
      args.pages.k_new = {keys, 0, a.kv_heads * a.dim, a.dim};
      space.turned = true;
    }
    launch(attend<T, kDim>, dim3(static_cast<unsigned>(multiprocessors() * S::kBlocks)),
           dim3(kThreads), S::kSharedBytes, stream, args, space);
    if (sizes.capacity == 0) return;
    const int64_t blocks = (a.queries * a.heads + kWarps - 1) / kWarps;
    launch(combine<T, kDim>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a,
           space);
  }
};

}  // namespace

int64_t attention_paged_workspace(const AttentionArgs& a) {
  const int dim = attention_padded_dim(a.dim);
  const Sizes sizes = dim == 64    ? Sizes::of<64>(a)
                      : dim == 128 ? Sizes::of<128>(a)
                                   : Sizes::of<256>(a);
  return sizes.total() > 0 ? sizes.total() : 1;
}

void attention_paged_cuda(const AttentionArgs& a, void* stream) {
  if (a.queries == 0) return;
  attention_dispatch(a.dtype, a.dim, Launch{a, stream});
}

}  // namespace ic
