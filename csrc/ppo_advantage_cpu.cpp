// ppo_advantage on the CPU: rows in parallel, one sweep per row while it is in cache; a second
// sweep where whitening needs the moments of all rows.
#include "gae_row.h"
#include "parallel.h"
#include "ppo_advantage.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

struct Row {
  int64_t offset;  // of its first step
  int64_t steps;
};

Row row_of(const PpoAdvantageArgs& a, int64_t b) {
  const int32_t* cu = a.gae.cu_seqlens;
  if (cu) return {cu[b], cu[b + 1] - cu[b]};
  return {b * a.gae.steps, a.gae.steps};
}

void write_rewards(const PpoAdvantageArgs& a, int64_t b, Row row) {
  const uint8_t* mask = a.mask + row.offset;
  float* rewards = a.rewards + row.offset;
  int64_t paid = -1;
  for (int64_t t = 0; t < row.steps; ++t) {
    const int64_t i = row.offset + t;
    rewards[t] = mask[t] ? kl_reward(a.kl_coef, a.logprobs[i], a.ref_logprobs[i]) : 0.0f;
    if (mask[t]) paid = t;
  }
  if (a.score_index) paid = a.score_index[b];
  if (paid < 0 || paid >= row.steps || !mask[paid]) return;
  rewards[paid] += clipped_score(a.scores[b], a.reward_clip);
}

Moments moments_of(const float* x, const uint8_t* mask, int64_t n) {
  double count = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    count += mask[i] ? 1.0 : 0.0;
    sum += mask[i] ? x[i] : 0.0;
  }
  if (count == 0) return {0, 0, 0};
  const double mean = sum / count;
  for (int64_t i = 0; i < n; ++i) {
    const double d = mask[i] ? x[i] - mean : 0.0;
    m2 += d * d;
  }
  return {count, mean, m2};
}

Moments merge_rows(const PpoAdvantageArgs& a) {
  Moments all{0, 0, 0};
  for (int64_t b = 0; b < a.gae.rows; ++b) all = merge_moments(all, a.row_moments[b]);
  return all;
}

// x <- (x - mean) rsqrt(var + 1e-8) + shift on unmasked steps.
void scale(float* out, const float* x, const uint8_t* mask, int64_t n, float mean, float var,
           float shift) {
  const float factor = whiten_factor(var);
  for (int64_t i = 0; i < n; ++i)
    out[i] = (!mask || mask[i]) ? whitened(x[i], mean, factor, shift) : 0.0f;
}

void scale_rows(const PpoAdvantageArgs& a, float* x, Moments all, bool keep_mean, int64_t begin,
                int64_t end) {
  const double var = all.m2 / (a.unbiased ? all.count - 1 : all.count);
  const float mean = static_cast<float>(all.mean);
  for (int64_t b = begin; b < end; ++b) {
    const Row row = row_of(a, b);
    float* first = x + row.offset;
    scale(first, first, a.mask + row.offset, row.steps, mean, static_cast<float>(var),
          keep_mean ? mean : 0.0f);
  }
}

}  // namespace

void ppo_advantage_cpu(const PpoAdvantageArgs& a) {
  const int64_t rows = a.gae.rows, steps = a.gae.steps;
  const int64_t per_row = a.gae.cu_seqlens ? steps / (rows + 1) + 1 : steps;
  const int64_t grain = 2048 / (per_row + 1) + 1;
  const auto each_row = [&](auto&& f) { parallel_rows(rows, grain, a.gae.threads, f); };
  const auto finish_row = [&](int64_t b, Row row) {
    gae_row(a.gae, b);
    a.row_moments[b] = moments_of(a.gae.advantages + row.offset, a.mask + row.offset, row.steps);
  };
  gae_clear_gaps(a.gae);
  if (a.gae.cu_seqlens)
    for (int64_t i = 0; i < steps; ++i)
      if (i < a.gae.cu_seqlens[0] || i >= a.gae.cu_seqlens[rows]) a.rewards[i] = 0.0f;

  if (a.whiten_rewards) {
    each_row([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Row row = row_of(a, b);
        write_rewards(a, b, row);
        a.row_moments[b] = moments_of(a.rewards + row.offset, a.mask + row.offset, row.steps);
      }
    });
    const Moments all = merge_rows(a);
    each_row([&](int64_t begin, int64_t end) {
      if (all.count > 1) scale_rows(a, a.rewards, all, true, begin, end);
      for (int64_t b = begin; b < end; ++b) finish_row(b, row_of(a, b));
    });
  } else {
    each_row([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Row row = row_of(a, b);
        write_rewards(a, b, row);
        finish_row(b, row);
      }
    });
  }

  const Moments all = merge_rows(a);
  a.stats[0] = static_cast<float>(all.count);
  a.stats[1] = static_cast<float>(all.mean);
  a.stats[2] = static_cast<float>(all.m2);
  if (!a.whiten || all.count <= 1) return;
  each_row(
      [&](int64_t begin, int64_t end) { scale_rows(a, a.gae.advantages, all, false, begin, end); });
}

void whiten_cpu(const WhitenArgs& a) {
  parallel_rows(a.count, 16384, a.threads, [&](int64_t begin, int64_t end) {
    scale(a.out + begin, a.advantages + begin, a.mask ? a.mask + begin : nullptr, end - begin,
          *a.mean, *a.var, 0.0f);
  });
}

}  // namespace ic::IC_ISA
