// ppo_advantage on CUDA. Rewards are formed where GAE loads its steps (gae_tiles.cuh), and each
// warp leaves the moments of its 256 advantages:
//   paid_steps      where each row's score goes: from the end of the mask to its first step
//   shape_rewards   with whiten_rewards only: rewards, and their moments by warps
//   gae tiles       rewards (or rewards whitened), advantages, returns, moments by warps
//   merge           one block: the moments of all, in a fixed order
//   whiten          advantages, in place
//
// Bytes per step: 25 = logprobs, ref_logprobs, values, mask read; rewards, advantages, returns
// written; whitening reads and writes 9 more, whiten_rewards 17. 4.2 M steps at the 4.8 TB/s of an
// H200: 22 us, 30 with whitening, 44 with both.
#include "gae_tiles.cuh"
#include "ppo_advantage.h"

namespace ic {
namespace {

constexpr int kThreads = kGaeWarps * kWarp;

// x <- (x - mean) factor (+ mean)
struct Whitening {
  float mean, factor;
};

// ---- moments

// Of the warp's elements, kGaeItems for each lane. Two passes over registers.
IC_GPU void store_moments(Moments* to, const float (&x)[kGaeItems], uint32_t unmasked) {
  double sum = 0.0, m2 = 0.0;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) sum += unmasked >> i & 1 ? x[i] : 0.0f;
  const double count = warp_sum(__popc(unmasked));
  sum = warp_sum(sum);
  const double mean = count > 0.0 ? sum / count : 0.0;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const double d = unmasked >> i & 1 ? x[i] - mean : 0.0;
    m2 += d * d;
  }
  m2 = warp_sum(m2);
  if (lane_index() == 0) *to = {count, mean, m2};
}

// One block. A sample's second moment about the mean of all is m2 + n (mean - all's mean)^2.
constexpr int kMergeWarps = 32;

__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge(const Moments* parts, int64_t n, bool unbiased, Whitening* whitening, float* stats) {
  double count = 0.0, sum = 0.0, m2 = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    count += parts[i].count;
    sum += parts[i].count * parts[i].mean;
  }
  count = block_sum<kMergeWarps>(count);
  sum = block_sum<kMergeWarps>(sum);
  const double mean = count > 0.0 ? sum / count : 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const double d = parts[i].mean - mean;
    m2 += parts[i].m2 + parts[i].count * d * d;
  }
  m2 = block_sum<kMergeWarps>(m2);
  if (threadIdx.x != 0) return;
  const double var = m2 / (unbiased ? count - 1.0 : count);
  // One element or none is left as it is.
  *whitening = count > 1.0
                   ? Whitening{static_cast<float>(mean), whiten_factor(static_cast<float>(var))}
                   : Whitening{0.0f, 1.0f};
  if (!stats) return;
  stats[0] = static_cast<float>(count);
  stats[1] = static_cast<float>(mean);
  stats[2] = static_cast<float>(m2);
}

// ---- rewards

// A warp for each row: the step, counted from where the row lies, that its score is paid at; or -1.
__global__ void __launch_bounds__(kThreads) paid_steps(PpoAdvantageArgs a, int64_t* paid) {
  const int64_t row = int64_t{blockIdx.x} * kGaeWarps + warp_index();
  if (row >= a.gae.rows) return;
  const bool packed = a.gae.cu_seqlens != nullptr;
  const int64_t first = packed ? gae_offset(a.gae, row) : 0;
  const int64_t last = packed ? gae_offset(a.gae, row + 1) : a.gae.steps;
  int64_t found = -1;
  if (a.score_index) {
    const int64_t index = a.score_index[row];
    if (index >= 0 && index < last - first) found = first + index;
  } else {
    const uint8_t* mask = a.mask + (packed ? 0 : row * a.gae.steps);
    for (int64_t t = last - 1 - lane_index(); found < 0; t -= kWarp) {
      const uint32_t unmasked = __ballot_sync(kAllLanes, t >= first && mask[t]);
      const int64_t latest = t + lane_index();  // lane 0's
      if (unmasked) found = latest - (__ffs(static_cast<int>(unmasked)) - 1);
      if (latest < first) break;
    }
  }
  if (lane_index() == 0) paid[row] = found;
}

