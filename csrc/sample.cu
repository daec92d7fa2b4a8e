// sample on CUDA: a block for each row, one launch, no workspace. The row is read again for each
// step, from L2 as far as it holds the rows in flight.
//
//   statistics  of the raw logits, and of what is drawn from unless that is the same
//   truncation  only where it is asked for: a search for the cut instead of a sort, and the
//               statistics of what is left
//   draw        noise and argmax
// Bias, penalties and disallowed tokens are applied as the row is read. The statistics are those of
// softmax_row.cuh, so log-probabilities have the bits of token_logprobs.
//
// Search: the cut is at the greatest value such that the weight (number or probability) at or above
// it reaches a target. It lies in a bracket of values; a sweep over the row weighs what is at or
// above three pivots that quarter the bracket, and finds the least and the greatest token inside,
// until they are equal. So a sweep leaves a quarter of the bracket or less: a few of them for
// logits as models have them, some 140 at most for any floats. Sums have a fixed order, in which
// they fall as the pivot rises.
//
// Draw: the noise costs more than all else, and few tokens can win. -ln u is above the noise and u
// < e^(z - bar) is one ex2, so only tokens that may beat `bar` get logarithms. The greatest score
// is Gumbel-distributed about ln sum e^z: with a bar of 2.5 below, 12 tokens of a row pass, and one
// row in 200,000 has none and is drawn again without a bar.
//
// Bytes: 2 N V with 16-bit logits, 4 N V with float32; 8192 rows of 151936 bfloat16 take 0.52 ms at
// the 4.8 TB/s of an H200. That is for rows that L2 (50 MB) holds, 160 of that length; beyond, each
// step reads them from memory: two steps at temperature 1 without truncation, three at another. A
// draw takes about 25 issue slots a logit, most of them Philox's 20 wide multiplications for four
// logits: 1.1 ms for those rows, so that plain sampling is bound by the statistics' bandwidth, then
// by arithmetic, and should take 1.6 ms. Bias, penalties and disallowed tokens add 4, 5 and 1 bytes
// a logit to each step.
#include "sample.h"
#include "softmax_row.cuh"

