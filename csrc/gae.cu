// gae on CUDA: parallel over rows and over time.
//
// A warp takes 256 positions of a row, 8 for each lane: it loads them coalesced, stages them in
// shared memory, composes each lane's steps to a map, scans the maps over the lanes, and replays
// its steps from the state that reaches it, by the same gae_step as the CPU. Then
//   warp tiles   a row is cut into tiles of a warp: rows of at most 256 steps; packed rows;
//   time-major inputs, of
//                which a block of 8 warps reads 8 rows together, so that 32-byte sectors are used
//                whole
//   block tiles  long contiguous rows are cut into tiles of a block, 2048 steps
// Tiles of a row are chained (gae_scan.cuh) in the order of tickets, one memset and one launch, no
// host sync.
//
// Bytes per step: 8 read (float32) and 8 written, 1 more for each of mask and dones. At the 4.8
// TB/s of an H200 256 x 131072 steps take 0.112 ms. The states handed on add 32 bytes for each
// tile.
#include "gae.h"
#include "gae_scan.cuh"
#include "gpu.cuh"

namespace ic {
namespace {

constexpr int kWarps = 8, kItems = 8;
static_assert(kWarp * kItems == kGaeWarpTile && kWarps * kGaeWarpTile == kGaeBlockTile, "");

// A warp's positions in shared memory. One word of padding after every 8 keeps both sides free of
// bank conflicts: lanes write neighbours, and read 8 apart.
constexpr int kStaged = static_cast<int>(kGaeWarpTile + kGaeWarpTile / kItems);

IC_GPU int staged(int position) { return position + position / kItems; }

enum Flags : uint8_t { kUnmasked = 1, kDone = 2 };

struct Stage {
  float reward[kStaged], value[kStaged];  // then advantage and return
  uint8_t flags[kGaeWarpTile];
};

// An element as it lies in memory: converted only when all loads of a lane are under way.
IC_GPU uint32_t load_bits(const void* base, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const uint32_t*>(base)[i];
  return static_cast<const uint16_t*>(base)[i];
}

IC_GPU float float_of(uint32_t bits, Dtype dtype) {
  const uint16_t half = static_cast<uint16_t>(bits);
  if (dtype == Dtype::kBFloat16) return to_float(BFloat16{half});
  if (dtype == Dtype::kFloat16) return to_float(Float16{half});
  return float_from_bits(bits);
}

// What one lane loads of a tile: kItems steps of any rows.
struct Loads {
  uint32_t reward[kItems], value[kItems];
  uint8_t flags[kItems];

  IC_GPU void step(const GaeArgs& a, int item, int64_t row, int64_t t) {
    reward[item] = load_bits(a.rewards, a.rewards_dtype, row * a.rewards_row + t * a.rewards_step);
    value[item] = load_bits(a.values, a.values_dtype, row * a.values_row + t * a.values_step);
    flags[item] = !a.mask || a.mask[row * a.mask_row + t * a.mask_step] ? kUnmasked : 0;
    if (a.dones && a.dones[row * a.dones_row + t * a.dones_step]) flags[item] |= kDone;
  }

  IC_GPU void nothing(int item) {
    reward[item] = value[item] = 0;
    flags[item] = 0;
  }

