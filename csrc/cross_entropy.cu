// cross_entropy on CUDA: a block for each row (softmax_row.cuh). Where the gradient is formed with
// the loss, the block reads its row again while L2 holds it, the end first, and writes the
// gradient, perhaps over the logits.
//   total     one block: the sum of the targets' weights, for the mean
//   rows      losses, statistics, gradients
//   reduce    one block: the sum of the losses / total
// Each sum has one fixed order.
//
// Bytes with 16-bit logits: 2 N V for the losses; 4 N V with the gradient if L2 holds the rows at
// work, 6 N V if it does not; as a backward of its own 4 N V. At the 4.8 TB/s of an H200 8192 rows
// of 151936 bfloat16 take 1.56 ms for 6 N V. 528 rows at work are 160 MB of them, three times L2,
// so a fourth of the second read comes from it; 50257 fit nearly. 85 % of a copy's bandwidth is
// what it should reach. A softcap costs two tanh an element each time, and computes for as long as
// it reads.
#include "cross_entropy.h"
#include "softmax_row.cuh"

namespace ic {
namespace {

constexpr int kReduceWarps = 32;

// ---- total and reduce

__global__ void __launch_bounds__(kReduceWarps* kWarp) total(CrossEntropyTotalArgs a) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < a.rows; i += blockDim.x) {
    const int64_t t = a.targets[i];
    if (t == a.ignore_index) continue;
    sum += !a.weight ? 1.0f : t >= 0 && t < a.vocab ? a.weight[t] : 0.0f;
  }
  sum = block_sum<kReduceWarps>(sum);
  if (threadIdx.x == 0) *a.total = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kReduceWarps* kWarp) reduce(CrossEntropyReduceArgs a) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < a.rows; i += blockDim.x) sum += a.losses[i];
  sum = block_sum<kReduceWarps>(sum);
  if (threadIdx.x != 0) return;
  const double divisor = a.total ? *a.total : 1.0;
  *a.loss = divisor == 0.0 ? 0.0f : static_cast<float>(sum / divisor);
}

// ---- rows

struct WeightSums {
  float weight, weighted;  // sum_j w[j], sum_j w[j] y[j]
};

IC_GPU WeightSums operator+(WeightSums a, WeightSums b) {
  return {a.weight + b.weight, a.weighted + b.weighted};
}

// A class of weight 0 does not count, whatever its logit. With kLogits false `weighted` is 0.
template <bool kLogits, class Row>
IC_GPU WeightSums weight_sums(const Row& row, const float* weight) {
  WeightSums sums{0.0f, 0.0f};
  for (int64_t i = threadIdx.x; i < row.n; i += kRowThreads) {
    const float w = weight ? weight[i] : 1.0f;
    sums.weight += w;
    if (kLogits && w != 0.0f) sums.weighted = fmaf(w, row.at(i), sums.weighted);
  }
  return block_sum<kRowWarps>(sums);
}

