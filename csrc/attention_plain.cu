// attention in float32 on the CUDA cores, forward and backward: for float32 tensors, and for caches
// of another element type than the queries. Elements become float32 as they are loaded.
//
// A block owns kRows rows of one key/value head and walks the rows of the other side, kTile at a
// time from multiples of kTile in the sequence on:
//   plain_forward          owns query rows (of all query heads of its key/value head), walks keys
//                          with a running maximum; appends what is new of its own tokens
//   plain_backward<false>  the same rows: delta = dout . out - dlse, laid out as lse, and dq
//   plain_backward<true>   owns keys, walks query rows: dk and dv
//   plain_sinks            a block for each head: dsink, summed in float64
// A warp owns kOwn rows and each of its lanes one row of the tile, so that a product over the head
// dim is one lane's; weights go through shared memory to lanes that each own columns. Sums go tile
// by tile: a row's bits depend on what it sees alone.
//
// FLOPs per query-key pair and query head: 4 D forward, 14 D backward (logits and dout . v twice).
// An H200's CUDA cores do 67 TFLOP/s in float32; a wavefront of shared memory for every two FMA
// instructions halves that: about 30 TFLOP/s where head dims fill the padding. Bytes matter in
// decoding only: 8 D for each key and key/value head at 4.8 TB/s, of which 4 bytes a lane and one
// block for a sequence and head reach a part.
#include <type_traits>

#include "attention.cuh"

namespace ic {
namespace {

constexpr int kWarps = 6, kThreads = kWarps * kWarp;
constexpr int kOwn = 4;               // rows of a warp
constexpr int kRows = kWarps * kOwn;  // of a block: 2 kRows + kTile of D = 256 fit 99 KB
constexpr int kTile = kWarp;

// Of a row in shared memory: 16-byte reads of 8 neighbouring rows meet no bank twice.
IC_HOST_DEVICE constexpr int pitch(int dim) { return dim + 4; }

IC_GPU int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

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

// The rows of the other side that a row sees.
struct Span {
  int begin, end;
  IC_GPU bool has(int64_t row) const { return row >= begin && row < end; }
};

// What a block owns: rows first .. end - 1 of a sequence's query rows, or of its keys; none where
// first >= end.
struct Block {
  bool of_keys;
  AttentionSequence s;
  int64_t kv_head, first, end;

  // Blocks for all sequences. Of packed ones, sequence b has those from floor(rows before / kRows)
  // + b on: enough for it, and none of the next one's.
  static int64_t count(const AttentionArgs& a, bool of_keys) {
    const int64_t rows = of_keys ? a.keys : a.queries * (a.heads / a.kv_heads);
    if (a.cu_q) return rows / kRows + a.sequences + 1;
    return a.sequences * ((rows + kRows - 1) / kRows);
  }
  IC_GPU Block(const AttentionArgs& a, bool of_keys)
      : of_keys(of_keys), s{}, kv_head(blockIdx.y), first(0), end(0) {
    if (a.sequences == 0) return;
    const int64_t group = of_keys ? 1 : a.heads / a.kv_heads, block = blockIdx.x;
    const int32_t* cu = of_keys ? a.cu_k : a.cu_q;
    const auto begin = [=](int64_t b) { return cu[b] * group / kRows + b; };
    int64_t sequence = 0;
    if (cu) {  // the last one that begins here or before
      for (int64_t count = a.sequences; count > 1;) {
        const int64_t half = count / 2;
        const bool begun = begin(sequence + half) <= block;
        sequence += begun ? half : 0;
        count = begun ? count - half : half;
      }
      first = (block - begin(sequence)) * kRows;
    } else {
      const int64_t blocks = ((of_keys ? a.keys : a.queries * group) + kRows - 1) / kRows;
      sequence = block / blocks;
      first = block % blocks * kRows;
    }
    s = attention_sequence(a, sequence);
    end = smaller(of_keys ? s.keys : s.rows(), first + kRows);
  }
  IC_GPU int64_t own_row() const { return first + warp_index() * kOwn; }  // the warp's first
  IC_GPU int64_t others() const { return of_keys ? s.rows() : s.keys; }
  IC_GPU Span seen(int64_t row) const {
    if (row >= end) return {0, 0};
    return {static_cast<int>(of_keys ? s.first_row(row) : s.first_seen(row)),
            static_cast<int>(of_keys ? s.end_row(row) : s.end_seen(row))};
  }
  IC_GPU int64_t head(int64_t row) const { return kv_head * s.group + row % s.group; }
  IC_GPU int64_t lse_at(const AttentionArgs& a, int64_t row) const {
    return attention_lse_index(a, s, head(row), row / s.group);
  }
};

struct QueryRows {
  const AttentionArgs& a;
  const Block& block;
  const AttentionTensor& t;

