// sample on the CPU: rows in parallel, each in a few vector sweeps over its logits.
//
//   where there are bias, penalties or disallowed tokens: the adjusted logits into the workspace
//   softmax statistics, of the raw logits and of what is drawn from
//   where a row is truncated: the cut, by a pivot search instead of a sort
//   noise and argmax over what is kept; vectors without a kept token are skipped
//
// Pivot search: all three truncations keep the tokens that come before some (value, index) in
// falling order. The value is bisected between the least and the greatest candidate; each sweep
// takes the weight (number or probability) of the candidates at or above the middle and drops those
// on the wrong side. A sweep costs a few cycles per vector, and there are as many as halvings of
// the range, two or three of them over the whole row.
#include "parallel.h"
#include "sample.h"
#include "softmax_row.h"

namespace ic::IC_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kSumBlock = 64 * kLanes;  // values summed in float32 before they join a float64

// Keeps the tokens whose logit is greater than `value`, and of those equal to it the ones below
// `end`.
struct Cut {
  float value = -kInfinity;
  int32_t end = 0x7fffffff;

  bool everything() const { return value == -kInfinity; }
  IC_INLINE Mask kept(Vec y, int64_t i) const {
    const VecInt index = iota() + broadcast_int(static_cast<int32_t>(i));
    const Vec at = broadcast(value);
    return (y > at) | ((y == at) & (index < broadcast_int(end)));
  }
};

// ---- the pivot search ----

struct Candidates {
  float *value, *weight;  // room for a whole row of whole vectors
  int64_t count;          // padded with value = -inf, weight = 0 to whole vectors
  float least;            // value

  int64_t padded() const { return (count + kLanes - 1) / kLanes * kLanes; }

  IC_INLINE void append(Vec values, Vec weights, Mask kept) {
    store_packed(weight + count, weights, kept);
    count += store_packed(value + count, values, kept);
  }

  void pad() {
    for (int64_t i = count; i < padded(); ++i) {
      value[i] = -kInfinity;
      weight[i] = 0.0f;
    }
  }

  // Drops what is outside [low, high].
  void narrow(float low, float high) {
    const int64_t n = padded();
    count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec x = load(value + i);
      const Mask inside = (x >= broadcast(low)) & (x <= broadcast(high));
      if (any(inside)) append(x, load(weight + i), inside);
    }
    pad();
  }
};

struct Split {
  double weight;  // of the candidates in [middle, high]
  int64_t count;  // their number
  float least_above, greatest_below;
};

Split split(const Candidates& c, float middle, float high) {
  Split s{0.0, 0, high, c.least};
  const Vec pivot = broadcast(middle), limit = broadcast(high), zero = broadcast(0.0f);
  Vec least = limit, greatest = broadcast(c.least);
  const int64_t n = c.padded();
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    Vec sum = zero;
    VecInt number = broadcast_int(0);
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec x = load(c.value + i);
      const Mask above = (x >= pivot) & (x <= limit);
      sum = sum + select(above, load(c.weight + i), zero);
      number = number - above;
      least = min(least, select(above, x, limit));
      greatest = max(greatest, select(x < pivot, x, greatest));
    }
    s.weight += static_cast<double>(reduce_add(sum));
    s.count += static_cast<int64_t>(reduce_add(int_to_float(number)));
  }
  s.least_above = reduce_min(least);
  s.greatest_below = reduce_max(greatest);
  return s;
}

struct Pivot {
  float value;   // the greatest such that the weight at or above it reaches the target
  double above;  // the weight above it
};

// `high` is the greatest candidate. Every round excludes one distinct value or more.
Pivot find_pivot(Candidates c, float high, double target) {
  float low = c.least;
  double above = 0.0;  // weight of what is greater than `high`
  int64_t inside = c.count;
  while (low < high) {
    float middle = low * 0.5f + high * 0.5f;  // high - low may be infinite
    if (!(middle > low)) middle = high;
    const Split s = split(c, middle, high);
    if (above + s.weight >= target) {
      low = s.least_above;
      inside = s.count;
    } else {
      high = s.greatest_below;
      above += s.weight;
      inside -= s.count;
    }
    if (inside < c.count / 4 || inside < 4 * kLanes) c.narrow(low, high);
  }
  return {high, above};
}

