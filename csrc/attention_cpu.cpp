// attention's forward on the CPU, and the paged cache.
//
// A task is a block of query rows of one key/value head. It walks the keys in blocks at fixed
// positions: packs a block (keys as lanes, values as rows), then for each tile of a few rows forms
// the logits in L1, takes their exponentials against the running maximum, and adds the product with
// the values to the rescaled output. A row's bits depend on its own keys and their positions alone:
// not on the other rows, on how queries are cut into calls, or on the threads.
#include "attention_block.h"
#include "parallel.h"

namespace ic::IC_ISA {
namespace {

// The largest of the logits s that a row sees, keys a .. z - 1. In vectors v0 .. v1 - 1, both even,
// all others become -inf.
IC_INLINE float hide_and_find_maximum(float* s, int64_t v0, int64_t v1, int64_t a, int64_t z) {
  const Vec lowest = broadcast(-__builtin_inff());
  const auto hide = [&](int64_t v) __attribute__((always_inline)) {
    store(s + v * kLanes, where_seen(v, a, z, load(s + v * kLanes), lowest));
  };
  for (int64_t v = v0; v * kLanes < a; ++v) hide(v);
  for (int64_t v = z / kLanes; v < v1; ++v) hide(v);
  Vec top = lowest, other = lowest;
  for (int64_t v = v0; v < v1; v += 2) {
    top = max(load(s + v * kLanes), top);
    other = max(load(s + (v + 1) * kLanes), other);
  }
  return reduce_max(max(top, other));
}

// The weights of vectors v0 .. v1 - 1, both even: powers of two of log2_scale (s - maximum), as
// words. Returns their sums, lane by lane.
template <Word kWord>
IC_INLINE Vec weights_of(const float* s, int64_t v0, int64_t v1, float maximum, float log2_scale,
                         float* words) {
  const Vec top = broadcast(maximum), c = broadcast(log2_scale);
  Vec sum = broadcast(0.0f), other_sum = sum;
  for (int64_t v = v0; v < v1; v += 2) {
    const Vec first = exp2_normal<kExpDegree<kWord>>(load(s + v * kLanes) - top, c);
    const Vec second = exp2_normal<kExpDegree<kWord>>(load(s + (v + 1) * kLanes) - top, c);
    if constexpr (kWord == Word::kFloat) {
      store(words + v * kLanes, first);
      store(words + (v + 1) * kLanes, second);
    } else {
      store_neighbours<kWord>(words + v / 2 * kLanes, first, second);
    }
    sum = sum + first;
    other_sum = other_sum + second;
  }
  return sum + other_sum;
}

// x (D) turned by the angles of a position, each product rounded as in plain torch.
void rotate(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved) {
  const int64_t half = dim / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float *a = x + i * step, *b = a + other;
    const float turned = *a * cos[i] - *b * sin[i];
    *b = *b * cos[i] + *a * sin[i];
    *a = turned;
  }
}

void rotate_at(const AttentionArgs& a, const Sequence& s, int64_t t, float* x) {
  const int64_t position = a.pages.cache_seqlens[s.index] + t;
  const int64_t angles = position * (a.dim / 2);
  rotate(x, a.pages.cos + angles, a.pages.sin + angles, a.dim, a.pages.interleaved);
}

// What a row reads like after a visit to a tensor of this element type.
void round_to(Dtype dtype, float* x, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (dtype == Dtype::kBFloat16) x[d] = to_float(to_bfloat16(x[d]));
    if (dtype == Dtype::kFloat16) x[d] = to_float(to_float16(x[d]));
  }
}

template <Word kWord>
class ForwardTask {
  static constexpr int kStep = tile_rows(kWord);  // rows of a tile
  static constexpr int kMostUnpacked = 6;         // rows
  static constexpr int kMostRows = kStep > kMostUnpacked ? kStep : kMostUnpacked;
  static constexpr int64_t kMostKeys = 256;  // of a block
  // Rows from a read to the prefetch of another, over the ends of keys, values and tasks: into L2,
  // whose misses outnumber those of L1.
  static constexpr int64_t kAhead = 64;