  IC_GPU int64_t at(int64_t row) const {
    const AttentionSequence& s = block.s;
    return s.index * t.batch + (s.first_query + row / s.group) * t.token + block.head(row) * t.head;
  }
  IC_GPU Row operator()(int64_t row) const {
    const int64_t held = a.pages.cos ? a.pages.cache_seqlens[block.s.index] : 0;
    return {t.data, at(row), a.dtype, a.dtype, a.pages.cos ? held + row / block.s.group : -1};
  }
};

// Keys or values. New ones are read where they come from, in the launch that appends them too.
struct KeyRows {
  const AttentionArgs& a;
  const Block& block;
  const AttentionTensor& t;
  AttentionTensor fresh{};
  int64_t page = 0;  // stride of a block of pages
  bool turn = false;

  IC_GPU int64_t at(int64_t key) const {
    const AttentionPages& p = a.pages;
    const AttentionSequence& s = block.s;
    int64_t row = s.index * t.batch + (s.first_key + key) * t.token;
    if (p.block_table)
      row = p.block_table[s.index * p.table_row + key / p.block_size] * page +
            key % p.block_size * t.token;
    return row + block.kv_head * t.head;
  }
  IC_GPU Row operator()(int64_t key) const {
    const int64_t token = key - block.s.position0;  // of a new key: its query
    if (!fresh.data || token < 0) return {t.data, at(key), a.kv_dtype, a.kv_dtype, -1};
    const int64_t row = (block.s.first_query + token) * fresh.token + block.kv_head * fresh.head;
    return {fresh.data, row, a.dtype, a.kv_dtype, turn ? key : -1};
  }
  // The new ones of tokens whose first row is this block's: each is one block's.
  IC_GPU void append() const {
    const int64_t group = block.s.group, first = (block.first + group - 1) / group;
    for (int64_t i = first + warp_index(); fresh.data && i * group < block.end; i += kWarps) {
      const int64_t key = block.s.position0 + i, to = at(key);
      const Row row = (*this)(key);
      for (int d = lane_index(); d < a.dim; d += kWarp)
        store(t.data, a.kv_dtype, to + d, row.element(a, d));
    }
  }
};

// Packed tokens of no sequence are shared out among the blocks: what they have of a head is 0, and
// in a row of `of_tokens` (lse and its like) `fill`.
IC_GPU void clear_gaps(const AttentionArgs& a, const AttentionTensor& t, bool of_keys,
                       float* of_tokens = nullptr, float fill = 0.0f) {
  const int32_t* cu = of_keys ? a.cu_k : a.cu_q;
  const int64_t tokens = of_keys ? a.keys : a.queries, heads = of_keys ? 1 : a.heads / a.kv_heads;
  for (int64_t i = blockIdx.x; cu && i < tokens; i += gridDim.x) {
    if (i >= cu[0] && i < cu[a.sequences]) continue;
    for (int64_t h = blockIdx.y * heads; h < (blockIdx.y + 1) * heads; ++h) {
      for (int64_t d = threadIdx.x; d < a.dim; d += kThreads)
        store(t.data, a.dtype, i * t.token + h * t.head + d, 0.0f);
      if (of_tokens && threadIdx.x == 0) of_tokens[h * tokens + i] = fill;
    }
  }
}

// ---- tiles and their products

// Rows first .. of which those before `end` exist; all else is 0. Returns whether this thread met
// what is not finite.
template <int kDim, int kCount, class Rows>
IC_GPU bool load_rows(const AttentionArgs& a, float* to, int64_t first, int64_t end,
                      const Rows& rows) {
  bool odd = false;
  for (int r = warp_index(); r < kCount; r += kWarps) {
    const bool real = first + r < end;
    const Row row = real ? rows(first + r) : Row{};
#pragma unroll
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
#pragma unroll 4
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
                         const Span (&seen)[kOwn], int64_t first, bool exact) {
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
IC_GPU void store_row(const AttentionArgs& a, const AttentionTensor& t, int64_t at,
                      const float (&x)[kDim / kWarp], float factor) {
#pragma unroll
  for (int c = 0; c < kDim / kWarp; ++c) {
    const int d = c * kWarp + lane_index();
    if (d < a.dim) store(t.data, a.dtype, at + d, x[c] * factor);
  }
}

// What a query row brings to its pairs with keys; lse in units of log 2.
struct Query {
  float slope, lse, delta;
  int64_t position;

  IC_GPU float logit(LogitRule rule, float product, int64_t key) const {
    rule.slope = slope;
    return rule.logit(product, position - key);
  }
};

IC_GPU Query query_of(const AttentionArgs& a, const Block& block, int64_t row) {
  return {LogitRule(a, block.s.index, block.head(row)).slope, 0.0f, 0.0f, block.s.position(row)};
}

// ---- forward

template <int kDim>
__global__ void __launch_bounds__(kThreads) plain_forward(AttentionArgs a) {
  DYNAMIC_SHARED(shared);
  float* own = reinterpret_cast<float*>(shared);
  float* tile = own + kRows * pitch(kDim);
  float* weights = tile + kTile * pitch(kDim);
  clear_gaps(a, a.out, false, a.lse, kMinusInf);
  const Block block(a, false);
  if (block.first >= block.end) return;
  const AttentionPages& p = a.pages;
  const KeyRows keys{a, block, a.k, p.k_new, p.k_block, p.cos != nullptr};
  const KeyRows values{a, block, a.v, p.v_new, p.v_block, false};
  keys.append();
  values.append();
  load_rows<kDim, kRows>(a, own, block.first, block.end, QueryRows{a, block, a.q});

  const LogitRule rule(a, block.s.index, 0);
  Query query[kOwn];
  Span seen[kOwn];
  float max[kOwn], sum[kOwn] = {}, out[kOwn][kDim / kWarp] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    query[i] = query_of(a, block, block.own_row() + i);
    seen[i] = block.seen(block.own_row() + i);
    max[i] = kMinusInf;
  }
  const int end_key = block.seen(block.end - 1).end;
  for (int key = block.seen(block.first).begin / kTile * kTile; key < end_key; key += kTile) {
    __syncthreads();
    load_rows<kDim, kTile>(a, tile, key, block.others(), keys);
    __syncthreads();
    float x[kOwn], keep[kOwn];
    multiply<kDim>(x, own, tile);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = key + lane_index();
      x[i] = seen[i].has(at) ? query[i].logit(rule, x[i], at) : kMinusInf;
      const float top = fmaxf(max[i], warp_max(x[i])), base = finite_or_zero(top);
      keep[i] = exp2f(max[i] - base);
      max[i] = top;
      x[i] = exp2f(x[i] - base);
      sum[i] = fmaf(sum[i], keep[i], x[i]);
    }
    __syncthreads();
    const bool odd = load_rows<kDim, kTile>(a, tile, key, block.others(), values);
    const bool exact = __syncthreads_or(odd);
    add_weighted<kDim>(out, keep, x, weights, tile, seen, key, exact);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = block.own_row() + i;
    const float all = warp_sum(sum[i]);
    if (row >= block.end) continue;
    const RowEnd last(max[i], all, a.sinks ? a.sinks[block.head(row)] : kMinusInf);
    store_row<kDim>(a, a.out, QueryRows{a, block, a.out}.at(row), out[i], last.factor);
    if (lane_index() == 0) a.lse[block.lse_at(a, row)] = last.lse;
  }
}

// ---- backward

// delta of a query row, by a warp; 0 if it sees no key.
IC_GPU float delta_of(const AttentionBackwardArgs& b, const Block& block, int64_t row, Span seen) {
  const AttentionArgs& a = b.forward;
  const Row out = QueryRows{a, block, a.out}(row), dout = QueryRows{a, block, b.grad_out}(row);
  float sum = 0.0f;
  for (int d = lane_index(); d < a.dim; d += kWarp)
    sum = fmaf(dout.element(a, d), out.element(a, d), sum);
  sum = warp_sum(sum) - (b.grad_lse ? b.grad_lse[block.lse_at(a, row)] : 0.0f);
  return seen.begin < seen.end ? sum : 0.0f;
}

template <int kDim, bool kOfKeys>
__global__ void __launch_bounds__(kThreads) plain_backward(AttentionBackwardArgs b) {
  DYNAMIC_SHARED(shared);
  float* own1 = reinterpret_cast<float*>(shared);  // q or k
  float* own2 = own1 + kRows * pitch(kDim);        // dout or v
  float* tile = own2 + kRows * pitch(kDim);
  float* weights = tile + kTile * pitch(kDim);
  const AttentionArgs& a = b.forward;
  if (kOfKeys) {
    clear_gaps(a, b.grad_k, true);
    clear_gaps(a, b.grad_v, true);
  } else {
    clear_gaps(a, b.grad_q, false, a.workspace);
  }
  const Block block(a, kOfKeys);
  if (block.first >= block.end) return;
  using Own = std::conditional_t<kOfKeys, KeyRows, QueryRows>;
  using Others = std::conditional_t<kOfKeys, QueryRows, KeyRows>;
  load_rows<kDim, kRows>(a, own1, block.first, block.end, Own{a, block, kOfKeys ? a.k : a.q});
  load_rows<kDim, kRows>(a, own2, block.first, block.end,
                         Own{a, block, kOfKeys ? a.v : b.grad_out});
  const Others others1{a, block, kOfKeys ? a.q : a.k};
  const Others others2{a, block, kOfKeys ? b.grad_out : a.v};

  const LogitRule rule(a, block.s.index, 0);
  Query query[kOwn];  // the warp's own, or all the lane's
  Span seen[kOwn];
  float grad1[kOwn][kDim / kWarp] = {}, grad2[kOwn][kDim / kWarp] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = smaller(block.own_row() + i, block.end - 1);
    seen[i] = block.seen(block.own_row() + i);
    if (kOfKeys) continue;
    query[i] = query_of(a, block, row);
    query[i].lse = a.lse[block.lse_at(a, row)] * kLog2e;
    query[i].delta = delta_of(b, block, row, block.seen(row));
    if (lane_index() == 0) a.workspace[block.lse_at(a, row)] = query[i].delta;
  }