  IC_GPU void put(const GaeArgs& a, int item, Stage& stage, int position) const {
    stage.reward[staged(position)] = float_of(reward[item], a.rewards_dtype);
    stage.value[staged(position)] = float_of(value[item], a.values_dtype);
    stage.flags[position] = flags[item];
  }
};

// Stages `count` positions of a row, the first of which is step t_last, those after it earlier
// steps.
IC_GPU void stage_row(const GaeArgs& a, Stage& stage, int64_t row, int64_t t_last, int64_t count) {
  Loads loads;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int position = i * kWarp + lane_index();
    if (position < count) {
      loads.step(a, i, row, t_last - position);
    } else {
      loads.nothing(i);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) loads.put(a, i, stage, i * kWarp + lane_index());
  __syncwarp();
}

// Stages the same positions of kWarps rows from row0 on, one for each warp; neighbouring threads
// load neighbouring rows.
IC_GPU void stage_time_major(const GaeArgs& a, Stage (&stages)[kWarps], int64_t row0,
                             int64_t t_last, int64_t count) {
  const int r = static_cast<int>(threadIdx.x) % kWarps,
            first = static_cast<int>(threadIdx.x) / kWarps;
  Loads loads;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int position = i * kWarp + first;
    if (position < count && row0 + r < a.rows) {
      loads.step(a, i, row0 + r, t_last - position);
    } else {
      loads.nothing(i);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) loads.put(a, i, stages[r], i * kWarp + first);
  __syncthreads();
}

IC_GPU GaeInput staged_step(const Stage& stage, int item) {
  const int position = lane_index() * kItems + item;
  const uint8_t flags = stage.flags[position];
  return {stage.reward[staged(position)], stage.value[staged(position)], (flags & kUnmasked) != 0,
          (flags & kDone) != 0};
}

// The run of this lane's positions.
IC_GPU GaeMap lane_run(const GaeArgs& a, const Stage& stage) {
  GaeMap run = kGaeIdentity;
#pragma unroll
  for (int i = 0; i < kItems; ++i) run = gae_prepend(staged_step(stage, i), run, a.gamma, a.lambda);
  return run;
}

// This lane's steps from the state after them on, then the warp's outputs, coalesced. `out` is
// where step 0 of the row goes.
IC_GPU void replay(const GaeArgs& a, Stage& stage, GaeState state, int64_t out, int64_t t_last,
                   int64_t count) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = staged(lane_index() * kItems + i);
    const GaeInput step = staged_step(stage, i);
    if (step.done) state = {0.0f, 0.0f};
    if (step.unmasked) state = gae_step(state, step.reward, step.value, a.gamma, a.lambda);
    stage.reward[at] = step.unmasked ? state.advantage : 0.0f;
    stage.value[at] = step.unmasked ? state.advantage + step.value : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int position = i * kWarp + lane_index();
    if (position >= count) continue;
    a.advantages[out + t_last - position] = stage.reward[staged(position)];
    a.returns[out + t_last - position] = stage.value[staged(position)];
  }
}

IC_GPU GaeState initial_state(const GaeArgs& a, int64_t row) {
  return {a.bootstrap ? a.bootstrap[row] : 0.0f, 0.0f};
}

// Packed steps before the first and after the last row belong to no row.
IC_GPU void clear_gaps(const GaeArgs& a) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t begin = a.cu_seqlens[0], end = a.cu_seqlens[a.rows];
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.steps; i += threads) {
    if (i >= begin && i < end) {
      if (i + threads < end) i += (end - i - 1) / threads * threads;
      continue;
    }
    a.advantages[i] = a.returns[i] = 0.0f;
  }
}

enum class Layout { kRows, kTimeMajor, kPacked };

struct Workspace {
  uint32_t* ticket;  // of kGaeStateBytes, in front
  GaeTileState* tiles;
};

// A warp for each tile of 256 positions.
template <Layout kLayout, bool kChained>
__global__ void __launch_bounds__(kWarps* kWarp) warp_tiles(GaeArgs a, Workspace workspace) {
  SHARED_ARRAY(Stage, stages, kWarps);
  Stage& stage = stages[warp_index()];
  const int64_t number = kChained ? draw_ticket(workspace.ticket) : blockIdx.x;
  int64_t row, index, tile0, first = 0,
                             last = a.steps;  // tile `index` of a row of steps [first, last)
  if (kLayout == Layout::kPacked) {
    clear_gaps(a);
    if (a.rows == 0) return;
    const int64_t tile = number * kWarps + warp_index();
    const GaeRow found = gae_find_row(a.cu_seqlens, a.rows, a.steps, tile);
    row = found.row, first = found.first, last = found.last, tile0 = found.tile0;
    index = tile - tile0;
  } else {
    // Tickets go through all rows before the next tile of any: by then most predecessors are done.
    const int64_t groups = (a.rows + kWarps - 1) / kWarps,
                  tiles = (a.steps + kGaeWarpTile - 1) / kGaeWarpTile;
    row = number % groups * kWarps + warp_index();
    index = number / groups;
    tile0 = row * tiles;
  }
  const int64_t t_last = last - 1 - index * kGaeWarpTile, left = t_last + 1 - first;
  const int64_t count = left < kGaeWarpTile ? left : kGaeWarpTile;
  if (kLayout == Layout::kTimeMajor) stage_time_major(a, stages, row - warp_index(), t_last, count);
  if (row >= a.rows || count <= 0) return;
  const int64_t address_row = kLayout == Layout::kPacked ? 0 : row;
  if (kLayout != Layout::kTimeMajor) stage_row(a, stage, address_row, t_last, count);

  const GaeMap scanned = gae_warp_scan(lane_run(a, stage));
  GaeState after = initial_state(a, row);
  if constexpr (kChained) {
    const GaeMap all = shuffle_from(scanned, kWarp - 1);
    GaeTileState* tiles = workspace.tiles + tile0;
    if (left > kGaeWarpTile) gae_publish_run(tiles + index, all);
    after = gae_look_back(tiles, index, after);
    if (left > kGaeWarpTile) gae_publish_state(tiles, index, all, after);
  }
  const GaeMap later = shuffle_up(scanned, 1);
  if (lane_index() > 0) after = gae_apply(later, after);
  replay(a, stage, after, address_row * a.steps, t_last, count);
}