template <class Row, class G>
IC_GPU void one_row(const CrossEntropyArgs& a, const Row& row, int64_t r) {
  const int64_t target = a.targets[r];
  G* grad = a.grad ? static_cast<G*>(a.grad) + r * a.grad_row : nullptr;
  if (target == a.ignore_index) {
    if (a.losses && threadIdx.x == 0) {
      a.losses[r] = 0.0f;
      if (a.stats) a.stats[2 * r] = a.stats[2 * r + 1] = 0.0f;
    }
    if (grad) map_row(row, grad, [](int64_t, float) { return 0.0f; });
    return;
  }
  // A target out of range makes loss and gradient NaN; nothing is read.
  const bool known = target >= 0 && target < a.vocab;
  const float nan = __builtin_nanf("");
  RowStats stats{};
  if (a.losses) {
    stats = softmax_row<false>(row, 1.0f);
  } else {
    stats.max = a.stats[2 * r];
    stats.sum = a.stats[2 * r + 1];
  }
  const float logprob = known ? row_logprob(stats, 1.0f, row.at(target)) : nan;
  const float lse = row_lse(stats, 1.0f);
  const float target_weight = a.weight && known ? a.weight[target] : 1.0f;
  const float share = target_weight * (1.0f - a.label_smoothing);
  const float smooth = a.label_smoothing / static_cast<float>(a.vocab);
  WeightSums weights{0.0f, 0.0f};
  if (smooth > 0.0f)
    weights = a.losses ? weight_sums<true>(row, a.weight) : weight_sums<false>(row, a.weight);
  if (a.losses && threadIdx.x == 0) {
    float loss = share == 0.0f ? 0.0f : -share * logprob;
    if (smooth > 0.0f) loss += smooth * (weights.weight * lse - weights.weighted);
    if (a.z_loss > 0.0f) loss += a.z_loss * (lse * lse);
    a.losses[r] = loss;
    if (a.stats) {
      a.stats[2 * r] = stats.max;
      a.stats[2 * r + 1] = stats.sum;
    }
  }
  if (!grad) return;
  float scale = a.grad_output ? a.grad_output[r * a.grad_output_row] : 1.0f;
  if (a.total) scale = *a.total == 0.0f ? 0.0f : scale / *a.total;
  if (!known) scale = nan;
  const float rest = smooth * weights.weight + (a.z_loss > 0.0f ? 2.0f * a.z_loss * lse : 0.0f);
  const float along_p = scale * (share + rest) / stats.sum, along_weight = scale * smooth;
  const float true_class =
      scale * (share * expm1f(logprob) + (rest * expf(logprob) - smooth * target_weight));
  const auto slope = [&](float y) {
    const float u = a.softcap > 0.0f ? y / a.softcap : 0.0f;
    return fmaf(-u, u, 1.0f);
  };
  const float true_slope = known ? slope(row.at(target)) : nan;
  __syncthreads();  // all have the target's logit, whose place the gradient may take
  const ScaledExp exp_of(1.0f);
  map_row(row, grad, [&](int64_t i, float y) {
    float g = exp_of(y - stats.max) * along_p;
    if (along_weight != 0.0f) g = fmaf(-along_weight, a.weight ? a.weight[i] : 1.0f, g);
    return a.softcap > 0.0f ? g * slope(y) : g;
  });
  __syncthreads();
  if (threadIdx.x == 0 && known) grad[target] = from_float<G>(true_class * true_slope);
}

template <class T, class G, bool kCapped>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) rows(CrossEntropyArgs a) {
  const int64_t r = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + r * a.logits_row;
  if constexpr (kCapped) {
    one_row<CappedRow<T>, G>(a, CappedRow<T>(x, a.vocab, a.softcap), r);
  } else {
    one_row<LogitsRow<T>, G>(a, LogitsRow<T>{x, a.vocab}, r);
  }
}

template <class T, class G>
void all_rows(const CrossEntropyArgs& a, void* stream) {
  IC_CHECK(a.rows <= 0x7fffffff, "cross_entropy: too many rows, got ", a.rows);
  launch(a.softcap > 0.0f ? rows<T, G, true> : rows<T, G, false>,
         dim3(static_cast<unsigned>(a.rows)), dim3(kRowThreads), 0, stream, a);
}

}  // namespace

void cross_entropy_cuda(const CrossEntropyArgs& a, void* stream) {
  if (a.rows == 0) return;
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return all_rows<BFloat16, BFloat16>(a, stream);
    case Dtype::kFloat16:
      return all_rows<Float16, Float16>(a, stream);
    default:
      return a.grad_dtype == Dtype::kBFloat16 ? all_rows<float, BFloat16>(a, stream)
                                              : all_rows<float, float>(a, stream);
  }
}

void cross_entropy_total_cuda(const CrossEntropyTotalArgs& a, void* stream) {
  launch(total, dim3(1), dim3(kReduceWarps * kWarp), 0, stream, a);
}

void cross_entropy_reduce_cuda(const CrossEntropyReduceArgs& a, void* stream) {
  launch(reduce, dim3(1), dim3(kReduceWarps * kWarp), 0, stream, a);
}

}  // namespace ic
