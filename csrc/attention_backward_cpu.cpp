// attention's backward on the CPU.
//
// A task is a block of keys of one key/value head. It packs the keys and values as lanes and walks
// the blocks of query rows that see it: logits and dout . v again, from them p and dlogit, then
// three products: dv += p^T dout, dk += dlogit^T q, dq += dlogit k. The first two stay with the
// task. Where the keys of a sequence fill more than one block, dq is summed in a shared buffer, in
// the order of the blocks: tasks take turns. So bits do not depend on the threads, and nothing is
// computed twice. Tasks start in the order of their key blocks, hence a turn that is waited for
// belongs to a task that runs.
#include <sched.h>

#include "attention_block.h"
#include "parallel.h"

namespace ic::IC_ISA {
namespace {

template <Word kWord>
class BackwardTask {
  // By the matrix unit, the gradients of keys and values are summed as columns: weights and dlogit
  // lie as an operand b, the rows as an operand a.
  static constexpr bool kByColumns = kWord == Word::kMatrix;
  // Rows whose logits are formed together, and keys whose gradients are: an even number, whole
  // tiles of multiply.
  static constexpr int64_t kGroup = kByColumns ? kMatrixRows : 6;

 public:
  BackwardTask(const AttentionBackwardArgs& args, const AttentionPlan& plan, const Sequence& s,
               int64_t kv_head, float* scratch)
      : b_(args), a_(args.forward), plan_(plan), s_(s), kv_head_(kv_head) {
    const int64_t keys = plan.back_keys, rows = plan.back_rows, padded = plan.padded;
    words_ = words_of(kWord, a_.dim);
    q_row_ = round_up(words_, kLanes);
    Arena arena(scratch);
    key_columns_ = arena.take(keys * words_);
    value_columns_ = arena.take(keys * words_);
    keys_ = arena.take(words_of(kWord, keys) * padded);
    grad_k_ = arena.take(keys * padded);
    grad_v_ = arena.take(keys * padded);
    q_ = arena.take(rows * q_row_);
    dout_ = arena.take(rows * q_row_);
    grad_q_ = arena.take(rows * padded);
    lse_ = arena.take(rows);
    delta_ = arena.take(rows);
    logits_ = arena.take(kGroup * keys);
    dweights_ = arena.take(kGroup * keys);
    // A row of weights or dlogit has a spare vector on either side, its stride is no power of two.
    weights_ = arena.take(words_of(kWord, rows) * (keys + 3 * kLanes)) + kLanes;
    dlogit_ = arena.take(words_of(kWord, rows) * (keys + 3 * kLanes)) + kLanes;
    if constexpr (kWord == Word::kFloat) {
      q_values_ = q_;
      dout_values_ = dout_;
      dlogit_rows_ = dlogit_;
    } else {
      q_values_ = arena.take(words_of(kWord, rows) * padded);
      dout_values_ = arena.take(words_of(kWord, rows) * padded);
      dlogit_rows_ = arena.take(rows * words_of(kWord, keys));
    }
    plain_ = plain_logits(a_);
    seen_ = s.keys > 0 ? Span{s.first_row(0), s.end_row(s.keys - 1)} : Span{0, 0};
  }

  // The index-th block of keys.
  void run(int64_t index) {
    if (index == 0) {
      clear_queries({0, seen_.begin});
      clear_queries({seen_.end > seen_.begin ? seen_.end : seen_.begin, s_.rows()});
    }
    key_ = index * plan_.back_keys;
    n_keys_ = smaller(plan_.back_keys, s_.keys - key_);
    if (n_keys_ <= 0) return;
    ld_ = round_up(n_keys_, 2 * kLanes) + 3 * kLanes;
    row_ld_ = kWord == Word::kFloat ? ld_ : words_of(kWord, plan_.back_keys);
    k_ = key_rows(a_, a_.k, s_, kv_head_);
    Rows v = key_rows(a_, a_.v, s_, kv_head_);
    k_.end = v.end = key_ + n_keys_;
    pack_keys<kWord>(a_.dtype, k_, key_, n_keys_, a_.dim, a_.scale < 0, key_columns_);
    pack_keys<kWord>(a_.dtype, v, key_, n_keys_, a_.dim, false, value_columns_);
    keys_finite_ =
        pack_values<kWord>(a_.dtype, k_, key_, key_, key_ + n_keys_, a_.dim, keys_, plan_.padded);
    const Span rows{s_.first_row(key_), s_.end_row(key_ + n_keys_ - 1)};
    if (rows.size() > 0)
      for (int64_t i = rows.begin / plan_.back_rows; i * plan_.back_rows < rows.end; ++i)
        add_rows(index, i, rows);
    store_key_gradients();
  }