// What a row's steps share.
struct PaidRow {
  int64_t paid;
  float score;
};

IC_GPU PaidRow paid_row(const PpoAdvantageArgs& a, const int64_t* paid, int64_t row) {
  return {paid[row], clipped_score(a.scores[row], a.reward_clip)};
}

IC_GPU float shaped(const PpoAdvantageArgs& a, PaidRow row, float logprob, float ref_logprob,
                    bool unmasked, int64_t t) {
  const float reward = unmasked ? kl_reward(a.kl_coef, logprob, ref_logprob) : 0.0f;
  return unmasked && t == row.paid ? reward + row.score : reward;
}

template <GaeLayout kLayout>
__global__ void __launch_bounds__(kThreads)
    shape_rewards(PpoAdvantageArgs a, const int64_t* paid, Moments* parts) {
  if (a.gae.rows == 0) return;
  const GaeTile tile = gae_warp_tile<kLayout>(a.gae, blockIdx.x);
  if (tile.row >= a.gae.rows) return;
  if (kLayout == GaeLayout::kPacked &&
      tile.number >= gae_tiles(a.gae.rows, a.gae.steps, true, kGaeWarpTile))
    return;
  const int count = tile.count();
  const PaidRow row = paid_row(a, paid, tile.row);
  float rewards[kGaeItems];
  uint32_t unmasked = 0;
#pragma unroll
  for (int i = 0; i < kGaeItems; ++i) {
    const int position = i * kWarp + lane_index();
    rewards[i] = 0.0f;
    if (position >= count) continue;
    const int64_t t = tile.last - position, at = tile.at * a.gae.steps + t;
    const bool real = a.mask[at] != 0;
    rewards[i] = shaped(a, row, a.logprobs[at], a.ref_logprobs[at], real, t);
    unmasked |= real << i;
    a.rewards[at] = rewards[i];
  }
  store_moments(parts + tile.number, rewards, unmasked);
}

// ---- GAE's steps

template <bool kWhitenRewards>  // they are shaped already
struct Steps {
  static constexpr bool kAnyStrides = false;
  PpoAdvantageArgs a;
  const int64_t* paid;
  const Whitening* of_rewards;
  Moments* parts;

  struct Row {
    PaidRow paid;
    Whitening whitening;
  };
  struct Raw {
    float reward, logprob, ref_logprob, value;
    uint8_t unmasked, done;
  };

  IC_HOST_DEVICE const GaeArgs& gae() const { return a.gae; }

  IC_GPU Row row(int64_t r) const {
    if constexpr (kWhitenRewards) return {{}, *of_rewards};
    return {paid_row(a, paid, r), {}};
  }

  IC_GPU Raw load(int64_t row, int64_t t) const {
    const int64_t i = row * a.gae.steps + t;
    Raw raw{};
    if constexpr (kWhitenRewards) {
      raw.reward = a.rewards[i];
    } else {
      raw.logprob = a.logprobs[i];
      raw.ref_logprob = a.ref_logprobs[i];
    }
    raw.value = static_cast<const float*>(a.gae.values)[i];
    raw.unmasked = a.mask[i];
    if (a.gae.dones) raw.done = a.gae.dones[i];
    return raw;
  }

  IC_GPU GaeInput input(const Row& row, const Raw& raw, int64_t at, int64_t t) const {
    const bool unmasked = raw.unmasked != 0;
    float reward;
    if constexpr (kWhitenRewards) {
      const Whitening w = row.whitening;
      reward = unmasked ? whitened(raw.reward, w.mean, w.factor, w.mean) : 0.0f;
    } else {
      reward = shaped(a, row.paid, raw.logprob, raw.ref_logprob, unmasked, t);
    }
    a.rewards[at * a.gae.steps + t] = reward;
    return {reward, raw.value, unmasked, raw.done != 0};
  }

  IC_GPU void finish(int64_t slot, const float (&advantages)[kGaeItems], uint32_t unmasked) const {
    store_moments(parts + slot, advantages, unmasked);
  }