 public:
  ForwardTask(const AttentionArgs& args, const AttentionPlan& plan, const Sequence& s,
              int64_t kv_head, float* scratch)
      : a_(args), plan_(plan), s_(s), kv_head_(kv_head) {
    Arena arena(scratch);
    columns_ = arena.take(plan.keys * plan.padded);
    values_ = arena.take(plan.keys * plan.padded);
    q_ = arena.take(plan.rows * plan.padded);
    out_ = arena.take(plan.rows * plan.padded);
    sums_ = arena.take(plan.rows * kLanes);
    maximum_ = arena.take(plan.rows);
    // Weights take the place of their logits where those fill the cache.
    logits_ = arena.take(kMostRows * plan.keys);
    weights_ = kInPlace ? logits_ : arena.take(kMostRows * plan.keys / 2);
    weights_row_ = kInPlace ? plan.keys : plan.keys / 2;
    words_ = words_of(kWord, a_.dim);
    q_row_ = round_up(words_, kLanes);
    plain_ = plain_logits(a_);
    log2_scale_ = plain_ ? __builtin_fabsf(a_.scale) * kLog2E : kLog2E;
    if (log2_scale_ < __FLT_MIN__) log2_scale_ = __FLT_MIN__;  // a hidden logit, -inf, stays that
  }

  // Whose keys come next, from row `first` on: the task after this one finds them in L2.
  void precede(const Rows& keys, int64_t first) {
    next_ = &keys;
    next_first_ = first;
  }

  // Rows begin .. end - 1.
  void run(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    pack(begin, end);
    if (a_.scale < 0) turn_signs<kWord>(q_, n * q_row_);
    __builtin_memset(sums_, 0, n * kLanes * sizeof(float));
    for (int64_t i = 0; i < n; ++i) maximum_[i] = -__builtin_inff();
    const int64_t end_key = s_.end_seen(end - 1);
    k_ = key_rows(a_, a_.k, s_, kv_head_);
    v_ = key_rows(a_, a_.v, s_, kv_head_);
    k_.end = v_.end = end_key;
    if (s_.queries == 1 && n <= kMostUnpacked) return run_unpacked(n, end_key);
    for (int64_t key = s_.first_seen(begin) / plan_.keys * plan_.keys; key < end_key;
         key += plan_.keys) {
      const int64_t n_keys = smaller(plan_.keys, end_key - key);
      pack_keys<kWord>(a_.kv_dtype, k_, key, n_keys, a_.dim, false, columns_);
      finite_ = pack_values<kWord>(a_.kv_dtype, v_, key, key, key + n_keys, a_.dim, values_,
                                   plan_.padded);
      for (int64_t r = begin; r < end; r += kStep)
        add_keys(r, smaller(kStep, end - r), r - begin, key, n_keys);
    }
    for (int64_t r = begin; r < end; ++r) finish(r, r - begin);
  }

 private:
  // The rows of a single token, as in decoding: every key is read once, so none is packed. Sixteen
  // keys at a time become columns in registers, values are multiplied from where they are; the same
  // sums in the same order.
  void run_unpacked(int64_t rows, int64_t end_key) {
    if constexpr (kWord == Word::kMatrix)  // halves of the queries' words, as float32
      for (int64_t i = 0; i < rows * q_row_; i += kLanes) {
        store(columns_ + i, early_halves(load(q_ + i)));
        store(columns_ + kMostUnpacked * q_row_ + i, late_halves(load(q_ + i)));
      }
    with_element<kWord>(a_.kv_dtype, [&](auto* element) {
      if (rows <= 1) return add_unpacked<1>(element, rows, end_key);
      if (rows <= 2) return add_unpacked<2>(element, rows, end_key);
      if (rows <= 4) return add_unpacked<4>(element, rows, end_key);
      add_unpacked<kMostUnpacked>(element, rows, end_key);
    });
    for (int64_t r = 0; r < rows; ++r) finish(r, r);
  }

