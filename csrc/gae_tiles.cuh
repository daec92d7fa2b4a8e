// The kernels of ops that have GAE in them: where the steps come from is theirs, the rest is here.
//
// A warp takes 256 positions of a row, 8 for each lane: it loads them coalesced, stages them in
// shared memory, composes each lane's steps to a map, scans the maps over the lanes, and replays
// its steps from the state that reaches it, by the same gae_step as the CPU. Then
//   gae_warp_tiles   a row is cut into tiles of a warp: rows of at most 256 steps, packed rows, and
//                    time-major inputs, of which a block's 8 warps read 8 rows together, so that
//                    32-byte sectors are used whole
//   gae_block_tiles  longer rows whose steps lie side by side are cut into tiles of a block, 2048
//                    steps
// Tiles of a row are chained (gae_scan.cuh) in the order of tickets.
//
// A Source gives the steps:
//   const GaeArgs& gae()        sizes, layout, scalars, outputs
//   Row row(r)                  what the steps of row r share
//   Raw load(row, at, t)        one step as it lies in memory, nothing computed from it yet, so
//   that
//                               all of a lane's loads are under way together; `at` is where the row
//                               lies: r, or 0 when packed
//   GaeInput input(Row, Raw, at, t)   the step; it may write what it likes at (at, t)
//   void finish(slot, advantages, unmasked)    of a lane, for each warp once; every slot from 0 to
//                               gae_slots() - 1 gets one warp, perhaps without steps
//   void clear(i)               a packed step of no row
//   kAnyStrides                 rows may be time-major
#pragma once

#include "gae.h"
#include "gae_scan.cuh"
#include "gpu.cuh"

namespace ic {

constexpr int kGaeWarps = 8, kGaeItems = 8;
static_assert(kWarp * kGaeItems == kGaeWarpTile && kGaeWarps * kGaeWarpTile == kGaeBlockTile,
              "tiles are what a warp and a block take");

// ---- which steps

// kTimeMajor: neighbouring rows lie side by side.
enum class GaeLayout { kRows, kTimeMajor, kPacked };

struct GaeTile {
  int64_t row, at;        // of the row's number, and of its place in memory
  int64_t index, number;  // of the tile in its row, and among all
  int64_t last;           // the step of position 0
  int64_t left;           // positions from there to the start of the row

  IC_GPU int count() const {
    return static_cast<int>(left < 0 ? 0 : left < kGaeWarpTile ? left : kGaeWarpTile);
  }
  IC_GPU bool is_first() const { return left <= kGaeWarpTile; }  // nobody waits for its state
};

// Where a row of a packed (N,) begins. Outside 0..steps: the nearest that is inside.
IC_GPU int64_t gae_offset(const GaeArgs& a, int64_t row) {
  const int64_t at = a.cu_seqlens[row];
  return at < 0 ? 0 : at > a.steps ? a.steps : at;
}

// The row of a packed (N,) that tile `number` belongs to: the last one whose first tile is that or
// one before. A warp searches 32 places at a time.
IC_GPU GaeTile gae_packed_tile(const GaeArgs& a, int64_t number) {
  int64_t row = 0, count = a.rows;
  while (count > 1) {
    const int64_t stride = (count + kWarp - 1) / kWarp, end = row + count;
    const int64_t probe = row + lane_index() * stride;
    const bool begun = probe < end && gae_offset(a, probe) / kGaeWarpTile + probe <= number;
    const int found = __popc(__ballot_sync(kAllLanes, begun));
    if (found > 0) row += (found - 1) * stride;
    count = end - row < stride ? end - row : stride;
  }
  const int64_t first = gae_offset(a, row), index = number - (first / kGaeWarpTile + row);
  const int64_t last = gae_offset(a, row + 1) - 1 - index * kGaeWarpTile;
  return {row, 0, index, number, last, last + 1 - first};
}

// Tile `number` of a warp in a block. Numbers go through all rows before the next tile of any: by
// then most predecessors are done.
template <GaeLayout kLayout>
IC_GPU GaeTile gae_warp_tile(const GaeArgs& a, int64_t block) {
  if constexpr (kLayout == GaeLayout::kPacked)
    return gae_packed_tile(a, block * kGaeWarps + warp_index());
  const int64_t groups = (a.rows + kGaeWarps - 1) / kGaeWarps;
  const int64_t row = block % groups * kGaeWarps + warp_index(), index = block / groups;
  const int64_t tiles = (a.steps + kGaeWarpTile - 1) / kGaeWarpTile;
  const int64_t last = a.steps - 1 - index * kGaeWarpTile;
  return {row, row, index, row * tiles + index, last, row < a.rows ? last + 1 : 0};
}

// Packed steps before the first and after the last row belong to no row.
template <class Clear>
IC_GPU void gae_each_gap(const GaeArgs& a, Clear clear) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t begin = a.cu_seqlens[0], end = a.cu_seqlens[a.rows];
  for (int64_t i = thread; i < begin && i < a.steps; i += threads) clear(i);
  for (int64_t i = (end < 0 ? 0 : end) + thread; i < a.steps; i += threads) clear(i);
}

