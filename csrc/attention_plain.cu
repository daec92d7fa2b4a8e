// attention in float32 on the CUDA cores, forward and backward: for float32 tensors, and for caches
// of another element type than the queries. Elements become float32 as they are loaded.
//
// A block owns kRows rows of a head and walks the rows of the other side, kTile at a time from
// multiples of kTile in the sequence on:
//   plain_forward          owns queries, walks keys with a running maximum; the block of a
//                          key/value head's first query head appends what is new of its tokens
//   plain_backward<false>  owns queries: delta = dout . out - dlse, laid out as lse, and dq
//   plain_backward<true>   owns keys, walks the queries of all heads of their group: dk and dv
//   plain_sinks            a block for each head: dsink, summed in float64
// A warp owns kOwn rows and each of its lanes one row of the tile, so that a product over the head
// dim is one lane's; weights go through shared memory to lanes that each own columns. Sums go tile
// by tile: a row's bits depend on what it sees alone.
//
// FLOPs per query, key and query head: 4 D forward, 14 D backward (logits and dout . v twice). An
// H200's CUDA cores do 67 TFLOP/s in float32; a wavefront of shared memory for every two FMA
// instructions halves that: about 30 TFLOP/s where head dims fill the padding. Bytes matter in
// decoding only: 8 D for each key and query head, from HBM at 4.8 TB/s or from L2, of which one
// block for a sequence and head takes what it can.
#include "attention.cuh"

namespace ic {
namespace {

constexpr int kWarps = 6, kThreads = kWarps * kWarp;
constexpr int kOwn = 4;               // rows of a warp
constexpr int kRows = kWarps * kOwn;  // of a block: 2 kRows + kTile of D = 256 fit 99 KB
constexpr int kTile = kWarp;

// Of a row in shared memory: 16-byte reads of 8 neighbouring rows meet no bank twice.
IC_HOST_DEVICE constexpr int pitch(int dim) { return dim + 4; }

// ---- elements

IC_GPU float load(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == Dtype::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

IC_GPU uint16_t bits_as(Dtype dtype, float x) {
  return dtype == Dtype::kBFloat16 ? to_bfloat16(x).bits : to_float16(x).bits;
}

IC_GPU void store(void* data, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = bits_as(dtype, x);
  }
}

IC_GPU float rounded(Dtype dtype, float x) {
  if (dtype == Dtype::kFloat32) return x;
  const uint16_t bits = bits_as(dtype, x);
  return load(&bits, dtype, 0);
}

// ---- rows of tensors

struct Row {
  const void* data;
  int64_t first;     // its first element
  Dtype dtype, as;   // how it lies, and to what it is rounded
  int64_t position;  // by which it is turned; -1: not

  // Each product of the turn rounds by itself, as on the CPU.
  IC_GPU float element(const AttentionArgs& a, int d) const {
    float x = load(data, dtype, first + d);
    if (position >= 0) {
      const bool pairs = a.pages.interleaved;
      const int half = static_cast<int>(a.dim) / 2;
      const bool second = pairs ? d % 2 == 1 : d >= half;
      const int other = pairs ? d ^ 1 : second ? d - half : d + half;
      const int64_t angle = position * half + (pairs ? d / 2 : second ? d - half : d);
      const float y = __fmul_rn(load(data, dtype, first + other), a.pages.sin[angle]);
      x = rounded(dtype, __fadd_rn(__fmul_rn(x, a.pages.cos[angle]), second ? y : -y));
    }
    return dtype == as ? x : rounded(as, x);
  }
};

// Of one head, from token `first` of the tensor on.
struct Rows {
  const AttentionTensor& t;
  Dtype dtype;
  int64_t batch, first, head;