  template <int kRows, class T>
  void add_unpacked(T*, int64_t rows, int64_t end_key) {
    const T* at[2 * kMostKeys + kAhead];  // in the order in which they are read
    const auto locate = [&](const Rows& from, int64_t row, int64_t end, int64_t n, const T** to) {
      const int64_t there = smaller(n, end - row);
      if (there > 0) from.locate(row, there, to);
      for (int64_t i = larger(there, 0); i < n; ++i) to[i] = to[i - 1];
    };
    const int64_t first_key = s_.first_seen(0);
    for (int64_t key = first_key / plan_.keys * plan_.keys; key < end_key; key += plan_.keys) {
      const int64_t a = larger(0, first_key - key), z = smaller(plan_.keys, end_key - key);
      const int64_t v0 = a / kLanes, v1 = (z + kLanes - 1) / kLanes, n = (v1 - v0) * kLanes;
      locate(k_, key + v0 * kLanes, end_key, n, at);
      locate(v_, key + v0 * kLanes, end_key, n, at + n);
      const bool last = key + plan_.keys >= end_key && next_;
      const Rows& then = last ? *next_ : k_;
      locate(then, last ? next_first_ : key + plan_.keys, then.end, kAhead, at + 2 * n);
      for (int64_t i = 0; i < n; i += kLanes)
        multiply_16_keys<kRows>(at + i, logits_ + v0 * kLanes + i);
      float keep[kMostUnpacked] = {};
      softmax(0, rows, 0, key, z, v0, v1, keep);
      if (key <= first_key) __builtin_memset(out_, 0, kRows * plan_.padded * sizeof(float));
      const T* const* values = at + n - v0 * kLanes;
      // Twice as many sums at work where the halves of words have their own.
      constexpr int kVecs = kWord == Word::kMatrix && kRows > 2 ? kTileVecs / 2 : kTileVecs;
      int64_t d = 0;
      for (; a_.dim - d >= kVecs * kLanes; d += kVecs * kLanes)
        multiply_values<kRows, kVecs>(values, a, z, d, keep);
      for (; d < a_.dim; d += kLanes) multiply_values<kRows, 1>(values, a, z, d, keep);
    }
  }

