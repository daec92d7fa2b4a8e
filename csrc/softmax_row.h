// The softmax statistics of one row of logits in a single read, for every op that needs them: the
// same bits for the same row, wherever it lies and whoever asks. Included by per-ISA files only.
//
//   y[i] = row.load(i), the logits; T = temperature, scale = 1 / T
//   max = max_i y[i]     sum = sum_i e^(scale (y[i] - max))     dot = sum_i e^(..) (y[i] - max)
//   lse of y / T = scale max + log sum           entropy = log sum - scale dot / sum
//   log-probability of t = scale (y[t] - max) - log sum: never above 0, since sum >= 1
//
// Cut: blocks of kBlock logits, first their maximum, then their exponentials while they lie in L1.
// A block that raises the maximum rescales the sums. -inf (a masked token) weighs exactly 0; NaN
// and +inf make the sum NaN, as does a row of nothing but -inf make (-inf, 0).
#pragma once

#include "simd.h"

namespace ic::IC_ISA {

inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr float kMinusInf = -__builtin_inff();
inline constexpr int kBlock = 2048;

// e^(scale d) for d <= 0, or 0 from about -88 / scale down: a scale and the constants that go with
// it. 2^(c d) with c = scale log2 e: the polynomial's relative error is 1.6e-8, plus rounding; e^0
// is exactly 1.
class ScaledExp {
 public:
  IC_INLINE explicit ScaledExp(float scale)
      : c_(broadcast(scale * kLog2e)), lowest_(broadcast(-127.0f / (scale * kLog2e))) {}

  // d within the range where the result is not 0; NaN stays.
  IC_INLINE Vec clamp(Vec d) const { return max(lowest_, d); }

  // d has been clamped. At the lowest, n is -127 and the exponent field of the power of two 0: so
  // is e^d.
  IC_INLINE Vec of_clamped(Vec d) const {
    const Vec round = broadcast(12582912.0f + 127.0f);  // 1.5 * 2^23: its last bits become n + 127
    const Vec shifted = fma(d, c_, round);
    const Vec f = fma(d, c_, round - shifted);
    Vec q = broadcast(0x1.41fbbcp-13f);
    q = fma(q, f, broadcast(0x1.5f3e54p-10f));
    q = fma(q, f, broadcast(0x1.3b2d4cp-7f));
    q = fma(q, f, broadcast(0x1.c6aee8p-5f));
    q = fma(q, f, broadcast(0x1.ebfbdcp-3f));
    q = fma(q, f, broadcast(0x1.62e430p-1f));
    q = fma(q, f, broadcast(1.0f));
    return q * from_bits(shift_left(bits(shifted), 23));
  }

  IC_INLINE Vec operator()(Vec d) const { return of_clamped(clamp(d)); }

 private:
  Vec c_, lowest_;
};

IC_INLINE float first_lane(Vec a) {
  float lane[kLanes];
  store(lane, a);
  return lane[0];
}

// A row of logits as they lie in memory.
template <class T>
struct LogitsRow {
  const T* x;

  IC_INLINE Vec load(int64_t i) const { return ic::IC_ISA::load(x + i); }
  IC_INLINE Vec load_partial(int64_t i, int n, float fill = kMinusInf) const {
    return ic::IC_ISA::load_partial(x + i, n, fill);
  }
  IC_INLINE float at(int64_t i) const { return to_float(x[i]); }
  IC_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
};

// The same, capped: y = cap tanh(x / cap).
template <class T>
struct CappedRow {
  const T* x;
  float cap;

