// attention: fused softmax attention (Dao et al. 2022, arXiv:2205.14135), dense, packed or over a
// paged cache.
//
//   logit(t, s) = softcap(scale q[t] . k[s]) - slope |t + S - T - s|,  softcap(x) = c tanh(x / c)
//   query t sees keys t + S - T - left .. t + S - T + right, as far as they are in 0 .. S - 1
//   lse[t] = log(sum over seen s of e^logit + e^sink),  p = e^(logit - lse)
//   out[t] = sum over seen s of p v[s]
//
// Backward, given dout and dlse:
//   delta[t] = dout[t] . out[t] - dlse[t],  dlogit = p (dout[t] . v[s] - delta[t])
//   dv[s] = sum over t of p dout[t]
//   dsink = -sum over t that see a key of e^(sink - lse[t]) delta[t]
//   dq and dk follow from dlogit and softcap' = 1 - tanh^2
//
// A row without a visible key: out 0, lse the sink or -inf, no gradient. Masked pairs are left out
// by selection, so NaN behind the mask stays there. Math in float32 whatever the element type.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace ic {

// A (batch, tokens, heads, D) or packed (N, heads, D) tensor; strides in elements, D's is 1.
struct AttentionTensor {
  void* data;
  int64_t batch, token, head;  // batch: 0 when packed
};

// Keys and values held in blocks, and what this call appends to them.
struct AttentionPages {
  const int32_t* block_table;    // (B, table_row): the blocks of each sequence; null: no pages
  const int32_t* cache_seqlens;  // (B,): tokens held before the append
  int64_t table_row, block_size, k_block, v_block;  // strides of a block, in elements
  // What to append, (N, K, D) of q's dtype and aligned with q; null data: nothing.
  AttentionTensor k_new, v_new;
  const float *cos, *sin;  // (positions, D / 2): turn q and k_new; null: as they are
  bool interleaved;        // pairs are (2i, 2i + 1), not (i, i + D / 2)
};

struct AttentionArgs {
  AttentionTensor q, k, v, out;  // with pages, k and v are the caches: token is a row of a block
  float* lse;                    // (B, H, T), or (H, N) when packed; contiguous
  const int32_t *cu_q, *cu_k;    // (B + 1,): packed sequences; null: dense. Pages: cu_q only.
  const float* slopes;           // (H,) or (B, H) with slopes_batch = H; null: none
  int64_t slopes_batch;
  const float* sinks;  // (H,); null: none
  AttentionPages pages;
  // B, T, S; when packed T and S are the rows of q and k; with pages S is the most that a sequence
  // of the block table can hold.
  int64_t sequences, queries, keys;
  int64_t heads, kv_heads, dim;
  int64_t left, right;  // keys besides the diagonal one; kAttentionUnbounded: all
  float scale, softcap;
  Dtype dtype, kv_dtype;
  float* workspace;  // CPU: attention_plan(dim) floats per thread, then one int32 per thread
  int threads;
};
constexpr int64_t kAttentionUnbounded = int64_t{1} << 40;
constexpr int64_t kAttentionMaxDim = 256;

struct AttentionBackwardArgs {
  AttentionArgs forward;  // with its out and lse; workspace as for the backward
  AttentionTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse;  // like lse; null: 0
  float* grad_sinks;      // (H,); null: not wanted
  // On the CPU, where a sequence has more than plan.back_keys keys: the gradient of q over the
  // blocks of keys so far, (queries of all sequences, H, padded dim), and a zeroed counter per
  // block of query rows.
  float* sums;
  int32_t* turns;
  int64_t turns_size;
};

// ---- sequences, and what their rows see

// Row r of a sequence is query r / group: kernels that take the query heads of a key/value head
// together have group = heads / kv_heads, those that take one at a time have 1.
struct AttentionSequence {
  int64_t queries, keys;            // T and S
  int64_t first_query, first_key;   // of a packed tensor
  int64_t index, group, position0;  // position0 = S - T: where query 0 stands
  int64_t left, right;

