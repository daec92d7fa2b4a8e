// The softmax statistics of one row of logits by a block of threads, in a single read: the same
// bits for the same row, wherever it lies and whoever asks.
//
//   y[i], the logits; T = temperature, scale = 1 / T
//   max = max_i y[i]     sum = sum_i e^(scale (y[i] - max))     dot = sum_i e^(..) (y[i] - max)
//
// Cut: which thread takes element i depends on i alone. A tile is kVectors vectors of 16 bytes for
// each thread, a vector's neighbours in the row being its neighbours in the warp. A thread folds
// tile by tile into a maximum and sums of its own (online softmax); the block joins them in a fixed
// order. A row that does not begin at a multiple of 16 bytes is read as two aligned vectors for
// each one, of which the second comes from L1. -inf (a masked token) weighs exactly 0; NaN and +inf
// make the sum NaN, as does a row of nothing but -inf make (-inf, 0). Products round by themselves
// or are fused in writing: what the compiler would fuse depends on the kernel around.
//
// 64 bytes in flight for each of 1024 threads or more are twice what an H200 needs to keep 4.8 TB/s
// busy (36 bytes a nanosecond and multiprocessor, at 0.8 us).
#pragma once

#include "gpu.cuh"

namespace ic {

constexpr int kRowWarps = 8, kRowThreads = kRowWarps * kWarp;
constexpr int kRowBlocks = 4;  // of them at a time on a multiprocessor: at most 64 registers
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kMinusInf = -__builtin_inff();

// ---- vectors of 16 bytes

template <class T>
constexpr int kVectorItems = 16 / static_cast<int>(sizeof(T));

template <class T>
IC_GPU void unpack16(uint4 raw, float (&y)[kVectorItems<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      y[w] = __uint_as_float(words[w]);
    } else {
      const float2 two = unpack2<T>(words[w]);
      y[2 * w] = two.x;
      y[2 * w + 1] = two.y;
    }
  }
}

