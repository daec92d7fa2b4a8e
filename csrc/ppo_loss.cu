// ppo_loss on CUDA: loss, statistics and gradients in one pass over the tokens.
//
//   count      unmasked tokens, of blocks of tokens or ("sequence") of rows; where no normalizer is
//              given, or a token's weight depends on its row
//   normalise  one block: what the loss is multiplied by
//   tokens     a block for each 2048 tokens: gradients, and the chunk's sums in float64
//   finish     one block: the sums of all chunks
// Every sum has one fixed order: inside a warp by halves, then by warps, then by chunks. Chunks do
// not depend on the device.
//
// Bytes per token: 33 for policy and value loss = logprobs, old_logprobs, advantages, values,
// old_values, returns read, two gradients written, mask; 1 more for the count. 4.2 M tokens at the
// 4.8 TB/s of an H200: 29 us. A chunk's sums are 112 bytes for 2048 tokens.
#include "gpu.cuh"
#include "ppo_loss.h"

namespace ic::gpu {

// What ppo_loss_token.h is written in, for one token.
IC_HOST_DEVICE float broadcast(float x) { return x; }
IC_HOST_DEVICE float select(bool which, float a, float b) { return which ? a : b; }
IC_HOST_DEVICE float exp(float x) { return expf(x); }
IC_HOST_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace ic::gpu

#include "ppo_loss_token.h"

namespace ic {
namespace {

using gpu::PpoTerms;
using gpu::PpoToken;

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kItems = static_cast<int>(kPpoChunk) / kThreads;
constexpr int kCountItems = static_cast<int>(kPpoCountChunk) / kThreads;
constexpr int kFinishWarps = 32;

// The workspace, in the order of ppo_loss_workspace.
struct Workspace {
  double* scale;   // 1 / normalizer
  double* counts;  // of rows, or of blocks of kPpoCountChunk tokens
  double* sums;    // (chunks, kPpoSums)
};

// ---- count and normalise

__global__ void __launch_bounds__(kThreads) count_tokens(PpoLossArgs a, Workspace w) {
  const int64_t first = int64_t{blockIdx.x} * kPpoCountChunk + threadIdx.x;
  int count = 0;
#pragma unroll 8
  for (int k = 0; k < kCountItems; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < a.tokens) count += a.mask[i] != 0;
  }
  count = block_sum<kWarps>(count);
  if (threadIdx.x == 0) w.counts[blockIdx.x] = count;
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) count_rows(PpoLossArgs a, Workspace w) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp_index();
  if (row >= a.segments) return;
  const int64_t begin = a.cu_seqlens ? a.cu_seqlens[row] : row * a.segment_tokens;
  const int64_t end = a.cu_seqlens ? a.cu_seqlens[row + 1] : begin + a.segment_tokens;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = begin + lane_index(); i < end; i += kWarp) count += a.mask[i] != 0;
  const double all = warp_sum(static_cast<double>(count));
  if (lane_index() == 0) w.counts[row] = all;
}

__global__ void __launch_bounds__(kFinishWarps* kWarp)
    normalise(PpoLossArgs a, Workspace w, int64_t counts) {
  double total = 0.0;
  if (a.normalizer) {
    total = *a.normalizer;
  } else {
    for (int64_t i = threadIdx.x; i < counts; i += blockDim.x)
      total += a.by_sequence ? (w.counts[i] > 0.0 ? 1.0 : 0.0) : w.counts[i];
    total = block_sum<kFinishWarps>(total);
  }
  if (threadIdx.x == 0) *w.scale = total > 0.0 ? 1.0 / total : 0.0;
}

// ---- tokens