  IC_GPU int64_t at(int64_t row) const {
    return batch * t.batch + (first + row) * t.token + head * t.head;
  }
  IC_GPU Row operator()(int64_t row) const { return {t.data, at(row), dtype, dtype, -1}; }
};

// Keys or values in a cache. New ones are read where they come from, also in the launch that
// appends them.
struct CachedRows {
  const AttentionArgs& a;
  const AttentionSequence& s;
  const AttentionTensor &t, &fresh;
  int64_t page, head;  // page: stride of a block
  bool turn;

  IC_GPU int64_t at(int64_t key) const {
    const AttentionPages& p = a.pages;
    return p.block_table[s.index * p.table_row + key / p.block_size] * page +
           key % p.block_size * t.token + head * t.head;
  }
  IC_GPU Row operator()(int64_t key) const {
    const int64_t token = key - s.position0;  // of a new key: its query
    if (!fresh.data || token < 0) return {t.data, at(key), a.kv_dtype, a.kv_dtype, -1};
    const int64_t row = (s.first_query + token) * fresh.token + head * fresh.head;
    return {fresh.data, row, a.dtype, a.kv_dtype, turn ? key : -1};
  }
  IC_GPU void append(int64_t begin, int64_t end) const {
    for (int64_t key = s.position0 + begin + warp_index(); key < s.position0 + end; key += kWarps)
      for (int d = lane_index(); d < a.dim; d += kWarp)
        store(t.data, a.kv_dtype, at(key) + d, (*this)(key).element(a, d));
  }
};

// ---- what a block owns

// Rows first .. end - 1 of a head: queries, or keys of the mirrored sequence; none if first >= end.
struct Block {
  AttentionSequence s{};
  int64_t first = 0, end = 0;

