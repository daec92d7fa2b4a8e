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

struct Span {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

class BackwardTask {
 public:
  BackwardTask(const AttentionBackwardArgs& args, const AttentionPlan& plan, const Sequence& s,
               int64_t kv_head, float* scratch)
      : b_(args), a_(args.forward), plan_(plan), s_(s), kv_head_(kv_head) {
    Arena arena(scratch);
    key_columns_ = arena.take(plan.back_keys * plan.padded);
    value_columns_ = arena.take(plan.back_keys * plan.padded);
    keys_ = arena.take(plan.back_keys * plan.padded);
    grad_k_ = arena.take(plan.back_keys * plan.padded);
    grad_v_ = arena.take(plan.back_keys * plan.padded);
    q_ = arena.take(plan.back_rows * plan.padded);
    dout_ = arena.take(plan.back_rows * plan.padded);
    grad_q_ = arena.take(plan.back_rows * plan.padded);
    lse_ = arena.take(plan.back_rows);
    delta_ = arena.take(plan.back_rows);
    // A row of p or dlogit has a spare vector on either side, and its stride is no power of two.
    p_ = arena.take(plan.back_rows * (plan.back_keys + 3 * kLanes)) + kLanes;
    dlogit_ = arena.take(plan.back_rows * (plan.back_keys + 3 * kLanes)) + kLanes;
    plain_ = !(a_.softcap > 0) && !a_.slopes;
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
    ld_ = round_up(n_keys_, kLanes) + 3 * kLanes;
    const Rows k = key_rows(a_, a_.k, s_, kv_head_), v = key_rows(a_, a_.v, s_, kv_head_);
    pack_columns(a_.dtype, k, key_, n_keys_, a_.dim, key_columns_);
    pack_columns(a_.dtype, v, key_, n_keys_, a_.dim, value_columns_);
    keys_finite_ = pack_rows(a_.dtype, k, key_, n_keys_, a_.dim, 1.0f, keys_);
    const Span rows{s_.first_row(key_), s_.end_row(key_ + n_keys_ - 1)};
    if (rows.size() > 0)
      for (int64_t i = rows.begin / plan_.back_rows; i * plan_.back_rows < rows.end; ++i)
        add_rows(index, i, rows);
    const Rows grad_k = key_rows(a_, b_.grad_k, s_, kv_head_);
    const Rows grad_v = key_rows(a_, b_.grad_v, s_, kv_head_);
    const float zeros[kAttentionMaxDim] = {};
    for (int64_t j = 0; j < n_keys_; ++j) {
      if (s_.end_row(key_ + j) <= s_.first_row(key_ + j)) {  // seen by no query
        store_row(a_.dtype, zeros, a_.dim, 1.0f, grad_k.at(key_ + j));
        store_row(a_.dtype, zeros, a_.dim, 1.0f, grad_v.at(key_ + j));
        continue;
      }
      store_row(a_.dtype, grad_k_ + j * plan_.padded, a_.dim, __builtin_fabsf(a_.scale),
                grad_k.at(key_ + j));
      store_row(a_.dtype, grad_v_ + j * plan_.padded, a_.dim, 1.0f, grad_v.at(key_ + j));
    }
  }

 private:
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
    // Whole tiles, the same ones at each visit: a tile is fresh or not as one.
    const int64_t before = larger(0, rows.begin - all.begin) / kTileRows * kTileRows;
    const int64_t after = round_up(smaller(rows.end, all.end) - all.begin, kTileRows);
    const Span here{all.begin + before, smaller(all.begin + after, all.end)};
    pack_queries(here);
    for (int64_t r = here.begin; r < here.end; r += kTileRows)
      logit_gradients(r, smaller(kTileRows, here.end - r), r - here.begin);
    for (int64_t j = 0; j < n_keys_; j += kTileRows)
      add_to_keys(j, smaller(kTileRows, n_keys_ - j), here);

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
    for (int64_t r = here.begin; r < here.end; r += kTileRows)
      add_to_queries(r, smaller(kTileRows, here.end - r), r - here.begin,
                     sums + (r - all.begin) * plan_.padded);
    if (index == last) {
      const Rows out = query_rows(b_.grad_q, a_.dtype, s_, kv_head_);
      for (int64_t r = all.begin; r < all.end; ++r)
        store_row(a_.dtype, sums + (r - all.begin) * plan_.padded, a_.dim, a_.scale, out.at(r));
    }
    if (turn) __atomic_store_n(turn, static_cast<int32_t>(index - first + 1), __ATOMIC_RELEASE);
  }