 private:
  void store_key_gradients() {
    const Rows grad_k = key_rows(a_, b_.grad_k, s_, kv_head_);
    const Rows grad_v = key_rows(a_, b_.grad_v, s_, kv_head_);
    const float zeros[kAttentionMaxDim] = {};
    float rows[2][kByColumns ? kLanes * kAttentionMaxDim : 1];
    for (int64_t j = 0; j < n_keys_; ++j) {
      const float *from_k = grad_k_ + j * plan_.padded, *from_v = grad_v_ + j * plan_.padded;
      if constexpr (kByColumns) {
        const int64_t i = j % kLanes;
        if (i == 0) {
          keys_to_rows(grad_k_ + j, rows[0]);
          keys_to_rows(grad_v_ + j, rows[1]);
        }
        from_k = rows[0] + i * plan_.padded;
        from_v = rows[1] + i * plan_.padded;
      }
      if (s_.end_row(key_ + j) <= s_.first_row(key_ + j)) {  // seen by no query
        store_row(a_.dtype, zeros, a_.dim, 1.0f, grad_k.at(key_ + j));
        store_row(a_.dtype, zeros, a_.dim, 1.0f, grad_v.at(key_ + j));
        continue;
      }
      store_row(a_.dtype, from_k, a_.dim, a_.scale, grad_k.at(key_ + j));
      store_row(a_.dtype, from_v, a_.dim, 1.0f, grad_v.at(key_ + j));
    }
  }

  // Sixteen columns, of a key each, become rows.
  void keys_to_rows(const float* from, float* to) const {
    for (int64_t d = 0; d < plan_.padded; d += kLanes)
      columns_to_rows(from + d * plan_.back_keys, plan_.back_keys, kLanes, to + d, plan_.padded);
  }

  void clear_queries(Span rows) {
    const Rows out = query_rows(b_.grad_q, a_.dtype, s_, kv_head_);
    const float zeros[kAttentionMaxDim] = {};
    for (int64_t r = rows.begin; r < rows.end; ++r)
      store_row(a_.dtype, zeros, a_.dim, 1.0f, out.at(r));
  }

  // What the rows of block `block` that are in `rows` add to all three gradients.
  void add_rows(int64_t index, int64_t block, Span rows) {
    const Span all{larger(seen_.begin, block * plan_.back_rows),
                   smaller(seen_.end, (block + 1) * plan_.back_rows)};
    // Whole groups, the same ones at each visit: a group is fresh or not as one.
    const int64_t before = larger(0, rows.begin - all.begin) / kGroup * kGroup;
    const int64_t after = round_up(smaller(rows.end, all.end) - all.begin, kGroup);
    here_ = {all.begin + before, smaller(all.begin + after, all.end)};
    pack_rows_here();
    for (int64_t r = here_.begin; r < here_.end; r += kGroup)
      logit_gradients(r, smaller(kGroup, here_.end - r), r - here_.begin);
    for (int64_t j = 0; j < n_keys_; j += kGroup) {
      const int64_t keys = smaller(kGroup, n_keys_ - j);
      const auto add = [&](const auto&... args) {
        if constexpr (kByColumns) {
          add_to_columns(j, keys, args...);
        } else {
          add_to_keys(j, keys, args...);
        }
      };
      add(weights_, dout_rows_, dout_values_, dout_finite_, grad_v_);
      add(dlogit_, q_rows_, q_values_, q_finite_, grad_k_);
    }

    const int64_t first = s_.first_seen(all.begin) / plan_.back_keys;
    const int64_t last = (s_.end_seen(all.end - 1) - 1) / plan_.back_keys;
    float* sums = grad_q_;  // of row all.begin
    int32_t* turn = nullptr;
    if (first < last) {
      const int64_t row =
          attention_first_token(a_, s_) * a_.heads + kv_head_ * s_.rows() + all.begin;
      sums = b_.sums + row * plan_.padded;
      turn = b_.turns + kv_head_ * (b_.turns_size / a_.kv_heads) + s_.index + block +
             attention_first_token(a_, s_) * s_.group / plan_.back_rows;
      while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != index - first) sched_yield();
    }
    for (int64_t r = here_.begin; r < here_.end; r += kGroup)
      add_to_queries(r, smaller(kGroup, here_.end - r), r - here_.begin,
                     sums + (r - all.begin) * plan_.padded);
    if (index == last) {
      const Rows out = query_rows(b_.grad_q, a_.dtype, s_, kv_head_);
      for (int64_t r = all.begin; r < all.end; ++r)
        store_row(a_.dtype, sums + (r - all.begin) * plan_.padded, a_.dim, a_.scale, out.at(r));
    }
    if (turn) __atomic_store_n(turn, static_cast<int32_t>(index - first + 1), __ATOMIC_RELEASE);
  }