// ---- a warp's steps

// A warp's positions in shared memory. A word of padding after every 8 keeps both sides free of
// bank conflicts: lanes write neighbours, and read 8 apart.
constexpr int kGaeStaged = static_cast<int>(kGaeWarpTile + kGaeWarpTile / kGaeItems);

struct GaeStage {
  float reward[kGaeStaged], value[kGaeStaged];  // then advantage and return
  alignas(8) uint8_t flags[kGaeWarpTile];       // 1: unmasked, 2: done

  IC_GPU static int padded(int position) { return position + position / kGaeItems; }

  IC_GPU void put(int position, GaeInput step) {
    reward[padded(position)] = step.reward;
    value[padded(position)] = step.value;
    flags[position] = static_cast<uint8_t>(step.unmasked | step.done << 1);
  }
};

// A lane's steps, in registers.
struct GaeLaneSteps {
  float reward[kGaeItems], value[kGaeItems];
  uint64_t flags;  // a byte for each

  IC_GPU explicit GaeLaneSteps(const GaeStage& stage) {
    const int first = lane_index() * kGaeItems;
    flags = *reinterpret_cast<const uint64_t*>(stage.flags + first);
#pragma unroll
    for (int i = 0; i < kGaeItems; ++i) {
      reward[i] = stage.reward[GaeStage::padded(first) + i];
      value[i] = stage.value[GaeStage::padded(first) + i];
    }
  }

  // All are real and none ends an episode. Most lanes are so: they save the tests of each step.
  IC_GPU bool plain() const { return flags == 0x0101010101010101u; }

  template <bool kPlain>
  IC_GPU GaeInput get(int i) const {
    if constexpr (kPlain) return {reward[i], value[i], true, false};
    return {reward[i], value[i], (flags >> 8 * i & 1) != 0, (flags >> 8 * i & 2) != 0};
  }
};

constexpr GaeInput kGaeNoStep{0.0f, 0.0f, false, false};

template <class Source>
IC_GPU void gae_stage(const Source& source, GaeStage& stage, const GaeTile& tile) {
  const int count = tile.count();
  typename Source::Raw raw[kGaeItems];
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + lane_index();
    if (position < count) raw[i] = source.load(tile.at, tile.last - position);
  }
  const auto row = count > 0 ? source.row(tile.row) : typename Source::Row{};
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + lane_index();
    stage.put(position, position < count ? source.input(row, raw[i], tile.at, tile.last - position)
                                         : kGaeNoStep);
  }
  __syncwarp();
}

// The tiles of all warps of a block: neighbouring threads take neighbouring rows.
template <class Source>
IC_GPU void gae_stage_time_major(const Source& source, GaeStage (&stages)[kGaeWarps],
                                 const GaeTile& tile) {
  const int thread = static_cast<int>(threadIdx.x), r = thread % kGaeWarps;
  const int64_t row = tile.row - warp_index() + r;
  const int64_t left = row < source.gae().rows ? tile.last + 1 : 0;
  typename Source::Raw raw[kGaeItems];
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + thread / kGaeWarps;
    if (position < left) raw[i] = source.load(row, tile.last - position);
  }
  const auto shared = left > 0 ? source.row(row) : typename Source::Row{};
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + thread / kGaeWarps;
    stages[r].put(position, position < left
                                ? source.input(shared, raw[i], row, tile.last - position)
                                : kGaeNoStep);
  }
  __syncthreads();
}

template <bool kPlain>
IC_GPU GaeMap gae_lane_run(const GaeArgs& a, const GaeLaneSteps& steps) {
  GaeMap run = kGaeIdentity;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i)
    run = gae_prepend(steps.get<kPlain>(i), run, a.gamma, a.lambda);
  return run;
}

// Of lane l: the run of the steps of lanes l, l - 1, .., 0.
IC_GPU GaeMap gae_warp_run(const GaeArgs& a, const GaeLaneSteps& steps) {
  return gae_warp_scan(steps.plain() ? gae_lane_run<true>(a, steps)
                                     : gae_lane_run<false>(a, steps));
}

// From the state after a lane's steps: what is to be put out, in place of the steps. Returns which
// are unmasked.
template <bool kPlain>
IC_GPU uint32_t gae_lane_replay(const GaeArgs& a, GaeLaneSteps& steps, GaeState state) {
  uint32_t unmasked = 0;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const GaeInput step = steps.get<kPlain>(i);
    if (step.done) state = {0.0f, 0.0f};
    if (step.unmasked) state = gae_step(state, step.reward, step.value, a.gamma, a.lambda);
    steps.reward[i] = step.unmasked ? state.advantage : 0.0f;
    steps.value[i] = step.unmasked ? state.advantage + step.value : 0.0f;
    unmasked |= step.unmasked << i;
  }
  return unmasked;
}