  IC_GPU Block(const AttentionArgs& a, bool of_keys) {
    if (a.sequences == 0) return;
    const int32_t* cu = of_keys ? a.cu_k : a.cu_q;
    int64_t sequence, tile;
    if (cu) {
      const PackedTile packed(cu, a.sequences, kRows, blockIdx.x);
      sequence = packed.sequence;
      tile = packed.tile;
    } else {
      const int64_t tiles = ((of_keys ? a.keys : a.queries) + kRows - 1) / kRows;
      sequence = blockIdx.x / tiles;
      tile = blockIdx.x % tiles;
    }
    if (tile < 0) return;  // before the first sequence
    s = attention_sequence(a, sequence);
    s.group = 1;
    if (of_keys) s = mirrored(s);
    first = tile * kRows;
    end = min(s.queries, first + kRows);
  }
  IC_GPU int64_t own_row() const { return first + warp_index() * kOwn; }  // the warp's first
  IC_GPU int first_tile() const { return static_cast<int>(s.first_seen(first)) / kTile * kTile; }
  IC_GPU int end_tile() const { return static_cast<int>(s.end_seen(end - 1)); }
};

// What a row sees of the other side.
struct Span {
  int begin, end;
  IC_GPU bool has(int row) const { return row >= begin && row < end; }
};

IC_GPU Span seen_by(const Block& block, int64_t row) {
  if (row >= block.end) return {0, 0};
  return {static_cast<int>(block.s.first_seen(row)), static_cast<int>(block.s.end_seen(row))};
}

// Packed tokens of no sequence are shared out among the blocks of a head: they become 0, and in
// `of_tokens` (lse and its like) `fill`.
IC_GPU void clear_gaps(const AttentionArgs& a, const AttentionTensor& t, const int32_t* cu,
                       int64_t tokens, float* of_tokens = nullptr, float fill = 0.0f) {
  for (int64_t i = blockIdx.x; cu && i < tokens; i += gridDim.x) {
    if (i >= cu[0] && i < cu[a.sequences]) continue;
    for (int64_t d = threadIdx.x; d < a.dim; d += kThreads)
      store(t.data, a.dtype, i * t.token + blockIdx.y * t.head + d, 0.0f);
    if (of_tokens && threadIdx.x == 0) of_tokens[blockIdx.y * tokens + i] = fill;
  }
}

// ---- tiles and their products

// Rows first .. of which those before `end` exist; all else is 0. Returns whether this thread met
// what is not finite.
template <int kDim, int kCount, class AnyRows>
IC_GPU bool load_rows(const AttentionArgs& a, float* to, int64_t first, int64_t end,
                      const AnyRows& rows) {
  bool odd = false;
  for (int r = warp_index(); r < kCount; r += kWarps) {
    const bool real = first + r < end;
    const Row row = real ? rows(first + r) : Row{};
#pragma unroll 2
    for (int d = lane_index(); d < kDim; d += kWarp) {
      const float x = real && d < a.dim ? row.element(a, d) : 0.0f;
      to[r * pitch(kDim) + d] = x;
      odd |= !(x - x == 0.0f);
    }
  }
  return odd;
}

// x[i] = the warp's i-th row . this lane's row of the tile
template <int kDim>
IC_GPU void multiply(float (&x)[kOwn], const float* own, const float* tile) {
  own += warp_index() * kOwn * pitch(kDim);
  tile += lane_index() * pitch(kDim);
  float4 sums[kOwn] = {};
#pragma unroll 2
  for (int d = 0; d < kDim; d += 4) {
    const float4 y = *reinterpret_cast<const float4*>(tile + d);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float4 z = *reinterpret_cast<const float4*>(own + i * pitch(kDim) + d);
      sums[i] = {fmaf(z.x, y.x, sums[i].x), fmaf(z.y, y.y, sums[i].y), fmaf(z.z, y.z, sums[i].z),
                 fmaf(z.w, y.w, sums[i].w)};
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) x[i] = (sums[i].x + sums[i].y) + (sums[i].z + sums[i].w);
}

// x: weights of the warp's rows for this lane's row of the tile. For all rows i and columns c,
// sums[i][c] = sums[i][c] keep[i] + weights of i . column c of the tile, whose rows are `first` and
// following. exact: rows that are not seen are left out, where 0 times them would be NaN. A barrier
// of the block lies between two uses of the weights.
template <int kDim>
IC_GPU void add_weighted(float (&sums)[kOwn][kDim / kWarp], const float (&keep)[kOwn],
                         const float (&x)[kOwn], float* weights, const float* tile,
                         const Span (&seen)[kOwn], int first, bool exact) {
  weights += warp_index() * kOwn * kTile;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) weights[i * kTile + lane_index()] = x[i];
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kDim / kWarp; ++c) {
    float part[kOwn] = {};
#pragma unroll 4
    for (int j = 0; j < kTile; ++j) {
      const float y = tile[j * pitch(kDim) + c * kWarp + lane_index()];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (!exact || seen[i].has(first + j)) part[i] = fmaf(weights[i * kTile + j], y, part[i]);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums[i][c] = fmaf(sums[i][c], keep[i], part[i]);
  }
}

template <int kDim>
IC_GPU void store_row(const AttentionArgs& a, const Rows& to, int64_t row,
                      const float (&x)[kDim / kWarp], float factor) {
#pragma unroll
  for (int c = 0; c < kDim / kWarp; ++c) {
    const int d = c * kWarp + lane_index();
    if (d < a.dim) store(to.t.data, to.dtype, to.at(row) + d, x[c] * factor);
  }
}

// LogitRule's logit, in units of log 2, with an exact tanh. *change: the factor of its gradient on
// the way through softcap.
IC_GPU float logit_of(const LogitRule& rule, float product, int64_t distance, float* change) {
  float x = __fmul_rn(product, rule.scale);
  *change = 1.0f;
  if (rule.softcap > 0.0f) {
    const float y = tanhf(x);
    x = __fmul_rn(rule.softcap, y);
    *change = fmaf(-y, y, 1.0f);
  }
  return fmaf(-rule.slope, fabsf(static_cast<float>(distance)), x);
}

// ---- forward

template <int kDim, class Keys>
IC_GPU void forward(const AttentionArgs& a, const Block& block, float* own, const Keys& keys,
                    const Keys& values) {
  const AttentionSequence& s = block.s;
  const int64_t head = blockIdx.y;
  float* tile = own + kRows * pitch(kDim);
  float* weights = tile + kTile * pitch(kDim);
  const Rows queries{a.q, a.dtype, s.index, s.first_query, head};
  load_rows<kDim, kRows>(a, own, block.first, block.end, [&](int64_t row) {
    Row turned = queries(row);
    if (a.pages.cos) turned.position = a.pages.cache_seqlens[s.index] + row;
    return turned;
  });
  const LogitRule rule(a, s.index, head);
  Span seen[kOwn];
  float max[kOwn], sum[kOwn] = {}, out[kOwn][kDim / kWarp] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    seen[i] = seen_by(block, block.own_row() + i);
    max[i] = kMinusInf;
  }
  for (int key = block.first_tile(); key < block.end_tile(); key += kTile) {
    __syncthreads();
    load_rows<kDim, kTile>(a, tile, key, s.keys, keys);
    __syncthreads();
    float x[kOwn], keep[kOwn], change;
    multiply<kDim>(x, own, tile);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = key + lane_index();
      x[i] = logit_of(rule, x[i], s.position(block.own_row() + i) - at, &change);
      if (!seen[i].has(at)) x[i] = kMinusInf;
      const float top = fmaxf(max[i], warp_max(x[i])), base = finite_or_zero(top);
      keep[i] = exp2f(max[i] - base);
      max[i] = top;
      x[i] = exp2f(x[i] - base);
      sum[i] = fmaf(sum[i], keep[i], x[i]);
    }
    __syncthreads();
    const bool odd = load_rows<kDim, kTile>(a, tile, key, s.keys, values);
    const bool exact = __syncthreads_or(odd);
    add_weighted<kDim>(out, keep, x, weights, tile, seen, key, exact);
  }
  const Rows to{a.out, a.dtype, s.index, s.first_query, head};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = block.own_row() + i;
    const float all = warp_sum(sum[i]);
    if (row >= block.end) continue;
    const RowEnd end(max[i], all, a.sinks ? a.sinks[head] : kMinusInf);
    store_row<kDim>(a, to, row, out[i], end.factor);
    if (lane_index() == 0) a.lse[attention_lse_index(a, s, head, row)] = end.lse;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) plain_forward(AttentionArgs a) {
  DYNAMIC_SHARED(shared);
  clear_gaps(a, a.out, a.cu_q, a.queries, a.lse, kMinusInf);
  const Block block(a, false);
  if (block.first >= block.end) return;
  float* own = reinterpret_cast<float*>(shared);
  const AttentionSequence& s = block.s;
  const AttentionPages& p = a.pages;
  const int64_t group = a.heads / a.kv_heads, kv_head = blockIdx.y / group;
  if (p.block_table) {
    const CachedRows keys{a, s, a.k, p.k_new, p.k_block, kv_head, p.cos != nullptr};
    const CachedRows values{a, s, a.v, p.v_new, p.v_block, kv_head, false};
    if (p.k_new.data && blockIdx.y % group == 0) {
      keys.append(block.first, block.end);
      values.append(block.first, block.end);
    }
    forward<kDim>(a, block, own, keys, values);
  } else {
    forward<kDim>(a, block, own, Rows{a.k, a.dtype, s.index, s.first_key, kv_head},
                  Rows{a.v, a.dtype, s.index, s.first_key, kv_head});
  }
}