  void pack_rows_here() {
    const int64_t n = here_.size(), padded = plan_.padded;
    q_rows_ = query_rows(a_.q, a_.dtype, s_, kv_head_);
    dout_rows_ = query_rows(b_.grad_out, a_.dtype, s_, kv_head_);
    q_rows_.end = dout_rows_.end = seen_.end;
    const auto pack = [&](const Rows& rows, float* a, float* b) {
      if (kWord != Word::kFloat)  // else a is b
        pack_queries<kWord>(a_.dtype, rows, here_.begin, n, a_.dim, a, q_row_);
      if constexpr (kByColumns) {
        rows_to_columns(rows, here_, b);
        return all_finite(a, n * q_row_);
      }
      return pack_values<kWord>(a_.dtype, rows, here_.begin, here_.begin, here_.end, a_.dim, b,
                                padded);
    };
    q_finite_ = pack(q_rows_, q_, q_values_);
    dout_finite_ = pack(dout_rows_, dout_, dout_values_);
    pack_queries<kWord>(a_.dtype, query_rows(a_.out, a_.dtype, s_, kv_head_), here_.begin, n,
                        a_.dim, grad_q_, q_row_);  // only to form delta
    dot_rows<kWord>(dout_, grad_q_, n, q_row_, delta_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = here_.begin + i;
      const int64_t at = attention_lse_index(a_, s_, head_of(row), row / s_.group);
      lse_[i] = a_.lse[at];
      if (b_.grad_lse) delta_[i] -= b_.grad_lse[at];
    }
  }

  // Rows of a block, 0 outside of `seen`, as columns of words.
  void rows_to_columns(const Rows& rows, Span seen, float* to) const {
    const BFloat16 zeros[kAttentionMaxDim] = {};
    const auto row = [&](int64_t i) -> const BFloat16* {
      const bool inside = i >= seen.begin - here_.begin && i < seen.end - here_.begin;
      return inside ? reinterpret_cast<const BFloat16*>(rows.at(here_.begin + i)) : zeros;
    };
    pack_across(row, a_.dim, here_.size(), to, column_words());
  }
  int64_t column_words() const { return words_of(kWord, plan_.back_rows); }

  static bool all_finite(const float* words, int64_t n) {
    Vec check = broadcast(0.0f);
    for (int64_t i = 0; i < n; i += kLanes)
      check = multiply_add<kWord>(load(words + i), broadcast(0.0f), check);
    return reduce_add(check) == 0.0f;
  }

  int64_t head_of(int64_t row) const { return kv_head_ * s_.group + row % s_.group; }

  // The keys of this block that a row sees, counted from its first.
  Span seen_by(int64_t row) const {
    return {larger(0, s_.first_seen(row) - key_), smaller(n_keys_, s_.end_seen(row) - key_)};
  }
  Span seen_by(int64_t row, int64_t rows) const {
    return {seen_by(row).begin, seen_by(row + rows - 1).end};
  }

  // The weight and dlogit of a row for one vector of keys.
  struct Row {
    Span seen;
    const float *products, *dweights;
    float lse, delta;
    Logits logits;
    int64_t position;
  };
  struct Gradient {
    Vec weight, dlogit;
  };

  IC_INLINE Gradient gradient_of(const Row& row, int64_t v) const {
    const Vec zero = broadcast(0.0f);
    Vec x = load(row.products + v * kLanes), slope = broadcast(1.0f);
    if (plain_) {
      x = fma(x, broadcast(row.logits.scale), broadcast(-row.lse));
    } else {
      x = logits_of(x, row.logits, row.position, key_ + v * kLanes, &slope) - broadcast(row.lse);
    }
    Gradient g;
    g.weight = exp2_normal<kExpDegree<kWord>>(x, broadcast(kLog2E));
    g.dlogit = g.weight * (load(row.dweights + v * kLanes) - broadcast(row.delta));
    if (!plain_) g.dlogit = g.dlogit * slope;
    if (v * kLanes < row.seen.begin || (v + 1) * kLanes > row.seen.end) {
      g.weight = where_seen(v, row.seen.begin, row.seen.end, g.weight, zero);
      g.dlogit = where_seen(v, row.seen.begin, row.seen.end, g.dlogit, zero);
    }
    return g;
  }