  void pack_queries(Span rows) {
    const int64_t n = rows.size(), padded = plan_.padded;
    const Rows out = query_rows(a_.out, a_.dtype, s_, kv_head_);
    q_finite_ = pack_rows(a_.dtype, query_rows(a_.q, a_.dtype, s_, kv_head_), rows.begin, n, a_.dim,
                          sign_of(a_.scale), q_);
    dout_finite_ = pack_rows(a_.dtype, query_rows(b_.grad_out, a_.dtype, s_, kv_head_), rows.begin,
                             n, a_.dim, 1.0f, dout_);
    pack_rows(a_.dtype, out, rows.begin, n, a_.dim, 1.0f, grad_q_);  // only to form delta
    dot_rows(dout_, grad_q_, n, padded, delta_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = rows.begin + i, head = kv_head_ * s_.group + row % s_.group;
      const int64_t at = attention_lse_index(a_, s_, head, row / s_.group);
      lse_[i] = a_.lse[at];
      if (b_.grad_lse) delta_[i] -= b_.grad_lse[at];
    }
  }

  // The keys of this block that a row sees, counted from its first.
  Span seen_by(int64_t row) const {
    return {larger(0, s_.first_seen(row) - key_), smaller(n_keys_, s_.end_seen(row) - key_)};
  }
  Span seen_by(int64_t row, int64_t rows) const {
    return {seen_by(row).begin, seen_by(row + rows - 1).end};
  }

  // p and dlogit of a tile of rows, the first the i-th of its block. Vectors next to what the tile
  // sees become 0, for products over tiles of keys that reach there.
  void logit_gradients(int64_t r, int64_t rows, int64_t i) {
    const Span tile = seen_by(r, rows);
    if (tile.size() == 0) return;
    const int64_t v0 = tile.begin / kLanes, v1 = (tile.end + kLanes - 1) / kLanes;
    const int64_t padded = plan_.padded;
    float *p = p_ + i * ld_, *dlogit = dlogit_ + i * ld_;
    multiply_columns(q_ + i * padded, padded, key_columns_, a_.dim, rows, v0, v1, p, ld_);
    multiply_columns(dout_ + i * padded, padded, value_columns_, a_.dim, rows, v0, v1, dlogit, ld_);
    const Vec zero = broadcast(0.0f);
    for (int64_t m = 0; m < rows; ++m, p += ld_, dlogit += ld_) {
      for (int64_t v = v0 - 1; v <= v1; v += v1 - v0 + 1) {
        store(p + v * kLanes, zero);
        store(dlogit + v * kLanes, zero);
      }
      const Span seen = seen_by(r + m);
      const Vec lse = broadcast(lse_[i + m]), delta = broadcast(delta_[i + m]);
      const Logits l = logits_for(r + m);
      const Vec scale = broadcast(plain_ ? l.scale : 1.0f);
      for (int64_t v = v0; v < v1; ++v) {
        Vec x = load(p + v * kLanes), slope = broadcast(1.0f);
        if (!plain_) x = logits_of(x, l, s_.position(r + m), key_ + v * kLanes, &slope);
        Vec weight = exp_normal(fma(x, scale, zero - lse));
        Vec change = weight * (load(dlogit + v * kLanes) - delta);
        if (!plain_) change = change * slope;
        weight = where_seen(v, seen.begin, seen.end, weight, zero);
        change = where_seen(v, seen.begin, seen.end, change, zero);
        store(p + v * kLanes, weight);
        store(dlogit + v * kLanes, change);
      }
    }
  }