// A block for each tile of 2048 positions.
template <bool kChained>
__global__ void __launch_bounds__(kWarps* kWarp) block_tiles(GaeArgs a, Workspace workspace) {
  SHARED_ARRAY(Stage, stages, kWarps);
  SHARED_ARRAY(GaeMap, of_warp, kWarps);
  SHARED_ARRAY(GaeState, after_tile, 1);
  Stage& stage = stages[warp_index()];
  const int64_t number = kChained ? draw_ticket(workspace.ticket) : blockIdx.x;
  const int64_t row = number % a.rows, index = number / a.rows;
  const int64_t tiles = (a.steps + kGaeBlockTile - 1) / kGaeBlockTile;
  const int64_t t_last = a.steps - 1 - index * kGaeBlockTile - warp_index() * kGaeWarpTile;
  const int64_t left =
      t_last + 1;  // of this warp; below 1 it has nothing to do, but meets the others
  stage_row(a, stage, row, t_last, left < kGaeWarpTile ? left : kGaeWarpTile);

  const GaeMap scanned = gae_warp_scan(lane_run(a, stage));
  if (lane_index() == kWarp - 1) of_warp[warp_index()] = scanned;
  __syncthreads();
  GaeMap later = kGaeIdentity;  // of the warps before this one
  for (int w = 0; w < warp_index(); ++w) later = gae_compose(of_warp[w], later);
  GaeState after = initial_state(a, row);
  if constexpr (kChained) {
    if (warp_index() == 0) {
      GaeMap all = of_warp[0];
      for (int w = 1; w < kWarps; ++w) all = gae_compose(of_warp[w], all);
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
  if (left > 0)
    replay(a, stage, after, row * a.steps, t_last, left < kGaeWarpTile ? left : kGaeWarpTile);
}

template <class Kernel>
void launch_tiles(Kernel kernel, const GaeArgs& a, int64_t blocks, int64_t tiles, bool chained,
                  Stream stream) {
  IC_CHECK(blocks <= 0x7fffffff, "gae: at most 2^31 - 1 blocks, got ", blocks, " for ", a.rows,
           " rows of ", a.steps, " steps");
  const Workspace workspace{reinterpret_cast<uint32_t*>(a.workspace),
                            reinterpret_cast<GaeTileState*>(a.workspace + kGaeStateBytes)};
  if (chained) zero_on_stream(a.workspace, kGaeStateBytes * (1 + tiles), stream);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp), 0, stream, a,
         workspace);
}

}  // namespace

void gae_cuda(const GaeArgs& a, void* stream) {
  if (a.steps == 0 || (a.rows == 0 && !a.cu_seqlens)) return;
  if (a.cu_seqlens) {
    const int64_t tiles = gae_tiles(a.rows, a.steps, true, kGaeWarpTile);
    return launch_tiles(warp_tiles<Layout::kPacked, true>, a, (tiles + kWarps) / kWarps, tiles,
                        true, stream);
  }
  const bool time_major = a.rewards_step != 1 && a.rewards_row == 1 && a.rows > 1;
  const int64_t groups = (a.rows + kWarps - 1) / kWarps;
  if (time_major) {
    const int64_t per_row = gae_tiles(1, a.steps, false, kGaeWarpTile);
    return launch_tiles(
        per_row > 1 ? warp_tiles<Layout::kTimeMajor, true> : warp_tiles<Layout::kTimeMajor, false>,
        a, groups * per_row, a.rows * per_row, per_row > 1, stream);
  }
  if (a.steps <= kGaeWarpTile)
    return launch_tiles(warp_tiles<Layout::kRows, false>, a, groups, 0, false, stream);
  const int64_t per_row = gae_tiles(1, a.steps, false, kGaeBlockTile);
  launch_tiles(per_row > 1 ? block_tiles<true> : block_tiles<false>, a, a.rows * per_row,
               a.rows * per_row, per_row > 1, stream);
}

}  // namespace ic