namespace ic {
namespace {

// At a time on a multiprocessor: at most 128 registers, or 255 where more than logits is read.
template <bool kAdjusted>
constexpr int kBlocks = kAdjusted ? 1 : 2;
constexpr float kLargest = 0x1.fffffep127f;

// ---- rows

// Elements p[0..left) of an array beside the logits, 0 after them; in whole words where p allows.
template <class U, int kItems>
IC_GPU void load_items(const U* p, int64_t left, U (&x)[kItems]) {
  if constexpr (sizeof(U) == 4 && kItems % 4 == 0) {
    if (left >= kItems && bytes_past_16(p) == 0) {
#pragma unroll
      for (int j = 0; j < kItems; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(p + j);
        memcpy(&x[j], &four, sizeof four);
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) x[j] = j < left ? p[j] : U{};
}

// Logits with bias, penalties, and -inf where not allowed.
template <class T>
struct AdjustedRow : LogitsRow<T> {
  static constexpr int kItems = kVectorItems<T>;
  const SampleArgs& a;
  int64_t r;

  IC_GPU AdjustedRow(const LogitsRow<T>& raw, const SampleArgs& a, int64_t r)
      : LogitsRow<T>(raw), a(a), r(r) {}

  // One way to read it does for any: the other one would double the code, for little.
  IC_GPU bool aligned() const { return false; }

  // kCount logits from y on, of the tokens from i on.
  template <int kCount>
  IC_GPU void adjust(int64_t i, float* y) const {
    const int64_t left = this->n - i;
    if (a.bias) {
      float bias[kCount];
      load_items(a.bias + r * a.bias_row + i, left, bias);
#pragma unroll
      for (int j = 0; j < kCount; ++j) y[j] += bias[j];
    }
    if (a.generated || a.prompt) {
      int32_t count[kCount] = {};
      uint8_t prompt[kCount] = {};
      if (a.generated) load_items(a.generated + r * a.generated_row + i, left, count);
      if (a.prompt) load_items(a.prompt + r * a.prompt_row + i, left, prompt);
      const float repetition = a.repetition.at(r), inverse = 1.0f / repetition;
      const float presence = a.presence.at(r), frequency = a.frequency.at(r);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (count[j] > 0 || prompt[j]) y[j] = __fmul_rn(y[j], y[j] > 0.0f ? inverse : repetition);
        if (count[j] > 0)
          y[j] = y[j] - presence - __fmul_rn(frequency, static_cast<float>(count[j]));
      }
    }
    if (a.allowed) {
      uint8_t allowed[kCount];
      load_items(a.allowed + r * a.allowed_row + i, left, allowed);
#pragma unroll
      for (int j = 0; j < kCount; ++j) y[j] = allowed[j] ? y[j] : kMinusInf;
    }
  }

  IC_GPU float at(int64_t i) const {
    float y = LogitsRow<T>::at(i);
    adjust<1>(i, &y);
    return y;
  }
  IC_GPU void values(uint4 raw, int64_t i, float (&y)[kItems]) const {
    unpack16<T>(raw, y);
#pragma unroll
    for (int j = 0; j < kItems; j += 4)
      if (i + j < this->n) adjust<4>(i + j, &y[j]);
  }
};

// Keeps the tokens whose logit is greater than `value`, and of those equal to it the ones below
// `end`.
struct Cut {
  float value;
  int64_t end;
};

template <class Row>
struct KeptRow : Row {
  Cut cut;

  IC_GPU KeptRow(const Row& row, Cut cut) : Row(row), cut(cut) {}
  IC_GPU void values(uint4 raw, int64_t i, float (&y)[Row::kItems]) const {
    Row::values(raw, i, y);
    const int64_t left = cut.end - i;
    const int before = left < Row::kItems ? static_cast<int>(left < 0 ? 0 : left) : Row::kItems;
#pragma unroll
    for (int j = 0; j < Row::kItems; ++j)
      y[j] = y[j] > cut.value || (y[j] == cut.value && j < before) ? y[j] : kMinusInf;
  }
};

// ---- truncation

constexpr int kPivots = 3;

// What a sweep sees of a row.
struct Split {
  double above[kPivots];  // the weight at or above each pivot
  int64_t inside;         // how many tokens are inside the bracket
  float least, greatest;  // of them
};

struct JoinSplits {
  IC_GPU Split operator()(const Split& a, const Split& b) const {
    Split s;
#pragma unroll
    for (int p = 0; p < kPivots; ++p) s.above[p] = a.above[p] + b.above[p];
    s.inside = a.inside + b.inside;
    s.least = fminf(a.least, b.least);
    s.greatest = fmaxf(a.greatest, b.greatest);
    return s;
  }
};

template <class Row>
IC_GPU Split split_row(const Row& row, float max, ScaledExp exp_of, float low, float high,
                       const float (&pivot)[kPivots]) {
  float above[kPivots] = {}, least = -kMinusInf, greatest = kMinusInf;
  int inside = 0;
  each_tile(row, [&](int64_t, int64_t first, const uint4(&raw)[kRowVectors]) {
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      float y[Row::kItems];
      row.values(raw[v], first + v * kRowStep<Row>, y);
#pragma unroll
      for (int j = 0; j < Row::kItems; ++j) {
        const float weight = exp_of(fmaxf(y[j] - max, -kLargest));  // -inf times a scale of 0
#pragma unroll
        for (int p = 0; p < kPivots; ++p) above[p] += y[j] >= pivot[p] ? weight : 0.0f;
        if (y[j] >= low && y[j] <= high) {
          least = fminf(least, y[j]);
          greatest = fmaxf(greatest, y[j]);
          ++inside;
        }
      }
    }
  });
  return block_reduce<kRowWarps>(Split{{above[0], above[1], above[2]}, inside, least, greatest},
                                 JoinSplits());
}

// The index behind the `ties`-th token of a value, of which there are more. Each thread looks
// through a piece of the row of its own.
template <class Row>
IC_GPU int64_t end_of_ties(const Row& row, float value, int64_t ties) {
  constexpr int kItems = Row::kItems;
  SHARED_ARRAY(int64_t, counts, kRowThreads);
  constexpr int64_t kStep = kRowVectors * kItems;
  const int64_t piece = (row.n + kRowThreads * kStep - 1) / (kRowThreads * kStep) * kStep;
  const int64_t begin = threadIdx.x * piece;
  const int64_t end = begin + piece < row.n ? begin + piece : row.n;
  // Calls found(i) for each of the piece's tokens of that value.
  const auto each = [&](auto found) {
    for (int64_t i = begin; i < end; i += kStep) {
      uint4 raw[kRowVectors];
      row.template load<false>(i, kItems, raw);
#pragma unroll
      for (int v = 0; v < kRowVectors; ++v) {
        float y[kItems];
        row.values(raw[v], i + v * kItems, y);
#pragma unroll
        for (int j = 0; j < kItems; ++j)
          if (y[j] == value) found(i + v * kItems + j);
      }
    }
  };
  int64_t count = 0, before = 0, behind = row.n;
  each([&](int64_t) { ++count; });
  counts[threadIdx.x] = count;
  __syncthreads();
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) before += counts[t];
  if (before < ties && ties <= before + count)
    each([&](int64_t i) {
      if (++before == ties) behind = i + 1;
    });
  return block_reduce<kRowWarps>(behind, Min());
}

// Keeps the shortest prefix of the row in falling order, the lower index first among equals, whose
// weight reaches `target`, or all of it; one token at least. A token weighs e^(scale (y - max)), 1
// with a scale of 0. What is at or above `low` reaches the target, if the row does.
template <class Row>
IC_GPU Cut prefix(const KeptRow<Row>& row, float max, float scale, double target, float low) {
  const ScaledExp exp_of(scale);
  float high = max;
  double beyond = 0.0;  // the weight above `high`
  for (;;) {
    float pivot[kPivots];
#pragma unroll
    for (int p = 0; p < kPivots; ++p) {
      const float share = (p + 1) / (kPivots + 1.0f);
      pivot[p] = fminf(fmaf(high, share, low * (1.0f - share)), high);
    }
    if (!(pivot[kPivots - 1] > low)) pivot[kPivots - 1] = high;
    const Split s = split_row(row, max, exp_of, low, high, pivot);
    if (s.least >= s.greatest) {
      const double ties = fmax(ceil((target - beyond) / exp_of(s.least - max)), 1.0);
      if (ties >= static_cast<double>(s.inside))
        return {s.least, s.least == row.cut.value ? row.cut.end : row.n};
      return {s.least, end_of_ties(row, s.least, static_cast<int64_t>(ties))};
    }
    low = s.least;
    high = s.greatest;
#pragma unroll
    for (int p = 0; p < kPivots; ++p) {
      const float below = nextafterf(pivot[p], kMinusInf);
      if (s.above[p] >= target) {
        low = fmaxf(low, pivot[p]);
      } else if (below >= s.least && below < high) {
        high = below;
        beyond = s.above[p];
      }
    }
  }
}

struct Least {
  IC_GPU float operator()(float a, float b) const { return fminf(a, b); }
};

// Applies top_k, top_p and min_p to a row with these statistics; those of what is left.
template <class Row>
IC_GPU RowStats truncate(const SampleArgs& a, int64_t r, float scale, RowStats stats,
                         KeptRow<Row>& row) {
  enum Rule { kTopK, kTopP, kMinP, kRules };
  const int64_t k = a.top_k.at(r);
  const float p = a.top_p.at(r), m = a.min_p.at(r);
#pragma unroll 1
  for (int rule = kTopK; rule < kRules; ++rule) {
    Cut cut = row.cut;
    if (rule == kMinP) {
      const float value = stats.max + logf(fminf(m, 1.0f)) / scale;
      if (m > 0.0f && value > cut.value) cut = {value, row.n};
    } else if (rule == kTopK ? k > 0 && k < row.n : p < 1.0f) {
      float low = -kLargest;
      double target = static_cast<double>(k);
      if (rule == kTopP) {
        // What is below weighs less than the 1 - p that may go.
        const float q = fmaxf(p, 0.0f), share = 0.99f * (1.0f - q) * stats.sum;
        low = stats.max + logf(share / static_cast<float>(row.n)) / scale;
        target = static_cast<double>(q) * stats.sum;
      } else if (k <= kRowThreads) {  // each thread has a token at or above the least maximum
        low = block_reduce<kRowWarps>(stats.own_max, Least());
      }
      low = fmaxf(low, -kLargest);  // logf(0), or a large 1 / scale
      cut = prefix(row, stats.max, rule == kTopP ? scale : 0.0f, target, low);
    }
    if (cut.value == row.cut.value && cut.end == row.cut.end) continue;
    row.cut = cut;
    stats = softmax_row<false>(row, scale);
  }
  return stats;
}

// ---- draw

// -ln(-ln(1 - u)), u = (the low 31 bits of a word + 1/2) / 2^31
IC_GPU float gumbel(uint32_t word) {
  const float number = static_cast<float>(word & 0x7fffffff) + 0.5f;
  return -logf(-log1pf(-fminf(number * 0x1p-31f, 1.0f - 0x1p-24f)));
}

struct Draw {
  uint32_t seed[2], position[2];
  float max, scale;
  float bar;  // who may score no more is of no account

