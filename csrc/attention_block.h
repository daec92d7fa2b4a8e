// What attention's forward and backward share on the CPU: sequences and their masks, packing to
// float32, and the register-blocked product that does all the work.
//
// A task works for one key/value head: its query rows are r = t * group + g over the queries t and
// the query heads g of that head, so grouped heads share every packed key.
#pragma once

#include "attention.h"
#include "tile.h"

namespace ic::IC_ISA {
namespace {

IC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
IC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
IC_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Span {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

// ---- sequences ----

using Sequence = AttentionSequence;

// Longest sequences and the work of all, which decide how tasks are cut.
struct Extent {
  int64_t queries = 0, keys = 0;
  double pairs = 0;  // query-key pairs, seen or not
};

Extent extent_of(const AttentionArgs& a) {
  Extent e;
  for (int64_t b = 0; b < a.sequences; ++b) {
    const Sequence s = attention_sequence(a, b);
    e.queries = larger(e.queries, s.queries);
    e.keys = larger(e.keys, s.keys);
    e.pairs += static_cast<double>(s.queries) * static_cast<double>(s.keys);
  }
  return e;
}

// x where vector v of a block holds keys a .. z - 1, else `other`.
IC_INLINE Vec where_seen(int64_t v, int64_t a, int64_t z, Vec x, Vec other) {
  const int64_t from = a - v * kLanes, to = z - v * kLanes;
  if (to < kLanes) x = select(iota() < broadcast_int(static_cast<int32_t>(to)), x, other);
  if (from > 0) x = select(iota() < broadcast_int(static_cast<int32_t>(from)), other, x);
  return x;
}

// ---- rows of a tensor ----

struct Rows {
  char* base;
  int64_t token, head;  // strides in bytes
  uint32_t group;       // rows of one token: its query heads
  const int32_t* table = nullptr;
  uint32_t block_size = 0;
  int64_t block = 0;
  int64_t end = 0;  // packing prefetches rows before this one

  IC_INLINE char* at(int64_t row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    if (table) return base + table[r / block_size] * block + r % block_size * token;
    if (group == 1) return base + row * token;
    return base + r / group * token + r % group * head;
  }
  // Where rows first .. first + n - 1 are; of keys and values.
  template <class T>
  IC_INLINE void locate(int64_t first, int64_t n, const T** to) const {
    for (int64_t i = 0; i < n;) {
      const char* from = at(first + i);
      const int64_t left = table ? block_size - (first + i) % block_size : n;
      for (const int64_t stop = smaller(n, i + left); i < stop; ++i, from += token)
        to[i] = reinterpret_cast<const T*>(from);
    }
  }
  // As a row is packed, the one that will be kAhead rows later.
  static constexpr int64_t kAhead = kLanes;
  IC_INLINE void prefetch_after(int64_t row, int64_t bytes) const {
    if (row + kAhead >= end) return;
    const char* from = at(row + kAhead);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  }
};

IC_INLINE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

Rows query_rows(const AttentionTensor& t, Dtype dtype, const Sequence& s, int64_t kv_head) {
  const int64_t size = bytes_of(dtype);
  const int64_t first = s.index * t.batch + s.first_query * t.token + kv_head * s.group * t.head;
  return {static_cast<char*>(t.data) + first * size, t.token * size, t.head * size,
          static_cast<uint32_t>(s.group)};
}

Rows key_rows(const AttentionArgs& a, const AttentionTensor& t, const Sequence& s,
              int64_t kv_head) {
  const int64_t size = bytes_of(a.kv_dtype);
  char* base = static_cast<char*>(t.data) + kv_head * t.head * size;
  if (a.pages.block_table) {
    const int64_t block = &t == &a.k ? a.pages.k_block : a.pages.v_block;
    return {base,
            t.token * size,
            0,
            1,
            a.pages.block_table + s.index * a.pages.table_row,
            static_cast<uint32_t>(a.pages.block_size),
            block * size};
  }
  return {base + (s.index * t.batch + s.first_key * t.token) * size, t.token * size, 0, 1};
}

// f(element) with a null pointer to a value of the tensor's type.
template <Word kWord, class F>
IC_INLINE void with_element(Dtype dtype, F&& f) {
  if constexpr (kWord != Word::kFloat) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == Dtype::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == Dtype::kFloat16) {
    f(static_cast<Float16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// One row of `dim` floats, times `factor`, rounded to the tensor's element type.
void store_row(Dtype dtype, const float* from, int64_t dim, float factor, char* to) {
  with_element<Word::kFloat>(
      dtype, [&](auto* element) __attribute__((always_inline)) {
        auto* target = reinterpret_cast<decltype(element)>(to);
        for (int64_t d = 0; d < dim; d += kLanes) {
          const Vec x = load(from + d) * broadcast(factor);
          if (dim - d >= kLanes) {
            store(target + d, x);
          } else {
            store_partial(target + d, x, static_cast<int>(dim - d));
          }
        }
      });
}

// 0 in every head of tokens begin .. end - 1 of a packed tensor: rows that belong to no sequence.
void clear_tokens(const AttentionTensor& t, Dtype dtype, int64_t heads, int64_t dim, int64_t begin,
                  int64_t end) {
  const int64_t size = bytes_of(dtype);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t h = 0; h < heads; ++h)
      __builtin_memset(static_cast<char*>(t.data) + (i * t.token + h * t.head) * size, 0,
                       dim * size);
}

// ---- rows as operands of multiply (tile.h) ----
//
// bfloat16 queries over bfloat16 keys are multiplied as pairs, all else as float32.

constexpr int64_t words_of(Word word, int64_t n) { return word == Word::kFloat ? n : (n + 1) / 2; }

IC_INLINE Word word_of(const AttentionArgs& a) {
  return a.dtype == Dtype::kBFloat16 && a.kv_dtype == Dtype::kBFloat16 ? pair_word() : Word::kFloat;
}

// f with the word as a type.
template <Word kWord>
struct WordTag {
  static constexpr Word word = kWord;
};
template <class F>
IC_INLINE void with_word(Word word, F&& f) {
  if (word == Word::kFloat) return f(WordTag<Word::kFloat>{});
#if defined(__AVX512F__)
  if (word == Word::kPair) return f(WordTag<Word::kPair>{});
  if (word == Word::kMatrix) return f(WordTag<Word::kMatrix>{});
#endif
  f(WordTag<Word::kSplit>{});
}

// Sums along the head dim, operand a: rows first .. first + n - 1, `ld` words each.
template <Word kWord>
void pack_queries(Dtype dtype, const Rows& rows, int64_t first, int64_t n, int64_t dim, float* to,
                  int64_t ld) {
  with_element<kWord>(
      dtype, [&](auto* element) __attribute__((always_inline)) {
        for (int64_t i = 0; i < n; ++i)
          pack_row<kWord != Word::kFloat>(reinterpret_cast<decltype(element)>(rows.at(first + i)),
                                          dim, to + i * ld);
      });
}

// Whole vectors of words.
template <Word kWord>
void turn_signs(float* words, int64_t n) {
  const VecInt sign = broadcast_int(kWord == Word::kFloat ? INT32_MIN : INT32_MIN | 1 << 15);
  for (int64_t i = 0; i < n; i += kLanes) store(words + i, from_bits(bits(load(words + i)) ^ sign));
}

// The same, operand b: keys as columns, with their sign turned if `negative`.
template <Word kWord>
void pack_keys(Dtype dtype, const Rows& rows, int64_t first, int64_t n, int64_t dim, bool negative,
               float* to) {
  with_element<kWord>(
      dtype, [&](auto* element) __attribute__((always_inline)) {
        pack_columns<kWord != Word::kFloat>(
            [&](int64_t i) __attribute__((always_inline)) {
              rows.prefetch_after(first + i, dim * sizeof *element);
              return reinterpret_cast<decltype(element)>(rows.at(first + i));
            },
            n, dim, to);
      });
  if (negative) turn_signs<kWord>(to, round_up(n, kPanel) * words_of(kWord, dim));
}

// Rows of values that are multiplied as one, and the range of them that holds begin .. end - 1.
template <Word kWord>
constexpr int64_t kRowsAtOnce = elements_of(kWord) * words_at_once(kWord);
template <Word kWord>
constexpr Span whole_rows(int64_t begin, int64_t end) {
  constexpr int64_t kRows = kRowsAtOnce<kWord>;
  return {begin / kRows * kRows, (end + kRows - 1) / kRows * kRows};
}

// Sums across rows, operand b: rows begin .. end - 1, padded to whole vectors, and rows of 0 up to
// whole_rows on either side, counted from row `base`. Returns whether all is finite.
template <Word kWord>
bool pack_values(Dtype dtype, const Rows& rows, int64_t base, int64_t begin, int64_t end,
                 int64_t dim, float* to, int64_t ld) {
  Vec check = broadcast(0.0f);
  const auto put = [&](Vec words, float* at) __attribute__((always_inline)) {
    store(at, words);
    check = multiply_add<kWord>(words, broadcast(0.0f), check);
  };
  with_element<kWord>(
      dtype, [&](auto* element) __attribute__((always_inline)) {
        using T = decltype(element);
        if constexpr (kWord == Word::kFloat) {
          for (int64_t i = begin; i < end; ++i, to += ld) {
            rows.prefetch_after(i, dim * sizeof *element);
            const T from = reinterpret_cast<T>(rows.at(i));
            for (int64_t d = 0; d < dim; d += kLanes)
              put(load_words<false>(from + d, dim - d), to + d);
          }
        } else {
          const BFloat16 zeros[kAttentionMaxDim] = {};
          const auto row = [&](int64_t i) __attribute__((always_inline))->const BFloat16* {
            if (i < begin || i >= end) return zeros;
            rows.prefetch_after(i, dim * sizeof *element);
            return reinterpret_cast<const BFloat16*>(rows.at(i));
          };
          const Span all = whole_rows<kWord>(begin - base, end - base);
          for (int64_t i = base + all.begin; i < base + all.end; i += 2, to += ld) {
            const BFloat16 *early = row(i), *late = row(i + 1);
            for (int64_t d = 0; d < dim; d += kLanes)
              put(interleave(early + d, late + d, dim - d), to + d);
          }
        }
      });
  return reduce_add(check) == 0.0f;
}

// 16 sums' words, each of an earlier and a later element.
template <Word kWord>
IC_INLINE void store_pairs(float* to, Vec early, Vec late) {
#if defined(__AVX512F__)
  if constexpr (kNativePairs<kWord>) {
    __m512i words;  // all of `early`, then all of `late`
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(words) : "v"(late.part[0]), "v"(early.part[0]));
    const __m512i halves =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(halves, words));
    return;
  }
#endif
  const VecInt low = shift_right(round_to_high_half(early), 16) & broadcast_int(0xffff);
  store(to, from_bits(low | (round_to_high_half(late) & broadcast_int(-65536))));
}

// c + a b where a is one word for all columns.
template <Word kWord>
IC_INLINE Vec multiply_add_word(const float* a, Vec b, Vec c) {
  int32_t word;
  __builtin_memcpy(&word, a, sizeof word);
  return multiply_add<kWord>(from_bits(broadcast_int(word)), b, c);
}

// Dot products over the head dim are chains of kDepth words, added up: half the rounding error of
// one chain.
constexpr int64_t kDepth = 64;

// Dot products of `rows` query rows with the keys of vectors v0 .. v1 - 1 of packed columns.
IC_INLINE void multiply_columns(Word word, const float* q, int64_t ldq, const float* columns,
                                int64_t words, int64_t rows, int64_t v0, int64_t v1, float* to,
                                int64_t ld) {
  constexpr int64_t kVecs = kPanel / kLanes;
  for (int64_t v = v0; v < v1;) {
    const int64_t end = smaller(v1, (v / kVecs + 1) * kVecs);
    const float* panel = columns + v / kVecs * kPanel * words + v % kVecs * kLanes;
    multiply_rows(word, {q, panel, to + v * kLanes, nullptr, ldq, kPanel, ld, words, kDepth}, rows,
                  (end - v) * kLanes);
    v = end;
  }
}

// to[i] = x[i] . y[i] for n rows of pack_queries, bit for bit as multiply_columns would form it. Up
// to 15 elements past to[n - 1] are written.
template <Word kWord>
void dot_rows(const float* x, const float* y, int64_t n, int64_t ld, float* to) {
  for (int64_t i0 = 0; i0 < n; i0 += kLanes) {
    Vec sum = broadcast(0.0f), chain = sum;
    for (int64_t d = 0; d < ld; d += kLanes) {
      Vec a[kLanes], b[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = smaller(i0 + i, n - 1) * ld + d;
        a[i] = load(x + row);
        b[i] = load(y + row);
      }
      transpose(a);
      transpose(b);
      if constexpr (kWord == Word::kMatrix) {
        Halves group;
        for (int64_t i = 0; i < kLanes; ++i)
          group.add(early_halves(a[i]), early_halves(b[i]), late_halves(a[i]), late_halves(b[i]));
        sum = sum + group.sum();
        continue;
      }
      for (int64_t i = 0; i < kLanes; ++i) chain = multiply_add<kWord>(a[i], b[i], chain);
      if ((d + kLanes) % kDepth == 0 || d + kLanes == ld) {
        sum = sum + chain;
        chain = broadcast(0.0f);
      }
    }
    store(to + i0, sum);
  }
}

// ---- logits ----

// How a product q . k, or q . -k where the scale is negative, becomes a logit: the largest product
// gives the largest logit. Without softcap and slopes the logit is scale times the product, and
// `plain` leaves it to the exponential to multiply.
struct Logits {
  float scale, softcap;  // |scale|; softcap 0: none
  float slope;           // of this row's head
};

// One vector of products to logits, for the query at `position` and keys from `key` on.
// `slope_out`, if not null, receives d logit / d (scale product).
IC_INLINE Vec logits_of(Vec x, const Logits& l, int64_t position, int64_t key, Vec* slope_out) {
  x = x * broadcast(l.scale);
  if (l.softcap > 0) {
    const Vec cap = broadcast(l.softcap), t = tanh(x / cap);
    x = cap * t;
    if (slope_out) *slope_out = broadcast(1.0f) - t * t;
  }
  const VecInt distance = broadcast_int(static_cast<int32_t>(position - key)) - iota();
  const VecInt sign = shift_right(distance, 31);
  const Vec far = int_to_float((distance ^ sign) - sign);
  return x - broadcast(l.slope) * far;
}

IC_INLINE float exponential(float x) {
  return lanes_of(exp2_normal(broadcast(x), broadcast(kLog2E)))[0];
}

// Weights that become bfloat16 need no more.
template <Word kWord>
constexpr int kExpDegree = kWord == Word::kFloat ? 6 : 4;

IC_INLINE bool plain_logits(const AttentionArgs& a) { return !(a.softcap > 0) && !a.slopes; }

IC_INLINE Logits logits_for(const AttentionArgs& a, const Sequence& s, int64_t head) {
  return {__builtin_fabsf(a.scale), a.softcap,
          a.slopes ? a.slopes[s.index * a.slopes_batch + head] : 0.0f};
}

// ---- scratch: one slot per thread at work ----

class Slot {
 public:
  Slot(float* workspace, int64_t floats, int threads)
      : flags_(reinterpret_cast<int32_t*>(workspace + floats * threads)) {
    while (__atomic_exchange_n(&flags_[index_], 1, __ATOMIC_ACQUIRE))
      index_ = (index_ + 1) % threads;
    scratch_ = workspace + floats * index_;
  }
  ~Slot() { __atomic_store_n(&flags_[index_], 0, __ATOMIC_RELEASE); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  float* scratch() const { return scratch_; }

  static void clear(float* workspace, int64_t floats, int threads) {
    __builtin_memset(workspace + floats * threads, 0, sizeof(int32_t) * threads);
  }

 private:
  int32_t* flags_;
  int index_ = 0;
  float* scratch_;
};

// Hands out parts of a slot.
class Arena {
 public:
  explicit Arena(float* scratch) : next_(scratch) {}
  float* take(int64_t floats) {
    float* start = next_;
    next_ += floats;
    return start;
  }

 private:
  float* next_;
};

// Tasks in a piece of the thread pool: a million flops or so, 20 microseconds.
IC_INLINE int64_t grain_of(double flops, int64_t tasks) {
  const double per_task = flops / static_cast<double>(tasks > 0 ? tasks : 1) + 1.0;
  return per_task >= 1e6 ? 1 : static_cast<int64_t>(1e6 / per_task) + 1;
}

}  // namespace
}  // namespace ic::IC_ISA