  // Logits of keys from[0] .. from[15].
  template <int kRows, class T>
  IC_INLINE void multiply_16_keys(const T* const* from, float* to) {
    const int64_t rows_per_step = kLanes * kLanes / round_up(words_, kLanes);
    int64_t row = 0;
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = from[i];
    const int64_t depth = kWord == Word::kMatrix ? words_ : kDepth;
    for (int64_t begin = 0; begin < words_; begin += depth) {
      Vec chain[kRows];
      for (int m = 0; m < kRows; ++m) chain[m] = broadcast(0.0f);
      for (int64_t word = begin; word < smaller(words_, begin + depth); word += kLanes) {
        Vec columns[kLanes];
        load_columns<kWord != Word::kFloat>(
            [&](int64_t i) __attribute__((always_inline)) { return rows[i]; }, kLanes,
            word * kElements, a_.dim, columns);
        for (int64_t row_end = row + rows_per_step; row < row_end; ++row)
          for (int64_t d = 0; d < a_.dim; d += 64 / sizeof(T))
            __builtin_prefetch(from[row + kAhead] + d, 0, 2);
        if constexpr (kWord == Word::kMatrix) {
          Halves group[kRows];
          const float* halves = columns_ + word;
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            const Vec x = early_halves(columns[i]), y = late_halves(columns[i]);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
              const float* q = halves + m * q_row_ + i;
              group[m].add(broadcast(*q), x, broadcast(q[kMostUnpacked * q_row_]), y);
            }
          }
          for (int m = 0; m < kRows; ++m) chain[m] = chain[m] + group[m].sum();
          continue;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (word + i < words_)
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m)
              chain[m] = multiply_add_word<kWord>(q_ + m * q_row_ + word + i, columns[i], chain[m]);
      }
      for (int m = 0; m < kRows; ++m, to += plan_.keys)
        store(to, begin > 0 ? load(to) + chain[m] : chain[m]);
      to -= kRows * plan_.keys;
    }
  }

  // Columns d .. of out, from the values of keys a .. z - 1 of a block.
  template <int kRows, int kVecs, class T>
  IC_INLINE void multiply_values(const T* const* from, int64_t a, int64_t z, int64_t d,
                                 const float* keep) {
    if constexpr (kWord == Word::kMatrix) return multiply_groups<kRows, kVecs>(from, a, z, d, keep);
    const int64_t ld = weights_row_;
    Vec sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[m][j] = broadcast(0.0f);
    const T zeros[kVecs * kLanes] = {};
    for (int64_t word = a / kElements; word < words_of(kWord, z); ++word) {
      const int64_t key = word * kElements;
      Vec x[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        const int64_t n = kVecs > 1 ? kLanes : a_.dim - d;
        if constexpr (kWord == Word::kFloat) {
          x[j] = load_words<false>(from[key] + d + j * kLanes, n);
        } else {
          const T* early = key < a ? zeros : from[key] + d;
          const T* late = key + 1 < z ? from[key + 1] + d : zeros;
          x[j] = interleave(early + j * kLanes, late + j * kLanes, n);
        }
      }
      for (int e = 0; e < kElements; ++e)
        for (int j = 0; j < kVecs; j += 64 / sizeof(T) / kLanes)
          __builtin_prefetch(from[key + e + kAhead] + d + j * kLanes, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j)
          sum[m][j] = multiply_add_word<kWord>(weights_ + m * ld + word, x[j], sum[m][j]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        float* to = out_ + m * plan_.padded + d + j * kLanes;
        store(to, fma(load(to), broadcast(keep[m]), sum[m][j]));
      }
  }

  // The same for groups of 32 keys, in the order of the matrix unit.
  template <int kRows, int kVecs>
  IC_INLINE void multiply_groups(const BFloat16* const* from, int64_t a, int64_t z, int64_t d,
                                 const float* keep) {
    constexpr int64_t kGroup = kRowsAtOnce<kWord>;
    const BFloat16 zeros[kVecs * kLanes] = {};
    Vec sum[kRows][kVecs];
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < kVecs; ++j)
        sum[m][j] = load(out_ + m * plan_.padded + d + j * kLanes) * broadcast(keep[m]);
    for (int64_t first = a / kGroup * kGroup; first < z; first += kGroup) {
      Halves group[kRows][kVecs];
      for (int64_t key = larger(first, a & ~1); key < smaller(z, first + kGroup); key += 2) {
        const BFloat16* x = key < a ? zeros : from[key] + d;
        const BFloat16* y = key + 1 < z ? from[key + 1] + d : zeros;
        Vec xs[kVecs], ys[kVecs];
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) {
          const int64_t n = kVecs > 1 ? kLanes : a_.dim - d;
          xs[j] = load_words<false>(x + j * kLanes, n);
          ys[j] = load_words<false>(y + j * kLanes, n);
        }
        for (int e = 0; e < 2; ++e)
          for (int j = 0; j < kVecs; j += 2)
            __builtin_prefetch(from[key + e + kAhead] + d + j * kLanes, 0, 2);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          int32_t word;
          __builtin_memcpy(&word, weights_ + m * weights_row_ + key / 2, sizeof word);
          const Vec both = from_bits(broadcast_int(word));
          const Vec p = early_halves(both), q = late_halves(both);
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) group[m][j].add(p, xs[j], q, ys[j]);
        }
      }
      for (int m = 0; m < kRows; ++m)
        for (int j = 0; j < kVecs; ++j) sum[m][j] = sum[m][j] + group[m][j].sum();
    }
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < kVecs; ++j) store(out_ + m * plan_.padded + d + j * kLanes, sum[m][j]);
  }

  void pack(int64_t begin, int64_t end) {
    const Rows rows = query_rows(a_.q, a_.dtype, s_, kv_head_);
    if (!a_.pages.cos) {
      pack_queries<kWord>(a_.dtype, rows, begin, end - begin, a_.dim, q_, q_row_);
      return;
    }
    float turned[kAttentionMaxDim];
    for (int64_t r = begin; r < end; ++r) {
      pack_queries<Word::kFloat>(a_.dtype, rows, r, 1, a_.dim, turned, 0);
      rotate_at(a_, s_, r / s_.group, turned);
      float* to = q_ + (r - begin) * q_row_;
      if (kWord != Word::kFloat) {
        store_row(a_.dtype, turned, a_.dim, 1.0f, reinterpret_cast<char*>(to));
        for (int64_t i = words_; i < q_row_; ++i) to[i] = 0.0f;
      } else {
        round_to(a_.dtype, turned, a_.dim);
        __builtin_memcpy(to, turned, a_.dim * sizeof(float));
      }
    }
  }

  int64_t head_of(int64_t row) const { return kv_head_ * s_.group + row % s_.group; }

  // The keys of a block from `key` on that a row sees, counted from there; 0 to n_keys even where
  // it sees none, for softmax() writes up to begin and from end on.
  Span seen_by(int64_t row, int64_t key, int64_t n_keys) const {
    const auto within = [&](int64_t k) { return smaller(n_keys, larger(0, k - key)); };
    return {within(s_.first_seen(row)), within(s_.end_seen(row))};
  }

  // The packed block of n_keys keys from `key` on, for `rows` rows from r, the i-th of this task.
  void add_keys(int64_t r, int64_t rows, int64_t i, int64_t key, int64_t n_keys) {
    const Span tile{seen_by(r, key, n_keys).begin, seen_by(r + rows - 1, key, n_keys).end};
    if (tile.size() == 0) return;
    const int64_t v0 = tile.begin / kLanes, v1 = (tile.end + kLanes - 1) / kLanes;
    const int64_t padded = plan_.padded, keys = plan_.keys, ld = weights_row_;
    multiply_columns(kWord, q_ + i * q_row_, q_row_, columns_, words_, rows, v0, v1, logits_, keys);
    float keep[kStep];
    softmax(r, rows, i, key, n_keys, v0, v1, keep);
    const bool fresh = s_.first_seen(r) >= key;  // nothing was added to these rows before
    if (finite_) {
      const Span whole = whole_rows<kWord>(tile.begin, tile.end);
      const int64_t first = whole.begin / kElements, last = whole.end / kElements;
      multiply(kWord,
               {weights_ + first, values_ + first * padded, out_ + i * padded,
                fresh ? nullptr : keep, ld, padded, padded, last - first},
               rows, padded);
      return;
    }
    // A value is infinite or NaN: each row takes exactly the values that it sees.
    if (fresh) __builtin_memset(out_ + i * padded, 0, rows * padded * sizeof(float));
    for (int64_t m = 0; m < rows; ++m) {
      const Span seen = seen_by(r + m, key, n_keys);
      if (seen.size() == 0) continue;
      pack_values<kWord>(a_.kv_dtype, v_, key, key + seen.begin, key + seen.end, a_.dim, values_,
                         padded);
      const Span whole = whole_rows<kWord>(seen.begin, seen.end);
      const int64_t first = whole.begin / kElements, last = whole.end / kElements;
      multiply(kWord,
               {weights_ + m * ld + first, values_, out_ + (i + m) * padded, keep + m, ld, padded,
                padded, last - first},
               1, padded);
    }
  }

  // Products of `rows` rows from r, the i-th of this task, become weights; `keep` takes what was
  // summed before to the new maxima.
  void softmax(int64_t r, int64_t rows, int64_t i, int64_t key, int64_t n_keys, int64_t v0,
               int64_t v1, float* keep) {
    const int64_t keys = plan_.keys, ld = weights_row_;
    const int64_t w0 = v0 & ~1, w1 = (v1 + 1) & ~1;
    float maximum[kMostRows];
    for (int64_t m = 0; m < rows; ++m) {
      const Span seen = seen_by(r + m, key, n_keys);
      float* logits = logits_ + m * keys;
      if (!plain_) to_logits(logits, v0, v1, r + m, key);
      maximum[m] = hide_and_find_maximum(logits, w0, w1, seen.begin, seen.end);
    }
    for (int64_t m = 0; m < rows; ++m) {
      const float before = maximum_[i + m], now = maximum[m] > before ? maximum[m] : before;
      maximum_[i + m] = now;
      keep[m] = before == now
                    ? 1.0f
                    : lanes_of(exp2_normal(broadcast(before - now), broadcast(log2_scale_)))[0];
    }
    for (int64_t m = 0; m < rows; ++m) {
      // Without a key so far there may be no maximum: any number serves, the weights are 0.
      const bool blind = seen_by(r + m, key, n_keys).size() == 0;
      const Vec sum = weights_of<kWord>(logits_ + m * keys, w0, w1, blind ? 0.0f : maximum_[i + m],
                                        log2_scale_, weights_ + m * ld);
      float* sums = sums_ + (i + m) * kLanes;
      store(sums, fma(load(sums), broadcast(keep[m]), sum));
    }
  }

  void to_logits(float* x, int64_t v0, int64_t v1, int64_t row, int64_t key) const {
    const Logits l = logits_for(a_, s_, head_of(row));
    for (int64_t v = v0; v < v1; ++v)
      store(x + v * kLanes,
            logits_of(load(x + v * kLanes), l, s_.position(row), key + v * kLanes, nullptr));
  }

  void finish(int64_t row, int64_t i) {
    const int64_t head = head_of(row), t = row / s_.group;
    const Rows out = query_rows(a_.out, a_.dtype, s_, kv_head_);
    float* lse = a_.lse + attention_lse_index(a_, s_, head, t);
    const float sink = a_.sinks ? a_.sinks[head] : -__builtin_inff();
    if (s_.end_seen(row) <= s_.first_seen(row)) {
      const float zeros[kAttentionMaxDim] = {};
      store_row(a_.dtype, zeros, a_.dim, 1.0f, out.at(row));
      *lse = sink;
      return;
    }
    float sum = reduce_add(load(sums_ + i * kLanes)), top = maximum_[i];
    if (plain_) top *= __builtin_fabsf(a_.scale);
    float factor = 1.0f;
    if (a_.sinks) {
      const float before = top;
      top = before > sink ? before : sink;
      factor = exponential(before - top);
      sum = sum * factor + exponential(sink - top);
    }
    store_row(a_.dtype, out_ + i * plan_.padded, a_.dim, factor / sum, out.at(row));
    *lse = top + (sum > 0.0f ? lanes_of(log(broadcast(sum)))[0] : sum);  // NaN stays
  }

  static constexpr int64_t kElements = elements_of(kWord);
  static constexpr bool kInPlace = kWord == Word::kFloat || kWord == Word::kMatrix;

  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Sequence& s_;
  int64_t kv_head_, words_, q_row_, weights_row_;
  Rows k_, v_;
  const Rows* next_ = nullptr;
  int64_t next_first_ = 0;
  float *columns_, *values_, *q_, *out_, *logits_, *weights_;
  float *maximum_, *sums_;  // running softmax: (rows,) and (rows, 16)
  float log2_scale_;
  bool plain_, finite_ = true;
};