  // Weights and dlogit of a group of rows, the first the i-th of its block. Vectors next to what
  // the group sees become 0, for products over tiles of keys that reach there.
  void logit_gradients(int64_t r, int64_t rows, int64_t i) {
    const Span group = seen_by(r, rows);
    if (group.size() == 0) return;
    const int64_t v0 = group.begin / kLanes, v1 = (group.end + kLanes - 1) / kLanes;
    const int64_t keys = plan_.back_keys;
    multiply_columns(kWord, q_ + i * q_row_, q_row_, key_columns_, words_, rows, v0, v1, logits_,
                     keys);
    multiply_columns(kWord, dout_ + i * q_row_, q_row_, value_columns_, words_, rows, v0, v1,
                     dweights_, keys);
    const auto row_of = [&](int64_t m) {
      return Row{seen_by(r + m),    logits_ + m * keys, dweights_ + m * keys,
                 lse_[i + m],       delta_[i + m],      logits_for(a_, s_, head_of(r + m)),
                 s_.position(r + m)};
    };
    const Vec zero = broadcast(0.0f);
    const int64_t w0 = v0 & ~1, w1 = (v1 + 1) & ~1;
    for (int64_t m = 0; m < rows; m += kElements) {
      const int64_t at = (i + m) / kElements * ld_;
      float *weights = weights_ + at, *dlogit = dlogit_ + at;
      for (int64_t v = w0 - 1; v <= w1; v += w1 - w0 + 1) {
        store(weights + v * kLanes, zero);
        store(dlogit + v * kLanes, zero);
      }
      const Row early = row_of(m);
      if constexpr (kWord == Word::kFloat) {
        for (int64_t v = w0; v < w1; ++v) {
          const Gradient g = gradient_of(early, v);
          store(weights + v * kLanes, g.weight);
          store(dlogit + v * kLanes, g.dlogit);
        }
      } else {
        const bool paired = m + 1 < rows;
        const Row late = row_of(paired ? m + 1 : m);
        float* rows_at = dlogit_rows_ + (i + m) * row_ld_;
        for (int64_t v = w0; v < w1; v += 2) {
          const Gradient a0 = gradient_of(early, v), a1 = gradient_of(early, v + 1);
          Gradient b0{zero, zero}, b1 = b0;
          if (paired) b0 = gradient_of(late, v), b1 = gradient_of(late, v + 1);
          store_pairs<kWord>(weights + v * kLanes, a0.weight, b0.weight);
          store_pairs<kWord>(weights + (v + 1) * kLanes, a1.weight, b1.weight);
          store_pairs<kWord>(dlogit + v * kLanes, a0.dlogit, b0.dlogit);
          store_pairs<kWord>(dlogit + (v + 1) * kLanes, a1.dlogit, b1.dlogit);
          store_neighbours<kWord>(rows_at + v / 2 * kLanes, a0.dlogit, a1.dlogit);
          if (paired)
            store_neighbours<kWord>(rows_at + row_ld_ + v / 2 * kLanes, b0.dlogit, b1.dlogit);
        }
      }
    }
    if constexpr (kByColumns)  // words that are multiplied with the last of the rows
      for (int64_t m = round_up(rows, kElements); m < round_up(rows, kGroup); m += kElements)
        for (int64_t v = w0; v < w1; ++v) {
          store(weights_ + (i + m) / kElements * ld_ + v * kLanes, zero);
          store(dlogit_ + (i + m) / kElements * ld_ + v * kLanes, zero);
        }
  }