  IC_GPU void clear(int64_t i) const {
    a.rewards[i] = a.gae.advantages[i] = a.gae.returns[i] = 0.0f;
  }
};

// ---- whitening

struct Merged {
  const Whitening* all;
  IC_GPU Whitening get() const { return *all; }
};

struct Given {
  const float *mean, *var;
  IC_GPU Whitening get() const { return {*mean, whiten_factor(*var)}; }
};

constexpr int kWhitenItems = 4;

// `out` may be `x`.
template <class How>
__global__ void __launch_bounds__(kThreads)
    whiten(const float* x, const uint8_t* mask, float* out, int64_t n, How how) {
  const Whitening w = how.get();
  const int64_t first = int64_t{blockIdx.x} * kThreads * kWhitenItems + threadIdx.x;
  float value[kWhitenItems];
  uint8_t unmasked[kWhitenItems];
#pragma unroll
  for (int k = 0; k < kWhitenItems; ++k) {
    const int64_t i = first + k * kThreads;
    value[k] = i < n ? x[i] : 0.0f;
    unmasked[k] = i < n && mask ? mask[i] : 1;
  }
#pragma unroll
  for (int k = 0; k < kWhitenItems; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < n) out[i] = unmasked[k] ? whitened(value[k], w.mean, w.factor, 0.0f) : 0.0f;
  }
}

template <class How>
void launch_whiten(const float* x, const uint8_t* mask, float* out, int64_t n, How how,
                   Stream stream) {
  constexpr int64_t kPerBlock = kThreads * kWhitenItems;
  const int64_t blocks = (n + kPerBlock - 1) / kPerBlock;
  if (blocks == 0) return;
  IC_CHECK(blocks <= 0x7fffffff, "whiten_advantages: too many elements, got ", n);
  launch(whiten<How>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, x, mask, out,
         n, how);
}

}  // namespace

void ppo_advantage_cuda(const PpoAdvantageArgs& a, void* stream) {
  const int64_t rows = a.gae.rows, steps = a.gae.steps;
  const bool packed = a.gae.cu_seqlens != nullptr, empty = rows == 0 || steps == 0;
  // The workspace, in the order of ppo_advantage_workspace_bytes.
  uint8_t* at = a.gae.workspace + gae_workspace_bytes(rows, steps, packed);
  Whitening* whitening = reinterpret_cast<Whitening*>(at);
  int64_t* paid = reinterpret_cast<int64_t*>(at += 2 * sizeof(Whitening));
  Moments* parts = reinterpret_cast<Moments*>(at + rows * sizeof(int64_t));
  const auto merge_parts = [&](int64_t n, Whitening* to, float* stats) {
    launch(merge, dim3(1), dim3(kMergeWarps * kWarp), 0, stream, parts, n, a.unbiased, to, stats);
  };

  const dim3 row_blocks(static_cast<unsigned>((rows + kGaeWarps - 1) / kGaeWarps));
  if (!empty) launch(paid_steps, row_blocks, dim3(kThreads), 0, stream, a, paid);
  if (a.whiten_rewards && !empty) {
    launch(packed ? shape_rewards<GaeLayout::kPacked> : shape_rewards<GaeLayout::kRows>,
           gae_grid("ppo_advantage", a.gae, gae_warp_blocks(a.gae)), dim3(kThreads), 0, stream, a,
           paid, parts);
    merge_parts(gae_tiles(rows, steps, packed, kGaeWarpTile), whitening, nullptr);
    launch_gae("ppo_advantage", Steps<true>{a, paid, whitening, parts}, stream);
  } else {
    launch_gae("ppo_advantage", Steps<false>{a, paid, nullptr, parts}, stream);
  }
  merge_parts(empty ? 0 : gae_slots(a.gae), whitening + 1, a.stats);
  if (!a.whiten) return;
  const int64_t n = packed ? steps : rows * steps;
  launch_whiten(a.gae.advantages, a.mask, a.gae.advantages, n, Merged{whitening + 1}, stream);
}

void whiten_cuda(const WhitenArgs& a, void* stream) {
  launch_whiten(a.advantages, a.mask, a.out, a.count, Given{a.mean, a.var}, stream);
}

}  // namespace ic