  IC_HOST_DEVICE int64_t rows() const { return queries * group; }
  IC_HOST_DEVICE int64_t position(int64_t row) const {
    return (group == 1 ? row : row / group) + position0;
  }
  // Row r sees keys first_seen(r) .. end_seen(r) - 1; both never decrease with r.
  IC_HOST_DEVICE int64_t first_seen(int64_t row) const {
    const int64_t first = position(row) - left;
    return first > 0 ? first : 0;
  }
  IC_HOST_DEVICE int64_t end_seen(int64_t row) const {
    const int64_t end = position(row) + right + 1;
    return end < 0 ? 0 : end < keys ? end : keys;
  }
  // Key s is seen by rows first_row(s) .. end_row(s) - 1.
  IC_HOST_DEVICE int64_t first_row(int64_t key) const {
    return clip(key - position0 - right) * group;
  }
  IC_HOST_DEVICE int64_t end_row(int64_t key) const {
    return clip(key - position0 + left + 1) * group;
  }

 private:
  IC_HOST_DEVICE int64_t clip(int64_t t) const { return t < 0 ? 0 : t < queries ? t : queries; }
};

IC_HOST_DEVICE AttentionSequence attention_sequence(const AttentionArgs& a, int64_t b) {
  AttentionSequence s{a.queries, a.keys, 0, 0, b, a.heads / a.kv_heads, 0, a.left, a.right};
  if (a.cu_q) {
    s.first_query = a.cu_q[b];
    s.queries = a.cu_q[b + 1] - a.cu_q[b];
  }
  if (a.cu_k) {
    s.first_key = a.cu_k[b];
    s.keys = a.cu_k[b + 1] - a.cu_k[b];
  }
  if (a.pages.block_table) s.keys = a.pages.cache_seqlens[b] + (a.pages.k_new.data ? s.queries : 0);
  s.position0 = s.keys - s.queries;
  return s;
}

// Where a sequence starts among the queries of all.
IC_HOST_DEVICE int64_t attention_first_token(const AttentionArgs& a, const AttentionSequence& s) {
  return a.cu_q ? s.first_query : s.index * a.queries;
}

IC_HOST_DEVICE int64_t attention_lse_index(const AttentionArgs& a, const AttentionSequence& s,
                                           int64_t head, int64_t t) {
  return a.cu_q ? head * a.queries + s.first_query + t : (s.index * a.heads + head) * a.queries + t;
}

// How a head is cut on the CPU, and the scratch it takes: constants of the head dim, so that bits
// depend on nothing else.
struct AttentionPlan {
  int64_t padded;                // dim rounded up to whole vectors
  int64_t rows, keys;            // forward: query rows of a task at most; keys of a block
  int64_t back_rows, back_keys;  // backward: query rows of a block, keys of a task
  int64_t forward_floats, backward_floats;  // scratch of one thread
};

constexpr AttentionPlan attention_plan(int64_t dim) {
  AttentionPlan p{};
  p.padded = (dim + 15) / 16 * 16;
  p.keys = 256;
  p.rows = p.padded <= 64 ? 768 : 49152 / p.padded / 48 * 48;
  p.back_rows = 96;
  p.back_keys = p.padded <= 64 ? 256 : 16384 / p.padded / 64 * 64;  // whole panels
  // keys transposed, values; queries, outputs, row sums and maxima; a tile of logits and weights,
  // of 32 rows at most
  p.forward_floats = 2 * p.keys * p.padded + p.rows * (2 * p.padded + 16 + 1) + 32 * p.keys;
  // keys and values transposed, keys, two gradients; queries, dout, dq, lse and delta; a tile of
  // logits and of dout . v; weights and dlogit
  p.backward_floats = 5 * p.back_keys * p.padded + p.back_rows * (3 * p.padded + 2) +
                      64 * p.back_keys + 2 * p.back_rows * (p.back_keys + 48);
  return p;
}

IC_CPU_KERNEL(attention_cpu, AttentionArgs)
IC_CPU_KERNEL(attention_backward_cpu, AttentionBackwardArgs)

void attention_cuda(const AttentionArgs&, void* stream);
void attention_backward_cuda(const AttentionBackwardArgs&, void* stream);
// Floats of workspace, 1 or more: of the sizes and dtypes alone. `paged`: keys is the most that a
// sequence of the block table can hold.
int64_t attention_workspace_cuda(const AttentionArgs&, bool paged);
int64_t attention_backward_workspace_cuda(const AttentionArgs&);

}  // namespace ic
