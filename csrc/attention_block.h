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
  int64_t group;        // rows of one token: its query heads
  const int32_t* table = nullptr;
  int64_t block_size = 0, block = 0;

  char* at(int64_t row) const {
    if (table) return base + table[row / block_size] * block + row % block_size * token;
    if (group == 1) return base + row * token;
    return base + row / group * token + row % group * head;
  }
};

IC_INLINE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

Rows query_rows(const AttentionTensor& t, Dtype dtype, const Sequence& s, int64_t kv_head) {
  const int64_t size = bytes_of(dtype);
  const int64_t first = s.index * t.batch + s.first_query * t.token + kv_head * s.group * t.head;
  return {static_cast<char*>(t.data) + first * size, t.token * size, t.head * size, s.group};
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
            a.pages.block_size,
            block * size};
  }
  return {base + (s.index * t.batch + s.first_key * t.token) * size, t.token * size, 0, 1};
}

// ---- packing: rows become float32, padded to whole vectors with 0 ----

template <class T>
IC_INLINE Vec load_some(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : load_partial(from, static_cast<int>(n), 0.0f);
}

// Finite as long as all that was added is.
IC_INLINE Vec add_zero_times(Vec sum, Vec x) { return fma(x, broadcast(0.0f), sum); }

// Row-major (n, padded), times `factor`. Returns whether all is finite.
template <class T>
bool pack_rows_of(const Rows& rows, int64_t first, int64_t n, int64_t dim, float factor,
                  float* to) {
  const int64_t padded = round_up(dim, kLanes);
  Vec check = broadcast(0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const T* from = reinterpret_cast<const T*>(rows.at(first + i));
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec x = load_some(from + d, dim - d) * broadcast(factor);
      check = add_zero_times(check, x);
      store(to + i * padded + d, x);
    }
  }
  return reduce_add(check) == 0.0f;
}

// Keys as columns, for multiply.
template <class T>
void pack_columns_of(const Rows& rows, int64_t first, int64_t n, int64_t dim, float* to) {
  pack_columns<false>(
      [&](int64_t i)
          __attribute__((always_inline)) { return reinterpret_cast<const T*>(rows.at(first + i)); },
      n, dim, to);
}

bool pack_rows(Dtype dtype, const Rows& rows, int64_t first, int64_t n, int64_t dim, float factor,
               float* to) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return pack_rows_of<BFloat16>(rows, first, n, dim, factor, to);
    case Dtype::kFloat16:
      return pack_rows_of<Float16>(rows, first, n, dim, factor, to);
    default:
      return pack_rows_of<float>(rows, first, n, dim, factor, to);
  }
}

void pack_columns(Dtype dtype, const Rows& rows, int64_t first, int64_t n, int64_t dim, float* to) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return pack_columns_of<BFloat16>(rows, first, n, dim, to);
    case Dtype::kFloat16:
      return pack_columns_of<Float16>(rows, first, n, dim, to);
    default:
      return pack_columns_of<float>(rows, first, n, dim, to);
  }
}

// One row of `dim` floats, times `factor`, rounded to the tensor's element type.
template <class T>
IC_INLINE void store_row_of(const float* from, int64_t dim, float factor, char* to) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec x = load(from + d) * broadcast(factor);
    T* target = reinterpret_cast<T*>(to) + d;
    if (dim - d >= kLanes) {
      store(target, x);
    } else {
      store_partial(target, x, static_cast<int>(dim - d));
    }
  }
}

void store_row(Dtype dtype, const float* from, int64_t dim, float factor, char* to) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return store_row_of<BFloat16>(from, dim, factor, to);
    case Dtype::kFloat16:
      return store_row_of<Float16>(from, dim, factor, to);
    default:
      return store_row_of<float>(from, dim, factor, to);
  }
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

// ---- products ----

// Dot products over the head dim are chains of kDepth terms, added up: half the rounding error of
// one chain.
constexpr int64_t kDepth = 64;

// Dot products of `rows` query rows with the keys of vectors v0 .. v1 - 1 of packed columns.
IC_INLINE void multiply_columns(const float* q, int64_t ldq, const float* columns, int64_t dim,
                                int64_t rows, int64_t v0, int64_t v1, float* to, int64_t ld) {
  constexpr int64_t kVecs = kPanel / kLanes;
  for (int64_t v = v0; v < v1;) {
    const int64_t end = smaller(v1, (v / kVecs + 1) * kVecs);
    const float* panel = columns + v / kVecs * kPanel * dim + v % kVecs * kLanes;
    for (int64_t d = 0; d < dim; d += kDepth)
      multiply(Word::kFloat,
               {q + d, panel + d * kPanel, to + v * kLanes, d > 0 ? kOnes : nullptr, ldq, kPanel,
                ld, smaller(kDepth, dim - d)},
               rows, (end - v) * kLanes);
    v = end;
  }
}

// to[i] = x[i] . y[i] for n packed rows, bit for bit as multiply_columns would form it. Up to 15
// elements past to[n - 1] are written.
IC_INLINE void dot_rows(const float* x, const float* y, int64_t n, int64_t padded, float* to) {
  for (int64_t i0 = 0; i0 < n; i0 += kLanes) {
    Vec sum = broadcast(0.0f), chain = sum;
    for (int64_t d = 0; d < padded; d += kLanes) {
      Vec a[kLanes], b[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = smaller(i0 + i, n - 1) * padded + d;
        a[i] = load(x + row);
        b[i] = load(y + row);
      }
      transpose(a);
      transpose(b);
      for (int64_t i = 0; i < kLanes; ++i) chain = fma(a[i], b[i], chain);
      if ((d + kLanes) % kDepth == 0 || d + kLanes == padded) {
        sum = sum + chain;
        chain = broadcast(0.0f);
      }
    }
    store(to + i0, sum);
  }
}

// ---- logits ----

// scale's sign goes into the packed queries, so that the largest product gives the largest logit.
IC_INLINE float sign_of(float x) { return x < 0 ? -1.0f : 1.0f; }

// How a product q . k (its sign turned) becomes a logit.
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