// This lane's steps from the state after them on, then the warp's outputs, coalesced.
template <class Source>
IC_GPU void gae_replay(const Source& source, GaeStage& stage, GaeLaneSteps& steps,
                       const GaeTile& tile, int64_t slot, GaeState state) {
  const GaeArgs& a = source.gae();
  const uint32_t unmasked = steps.plain() ? gae_lane_replay<true>(a, steps, state)
                                          : gae_lane_replay<false>(a, steps, state);
  const int first = GaeStage::padded(lane_index() * kGaeItems);
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    stage.reward[first + i] = steps.reward[i];
    stage.value[first + i] = steps.value[i];
  }
  __syncwarp();
  const int count = tile.count();
  const int64_t to = tile.at * a.steps + tile.last;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + lane_index();
    if (position >= count) continue;
    a.advantages[to - position] = stage.reward[GaeStage::padded(position)];
    a.returns[to - position] = stage.value[GaeStage::padded(position)];
  }
  source.finish(slot, steps.reward, unmasked);
}

IC_GPU GaeState gae_initial_state(const GaeArgs& a, int64_t row) {
  return {a.bootstrap ? a.bootstrap[row] : 0.0f, 0.0f};
}

// ---- kernels

struct GaeWorkspace {
  uint32_t* ticket;  // of kGaeStateBytes, in front
  GaeTileState* tiles;
};

// A warp for each tile of 256 positions.
template <GaeLayout kLayout, bool kChained, class Source>
__global__ void __launch_bounds__(kGaeWarps* kWarp)
    gae_warp_tiles(Source source, GaeWorkspace workspace) {
  SHARED_ARRAY(GaeStage, stages, kGaeWarps);
  const GaeArgs& a = source.gae();
  GaeStage& stage = stages[warp_index()];
  const int64_t block = kChained ? draw_ticket(workspace.ticket) : blockIdx.x;
  if constexpr (kLayout == GaeLayout::kPacked) {
    gae_each_gap(a, [&](int64_t i) { source.clear(i); });
    if (a.rows == 0) return;
  }
  const GaeTile tile = gae_warp_tile<kLayout>(a, block);
  if constexpr (kLayout == GaeLayout::kTimeMajor) {
    gae_stage_time_major(source, stages, tile);
    if (tile.row >= a.rows) return;
  } else {
    if (kLayout == GaeLayout::kRows && tile.row >= a.rows) return;
    if (kLayout == GaeLayout::kPacked &&
        tile.number >= gae_tiles(a.rows, a.steps, true, kGaeWarpTile))
      return;
    gae_stage(source, stage, tile);
  }

  GaeLaneSteps steps(stage);
  const GaeMap scanned = gae_warp_run(a, steps);
  GaeState after = gae_initial_state(a, tile.row);
  if (kChained && tile.left > 0) {
    const GaeMap all = shuffle_from(scanned, kWarp - 1);
    GaeTileState* row = workspace.tiles + tile.number - tile.index;
    if (!tile.is_first()) gae_publish_run(row + tile.index, all);
    after = gae_look_back(row, tile.index, after);
    if (!tile.is_first()) gae_publish_state(row, tile.index, all, after);
  }
  const GaeMap later = shuffle_up(scanned, 1);
  if (lane_index() > 0) after = gae_apply(later, after);
  gae_replay(source, stage, steps, tile, tile.number, after);
}