// ---- a row ----

// 16 logits from i on, -inf past the end.
template <class Logits>
IC_INLINE Vec load16(const Logits& logits, int64_t vocab, int64_t i) {
  if (i + kLanes <= vocab) return logits.load(i);
  return i < vocab ? logits.load_partial(i, static_cast<int>(vocab - i)) : broadcast(-kInfinity);
}

// The logits as they are drawn from, and what each sweep over them needs.
template <class Logits>
struct Row {
  const SampleArgs& a;
  int64_t index;
  Logits logits;
  RowStats stats;           // at this scale
  float scale;              // 1 / temperature
  float *values, *weights;  // (padded_vocab,) each: scratch

  IC_INLINE Vec load(int64_t i) const { return load16(logits, a.vocab, i); }
};

// What a cut leaves of a row, as softmax_row wants it.
template <class Logits>
struct KeptRow {
  static constexpr int kElement = Logits::kElement;
  Logits logits;
  Cut cut;

  IC_INLINE Vec keep(Vec y, int64_t i) const {
    return select(cut.kept(y, i), y, broadcast(-kInfinity));
  }
  IC_INLINE Vec load(int64_t i) const { return keep(logits.load(i), i); }
  IC_INLINE Vec load_partial(int64_t i, int n) const { return keep(logits.load_partial(i, n), i); }
  IC_INLINE void prefetch(int64_t i) const { logits.prefetch(i); }
};

IC_INLINE VecInt load_counts(const int32_t* from, int n) {
  int32_t lane[kLanes];
  for (int k = 0; k < kLanes; ++k) lane[k] = k < n ? from[k] : 0;
  VecInt r;
  __builtin_memcpy(&r, lane, sizeof r);
  return r;
}

// Logits with bias, penalties and -inf where not allowed.
template <class Logits>
void adjust(const SampleArgs& a, int64_t r, const Logits& logits, float* out) {
  const Vec zero = broadcast(0.0f), repetition = broadcast(a.repetition.at(r));
  const Vec presence = broadcast(a.presence.at(r)), frequency = broadcast(a.frequency.at(r));
  for (int64_t i = 0; i < a.vocab; i += kLanes) {
    const int n = i + kLanes <= a.vocab ? kLanes : static_cast<int>(a.vocab - i);
    Vec x = load16(logits, a.vocab, i);
    if (a.bias) x = x + load_partial(a.bias + r * a.bias_row + i, n, 0.0f);
    if (a.generated || a.prompt) {
      VecInt number = broadcast_int(0);
      if (a.generated) number = load_counts(a.generated + r * a.generated_row + i, n);
      const Mask occurs = broadcast_int(0) < number;
      Mask seen = occurs;
      if (a.prompt) seen = seen | load_mask(a.prompt + r * a.prompt_row + i, n);
      x = select(seen, select(x > zero, x / repetition, x * repetition), x);
      x = select(occurs, x - presence - frequency * int_to_float(number), x);
    }
    if (a.allowed) {
      x = select(load_mask(a.allowed + r * a.allowed_row + i, n), x, broadcast(-kInfinity));
    }
    store_partial(out + i, x, n);
  }
}

// Candidates: what `cut` keeps, but no -inf. Weights: their probabilities times a constant, or 1.
template <class Logits>
Candidates collect(const Row<Logits>& row, Cut cut, bool weigh) {
  Candidates c{row.values, row.weights, 0, kInfinity};
  const ScaledExp exp_of(row.scale);
  Vec least = broadcast(kInfinity);
  for (int64_t i = 0; i < row.a.vocab; i += kLanes) {
    const Vec y = row.load(i);
    const Mask kept = cut.kept(y, i) & (y > broadcast(-kInfinity));
    if (!any(kept)) continue;
    least = min(least, select(kept, y, least));
    const Vec weight = weigh ? exp_of(y - broadcast(row.stats.max)) : broadcast(1.0f);
    c.append(y, weight, kept);
  }
  c.pad();
  c.least = reduce_min(least);
  return c;
}