// The row of token i, or -1: packed tokens before the first and after the last row.
IC_GPU int64_t row_of(const PpoLossArgs& a, int64_t i) {
  if (!a.cu_seqlens) return i / a.segment_tokens;
  if (i < a.cu_seqlens[0] || i >= a.cu_seqlens[a.segments]) return -1;
  int64_t low = 0, high = a.segments;  // cu[low] <= i < cu[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (a.cu_seqlens[middle] <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int kColumns = 16;  // kPpoSums, to a power of two
static_assert(kPpoSums <= kColumns && kColumns == kWarp / 2, "as warp_sum_columns halves them");

// The warp's sums of 16 columns at once: lane 2 c gets column c's. At each step a lane keeps one
// half of its columns and gives the other half away: 16 shuffles where 16 warp_sums take 80.
template <int kHalf = kColumns / 2>
IC_GPU double warp_sum_columns(const double (&column)[2 * kHalf]) {
  const bool upper = (lane_index() & (2 * kHalf)) != 0;
  double halved[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double kept = upper ? column[i + kHalf] : column[i];
    const double given = upper ? column[i] : column[i + kHalf];
    halved[i] = kept + shuffle_xor(given, 2 * kHalf);
  }
  if constexpr (kHalf == 1) {
    return halved[0] + shuffle_xor(halved[0], 1);
  } else {
    return warp_sum_columns<kHalf / 2>(halved);
  }
}

__global__ void __launch_bounds__(kThreads, 3) tokens(PpoLossArgs a, Workspace w) {
  SHARED_ARRAY(double, of_warp, kWarps* kColumns);
  const int64_t first = int64_t{blockIdx.x} * kPpoChunk + threadIdx.x;
  const double scale = *w.scale;
  double sums[kColumns] = {};
#pragma unroll 2
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= a.tokens) break;
    const bool kept = a.mask[i] != 0;
    // Loads do not wait for the mask.
    const auto in = [&](const float* x) {
      const float value = x ? x[i] : 0.0f;
      return kept ? value : 0.0f;
    };
    const PpoToken<float> token{in(a.logprobs), in(a.old_logprobs), in(a.advantages),
                                in(a.weights),  in(a.values),       in(a.old_values),
                                in(a.returns),  in(a.entropy),      in(a.ref_logprobs)};
    double weight = 1.0;
    if (a.by_sequence) {
      const int64_t row = row_of(a, i);
      const double count = row < 0 ? 0.0 : w.counts[row];
      weight = count > 0.0 ? 1.0 / count : 0.0;
    }
    const bool counts = kept && weight > 0.0;
    const PpoTerms<float> terms = gpu::ppo_terms(a, token);
    const float factor = static_cast<float>(weight * scale);
    const auto out = [&](float* x, float gradient) {
      if (x) x[i] = counts ? gradient : 0.0f;
    };
    out(a.grad_logprobs, factor * terms.slope);
    out(a.grad_values, factor * a.value_coef * terms.value_slope);
    out(a.grad_entropy, -factor * a.entropy_coef);
    gpu::ppo_each_sum(a, token, terms, [&](int which, float term) {
      const double x = counts ? term : 0.0f;
      sums[which] += which == kStatistics ? weight * x : x;
    });
  }
  const double sum = warp_sum_columns(sums);
  const int lane = lane_index();
  if (lane % 2 == 0) of_warp[warp_index() * kColumns + lane / 2] = sum;
  __syncthreads();
  if (threadIdx.x >= kPpoSums) return;
  double all = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) all += of_warp[warp * kColumns + threadIdx.x];
  w.sums[int64_t{blockIdx.x} * kPpoSums + threadIdx.x] = all;
}

// ---- finish

__global__ void __launch_bounds__(kFinishWarps* kWarp)
    finish(PpoLossArgs a, Workspace w, int64_t chunks) {
  constexpr int kParts = kFinishWarps * kWarp / kColumns;
  SHARED_ARRAY(double, of_part, kParts* kColumns);
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int part = static_cast<int>(threadIdx.x) / kColumns;
  double sum = 0.0;
  if (column < kPpoSums)
    for (int64_t c = part; c < chunks; c += kParts) sum += w.sums[c * kPpoSums + column];
  of_part[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || column >= kPpoSums) return;
  sum = 0.0;
  for (int p = 0; p < kParts; ++p) sum += of_part[p * kColumns + column];
  if (column == kStatistics) {
    *a.loss = static_cast<float>(sum * *w.scale);
  } else {
    a.sums[column] = static_cast<float>(sum);
  }
}

dim3 grid(int64_t n, int64_t per_block) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  IC_CHECK(blocks <= 0x7fffffff, "ppo_loss: too many tokens, got ", n);
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace

void ppo_loss_cuda(const PpoLossArgs& a, void* stream) {
  const int64_t chunks = ppo_chunks(a.tokens, kPpoChunk);
  const int64_t counts = a.by_sequence ? a.segments : ppo_chunks(a.tokens, kPpoCountChunk);
  Workspace w{a.workspace, a.workspace + 1, a.workspace + 1 + counts};
  const dim3 one(1), threads(kThreads), many_threads(kFinishWarps * kWarp);
  if (a.by_sequence && counts > 0) {
    launch(count_rows, grid(counts, kWarps), threads, 0, stream, a, w);
  } else if (!a.normalizer && counts > 0) {
    launch(count_tokens, dim3(static_cast<unsigned>(counts)), threads, 0, stream, a, w);
  }
  launch(normalise, one, many_threads, 0, stream, a, w, counts);
  if (chunks > 0) launch(tokens, grid(a.tokens, kPpoChunk), threads, 0, stream, a, w);
  launch(finish, one, many_threads, 0, stream, a, w, chunks);
}

}  // namespace ic
