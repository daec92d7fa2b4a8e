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

// Logits (times scale) of keys a .. z - 1 become exponentials against the largest so far, all
// others in vectors v0 .. v1 - 1 become 0; their sums, lane by lane, join `sums`. Returns the
// factor that takes what was summed before to the new maximum.
IC_INLINE float softmax_row(float* s, int64_t v0, int64_t v1, int64_t a, int64_t z, float scale,
                            float* maximum, float* sums) {
  const Vec zero = broadcast(0.0f), lowest = broadcast(-__builtin_inff());
  if (z <= a) {
    for (int64_t v = v0; v < v1; ++v) store(s + v * kLanes, zero);
    return 1.0f;
  }
  const int64_t first = a / kLanes, last = (z - 1) / kLanes;
  Vec top = lowest;
  for (int64_t v = first; v <= last; ++v) {
    const Vec x = where_seen(v, a, z, load(s + v * kLanes) * broadcast(scale), lowest);
    store(s + v * kLanes, x);
    top = max(x, top);
  }
  const float before = *maximum, here = reduce_max(top);
  const float now = here > before ? here : before;
  *maximum = now;
  Vec sum = zero;
  for (int64_t v = v0; v < first; ++v) store(s + v * kLanes, zero);
  for (int64_t v = first; v <= last; ++v) {
    const Vec p = exp_normal(load(s + v * kLanes) - broadcast(now));
    store(s + v * kLanes, p);
    sum = sum + p;
  }
  for (int64_t v = last + 1; v < v1; ++v) store(s + v * kLanes, zero);
  const float keep = before == now           ? 1.0f
                     : before < -__FLT_MAX__ ? 0.0f
                                             : lanes_of(exp_normal(broadcast(before - now)))[0];
  store(sums, fma(load(sums), broadcast(keep), sum));
  return keep;
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

class ForwardTask {
 public:
  ForwardTask(const AttentionArgs& args, const AttentionPlan& plan, const Sequence& s,
              int64_t kv_head, float* scratch)
      : a_(args), plan_(plan), s_(s), kv_head_(kv_head) {
    Arena arena(scratch);
    columns_ = arena.take(plan.keys * plan.padded);
    values_ = arena.take(plan.keys * plan.padded);
    packed_q_ = arena.take(plan.rows * plan.padded);
    out_ = arena.take(plan.rows * plan.padded);
    sums_ = arena.take(plan.rows * kLanes);
    maximum_ = arena.take(plan.rows);
    logits_ = arena.take(kTileRows * plan.keys);
    plain_ = !(a_.softcap > 0) && !a_.slopes;
  }

  // Rows begin .. end - 1.
  void run(int64_t begin, int64_t end) {
    pack_queries(begin, end);
    const int64_t n = end - begin;
    __builtin_memset(sums_, 0, n * kLanes * sizeof(float));
    for (int64_t i = 0; i < n; ++i) maximum_[i] = -__builtin_inff();
    const Rows k = key_rows(a_, a_.k, s_, kv_head_), v = key_rows(a_, a_.v, s_, kv_head_);
    const int64_t end_key = s_.end_seen(end - 1);
    for (int64_t key = s_.first_seen(begin) / plan_.keys * plan_.keys; key < end_key;
         key += plan_.keys) {
      const int64_t n_keys = smaller(plan_.keys, end_key - key);
      pack_columns(a_.kv_dtype, k, key, n_keys, a_.dim, columns_);
      const bool finite = pack_rows(a_.kv_dtype, v, key, n_keys, a_.dim, 1.0f, values_);
      for (int64_t r = begin; r < end; r += kTileRows)
        add_keys(r, smaller(kTileRows, end - r), r - begin, key, n_keys, finite);
    }
    for (int64_t r = begin; r < end; ++r) finish(r, r - begin);
  }

 private:
  void pack_queries(int64_t begin, int64_t end) {
    const Rows rows = query_rows(a_.q, a_.dtype, s_, kv_head_);
    if (a_.dtype == Dtype::kFloat32 && s_.group == 1 && !(a_.scale < 0) && !a_.pages.cos) {
      q_ = reinterpret_cast<const float*>(rows.at(begin));
      q_row_ = a_.q.token;
      return;
    }
    q_ = packed_q_;
    q_row_ = plan_.padded;
    pack_rows(a_.dtype, rows, begin, end - begin, a_.dim, sign_of(a_.scale), packed_q_);
    if (!a_.pages.cos) return;
    for (int64_t r = begin; r < end; ++r) {
      float* x = packed_q_ + (r - begin) * plan_.padded;
      rotate_at(a_, s_, r / s_.group, x);
      round_to(a_.dtype, x, a_.dim);
    }
  }

  int64_t head_of(int64_t row) const { return kv_head_ * s_.group + row % s_.group; }

  // The packed block of n_keys keys from `key` on, for `rows` rows from r, the i-th of this task.
  void add_keys(int64_t r, int64_t rows, int64_t i, int64_t key, int64_t n_keys, bool finite) {
    const int64_t a = larger(0, s_.first_seen(r) - key);
    const int64_t z = smaller(n_keys, s_.end_seen(r + rows - 1) - key);
    if (z <= a) return;
    const int64_t v0 = a / kLanes, v1 = (z + kLanes - 1) / kLanes, padded = plan_.padded;
    multiply_columns(q_ + i * q_row_, q_row_, columns_, a_.dim, rows, v0, v1, logits_, plan_.keys);
    float keep[kTileRows];
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row_a = larger(0, s_.first_seen(r + m) - key);
      const int64_t row_z = smaller(n_keys, s_.end_seen(r + m) - key);
      float* logits = logits_ + m * plan_.keys;
      if (!plain_) to_logits(logits, v0, v1, r + m, key);
      const float scale = plain_ ? __builtin_fabsf(a_.scale) : 1.0f;
      keep[m] = softmax_row(logits, v0, v1, row_a, row_z, scale, maximum_ + i + m,
                            sums_ + (i + m) * kLanes);
    }
    const bool fresh = s_.first_seen(r) >= key;  // nothing was added to these rows before
    if (finite) {
      multiply(Word::kFloat,
               {logits_ + a, values_ + a * padded, out_ + i * padded, fresh ? nullptr : keep,
                plan_.keys, padded, padded, z - a},
               rows, padded);
      return;
    }
    // A value is infinite or NaN: each row takes exactly the keys that it sees.
    if (fresh) __builtin_memset(out_ + i * padded, 0, rows * padded * sizeof(float));
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row_a = larger(0, s_.first_seen(r + m) - key);
      const int64_t row_z = smaller(n_keys, s_.end_seen(r + m) - key);
      if (row_z <= row_a) continue;
      multiply(Word::kFloat,
               {logits_ + m * plan_.keys + row_a, values_ + row_a * padded, out_ + (i + m) * padded,
                keep + m, plan_.keys, padded, padded, row_z - row_a},
               1, padded);
    }
  }

  void to_logits(float* x, int64_t v0, int64_t v1, int64_t row, int64_t key) const {
    const float slope = a_.slopes ? a_.slopes[s_.index * a_.slopes_batch + head_of(row)] : 0.0f;
    const Logits l{__builtin_fabsf(a_.scale), a_.softcap, slope};
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
    float factor = 1.0f;
    if (a_.sinks) {
      const float before = top;
      top = before > sink ? before : sink;
      factor = lanes_of(exp_normal(broadcast(before - top)))[0];
      sum = sum * factor + lanes_of(exp_normal(broadcast(sink - top)))[0];
    }
    store_row(a_.dtype, out_ + i * plan_.padded, a_.dim, factor / sum, out.at(row));
    *lse = top + (sum > 0.0f ? lanes_of(log(broadcast(sum)))[0] : sum);  // NaN stays
  }

  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Sequence& s_;
  int64_t kv_head_;
  float *columns_, *values_, *packed_q_, *out_, *logits_;
  float *maximum_, *sums_;  // running softmax: (rows,) and (rows, 16)
  const float* q_;          // (rows, D), packed or in place
  int64_t q_row_;
  bool plain_;
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
    pack_rows(a.dtype, new_rows(a, p.k_new, s, h), t, 1, a.dim, 1.0f, row);
    if (p.cos) {
      rotate_at(a, s, t, row);
      round_to(a.dtype, row, a.dim);
    }
    store_row(a.kv_dtype, row, a.dim, 1.0f, key_rows(a, a.k, s, h).at(at));
    pack_rows(a.dtype, new_rows(a, p.v_new, s, h), t, 1, a.dim, 1.0f, row);
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
  Slot::clear(a.workspace, plan.forward_floats, a.threads);
  // Last rows first: they see the most keys, and no long task is left for the end.
  parallel_rows(tasks, grain_of(flops, tasks), a.threads, [&](int64_t begin, int64_t end) {
    Slot slot(a.workspace, plan.forward_floats, a.threads);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task % units, first = (blocks - 1 - task / units) * block;
      const Sequence s = attention_sequence(a, unit / a.kv_heads);
      if (first >= s.rows()) continue;
      ForwardTask(a, plan, s, unit % a.kv_heads, slot.scratch())
          .run(first, smaller(s.rows(), first + block));
    }
  });
}

}  // namespace ic::IC_ISA