  // to += weights^T values for `keys` keys from the j-th on. Exactly the rows that see a key where
  // a value is not finite: 0 times it would be NaN.
  void add_to_keys(int64_t j, int64_t keys, const float* weights, const Rows& source, float* values,
                   bool finite, float* to) {
    const int64_t padded = plan_.padded, step = finite ? keys : 1;
    const bool fresh = s_.first_row(key_ + j) >= here_.begin;  // no row added to them before
    const float* keep = fresh && finite ? nullptr : kOnes;
    if (fresh && !finite) __builtin_memset(to + j * padded, 0, keys * padded * sizeof(float));
    for (int64_t first = j; first < j + keys; first += step) {
      const int64_t begin = larger(here_.begin, s_.first_row(key_ + first));
      const int64_t end = smaller(here_.end, s_.end_row(key_ + first + step - 1));
      if (end <= begin) continue;
      const int64_t i = (begin - here_.begin) / kElements;
      const float* from = values + i * padded;
      if (!finite) {
        pack_values<kWord>(a_.dtype, source, here_.begin, begin, end, a_.dim, values, padded);
        from = values;
      }
      multiply_rows<Layout::kColumns>(kWord,
                                      {weights + i * ld_ + first, from, to + first * padded, keep,
                                       ld_, padded, padded, words_of(kWord, end - here_.begin) - i},
                                      step, padded);
    }
  }

  // The same with keys as columns, from a multiple of 32 on.
  void add_to_columns(int64_t j, int64_t keys, const float* weights, const Rows& source,
                      float* values, bool finite, float* to) {
    const int64_t ldc = plan_.back_keys, lda = column_words();
    const auto multiply_seen = [&](Span seen, float* c, int64_t ld, const float* keep,
                                   int64_t column, int64_t n) {
      const Span whole = whole_rows<kWord>(seen.begin - here_.begin, seen.end - here_.begin);
      const int64_t i = whole.begin / kElements;
      multiply_rows(
          kWord,
          {values + i, weights + i * ld_ + column, c, keep, lda, ld_, ld, whole.size() / kElements},
          plan_.padded, n);
    };
    const auto seen_rows = [&](int64_t first, int64_t last) {
      return Span{larger(here_.begin, s_.first_row(key_ + first)),
                  smaller(here_.end, s_.end_row(key_ + last))};
    };
    const bool fresh = s_.first_row(key_ + j) >= here_.begin;  // no row added to them before
    if (finite) {
      const Span seen = seen_rows(j, j + keys - 1);
      if (seen.size() > 0)
        multiply_seen(seen, to + j, ldc, fresh ? nullptr : kOnes, j, kMatrixRows);
      return;
    }
    if (fresh)
      for (int64_t d = 0; d < plan_.padded; ++d)
        __builtin_memset(to + d * ldc + j, 0, kMatrixRows * sizeof(float));
    float sums[kAttentionMaxDim * kLanes];
    for (int64_t key = j; key < j + keys; ++key) {
      const Span seen = seen_rows(key, key);
      if (seen.size() == 0) continue;
      rows_to_columns(source, seen, values);
      const int64_t column = key / kLanes * kLanes;
      for (int64_t d = 0; d < plan_.padded; ++d)
        store(sums + d * kLanes, load(to + d * ldc + column));
      multiply_seen(seen, sums, kLanes, kOnes, column, kLanes);
      for (int64_t d = 0; d < plan_.padded; ++d)
        to[d * ldc + key] = sums[d * kLanes + key - column];
    }
  }

  // dq += dlogit k for a group of rows, the first the i-th of its block.
  void add_to_queries(int64_t r, int64_t rows, int64_t i, float* to) {
    const int64_t padded = plan_.padded, step = keys_finite_ ? rows : 1;
    const bool fresh = s_.first_seen(r) >= key_;  // no block of keys added to them before
    const float* keep = fresh && keys_finite_ ? nullptr : kOnes;
    if (fresh && !keys_finite_) __builtin_memset(to, 0, rows * padded * sizeof(float));
    for (int64_t m = 0; m < rows; m += step) {
      const Span seen = seen_by(r + m, step);
      if (seen.size() == 0) continue;
      const Span whole = whole_rows<kWord>(seen.begin, seen.end);
      const int64_t first = whole.begin / kElements;
      const float* from = keys_ + first * padded;
      if (!keys_finite_) {
        pack_values<kWord>(a_.dtype, k_, key_, key_ + seen.begin, key_ + seen.end, a_.dim, keys_,
                           padded);
        from = keys_;
      }
      multiply_rows(kWord,
                    {dlogit_rows_ + (i + m) * row_ld_ + first, from, to + m * padded, keep, row_ld_,
                     padded, padded, whole.size() / kElements},
                    step, padded);
    }
  }

  static constexpr int64_t kElements = elements_of(kWord);

