// token_logprobs on CUDA: a block for each row, which it reads once (softmax_row.cuh); the backward
// reads it again and writes the gradient.
//
// Bytes: 2 N V forward and 4 N V backward with 16-bit logits, 4 N V and 8 N V with float32. At the
// 4.8 TB/s of an H200 8192 rows of 151936 bfloat16 take 0.52 ms forward, 1.04 backward. About 7
// instructions an element, one of them ex2 (16 a clock and multiprocessor: 1.6 times what the bytes
// allow), leave the kernel bound by memory: 85 % of a copy's bandwidth is what it should reach.
#include "softmax_row.cuh"
#include "token_logprobs.h"

namespace ic {
namespace {

IC_GPU bool is_live(const TokenLogprobsArgs& a, int64_t r) {
  return a.targets[r] != a.ignore_index && (!a.mask || a.mask[r]);
}

// A target out of range: its row is NaN, nothing is read.
IC_GPU bool is_token(const TokenLogprobsArgs& a, int64_t target) {
  return target >= 0 && target < a.vocab;
}

// 1 / T; NaN for a temperature that is not above 0.
IC_GPU float row_scale(const TokenLogprobsArgs& a, int64_t r) {
  const float temperature = a.temperature[r * a.temperature_row];
  return temperature > 0.0f ? 1.0f / temperature : __builtin_nanf("");
}

template <class T>
IC_GPU LogitsRow<T> row_of(const TokenLogprobsArgs& a, int64_t r) {
  return {static_cast<const T*>(a.logits) + r * a.logits_row, a.vocab};
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) token_rows(TokenLogprobsArgs a) {
  const int64_t r = blockIdx.x, target = a.targets[r];
  RowStats stats{};
  float logprob = 0.0f, entropy = 0.0f, lse = 0.0f;
  bool top1 = false;
  if (is_live(a, r)) {
    const LogitsRow<T> row = row_of<T>(a, r);
    const float scale = row_scale(a, r);
    stats = softmax_row<kEntropy>(row, scale);
    const float x = is_token(a, target) ? row.at(target) : __builtin_nanf("");
    logprob = row_logprob(stats, scale, x);
    lse = row_lse(stats, scale);
    entropy = kEntropy ? row_entropy(stats, scale) : 0.0f;
    if (x == stats.max && stats.sum == stats.sum) top1 = row_argmax(row, stats) == target;
  }
  if (threadIdx.x != 0) return;
  a.logprobs[r] = logprob;
  a.lse[r] = lse;
  a.top1[r] = top1;
  if (kEntropy) a.entropy[r] = entropy;
  a.stats[2 * r] = stats.max;
  a.stats[2 * r + 1] = stats.sum;
}

template <class T, class G>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_gradients(TokenLogprobsArgs a, TokenLogprobsGradArgs b) {
  const int64_t r = blockIdx.x, target = a.targets[r];
  const LogitsRow<T> row = row_of<T>(a, r);
  G* grad = static_cast<G*>(b.grad) + r * b.grad_row;
  const float grad_logprob = b.grad_logprobs ? b.grad_logprobs[r] : 0.0f;
  const float grad_entropy = b.grad_entropy ? b.grad_entropy[r] : 0.0f;
  if (!is_live(a, r) || (grad_logprob == 0.0f && grad_entropy == 0.0f)) {
    map_row(row, grad, [](int64_t, float) { return 0.0f; });
    return;
  }
  const float scale = row_scale(a, r);
  const RowStats stats{a.stats[2 * r], a.stats[2 * r + 1], 0.0f, 0.0f, 0};
  const float log_sum = logf(stats.sum);
  const bool known = is_token(a, target);
  const float logprob = known ? row_logprob(stats, scale, row.at(target)) : __builtin_nanf("");
  __syncthreads();  // all have the target's logit, whose place the gradient may take
  // With d = x - max: l = scale d - log sum, p = e^(scale d) / sum, and off the target
  // dx[j] = -scale p[j] (g_logprob + g_entropy (H - log sum) + g_entropy scale d[j]).
  const float entropy = grad_entropy != 0.0f ? a.entropy[r] : 0.0f;
  const float factor = known ? -scale / stats.sum : __builtin_nanf("");
  const float constant = factor * (grad_logprob + grad_entropy * (entropy - log_sum));
  const float linear = factor * grad_entropy * scale;
  const ScaledExp exp_of(scale);
  map_row(row, grad, [&](int64_t, float x) {
    const float d = x - stats.max;
    return exp_of(d) * fmaf(linear, exp_of.clamp(d), constant);
  });
  __syncthreads();
  if (threadIdx.x != 0 || !known) return;
  // 1 - p[t] without cancellation.
  float along_entropy = 0.0f;
  if (grad_entropy != 0.0f && logprob > kMinusInf)
    along_entropy = grad_entropy * expf(logprob) * (logprob + entropy);
  grad[target] = from_float<G>(scale * (-grad_logprob * expm1f(logprob) - along_entropy));
}

dim3 grid(const TokenLogprobsArgs& a) {
  IC_CHECK(a.rows <= 0x7fffffff, "token_logprobs: too many rows, got ", a.rows);
  return dim3(static_cast<unsigned>(a.rows));
}

template <class T>
void forward(const TokenLogprobsArgs& a, void* stream) {
  launch(a.entropy ? token_rows<T, true> : token_rows<T, false>, grid(a), dim3(kRowThreads), 0,
         stream, a);
}

template <class T, class G>
void backward(const TokenLogprobsGradArgs& b, void* stream) {
  launch(token_gradients<T, G>, grid(*b.forward), dim3(kRowThreads), 0, stream, *b.forward, b);
}

}  // namespace

void token_logprobs_cuda(const TokenLogprobsArgs& a, void* stream) {
  if (a.rows == 0) return;
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return forward<BFloat16>(a, stream);
    case Dtype::kFloat16:
      return forward<Float16>(a, stream);
    default:
      return forward<float>(a, stream);
  }
}

void token_logprobs_backward_cuda(const TokenLogprobsGradArgs& b, void* stream) {
  if (b.forward->rows == 0) return;
  switch (b.forward->dtype) {
    case Dtype::kBFloat16:
      return backward<BFloat16, BFloat16>(b, stream);
    case Dtype::kFloat16:
      return backward<Float16, Float16>(b, stream);
    default:
      return b.grad_dtype == Dtype::kBFloat16 ? backward<float, BFloat16>(b, stream)
                                              : backward<float, float>(b, stream);
  }
}

}  // namespace ic