  const float ones[kOwn] = {1.0f, 1.0f, 1.0f, 1.0f};
  const int end_row = block.seen(block.end - 1).end;
  for (int row = block.seen(block.first).begin / kTile * kTile; row < end_row; row += kTile) {
    const int at = row + lane_index();
    if (kOfKeys) {
      const int64_t r = smaller(at, block.others() - 1), of_row = block.lse_at(a, r);
      query[0] = query_of(a, block, r);
      query[0].lse = a.lse[of_row] * kLog2e;
      query[0].delta = a.workspace[of_row];
    }
    float x[kOwn], p[kOwn], dout_v[kOwn];
    __syncthreads();
    const bool odd1 = load_rows<kDim, kTile>(a, tile, row, block.others(), others1);
    const bool exact1 = __syncthreads_or(odd1);
    multiply<kDim>(x, own1, tile);
    __syncthreads();
    const bool odd2 = load_rows<kDim, kTile>(a, tile, row, block.others(), others2);
    const bool exact2 = __syncthreads_or(odd2);
    multiply<kDim>(dout_v, own2, tile);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const Query& of = query[kOfKeys ? 0 : i];
      const float logit = of.logit(rule, x[i], kOfKeys ? block.own_row() + i : at);
      const float tanh = rule.softcap > 0.0f ? rule.capped(x[i]) / rule.softcap : 0.0f;
      p[i] = exp2f(logit - of.lse);
      x[i] = p[i] * (dout_v[i] - of.delta) * fmaf(-tanh, tanh, 1.0f);  // dlogit, and through tanh
      if (!seen[i].has(at)) p[i] = x[i] = 0.0f;
    }
    if (kOfKeys) add_weighted<kDim>(grad2, ones, p, weights, tile, seen, row, exact2);
    __syncthreads();
    load_rows<kDim, kTile>(a, tile, row, block.others(), others1);
    __syncthreads();
    add_weighted<kDim>(grad1, ones, x, weights, tile, seen, row, exact1);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = block.own_row() + i;
    if (row >= block.end) continue;
    const AttentionTensor& to = kOfKeys ? b.grad_k : b.grad_q;
    store_row<kDim>(a, to, Own{a, block, to}.at(row), grad1[i], a.scale);
    if (kOfKeys) store_row<kDim>(a, b.grad_v, Own{a, block, b.grad_v}.at(row), grad2[i], 1.0f);
  }
}