  Logits logits_for(int64_t row) const {
    const int64_t head = kv_head_ * s_.group + row % s_.group;
    const float slope = a_.slopes ? a_.slopes[s_.index * a_.slopes_batch + head] : 0.0f;
    return {__builtin_fabsf(a_.scale), a_.softcap, slope};
  }

  // dv += p^T dout, dk += dlogit^T q for `keys` keys from the j-th on. Exact spans where a factor
  // is not finite: 0 times it would be NaN.
  void add_to_keys(int64_t j, int64_t keys, Span here) {
    const int64_t padded = plan_.padded;
    const bool fresh = s_.first_row(key_ + j) >= here.begin;  // no row added to them before
    const auto add = [&](const float* weights, const float* from, bool finite, float* to) {
      const int64_t step = finite ? keys : 1;
      const float* keep = fresh && finite ? nullptr : kOnes;
      if (fresh && !finite) __builtin_memset(to + j * padded, 0, keys * padded * sizeof(float));
      for (int64_t first = j; first < j + keys; first += step) {
        const int64_t begin = larger(here.begin, s_.first_row(key_ + first));
        const int64_t end = smaller(here.end, s_.end_row(key_ + first + step - 1));
        if (end <= begin) continue;
        const int64_t i = begin - here.begin;
        multiply<Layout::kColumns>(Word::kFloat,
                                   {weights + i * ld_ + first, from + i * padded,
                                    to + first * padded, keep, ld_, padded, padded, end - begin},
                                   step, padded);
      }
    };
    add(p_, dout_, dout_finite_, grad_v_);
    add(dlogit_, q_, q_finite_, grad_k_);
  }

  // dq += dlogit k for a tile of rows, the first the i-th of its block.
  void add_to_queries(int64_t r, int64_t rows, int64_t i, float* to) {
    const int64_t padded = plan_.padded, step = keys_finite_ ? rows : 1;
    const bool fresh = s_.first_seen(r) >= key_;  // no block of keys added to them before
    const float* keep = fresh && keys_finite_ ? nullptr : kOnes;
    if (fresh && !keys_finite_) __builtin_memset(to, 0, rows * padded * sizeof(float));
    for (int64_t m = 0; m < rows; m += step) {
      const Span seen = seen_by(r + m, step);
      if (seen.size() == 0) continue;
      multiply(Word::kFloat,
               {dlogit_ + (i + m) * ld_ + seen.begin, keys_ + seen.begin * padded, to + m * padded,
                keep, ld_, padded, padded, seen.size()},
               step, padded);
    }
  }

  const AttentionBackwardArgs& b_;
  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Sequence& s_;
  int64_t kv_head_;
  Span seen_;  // rows that see a key
  bool plain_, keys_finite_ = true, q_finite_ = true, dout_finite_ = true;
  int64_t key_ = 0, n_keys_ = 0, ld_ = 0;
  float *key_columns_, *value_columns_, *keys_, *grad_k_, *grad_v_;
  float *q_, *dout_, *grad_q_, *lse_, *delta_, *p_, *dlogit_;
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
      const float share = lanes_of(exp_normal(broadcast(a.sinks[head] - a.lse[at])))[0];
      if (!(a.sinks[head] > -__FLT_MAX__)) continue;
      pack_rows(a.dtype, dout_rows, row, 1, a.dim, 1.0f, dout);
      pack_rows(a.dtype, out_rows, row, 1, a.dim, 1.0f, out);
      dot_rows(dout, out, 1, padded, delta);
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
  Slot::clear(a.workspace, plan.backward_floats, a.threads);
  parallel_rows(tasks, grain_of(flops, tasks), a.threads, [&](int64_t begin, int64_t end) {
    Slot slot(a.workspace, plan.backward_floats, a.threads);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task % units, block = task / units;
      const Sequence s = attention_sequence(a, unit / a.kv_heads);
      if (block > 0 && block * plan.back_keys >= s.keys) continue;
      BackwardTask(b, plan, s, unit % a.kv_heads, slot.scratch()).run(block);
    }
  });
  if (b.grad_sinks)
    parallel_rows(a.heads, 1, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) sink_gradient(b, head);
    });
}

}  // namespace ic::IC_ISA
