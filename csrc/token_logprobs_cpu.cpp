// token_logprobs on the CPU: rows in parallel, each one read of its logits.
#include "parallel.h"
#include "softmax_row.h"
#include "token_logprobs.h"

namespace ic::IC_ISA {
namespace {

bool is_live(const TokenLogprobsArgs& a, int64_t r) {
  return a.targets[r] != a.ignore_index && (!a.mask || a.mask[r]);
}

int64_t grain(int64_t vocab) { return 65536 / (vocab + 1) + 1; }  // about 20 us

template <class T>
void forward_rows(const TokenLogprobsArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    RowStats stats{};
    if (!is_live(a, r)) {
      a.logprobs[r] = a.lse[r] = 0.0f;
      if (a.entropy) a.entropy[r] = 0.0f;
      a.top1[r] = false;
    } else {
      const LogitsRow<T> row{static_cast<const T*>(a.logits) + r * a.logits_row};
      const float scale = 1.0f / a.temperature[r * a.temperature_row];
      if (a.entropy) {
        stats = softmax_row<true>(row, a.vocab, scale);
        a.entropy[r] = row_entropy(stats, scale);
      } else {
        stats = softmax_row<false>(row, a.vocab, scale);
      }
      const int64_t target = a.targets[r];
      const float x = row.at(target);
      a.logprobs[r] = row_logprob(stats, scale, x);
      a.lse[r] = row_lse(stats, scale);
      a.top1[r] =
          x == stats.max && stats.sum == stats.sum && row_argmax(row, a.vocab, stats) == target;
    }
    a.stats[2 * r] = stats.max;
    a.stats[2 * r + 1] = stats.sum;
  }
}

template <class T, class G>
void backward_row(const TokenLogprobsGradArgs& b, int64_t r) {
  const TokenLogprobsArgs& a = *b.forward;
  G* grad = static_cast<G*>(b.grad) + r * b.grad_row;
  const float grad_logprob = b.grad_logprobs ? b.grad_logprobs[r] : 0.0f;
  const float grad_entropy = b.grad_entropy ? b.grad_entropy[r] : 0.0f;
  if (!is_live(a, r) || (grad_logprob == 0.0f && grad_entropy == 0.0f)) {
    __builtin_memset(grad, 0, static_cast<size_t>(a.vocab) * sizeof(G));
    return;
  }
  const LogitsRow<T> row{static_cast<const T*>(a.logits) + r * a.logits_row};
  const int64_t n = a.vocab, target = a.targets[r];
  const float scale = 1.0f / a.temperature[r * a.temperature_row];
  const RowStats stats{a.stats[2 * r], a.stats[2 * r + 1], 0.0f, 0};
  const float log_sum = __builtin_logf(stats.sum);
  // With d = x - max: l = scale d - log sum, p = e^(scale d) / sum, and
  // dx[j] = -scale p[j] (g_logprob + g_entropy (H - log sum) + g_entropy scale d[j]), off the
  // target.
  const float entropy = grad_entropy != 0.0f ? a.entropy[r] : 0.0f;
  const float factor = -scale / stats.sum;
  const Vec constant = broadcast(factor * (grad_logprob + grad_entropy * (entropy - log_sum)));
  const Vec linear = broadcast(factor * grad_entropy * scale);
  const Vec max = broadcast(stats.max);
  const ScaledExp exp_of(scale);
  const float logprob = row_logprob(stats, scale, row.at(target));
  const bool past_caches = b.grad != a.logits && a.rows * n * int64_t{sizeof(G)} >= kPastCaches;
  write_row(
      grad, 0, n, past_caches, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec x = lanes < kLanes ? row.load_partial(i, lanes, 0.0f) : row.load(i);
        const Vec d = exp_of.clamp(x - max);
        return exp_of.of_clamped(d) * fma(linear, d, constant);
      });
  // 1 - p[t] without cancellation.
  float along_entropy = 0.0f;
  if (grad_entropy != 0.0f && logprob > kMinusInf)
    along_entropy = grad_entropy * __builtin_expf(logprob) * (logprob + entropy);
  grad[target] = from_float<G>(scale * (-grad_logprob * __builtin_expm1f(logprob) - along_entropy));
  if (past_caches) fence();
}

template <class T, class G>
void backward_rows(const TokenLogprobsGradArgs& b) {
  const TokenLogprobsArgs& a = *b.forward;
  parallel_rows(a.rows, grain(a.vocab), a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) backward_row<T, G>(b, r);
  });
}

}  // namespace

void token_logprobs_cpu(const TokenLogprobsArgs& a) {
  parallel_rows(a.rows, grain(a.vocab), a.threads, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case Dtype::kBFloat16:
        return forward_rows<BFloat16>(a, begin, end);
      case Dtype::kFloat16:
        return forward_rows<Float16>(a, begin, end);
      default:
        return forward_rows<float>(a, begin, end);
    }
  });
}

void token_logprobs_backward_cpu(const TokenLogprobsGradArgs& b) {
  switch (b.forward->dtype) {
    case Dtype::kBFloat16:
      return backward_rows<BFloat16, BFloat16>(b);
    case Dtype::kFloat16:
      return backward_rows<Float16, Float16>(b);
    default:
      return b.grad_dtype == Dtype::kBFloat16 ? backward_rows<float, BFloat16>(b)
                                              : backward_rows<float, float>(b);
  }
}

}  // namespace ic::IC_ISA
