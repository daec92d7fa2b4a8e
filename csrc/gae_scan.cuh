// GAE's recurrence in parallel over time, for the ops that have it in them.
//
// A run of steps is a map of the state after it to the state before it (GaeMap); maps compose
// associatively, so lanes scan them. What every thread composes with what is fixed by positions in
// the row, never by timing. Positions count from the end of the row: position 0 is its last step.
#pragma once

#include "gae.h"
#include "gpu.cuh"

namespace ic {

// ---- runs of steps

// state -> state: A = bias + from_value V' + from_advantage A', V = value.
struct GaeMap {
  float bias, from_value, from_advantage, value;
  // Nothing but masked steps: state passes. Else V is `value`, and a run with a done in it looks at
  // nothing after it: by selection, so that NaN there stays there.
  enum : uint32_t { kPasses = 0, kSteps = 1, kCuts = 3 } kind;
};

constexpr GaeMap kGaeIdentity{0.0f, 0.0f, 1.0f, 0.0f, GaeMap::kPasses};

IC_GPU GaeMap gae_constant(GaeState s) {
  return {s.advantage, 0.0f, 0.0f, s.next_value, GaeMap::kCuts};
}

struct GaeInput {
  float reward, value;
  bool unmasked, done;
};

// The run that `step` and then `after` are.
IC_GPU GaeMap gae_prepend(GaeInput step, GaeMap after, float gamma, float lambda) {
  if (step.done) after = gae_constant({0.0f, 0.0f});
  if (!step.unmasked) return after;
  const GaeState s = gae_step({after.value, after.bias}, step.reward, step.value, gamma, lambda);
  const float decay = gamma * lambda;
  const float from_value = after.kind == GaeMap::kPasses ? gamma : decay * after.from_value;
  const auto kind = after.kind == GaeMap::kCuts ? GaeMap::kCuts : GaeMap::kSteps;
  return {s.advantage, from_value, decay * after.from_advantage, s.next_value, kind};
}

// By selection, without branches: lanes differ in what they have to do.
IC_GPU GaeMap gae_compose(GaeMap before, GaeMap after) {
  const bool keep = before.kind == GaeMap::kCuts || after.kind == GaeMap::kPasses;
  const bool skip = before.kind == GaeMap::kPasses;
  const auto choose = [=](float composed, float kept, float skipped) {
    return skip ? skipped : keep ? kept : composed;
  };
  const float bias = before.bias + before.from_value * after.value;
  return {choose(bias + before.from_advantage * after.bias, before.bias, after.bias),
          choose(before.from_advantage * after.from_value, before.from_value, after.from_value),
          choose(before.from_advantage * after.from_advantage, before.from_advantage,
                 after.from_advantage),
          skip ? after.value : before.value, skip || !keep ? after.kind : before.kind};
}

IC_GPU GaeState gae_apply(GaeMap map, GaeState after) {
  if (map.kind == GaeMap::kPasses) return after;
  if (map.kind == GaeMap::kCuts) return {map.value, map.bias};
  const float bias = map.bias + map.from_value * after.next_value;
  return {map.value, bias + map.from_advantage * after.advantage};
}

// Of lane l: the run of lanes l, l - 1, .., 0 (a lower lane holds later steps).
IC_GPU GaeMap gae_warp_scan(GaeMap map) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const GaeMap after = shuffle_up(map, offset);
    if (lane_index() >= offset) map = gae_compose(map, after);
  }
  return map;
}

// ---- tiles that hand on the state

// A tile's own run, and for the last tile of a group of 32 the state before it too.
struct GaeTileState {
  GaeMap run;
  uint32_t ready;  // 1: run; 2: state as well
  GaeState state;
};
static_assert(sizeof(GaeTileState) == kGaeStateBytes, "as the workspace is sized");

IC_GPU void gae_publish_run(GaeTileState* tile, GaeMap run) {
  if (lane_index() != 0) return;
  tile->run = run;
  store_release(&tile->ready, 1);
}

// The state after tile `index` of a row: what its predecessors (later steps) make of the row's
// initial state. A warp does it. Lane l takes the run of the l-th tile before; the lane after them
// the state that the group before has reached, so a row's chain of waits has a link for each 32
// tiles.
IC_GPU GaeState gae_look_back(const GaeTileState* row, int64_t index, GaeState initial) {
  const int in_group = static_cast<int>(index % kWarp), lane = lane_index();
  GaeMap run = kGaeIdentity;
  if (lane < in_group) {
    const GaeTileState* tile = row + index - 1 - lane;
    wait_for_flag(&tile->ready, 1);
    run = tile->run;
  } else if (lane == in_group && index < kWarp) {
    run = gae_constant(initial);
  } else if (lane == in_group) {
    const GaeTileState* tile = row + index - 1 - in_group;
    wait_for_flag(&tile->ready, 2);
    run = gae_constant(tile->state);
  }
  __syncwarp();
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const GaeMap after = shuffle_down(run, offset);
    if (lane + offset < kWarp) run = gae_compose(run, after);
  }
  run = shuffle_from(run, 0);
  return {run.value, run.bias};
}

// For the last tile of a group, once the state after it is known.
IC_GPU void gae_publish_state(GaeTileState* row, int64_t index, GaeMap run, GaeState after) {
  if (lane_index() != 0 || index % kWarp != kWarp - 1) return;
  row[index].state = gae_apply(run, after);
  store_release(&row[index].ready, 2);
}

}  // namespace ic