  IC_INLINE Vec capped(Vec v) const { return broadcast(cap) * tanh(v / broadcast(cap)); }
  IC_INLINE Vec load(int64_t i) const { return capped(ic::IC_ISA::load(x + i)); }
  IC_INLINE Vec load_partial(int64_t i, int n, float fill = kMinusInf) const {
    const Vec y = capped(ic::IC_ISA::load_partial(x + i, n, 0.0f));
    return select(iota() < broadcast_int(n), y, broadcast(fill));
  }
  IC_INLINE float at(int64_t i) const { return first_lane(load_partial(i, 1)); }
  IC_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
};

struct RowStats {
  float max, sum, dot;
  int64_t block;  // where the block starts that holds the first maximum
};

// dot only with kDot; it is 0 otherwise, and max and sum have the same bits.
template <bool kDot, class Row>
IC_INLINE RowStats softmax_row(const Row& row, int64_t n, float scale) {
  const ScaledExp exp_of(scale);
  const Vec zero = broadcast(0.0f);
  Vec sum[4] = {zero, zero, zero, zero}, dot[4] = {zero, zero, zero, zero};
  float running = kMinusInf;
  int64_t best_block = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    int64_t i = start;
    Vec top[4];
    for (Vec& v : top) v = broadcast(kMinusInf);
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) top[j] = max(row.load(i + j * kLanes), top[j]);
    for (; i + kLanes <= end; i += kLanes) top[0] = max(row.load(i), top[0]);
    if (i < end) top[0] = max(row.load_partial(i, static_cast<int>(end - i)), top[0]);
    const float block_max = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (block_max > running) {
      if (running > kMinusInf) {
        const Vec step = broadcast(running - block_max);
        const Vec factor = exp_of(step);
        for (int j = 0; j < 4; ++j) {
          if constexpr (kDot) dot[j] = fma(exp_of.clamp(step), sum[j], dot[j]) * factor;
          sum[j] = sum[j] * factor;
        }
      }
      running = block_max;
      best_block = start;
    }
    // Nothing but -inf so far: shift by 0 instead, for -inf - -inf is NaN.
    const Vec shift = broadcast(running > kMinusInf ? running : 0.0f);
    const auto add = [&](Vec y, int j) __attribute__((always_inline)) {
      const Vec d = exp_of.clamp(y - shift);
      const Vec e = exp_of.of_clamped(d);
      sum[j] = sum[j] + e;
      if constexpr (kDot) dot[j] = fma(e, d, dot[j]);
    };
    for (i = start; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) row.prefetch(i + kBlock + j * kLanes);
      for (int j = 0; j < 4; ++j) add(row.load(i + j * kLanes), j);
    }
    for (; i + kLanes <= end; i += kLanes) add(row.load(i), 0);
    if (i < end) add(row.load_partial(i, static_cast<int>(end - i)), 0);
  }
  return {running, reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])),
          kDot ? reduce_add((dot[0] + dot[1]) + (dot[2] + dot[3])) : 0.0f, best_block};
}

// The lowest index whose logit is the maximum. Only the block that holds it is read again.
template <class Row>
IC_INLINE int64_t row_argmax(const Row& row, int64_t n, const RowStats& stats) {
  const int64_t end = n - stats.block < kBlock ? n : stats.block + kBlock;
  const Vec top = broadcast(stats.max);
  VecInt best = broadcast_int(kBlock), index = iota();
  for (int64_t i = stats.block; i < end; i += kLanes) {
    const Vec y = end - i < kLanes ? row.load_partial(i, static_cast<int>(end - i)) : row.load(i);
    best = select((y == top) & (index < best), index, best);
    index = index + broadcast_int(kLanes);
  }
  int32_t lane[kLanes];
  __builtin_memcpy(lane, &best, sizeof lane);
  int32_t lowest = lane[0];
  for (int j = 1; j < kLanes; ++j) lowest = lane[j] < lowest ? lane[j] : lowest;
  return stats.block + lowest;
}

// ---- what a row's statistics say ----

IC_INLINE float row_lse(const RowStats& s, float scale) {
  return scale * s.max + __builtin_logf(s.sum);
}

// Once a row, so in float64: the two terms cancel where the token is likely.
IC_INLINE float row_logprob(const RowStats& s, float scale, float y) {
  const double above = static_cast<double>(y) - s.max;
  return static_cast<float>(scale * above - __builtin_log(static_cast<double>(s.sum)));
}

IC_INLINE float row_entropy(const RowStats& s, float scale) {
  return __builtin_logf(s.sum) - scale * (s.dot / s.sum);
}

}  // namespace ic::IC_ISA