  // The thread's best token so far.
  float score;
  int64_t token;

  // Tokens i + 16 v + j of 64 share counters. A thread takes all that belong to kItems counters.
  template <bool kAligned, class Row>
  IC_GPU void take(const Row& row) {
    constexpr int kItems = Row::kItems, kShare = 16 / kItems;
    const float c = scale * kLog2e, offset = -bar * kLog2e;
    const int64_t t = threadIdx.x;
    for (int64_t i = t / kShare * 64 + t % kShare * kItems; i < row.n;
         i += kRowThreads / kShare * 64) {
      uint4 raw[4];
      float y[4][kItems], top = kMinusInf;
      row.template load<kAligned>(i, 16, raw);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        row.values(raw[v], i + 16 * v, y[v]);
#pragma unroll
        for (int j = 0; j < kItems; ++j) top = fmaxf(top, y[v][j]);
      }
      if (top == kMinusInf) continue;
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        uint32_t words[4] = {static_cast<uint32_t>(i / 64 * 16 + i % 64 + j), position[0],
                             position[1], 0};
        philox4x32(words, seed[0], seed[1]);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          // 1 + u, cut off to 23 bits, against 1 + e^(z - bar) and more than its error.
          const float u = __uint_as_float(words[v] << 1 >> 9 | 0x3f800000);
          const float likely = exp2_approx(fmaf(y[v][j] - max, c, offset));
          if (!(u < fmaf(likely, 1.01f, 1.0f + 0x1p-22f))) continue;
          const int64_t index = i + 16 * v + j;
          const float z = scale * (y[v][j] - max) + gumbel(words[v]);
          if (z > score || (z == score && index < token)) {
            score = z;
            token = index;
          }
        }
      }
    }
  }
};