// A block for each tile of 2048 positions.
template <bool kChained, class Source>
__global__ void __launch_bounds__(kGaeWarps* kWarp)
    gae_block_tiles(Source source, GaeWorkspace workspace) {
  SHARED_ARRAY(GaeStage, stages, kGaeWarps);
  SHARED_ARRAY(GaeMap, of_warp, kGaeWarps);
  SHARED_ARRAY(GaeState, after_tile, 1);
  const GaeArgs& a = source.gae();
  GaeStage& stage = stages[warp_index()];
  const int64_t block = kChained ? draw_ticket(workspace.ticket) : blockIdx.x;
  const int64_t row = block % a.rows, index = block / a.rows;
  const int64_t tiles = gae_tiles(1, a.steps, false, kGaeBlockTile);
  // This warp's part. Perhaps it has no steps, but it meets the others.
  const int64_t last = a.steps - 1 - index * kGaeBlockTile - warp_index() * kGaeWarpTile;
  const GaeTile part{row, row, index, row * tiles + index, last, last + 1};
  gae_stage(source, stage, part);

  GaeLaneSteps steps(stage);
  const GaeMap scanned = gae_warp_run(a, steps);
  if (lane_index() == kWarp - 1) of_warp[warp_index()] = scanned;
  __syncthreads();
  GaeMap later = kGaeIdentity;  // of the warps with later steps
  for (int w = 0; w < warp_index(); ++w) later = gae_compose(of_warp[w], later);
  GaeState after = gae_initial_state(a, row);
  if constexpr (kChained) {
    if (warp_index() == 0) {
      GaeMap all = of_warp[0];
      for (int w = 1; w < kGaeWarps; ++w) all = gae_compose(of_warp[w], all);
      GaeTileState* of_row = workspace.tiles + row * tiles;
      if (index + 1 < tiles) gae_publish_run(of_row + index, all);
      after = gae_look_back(of_row, index, after);
      if (index + 1 < tiles) gae_publish_state(of_row, index, all, after);
      if (lane_index() == 0) after_tile[0] = after;
    }
    __syncthreads();
    after = after_tile[0];
  }
  after = gae_apply(later, after);
  const GaeMap in_warp = shuffle_up(scanned, 1);
  if (lane_index() > 0) after = gae_apply(in_warp, after);
  gae_replay(source, stage, steps, part, part.number * kGaeWarps + warp_index(), after);
}

// ---- launches

inline dim3 gae_grid(const char* op, const GaeArgs& a, int64_t blocks) {
  IC_CHECK(blocks <= 0x7fffffff, op, ": at most 2^31 - 1 tiles at a time, got ", a.rows,
           " rows of ", a.steps, " steps");
  return dim3(static_cast<unsigned>(blocks));
}

// Blocks of warp tiles.
inline int64_t gae_warp_blocks(const GaeArgs& a) {
  if (a.cu_seqlens)  // one more than needed: also with no row there are gaps to clear
    return gae_tiles(a.rows, a.steps, true, kGaeWarpTile) / kGaeWarps + 1;
  return (a.rows + kGaeWarps - 1) / kGaeWarps * gae_tiles(1, a.steps, false, kGaeWarpTile);
}

inline GaeLayout gae_layout(const GaeArgs& a) {
  if (a.cu_seqlens) return GaeLayout::kPacked;
  const bool time_major = a.rewards_step != 1 && a.rewards_row == 1 && a.rows > 1;
  return time_major ? GaeLayout::kTimeMajor : GaeLayout::kRows;
}

inline bool gae_uses_block_tiles(const GaeArgs& a) {
  return gae_layout(a) == GaeLayout::kRows && a.steps > kGaeWarpTile;
}

// How many slots Source::finish fills.
inline int64_t gae_slots(const GaeArgs& a) {
  return gae_uses_block_tiles(a)
             ? gae_tiles(a.rows, a.steps, false, kGaeBlockTile) * kGaeWarps
             : gae_tiles(a.rows, a.steps, a.cu_seqlens != nullptr, kGaeWarpTile);
}

// One launch, and a memset of the workspace where rows have several tiles.
template <class Source>
void launch_gae(const char* op, const Source& source, Stream stream) {
  const GaeArgs& a = source.gae();
  if (a.steps == 0 || (a.rows == 0 && !a.cu_seqlens)) return;
  const GaeWorkspace workspace{reinterpret_cast<uint32_t*>(a.workspace),
                               reinterpret_cast<GaeTileState*>(a.workspace + kGaeStateBytes)};
  const auto run = [&](auto kernel, int64_t blocks, int64_t chained_tiles) {
    if (chained_tiles > 0)
      zero_on_stream(a.workspace, kGaeStateBytes * (1 + chained_tiles), stream);
    launch(kernel, gae_grid(op, a, blocks), dim3(kGaeWarps * kWarp), 0, stream, source, workspace);
  };
  using L = GaeLayout;
  const int64_t blocks = gae_warp_blocks(a), slots = gae_slots(a);
  const L layout = gae_layout(a);
  if (layout == L::kPacked) return run(gae_warp_tiles<L::kPacked, true, Source>, blocks, slots);
  if constexpr (Source::kAnyStrides) {
    if (layout == L::kTimeMajor && a.steps > kGaeWarpTile)
      return run(gae_warp_tiles<L::kTimeMajor, true, Source>, blocks, slots);
    if (layout == L::kTimeMajor)
      return run(gae_warp_tiles<L::kTimeMajor, false, Source>, blocks, 0);
  }
  if (a.steps <= kGaeWarpTile) return run(gae_warp_tiles<L::kRows, false, Source>, blocks, 0);
  const int64_t tiles = slots / kGaeWarps;
  if (a.steps <= kGaeBlockTile) return run(gae_block_tiles<false, Source>, tiles, 0);
  run(gae_block_tiles<true, Source>, tiles, tiles);
}

}  // namespace ic