// The cut that keeps the first `ties` tokens of a value.
template <class Logits>
Cut cut_at(const Row<Logits>& row, float value, int64_t ties) {
  const Vec at = broadcast(value);
  for (int64_t i = 0; i < row.a.vocab; i += kLanes) {
    const Mask equal = row.load(i) == at;
    if (!any(equal)) continue;
    int32_t lane[kLanes];
    __builtin_memcpy(lane, &equal, sizeof lane);
    for (int k = 0; k < kLanes; ++k)
      if (lane[k] && --ties == 0) return {value, static_cast<int32_t>(i + k + 1)};
  }
  return {value};
}

// What top_k, top_p and min_p keep.
template <class Logits>
Cut truncate(const Row<Logits>& row) {
  const SampleArgs& a = row.a;
  const int64_t k = a.top_k.at(row.index);
  const float p = a.top_p.at(row.index), m = a.min_p.at(row.index), max = row.stats.max;
  Cut cut;
  if (k > 0 && k < a.vocab) {
    const Candidates c = collect(row, cut, false);
    if (k < c.count) {
      const Pivot pivot = find_pivot(c, max, static_cast<double>(k));
      cut = cut_at(row, pivot.value, k - static_cast<int64_t>(pivot.above));
    }
  }
  if (p < 1.0f) {
    const Candidates c = collect(row, cut, true);
    const double target = p * split(c, c.least, max).weight;
    const Pivot pivot = find_pivot(c, max, target);
    const Vec each = ScaledExp(row.scale)(broadcast(pivot.value - max));
    const double ties = __builtin_ceil((target - pivot.above) / first_lane(each));
    const Cut mass = cut_at(row, pivot.value, ties > 1.0 ? static_cast<int64_t>(ties) : 1);
    if (mass.value > cut.value || mass.end < cut.end) cut = mass;
  }
  if (m > 0.0f) {
    const float value = max + __builtin_logf(m < 1.0f ? m : 1.0f) / row.scale;
    if (value > cut.value) cut = {value};
  }
  return cut;
}

// u = (the low 31 bits of a word + 1/2) / 2^31, finest near 0, where the greatest noise comes from.
struct Noise {
  Vec number;  // 2^31 u

  IC_INLINE explicit Noise(VecInt word)
      : number(int_to_float(word & broadcast_int(0x7fffffff)) + broadcast(0.5f)) {}

  // -ln(-ln(1 - u))
  IC_INLINE Vec gumbel() const {
    const Vec u = min(number * broadcast(0x1p-31f), broadcast(1.0f - 0x1p-24f));
    const Vec exponential = broadcast(0.0f) - log1p(broadcast(0.0f) - u);
    return broadcast(0.0f) - log(exponential);
  }

  // A little more than -ln u, which is more than the noise: log2 is above the line that the bits of
  // a float make of it.
  IC_INLINE Vec bound() const {
    constexpr float kLog2 = 0x1.62e430p-1f;
    const Vec bits_as_number = int_to_float(bits(number));
    return fma(bits_as_number, broadcast(-kLog2 * 0x1p-23f), broadcast(158 * kLog2 + 0.01f));
  }
};

// argmax of scale (y - max) + noise over what is kept, the lowest index among equals. Few vectors
// get as far as the logarithms: most cannot beat the best token so far whatever their noise's last
// digits.
template <class Logits>
int64_t draw(const Row<Logits>& row, Cut cut) {
  const uint64_t seed = static_cast<uint64_t>(row.a.seed.at(row.index));
  const uint64_t position = static_cast<uint64_t>(row.a.position.at(row.index));
  const Vec nothing = broadcast(-kInfinity);
  const Vec scale = broadcast(row.scale), max = broadcast(row.stats.max);
  Vec best = nothing, bar = nothing;  // of each lane, of all
  VecInt best_index = broadcast_int(-1);
  for (int64_t i = 0; i < row.a.vocab; i += 4 * kLanes) {
    Vec z[4];
    Mask some = broadcast_int(0);
    for (int w = 0; w < 4; ++w) {
      const int64_t at = i + w * kLanes;
      const Vec y = row.load(at);
      const Mask kept = cut.kept(y, at) & (y > nothing);
      z[w] = select(kept, (y - max) * scale, nothing);
      some = some | kept;
    }
    if (!any(some)) continue;
    VecInt words[4] = {iota() + broadcast_int(static_cast<int32_t>(i / 4)),
                       broadcast_int(static_cast<int32_t>(position)),
                       broadcast_int(static_cast<int32_t>(position >> 32)), broadcast_int(0)};
    philox4x32(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int w = 0; w < 4; ++w) {
      const Noise noise(words[w]);
      if (!any(z[w] + noise.bound() > bar)) continue;
      const Vec score = z[w] + noise.gumbel();
      const Mask better = score > best;
      best = select(better, score, best);
      bar = broadcast(reduce_max(best));
      const VecInt index = iota() + broadcast_int(static_cast<int32_t>(i + w * kLanes));
      best_index = select(better, index, best_index);
    }
  }
  float lane[kLanes];
  int32_t lane_index[kLanes];
  store(lane, best);
  __builtin_memcpy(lane_index, &best_index, sizeof lane_index);
  int first = 0;
  for (int k = 1; k < kLanes; ++k)
    if (lane[k] > lane[first] || (lane[k] == lane[first] && lane_index[k] < lane_index[first]))
      first = k;
  return lane_index[first];
}