template <class T>
IC_GPU uint4 pack16(const float (&y)[kVectorItems<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      words[w] = __float_as_uint(y[w]);
    } else {
      words[w] = pack2<T>(y[2 * w], y[2 * w + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The 16 bytes that begin `bytes` (0..15) into two neighbouring vectors.
IC_GPU uint4 shifted16(uint4 a, uint4 b, uint32_t bytes) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
  const uint32_t bits = 8 * (bytes & 3);
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// The first `count` elements, -inf for the others.
template <class T>
IC_GPU uint4 cut16(uint4 raw, int64_t count) {
  constexpr uint32_t kInf = sizeof(T) == 4 ? 0xff800000 : __is_same(T, BFloat16) ? 0xff80 : 0xfc00;
  uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      words[w] = w < count ? words[w] : kInf;
    } else {
      const uint32_t low = 2 * w < count ? words[w] & 0xffff : kInf;
      const uint32_t high = 2 * w + 1 < count ? words[w] >> 16 : kInf;
      words[w] = low | high << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

IC_GPU uint32_t bytes_past_16(const void* p) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) & 15;
}

// ---- rows

// A row of logits as they lie in memory.
template <class T>
struct LogitsRow {
  using Element = T;
  static constexpr int kItems = kVectorItems<T>;

  const T* x;
  int64_t n;

  IC_GPU bool aligned() const { return bytes_past_16(x) == 0; }
  IC_GPU float at(int64_t i) const { return to_float(x[i]); }

  // kCount vectors, from i, i + step, .. on; -inf past the end. kAligned is aligned(): a row that
  // is read once may then pass L1 by. All loads are on their way before the first is waited for.
  template <bool kAligned, int kCount>
  IC_GPU void load(int64_t i, int64_t step, uint4 (&raw)[kCount]) const {
    const uint32_t bytes = kAligned ? 0 : bytes_past_16(x);
    const T* end = x + n;
    uint4 next[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const char* p = reinterpret_cast<const char*>(x + i + v * step) - bytes;
      raw[v] = next[v] = make_uint4(0, 0, 0, 0);
      if (i + v * step < n) raw[v] = load16_part<kAligned>(p, x, end);
      if (!kAligned && p + 16 < reinterpret_cast<const char*>(end))
        next[v] = load16_part<false>(p + 16, x, end);
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      if constexpr (!kAligned) raw[v] = shifted16(raw[v], next[v], bytes);
      if (i + v * step + kItems > n) raw[v] = cut16<T>(raw[v], n - i - v * step);
    }
  }

  IC_GPU void values(uint4 raw, int64_t, float (&y)[kItems]) const { unpack16<T>(raw, y); }
};

// The same, capped: y = cap tanh(x / cap).
template <class T>
struct CappedRow : LogitsRow<T> {
  float cap;

  IC_GPU CappedRow(const T* x, int64_t n, float cap) : LogitsRow<T>{x, n}, cap(cap) {}
  IC_GPU float capped(float x) const { return __fmul_rn(cap, tanhf(x / cap)); }
  IC_GPU float at(int64_t i) const { return capped(LogitsRow<T>::at(i)); }
  IC_GPU void values(uint4 raw, int64_t i, float (&y)[LogitsRow<T>::kItems]) const {
    unpack16<T>(raw, y);
#pragma unroll
    for (int j = 0; j < LogitsRow<T>::kItems; ++j)
      y[j] = i + j < this->n ? capped(y[j]) : kMinusInf;
  }
};

// ---- statistics

// e^(scale d) for d <= 0, or 0 from about -88 / scale down: within 2 ulp, plus the rounding of
// scale d. e^0 is exactly 1.
struct ScaledExp {
  float c, lowest;

  IC_GPU explicit ScaledExp(float scale) : c(scale * kLog2e), lowest(-127.0f / (scale * kLog2e)) {}
  IC_GPU float operator()(float d) const { return exp2_approx(d * c); }
  IC_GPU float clamp(float d) const { return fmaxf(d, lowest); }  // also for d = -inf, NaN
};

struct RowSums {
  float sum, dot;
};

IC_GPU RowSums operator+(RowSums a, RowSums b) { return {a.sum + b.sum, a.dot + b.dot}; }

struct RowStats {
  float max, sum, dot;
  float own_max;     // of the elements that this thread took
  int64_t own_tile;  // where its first tile with that maximum starts
};

// A thread's vectors of a tile, and how far apart two of them are in a row of Row.
constexpr int kRowVectors = 4;
template <class Row>
constexpr int64_t kRowStep = int64_t{kRowThreads} * Row::kItems;
template <class Row>
constexpr int64_t kRowTile = kRowVectors * kRowStep<Row>;

// visit(start, first, raw) for each tile of the row, from element `start` on: this thread's
// vectors, of which raw[v] holds the elements from first + v kRowStep on; -inf past the end.
template <bool kAligned, class Row, class Visit>
IC_GPU void each_tile(const Row& row, Visit visit) {
  for (int64_t start = 0; start < row.n; start += kRowTile<Row>) {
    const int64_t first = start + int64_t{threadIdx.x} * Row::kItems;
    uint4 raw[kRowVectors];
    row.template load<kAligned>(first, kRowStep<Row>, raw);
    visit(start, first, raw);
  }
}

template <class Row, class Visit>
IC_GPU void each_tile(const Row& row, Visit visit) {
  if (row.aligned()) {
    each_tile<true>(row, visit);
  } else {
    each_tile<false>(row, visit);
  }
}

// dot only with kDot; it is 0 otherwise, and max and sum have the same bits. All threads call it
// and get the same max, sum and dot.
template <bool kDot, class Row>
IC_GPU RowStats softmax_row(const Row& row, float scale) {
  const ScaledExp exp_of(scale);
  float max = kMinusInf;
  RowSums of{0.0f, 0.0f};
  int64_t max_tile = 0;
  // Sums about `from` become sums about `to`. Nothing but -inf so far: shift by 0, for -inf - -inf
  // is NaN.
  const auto shift_sums = [&](float from, float to) {
    const float step = exp_of.clamp(from - to);
    const float factor = exp_of(step);
    if constexpr (kDot) of.dot = __fmul_rn(fmaf(step, of.sum, of.dot), factor);
    of.sum = __fmul_rn(of.sum, factor);
  };
  // Two looks at a tile, each of which unpacks it anew: registers are dearer than instructions
  // here.
  each_tile(row, [&](int64_t start, int64_t first, const uint4(&raw)[kRowVectors]) {
    float top = kMinusInf, y[Row::kItems];
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      row.values(raw[v], first + v * kRowStep<Row>, y);
#pragma unroll
      for (int j = 0; j < Row::kItems; ++j) top = fmaxf(top, y[j]);
    }
    if (top > max) {
      shift_sums(max, top);
      max = top;
      max_tile = start;
    }
    const float shift = max > kMinusInf ? max : 0.0f;
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      row.values(raw[v], first + v * kRowStep<Row>, y);
#pragma unroll
      for (int j = 0; j < Row::kItems; ++j) {
        const float d = y[j] - shift, e = exp_of(d);
        of.sum += e;
        if constexpr (kDot) of.dot = fmaf(e, exp_of.clamp(d), of.dot);
      }
    }
  });
  const float all_max = block_max<kRowWarps>(max);
  if (all_max > kMinusInf) shift_sums(max, all_max);
  of = block_sum<kRowWarps>(of);
  return {all_max, of.sum, of.dot, max, max_tile};
}

struct Min {
  IC_GPU int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

// The lowest index whose logit is the maximum, for all threads. A thread reads again only the tile
// in which it first met it.
template <class Row>
IC_GPU int64_t row_argmax(const Row& row, const RowStats& stats) {
  int64_t lowest = row.n;
  if (stats.own_max == stats.max) {
    for (int v = 0; v < kRowVectors; ++v) {
      const int64_t i = stats.own_tile + v * kRowStep<Row> + int64_t{threadIdx.x} * Row::kItems;
      for (int j = Row::kItems - 1; j >= 0; --j)
        if (i + j < lowest && row.at(i + j) == stats.max) lowest = i + j;
    }
  }
  return block_reduce<kRowWarps>(lowest, Min());
}

// ---- what a row's statistics say

IC_GPU float row_lse(const RowStats& s, float scale) { return fmaf(scale, s.max, logf(s.sum)); }

// Both terms are <= 0, so nothing cancels and the sum is never above 0.
IC_GPU float row_logprob(const RowStats& s, float scale, float y) {
  return fmaf(scale, y - s.max, -logf(s.sum));
}

IC_GPU float row_entropy(const RowStats& s, float scale) {
  return fmaf(-scale, s.dot / s.sum, logf(s.sum));
}

// ---- elementwise passes

// `out` from its element `head` on, which is a multiple of 16 bytes, as many whole vectors as fit.
template <bool kAligned, class G, class Row, class F>
IC_GPU void map_vectors(const Row& row, int64_t head, int64_t vectors, G* out, F f) {
  using T = typename Row::Element;
  constexpr int kItems = kVectorItems<G>, kFrom = kVectorItems<T>, kReads = kItems / kFrom;
  static_assert(kReads * kFrom == kItems);
  constexpr int kVectors = 2;
  constexpr int64_t kTile = kVectors * kRowThreads;
  const LogitsRow<T> body{row.x + head, row.n - head};
  for (int64_t tile = (vectors + kTile - 1) / kTile - 1; tile >= 0; --tile) {
    uint4 raw[kVectors][kReads];
    const int64_t first = tile * kTile + threadIdx.x;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (first + v * kRowThreads < vectors)
        body.template load<kAligned>((first + v * kRowThreads) * kItems, kFrom, raw[v]);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first + v * kRowThreads >= vectors) continue;
      const int64_t i = head + (first + v * kRowThreads) * kItems;
      float result[kItems];
#pragma unroll
      for (int r = 0; r < kReads; ++r) {
        float y[kFrom];
        row.values(raw[v][r], i + r * kFrom, y);
#pragma unroll
        for (int j = 0; j < kFrom; ++j) result[r * kFrom + j] = f(i + r * kFrom + j, y[j]);
      }
      store16_streaming(out + i, pack16<G>(result));
    }
  }
}

// out[i] = f(i, y[i]) for the whole row, 16 aligned bytes at a time, its last tile first: that is
// what L2 still holds. `out` may be the row's own memory: other threads have read what they need of
// it before.
template <class G, class Row, class F>
IC_GPU void map_row(const Row& row, G* out, F f) {
  const int64_t n = row.n, lead = (16 - bytes_past_16(out)) % 16 / sizeof(G);
  const int64_t head = lead < n ? lead : n, vectors = (n - head) / kVectorItems<G>;
  const int64_t tail = head + vectors * kVectorItems<G>;
  const int64_t t = threadIdx.x, edge = t < head ? t : tail + t - head;
  if (edge < n) out[edge] = from_float<G>(f(edge, row.at(edge)));
  if (bytes_past_16(row.x + head) == 0) {
    map_vectors<true>(row, head, vectors, out, f);
  } else {
    map_vectors<false>(row, head, vectors, out, f);
  }
}

}  // namespace ic