__global__ void __launch_bounds__(kThreads) plain_sinks(AttentionBackwardArgs b, int64_t batch) {
  const AttentionArgs& a = b.forward;
  const int64_t head = blockIdx.x;
  const float sink = a.sinks[head];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < batch * a.queries; i += kThreads) {
    const int64_t at = (i / a.queries * a.heads + head) * a.queries + i % a.queries;
    const float delta = a.workspace[at];
    if (delta != 0.0f && sink > kMinusInf)  // rows without a key have no delta
      sum -= static_cast<double>(expf(sink - a.lse[at])) * static_cast<double>(delta);
  }
  sum = block_sum<kWarps>(sum);
  if (threadIdx.x == 0) b.grad_sinks[head] = static_cast<float>(sum);
}

// ---- launches

// `tiles`: rows of the head dim that a block keeps.
template <class Args>
void launch_blocks(void (*of64)(Args), void (*of128)(Args), void (*of256)(Args), const Args& args,
                   const AttentionArgs& a, bool of_keys, int tiles, Stream stream) {
  const int64_t blocks = Block::count(a, of_keys);
  if (blocks == 0 || a.heads == 0) return;
  IC_CHECK(blocks <= 0x7fffffff, "attention: too many rows for a launch, got ", blocks, " tiles");
  const int dim = attention_padded_dim(a.dim);
  launch(dim == 64 ? of64 : dim == 128 ? of128 : of256,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(a.kv_heads)), dim3(kThreads),
         (tiles * pitch(dim) + kRows * kTile) * sizeof(float), stream, args);
}

}  // namespace

void attention_plain_cuda(const AttentionArgs& a, void* stream) {
  launch_blocks(plain_forward<64>, plain_forward<128>, plain_forward<256>, a, a, false,
                kRows + kTile, stream);
}

// Queries first: they leave delta for the keys.
void attention_plain_backward_cuda(const AttentionBackwardArgs& b, void* stream) {
  const AttentionArgs& a = b.forward;
  launch_blocks(plain_backward<64, false>, plain_backward<128, false>, plain_backward<256, false>,
                b, a, false, 2 * kRows + kTile, stream);
  launch_blocks(plain_backward<64, true>, plain_backward<128, true>, plain_backward<256, true>, b,
                a, true, 2 * kRows + kTile, stream);
  if (b.grad_sinks && a.heads > 0)
    launch(plain_sinks, dim3(static_cast<unsigned>(a.heads)), dim3(kThreads), 0, stream, b,
           a.cu_q ? 1 : a.sequences);
}

}  // namespace ic