struct Drawn {
  int64_t token;  // -1: nothing can be drawn
  float logprob;
};

template <class Logits>
Drawn draw_row(const Row<Logits>& row) {
  if (!(row.stats.sum > 0.0f)) return {-1, 0.0f};  // NaN, or nothing but -inf
  const Cut cut = truncate(row);
  const int64_t token = draw(row, cut);
  if (token < 0) return {-1, 0.0f};
  RowStats kept = row.stats;
  if (!cut.everything())
    kept = softmax_row<false>(KeptRow<Logits>{row.logits, cut}, row.a.vocab, row.scale);
  return {token, row_logprob(kept, row.scale, row.logits.at(token))};
}

template <class T>
void sample_row(const SampleArgs& a, int64_t r, float* workspace) {
  const LogitsRow<T> raw{static_cast<const T*>(a.logits) + r * a.logits_row};
  const RowStats raw_stats = softmax_row<false>(raw, a.vocab, 1.0f);
  const float temperature = a.temperature.at(r);
  const bool greedy = temperature <= 0.0f;
  const float scale = greedy ? 1.0f : 1.0f / temperature;
  float *values = workspace, *weights = values + a.padded_vocab;

  const auto drawn_from = [&](const auto& logits, RowStats stats) __attribute__((always_inline)) {
    if (!greedy) return draw_row(Row{a, r, logits, stats, scale, values, weights});
    if (!(stats.sum > 0.0f)) return Drawn{-1, 0.0f};
    return Drawn{row_argmax(logits, a.vocab, stats), 0.0f};
  };
  Drawn drawn;
  if (a.bias || a.generated || a.prompt || a.allowed) {
    float* adjusted = weights + a.padded_vocab;
    adjust(a, r, raw, adjusted);
    const LogitsRow<float> logits{adjusted};
    drawn = drawn_from(logits, softmax_row<false>(logits, a.vocab, scale));
  } else {
    drawn = drawn_from(raw, scale == 1.0f ? raw_stats : softmax_row<false>(raw, a.vocab, scale));
  }
  const bool possible = drawn.token >= 0 && raw_stats.sum > 0.0f;
  const float nan = __builtin_nanf("");
  const float logprob = possible ? row_logprob(raw_stats, 1.0f, raw.at(drawn.token)) : nan;
  a.tokens[r] = possible ? drawn.token : -1;
  a.logprobs[r] = logprob;
  a.sampled_logprobs[r] = greedy || !possible ? logprob : drawn.logprob;
}

template <class T>
void sample_rows(const SampleArgs& a) {
  const int64_t grain = (a.rows + a.slots - 1) / a.slots;
  parallel_rows(a.rows, grain, a.threads, [&](int64_t begin, int64_t end) {
    // One piece, one slot; without other threads there is one piece of all rows.
    float* workspace = a.workspace + begin / grain * 3 * a.padded_vocab;
    for (int64_t r = begin; r < end; ++r) sample_row<T>(a, r, workspace);
  });
}

}  // namespace

void sample_cpu(const SampleArgs& a) {
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return sample_rows<BFloat16>(a);
    case Dtype::kFloat16:
      return sample_rows<Float16>(a);
    default:
      return sample_rows<float>(a);
  }
}

}  // namespace ic::IC_ISA
