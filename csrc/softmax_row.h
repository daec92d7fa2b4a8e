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
// it. 2^(c d) with c = scale log2 e: the polynomial's relative error is 9e-8, plus rounding. e^0
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
    Vec q = broadcast(0x1.5bd97cp-10f);
    q = fma(q, f, broadcast(0x1.3ce8b2p-7f));
    q = fma(q, f, broadcast(0x1.c6b6dap-5f));
    q = fma(q, f, broadcast(0x1.ebf9c2p-3f));
    q = fma(q, f, broadcast(0x1.62e42ap-1f));
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
  static constexpr int kElement = sizeof(T);  // bytes
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
  static constexpr int kElement = sizeof(T);
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

// What softmax_row does with the exponentials besides adding them up.
struct KeepNothing {
  IC_INLINE void block(int64_t, float) {}
  IC_INLINE void exponential(int64_t, Vec) {}
};

// Keeps them for who wants them again: a load instead of a polynomial.
class KeptExponentials {
 public:
  // Floats of scratch for a row of n.
  static IC_INLINE int64_t size(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes + (n + kBlock - 1) / kBlock;
  }
  IC_INLINE KeptExponentials(float* scratch, int64_t n)
      : e_(scratch), shift_(scratch + (n + kLanes - 1) / kLanes * kLanes) {}

  IC_INLINE void block(int64_t start, float shift) { shift_[start / kBlock] = shift; }
  IC_INLINE void exponential(int64_t i, Vec e) { store(e_ + i, e); }

  // e^(scale (y[i] - shift)), the shift being that of the block which i is in.
  IC_INLINE const float* at(int64_t i) const { return e_ + i; }
  IC_INLINE float shift(int64_t i) const { return shift_[i / kBlock]; }

 private:
  float *e_, *shift_;
};

// dot only with kDot; it is 0 otherwise, and max and sum have the same bits.
template <bool kDot, class Row, class Keep = KeepNothing>
IC_INLINE RowStats softmax_row(const Row& row, int64_t n, float scale, Keep keep = {}) {
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
    const float top_so_far = running > kMinusInf ? running : 0.0f;
    const Vec shift = broadcast(top_so_far);
    keep.block(start, top_so_far);
    const auto add = [&](int64_t at, Vec y, int j) __attribute__((always_inline)) {
      const Vec d = exp_of.clamp(y - shift);
      const Vec e = exp_of.of_clamped(d);
      keep.exponential(at, e);
      sum[j] = sum[j] + e;
      if constexpr (kDot) dot[j] = fma(e, d, dot[j]);
    };
    for (i = start; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; j += 4 / Row::kElement) row.prefetch(i + kBlock + j * kLanes);
      for (int j = 0; j < 4; ++j) add(i + j * kLanes, row.load(i + j * kLanes), j);
    }
    for (; i + kLanes <= end; i += kLanes) add(i, row.load(i), 0);
    if (i < end) add(i, row.load_partial(i, static_cast<int>(end - i)), 0);
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

// An output of so many bytes will have left the caches before anyone reads it.
inline constexpr int64_t kPastCaches = 16 << 20;

// Writes f(i, lanes) to row[i] for i in [begin, end). `past_caches`: lines go straight to memory,
// which saves reading them first. fence() when the row is done.
template <class T, class F>
IC_INLINE void write_row(T* row, int64_t begin, int64_t end, bool past_caches, F f) {
  int64_t i = begin;
  if (past_caches) {
    const int64_t ahead = lanes_to_line(row + i);
    if (ahead > 0 && ahead < end - i) {
      store_partial(row + i, f(i, static_cast<int>(ahead)), static_cast<int>(ahead));
      i += ahead;
    }
    if (ahead <= end - i)
      for (; i + kLanes <= end; i += kLanes) store_past_caches(row + i, f(i, kLanes));
  }
  for (; i + kLanes <= end; i += kLanes) store(row + i, f(i, kLanes));
  if (i < end) {
    const int lanes = static_cast<int>(end - i);
    store_partial(row + i, f(i, lanes), lanes);
  }
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