// ---- backward

// A warp's sum for a row; 0 if it sees no key.
IC_GPU float delta_of(const AttentionArgs& a, const Row& out, const Row& dout, float dlse,
                      const Span& seen) {
  float sum = 0.0f;
  for (int d = lane_index(); d < a.dim; d += kWarp)
    sum = fmaf(dout.element(a, d), out.element(a, d), sum);
  sum = warp_sum(sum) - dlse;
  return seen.begin < seen.end ? sum : 0.0f;
}

template <int kDim, bool kOfKeys>
__global__ void __launch_bounds__(kThreads, 1) plain_backward(AttentionBackwardArgs b) {
  DYNAMIC_SHARED(shared);
  float* own1 = reinterpret_cast<float*>(shared);  // q or k
  float* own2 = own1 + kRows * pitch(kDim);        // dout or v
  float* tile = own2 + kRows * pitch(kDim);
  float* weights = tile + kTile * pitch(kDim);
  const AttentionArgs& a = b.forward;
  if (kOfKeys) {
    clear_gaps(a, b.grad_k, a.cu_k, a.keys);
    clear_gaps(a, b.grad_v, a.cu_k, a.keys);
  } else {
    clear_gaps(a, b.grad_q, a.cu_q, a.queries, a.workspace);
  }
  const Block block(a, kOfKeys);
  if (block.first >= block.end) return;
  const AttentionSequence& s = block.s;
  const int64_t group = a.heads / a.kv_heads, kv_head = blockIdx.y / (kOfKeys ? 1 : group);
  const auto queries = [&](const AttentionTensor& t, int64_t head) {
    return Rows{t, a.dtype, s.index, s.first_query, head};
  };
  const auto keys = [&](const AttentionTensor& t) {
    return Rows{t, a.dtype, s.index, s.first_key, kv_head};
  };
  const int64_t first_head = kOfKeys ? kv_head * group : blockIdx.y;
  load_rows<kDim, kRows>(a, own1, block.first, block.end,
                         kOfKeys ? keys(a.k) : queries(a.q, first_head));
  load_rows<kDim, kRows>(a, own2, block.first, block.end,
                         kOfKeys ? keys(a.v) : queries(b.grad_out, first_head));

  Span seen[kOwn];
  // Of the warp's own queries; where it has keys, [0] is of the lane's query.
  float lse[kOwn] = {}, delta[kOwn] = {};
  float grad1[kOwn][kDim / kWarp] = {}, grad2[kOwn][kDim / kWarp] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = block.own_row() + i;
    seen[i] = seen_by(block, row);
    if (kOfKeys || row >= block.end) continue;
    const int64_t at = attention_lse_index(a, s, first_head, row);
    lse[i] = a.lse[at] * kLog2e;
    delta[i] = delta_of(a, queries(a.out, first_head)(row), queries(b.grad_out, first_head)(row),
                        b.grad_lse ? b.grad_lse[at] : 0.0f, seen[i]);
    if (lane_index() == 0) a.workspace[at] = delta[i];
  }
  const float ones[kOwn] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int64_t head = first_head; head < first_head + (kOfKeys ? group : 1); ++head) {
    const LogitRule rule(a, s.index, head);
    const Rows others1 = kOfKeys ? queries(a.q, head) : keys(a.k);
    const Rows others2 = kOfKeys ? queries(b.grad_out, head) : keys(a.v);
    for (int row = block.first_tile(); row < block.end_tile(); row += kTile) {
      const int at = row + lane_index();
      if (kOfKeys && at < s.keys) {
        const int64_t of_query = attention_lse_index(a, s, head, at);
        lse[0] = a.lse[of_query] * kLog2e;
        delta[0] = a.workspace[of_query];
      }
      float x[kOwn], p[kOwn], dout_v[kOwn], change;
      __syncthreads();
      const bool odd1 = load_rows<kDim, kTile>(a, tile, row, s.keys, others1);
      const bool exact1 = __syncthreads_or(odd1);
      multiply<kDim>(x, own1, tile);
      __syncthreads();
      const bool odd2 = load_rows<kDim, kTile>(a, tile, row, s.keys, others2);
      const bool exact2 = __syncthreads_or(odd2);
      multiply<kDim>(dout_v, own2, tile);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t distance = s.position(block.own_row() + i) - at;
        const float logit = logit_of(rule, x[i], distance, &change);
        p[i] = exp2f(logit - lse[kOfKeys ? 0 : i]);
        x[i] = p[i] * (dout_v[i] - delta[kOfKeys ? 0 : i]) * change;
        if (!seen[i].has(at)) p[i] = x[i] = 0.0f;
      }
      if (kOfKeys) add_weighted<kDim>(grad2, ones, p, weights, tile, seen, row, exact2);
      __syncthreads();
      load_rows<kDim, kTile>(a, tile, row, s.keys, others1);
      __syncthreads();
      add_weighted<kDim>(grad1, ones, x, weights, tile, seen, row, exact1);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = block.own_row() + i;
    if (row >= block.end) continue;
    store_row<kDim>(a, kOfKeys ? keys(b.grad_k) : queries(b.grad_q, first_head), row, grad1[i],
                    a.scale);
    if (kOfKeys) store_row<kDim>(a, keys(b.grad_v), row, grad2[i], 1.0f);
  }
}

