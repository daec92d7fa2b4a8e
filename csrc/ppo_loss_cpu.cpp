// ppo_loss on the CPU: a sweep over the mask for the normalizer, then one over everything else.
#include "parallel.h"
#include "ppo_loss.h"
#include "simd.h"
// After the vectors that it is written in.
#include "ppo_loss_token.h"

namespace ic::IC_ISA {
namespace {

struct Segment {
  int64_t begin, end;
};

Segment segment_of(const PpoLossArgs& a, int64_t s) {
  if (a.cu_seqlens) return {a.cu_seqlens[s], a.cu_seqlens[s + 1]};
  const int64_t end = (s + 1) * a.segment_tokens;
  return {s * a.segment_tokens, end < a.tokens ? end : a.tokens};
}

// A term's sum in float64, lane by lane: thousands of terms of either sign would lose digits in
// float32.
struct LaneSums {
  double lane[kLanes];
};

struct Coefficients {
  float weight;  // w / normalizer
  bool gradients;
};

// Up to 16 tokens from i on: adds to the sums, writes the gradients.
IC_INLINE void tokens16(const PpoLossArgs& a, int64_t i, int n, Coefficients c,
                        LaneSums (&sums)[kPpoSums]) {
  const Vec zero = broadcast(0.0f);
  const Mask kept = load_mask(a.mask + i, n);
  const auto in = [&](const float* x) __attribute__((always_inline)) {
    if (!x) return zero;
    return select(kept, n == kLanes ? load(x + i) : load_partial(x + i, n, 0.0f), zero);
  };
  const auto put = [&](float* x, Vec gradient) __attribute__((always_inline)) {
    if (!c.gradients || !x) return;
    gradient = select(kept, gradient, zero);
    if (n == kLanes) {
      store(x + i, gradient);
    } else {
      store_partial(x + i, gradient, n);
    }
  };
  const auto add = [&](int which, Vec x) __attribute__((always_inline)) {
    float lane[kLanes];
    store(lane, select(kept, x, zero));
    for (int k = 0; k < kLanes; ++k) sums[which].lane[k] += lane[k];
  };

  const PpoToken<Vec> token{in(a.logprobs), in(a.old_logprobs), in(a.advantages),
                            in(a.weights),  in(a.values),       in(a.old_values),
                            in(a.returns),  in(a.entropy),      in(a.ref_logprobs)};
  const PpoTerms<Vec> terms = ppo_terms(a, token);
  put(a.grad_logprobs, broadcast(c.weight) * terms.slope);
  put(a.grad_values, broadcast(c.weight * a.value_coef) * terms.value_slope);
  put(a.grad_entropy, broadcast(-c.weight * a.entropy_coef));
  ppo_each_sum(a, token, terms, add);
}

double count_of(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  return static_cast<double>(count);
}

void run_segment(const PpoLossArgs& a, Segment segment, Coefficients c, double* out) {
  LaneSums sums[kPpoSums] = {};
  int64_t i = segment.begin;
  for (; i + kLanes <= segment.end; i += kLanes) tokens16(a, i, kLanes, c, sums);
  if (i < segment.end) tokens16(a, i, static_cast<int>(segment.end - i), c, sums);
  for (int k = 0; k < kPpoSums; ++k) {
    out[k] = 0;
    for (double x : sums[k].lane) out[k] += x;
  }
}

// Packed tokens before the first and after the last row belong to no row.
void clear_gaps(const PpoLossArgs& a) {
  if (!a.cu_seqlens) return;
  float* const gradients[] = {a.grad_logprobs, a.grad_values, a.grad_entropy};
  for (float* gradient : gradients) {
    if (!gradient) continue;
    for (int64_t i = 0; i < a.cu_seqlens[0]; ++i) gradient[i] = 0.0f;
    for (int64_t i = a.cu_seqlens[a.segments]; i < a.tokens; ++i) gradient[i] = 0.0f;
  }
}

}  // namespace

void ppo_loss_cpu(const PpoLossArgs& a) {
  clear_gaps(a);
  const int64_t per_segment = a.tokens / (a.segments + 1) + 1;
  const int64_t grain = 2048 / per_segment + 1;
  double total = 0;
  parallel_rows(a.segments, 8 * grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Segment segment = segment_of(a, s);
      a.workspace[s * kPpoSums] = count_of(a.mask + segment.begin, segment.end - segment.begin);
    }
  });
  for (int64_t s = 0; s < a.segments; ++s) {
    const double count = a.workspace[s * kPpoSums];
    total += a.by_sequence ? (count > 0 ? 1.0 : 0.0) : count;
  }
  const double normalizer = a.normalizer ? static_cast<double>(*a.normalizer) : total;
  const double scale = normalizer > 0 ? 1.0 / normalizer : 0.0;

  const bool gradients = a.grad_logprobs || a.grad_values || a.grad_entropy;
  parallel_rows(a.segments, grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double* sums = a.workspace + s * kPpoSums;
      const double count = sums[0];
      const double weight = !a.by_sequence ? 1.0 : count > 0 ? 1.0 / count : 0.0;
      run_segment(a, segment_of(a, s), {static_cast<float>(weight * scale), gradients}, sums);
      sums[kStatistics] *= weight;
    }
  });
  double sums[kPpoSums] = {};
  for (int64_t s = 0; s < a.segments; ++s)
    for (int k = 0; k < kPpoSums; ++k) sums[k] += a.workspace[s * kPpoSums + k];
  for (int k = 0; k < kStatistics; ++k) a.sums[k] = static_cast<float>(sums[k]);
  *a.loss = static_cast<float>(sums[kStatistics] * scale);
}

}  // namespace ic::IC_ISA