Rows new_rows(const AttentionArgs& a, const AttentionTensor& t, const Sequence& s,
              int64_t kv_head) {
  const int64_t size = bytes_of(a.dtype);
  const int64_t first = s.first_query * t.token + kv_head * t.head;
  return {static_cast<char*>(t.data) + first * size, t.token * size, 0, 1};
}

// The key and value of a sequence's t-th new token go into the cache.
void append(const AttentionArgs& a, const Sequence& s, int64_t t) {
  const AttentionPages& p = a.pages;
  const int64_t at = p.cache_seqlens[s.index] + t;
  float row[kAttentionMaxDim];
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    pack_queries<Word::kFloat>(a.dtype, new_rows(a, p.k_new, s, h), t, 1, a.dim, row, 0);
    if (p.cos) {
      rotate_at(a, s, t, row);
      round_to(a.dtype, row, a.dim);
    }
    store_row(a.kv_dtype, row, a.dim, 1.0f, key_rows(a, a.k, s, h).at(at));
    pack_queries<Word::kFloat>(a.dtype, new_rows(a, p.v_new, s, h), t, 1, a.dim, row, 0);
    store_row(a.kv_dtype, row, a.dim, 1.0f, key_rows(a, a.v, s, h).at(at));
  }
}

void append_all(const AttentionArgs& a, const Extent& extent) {
  constexpr int64_t kTokens = 16;
  const int64_t chunks = (extent.queries + kTokens - 1) / kTokens;
  const int64_t grain = 65536 / (kTokens * a.kv_heads * a.dim) + 1;
  parallel_rows(a.sequences * chunks, grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s = attention_sequence(a, i / chunks);
      const int64_t first = i % chunks * kTokens;
      for (int64_t t = first; t < smaller(s.queries, first + kTokens); ++t) append(a, s, t);
    }
  });
}