// `batch`: of lse. Rows without a key have delta 0.
__global__ void __launch_bounds__(kThreads) plain_sinks(AttentionBackwardArgs b, int64_t batch) {
  const AttentionArgs& a = b.forward;
  const int64_t head = blockIdx.x;
  const float sink = a.sinks[head];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < batch * a.queries; i += kThreads) {
    const int64_t at = (i / a.queries * a.heads + head) * a.queries + i % a.queries;
    const float delta = a.workspace[at];
    if (delta != 0.0f && sink > kMinusInf)
      sum -= static_cast<double>(expf(sink - a.lse[at])) * static_cast<double>(delta);
  }
  sum = block_sum<kWarps>(sum);
  if (threadIdx.x == 0) b.grad_sinks[head] = static_cast<float>(sum);
}

// ---- launches

// The kernel of a's head dim, for `tokens` tokens of `heads` heads, kRows at a time. `tiles`: rows
// that a block keeps in shared memory.
template <class Args>
void launch_plain(void (*of64)(Args), void (*of128)(Args), void (*of256)(Args), const Args& args,
                  const AttentionArgs& a, const int32_t* cu, int64_t tokens, int64_t heads,
                  int tiles, Stream stream) {
  // When packed at least one: also without a sequence there are rows to clear.
  const int64_t blocks = cu ? packed_tiles(tokens, a.sequences, kRows) + 1
                            : a.sequences * ((tokens + kRows - 1) / kRows);
  IC_CHECK(blocks < int64_t{1} << 31 && heads < 65536,
           "attention: too many rows for one call, got ", a.sequences, " sequences of ", tokens,
           " tokens and ", heads, " heads");
  if (blocks == 0 || heads == 0) return;
  const int dim = attention_padded_dim(a.dim);
  launch(dim == 64    ? of64
         : dim == 128 ? of128
                      : of256,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads)), dim3(kThreads),
         (tiles * pitch(dim) + kRows * kTile) * sizeof(float), stream, args);
}

}  // namespace

void attention_plain_cuda(const AttentionArgs& a, void* stream) {
  launch_plain(plain_forward<64>, plain_forward<128>, plain_forward<256>, a, a, a.cu_q, a.queries,
               a.heads, kRows + kTile, stream);
}

// Queries first: they leave delta for the keys.
void attention_plain_backward_cuda(const AttentionBackwardArgs& b, void* stream) {
  const AttentionArgs& a = b.forward;
  launch_plain(plain_backward<64, false>, plain_backward<128, false>, plain_backward<256, false>, b,
               a, a.cu_q, a.queries, a.heads, 2 * kRows + kTile, stream);
  launch_plain(plain_backward<64, true>, plain_backward<128, true>, plain_backward<256, true>, b, a,
               a.cu_k, a.keys, a.kv_heads, 2 * kRows + kTile, stream);
  if (b.grad_sinks && a.heads > 0)
    launch(plain_sinks, dim3(static_cast<unsigned>(a.heads)), dim3(kThreads), 0, stream, b,
           a.cu_q ? 1 : a.sequences);
}

}  // namespace ic