  const AttentionBackwardArgs& b_;
  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Sequence& s_;
  int64_t kv_head_, words_, q_row_;
  Span seen_, here_{0, 0};  // rows that see a key; rows at work
  Rows k_, q_rows_, dout_rows_;
  bool plain_, keys_finite_ = true, q_finite_ = true, dout_finite_ = true;
  int64_t key_ = 0, n_keys_ = 0, ld_ = 0, row_ld_ = 0;
  // Operands b and a of the keys, sums of their gradients; rows as operands a and b; a group's
  // products; a block's weights and dlogit, along the rows and along the keys.
  float *key_columns_, *value_columns_, *keys_, *grad_k_, *grad_v_;
  float *q_, *dout_, *q_values_, *dout_values_, *grad_q_, *lse_, *delta_;
  float *logits_, *dweights_, *weights_, *dlogit_, *dlogit_rows_;
};

// dsink = -sum over the rows that see a key of e^(sink - lse) delta, in their order.
void sink_gradient(const AttentionBackwardArgs& b, int64_t head) {
  const AttentionArgs& a = b.forward;
  const int64_t kv_head = head * a.kv_heads / a.heads, padded = round_up(a.dim, kLanes);
  float dout[kAttentionMaxDim], out[kAttentionMaxDim], delta[kLanes];
  double sum = 0.0;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Sequence s = attention_sequence(a, i);
    const Rows dout_rows = query_rows(b.grad_out, a.dtype, s, kv_head);
    const Rows out_rows = query_rows(a.out, a.dtype, s, kv_head);
    for (int64_t t = 0; t < s.queries; ++t) {
      const int64_t at = attention_lse_index(a, s, head, t), row = t * s.group + head % s.group;
      if (s.end_seen(row) <= s.first_seen(row)) continue;
      const float share = exponential(a.sinks[head] - a.lse[at]);
      if (!(a.sinks[head] > -__FLT_MAX__)) continue;
      pack_queries<Word::kFloat>(a.dtype, dout_rows, row, 1, a.dim, dout, 0);
      pack_queries<Word::kFloat>(a.dtype, out_rows, row, 1, a.dim, out, 0);
      dot_rows<Word::kFloat>(dout, out, 1, padded, delta);
      if (b.grad_lse) delta[0] -= b.grad_lse[at];
      sum -= static_cast<double>(share) * static_cast<double>(delta[0]);
    }
  }
  b.grad_sinks[head] = static_cast<float>(sum);
}

}  // namespace

void attention_backward_cpu(const AttentionBackwardArgs& b) {
  const AttentionArgs& a = b.forward;
  const AttentionPlan plan = attention_plan(a.dim);
  const Extent extent = extent_of(a);
  if (a.cu_q) {
    clear_tokens(b.grad_q, a.dtype, a.heads, a.dim, 0, a.cu_q[0]);
    clear_tokens(b.grad_q, a.dtype, a.heads, a.dim, a.cu_q[a.sequences], a.queries);
  }
  if (a.cu_k) {
    const AttentionTensor both[] = {b.grad_k, b.grad_v};
    for (const AttentionTensor& t : both) {
      clear_tokens(t, a.dtype, a.kv_heads, a.dim, 0, a.cu_k[0]);
      clear_tokens(t, a.dtype, a.kv_heads, a.dim, a.cu_k[a.sequences], a.keys);
    }
  }
  const int64_t units = a.sequences * a.kv_heads;
  const int64_t blocks = larger(1, (extent.keys + plan.back_keys - 1) / plan.back_keys);
  const int64_t tasks = units * blocks;
  const double flops = 10.0 * extent.pairs * static_cast<double>(a.heads * a.dim);
  const Word word = word_of(a);
  Slot::clear(a.workspace, plan.backward_floats, a.threads);
  parallel_rows(tasks, grain_of(flops, tasks), a.threads, [&](int64_t begin, int64_t end) {
    Slot slot(a.workspace, plan.backward_floats, a.threads);
    const MatrixUnit guard(word);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task % units, block = task / units;
      const Sequence s = attention_sequence(a, unit / a.kv_heads);
      if (block > 0 && block * plan.back_keys >= s.keys) continue;
      with_word(word, [&](auto tag) {
        BackwardTask<tag.word>(b, plan, s, unit % a.kv_heads, slot.scratch()).run(block);
      });
    }
  });
  if (b.grad_sinks)
    parallel_rows(a.heads, 1, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) sink_gradient(b, head);
    });
}

}  // namespace ic::IC_ISA