// Rows of packed tensors that belong to no sequence.
void clear_gap(const AttentionArgs& a, int64_t begin, int64_t end) {
  clear_tokens(a.out, a.dtype, a.heads, a.dim, begin, end);
  for (int64_t h = 0; h < a.heads; ++h)
    for (int64_t t = begin; t < end; ++t) a.lse[h * a.queries + t] = -__builtin_inff();
}

}  // namespace

void attention_cpu(const AttentionArgs& a) {
  const AttentionPlan plan = attention_plan(a.dim);
  const Extent extent = extent_of(a);
  if (a.pages.k_new.data) append_all(a, extent);
  if (a.cu_q) {
    clear_gap(a, 0, a.cu_q[0]);
    clear_gap(a, a.cu_q[a.sequences], a.queries);
  }
  const int64_t units = a.sequences * a.kv_heads, rows = extent.queries * (a.heads / a.kv_heads);
  int64_t block = plan.rows;
  while (block > 48 && units * ((rows + block - 1) / block) < 4 * a.threads) block /= 2;
  const int64_t blocks = (rows + block - 1) / block, tasks = units * blocks;
  const double flops = 4.0 * extent.pairs * static_cast<double>(a.heads * a.dim);
  const Word word = word_of(a);
  Slot::clear(a.workspace, plan.forward_floats, a.threads);
  // Last rows first: they see the most keys, and no long task is left for the end.
  parallel_rows(tasks, grain_of(flops, tasks), a.threads, [&](int64_t begin, int64_t end) {
    Slot slot(a.workspace, plan.forward_floats, a.threads);
    const MatrixUnit guard(word);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task % units, first = (blocks - 1 - task / units) * block;
      const Sequence s = attention_sequence(a, unit / a.kv_heads);
      if (first >= s.rows()) continue;
      const int64_t next_unit = (task + 1) % units;
      const Sequence next = attention_sequence(a, next_unit / a.kv_heads);
      Rows next_keys = key_rows(a, a.k, next, next_unit % a.kv_heads);
      next_keys.end = next.keys;
      with_word(word, [&](auto tag) {
        ForwardTask<tag.word> work(a, plan, s, unit % a.kv_heads, slot.scratch());
        if (next.rows() > 0) work.precede(next_keys, next.first_seen(0));
        work.run(first, smaller(s.rows(), first + block));
      });
    }
  });
}

}  // namespace ic::IC_ISA