// argmax of scale (y - max) + noise, the lowest index among equals.
template <class Row>
IC_GPU int64_t draw_token(const Row& row, const RowStats& stats, float scale, uint64_t seed,
                          uint64_t position) {
  constexpr float kBelowMean = 2.5f;
  Draw draw{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
            {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)},
            stats.max,
            scale,
            logf(stats.sum) - kBelowMean,
            kMinusInf,
            row.n};
  for (;;) {
    if (row.aligned()) {
      draw.template take<true>(row);
    } else {
      draw.template take<false>(row);
    }
    const float best = block_max<kRowWarps>(draw.score);
    if (best > draw.bar || draw.bar == kMinusInf)
      return block_reduce<kRowWarps>(draw.score == best ? draw.token : row.n, Min());
    draw.bar = kMinusInf;
  }
}

// ---- the kernel

template <class T, bool kAdjusted>
__global__ void __launch_bounds__(kRowThreads, kBlocks<kAdjusted>) sample_rows(SampleArgs a) {
  const int64_t r = blockIdx.x;
  const LogitsRow<T> raw{static_cast<const T*>(a.logits) + r * a.logits_row, a.vocab};
  const RowStats raw_stats = softmax_row<false>(raw, 1.0f);
  const float temperature = a.temperature.at(r);
  const bool greedy = temperature <= 0.0f;
  const float scale = greedy ? 1.0f : 1.0f / temperature;

  int64_t token = -1;
  float logprob = __builtin_nanf(""), sampled = logprob;
  const auto draw_from = [&](const auto& row) {
    RowStats stats = raw_stats;
    if (kAdjusted || scale != 1.0f) stats = softmax_row<false>(row, scale);
    if (!(raw_stats.sum > 0.0f && stats.sum > 0.0f)) return;  // NaN, or nothing but -inf
    if (greedy) {
      token = row_argmax(row, stats);
    } else {
      KeptRow kept(row, {kMinusInf, row.n});
      stats = truncate(a, r, scale, stats, kept);
      token = draw_token(kept, stats, scale, static_cast<uint64_t>(a.seed.at(r)),
                         static_cast<uint64_t>(a.position.at(r)));
      sampled = row_logprob(stats, scale, row.at(token));
    }
    logprob = row_logprob(raw_stats, 1.0f, raw.at(token));
  };
  if constexpr (kAdjusted) {
    draw_from(AdjustedRow<T>(raw, a, r));
  } else {
    draw_from(raw);
  }
  if (threadIdx.x != 0) return;
  a.tokens[r] = token;
  a.logprobs[r] = logprob;
  a.sampled_logprobs[r] = greedy ? logprob : sampled;
}

template <class T>
void sample_typed(const SampleArgs& a, void* stream) {
  IC_CHECK(a.rows <= 0x7fffffff, "sample: too many rows, got ", a.rows);
  const bool adjusted = a.bias || a.generated || a.prompt || a.allowed;
  launch(adjusted ? sample_rows<T, true> : sample_rows<T, false>,
         dim3(static_cast<unsigned>(a.rows)), dim3(kRowThreads), 0, stream, a);
}

}  // namespace

void sample_cuda(const SampleArgs& a, void* stream) {
  if (a.rows == 0) return;
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return sample_typed<BFloat16>(a, stream);
    case Dtype::kFloat16:
      return sample_typed<Float16>(a, stream);
    default:
      return sample_typed<float>(a, stream);
  }
}

}  // namespace ic
