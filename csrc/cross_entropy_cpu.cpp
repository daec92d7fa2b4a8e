// cross_entropy on the CPU: rows in parallel. A row's logits come from memory once, and each is
// exponentiated once: the exponentials wait in L2 until their sum is known. A call for the gradient
// alone goes the same way, so that its bits are the same too.
#include "cross_entropy.h"
#include "parallel.h"
#include "softmax_row.h"

namespace ic::IC_ISA {
namespace {

// sum_j w[j] y[j]; a class of weight 0 does not count, whatever its logit.
template <class Row>
float weighted_sum(const Row& row, const float* weight, int64_t n) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  Vec sum[2] = {zero, zero};
  for (int64_t i = 0, k = 0; i < n; i += kLanes, k ^= 1) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const Vec y = lanes < kLanes ? row.load_partial(i, lanes, 0.0f) : row.load(i);
    const Vec w = weight ? load_partial(weight + i, lanes, 0.0f) : one;
    sum[k] = sum[k] + select(w == zero, zero, w * y);
  }
  return reduce_add(sum[0] + sum[1]);
}

struct RowGradient {
  const float* weight;
  float max, inverse_sum;  // p[j] = e^(y[j] - max) inverse_sum
  float along_p;           // what multiplies p[j]
  float along_weight;      // what multiplies -w[j]
  float true_class;        // d / dy[t], whole
  float softcap;
};

// dx[j] = (along_p p[j] - along_weight w[j]) dy/dx[j]. `grad` may be the logits' own memory.
template <class Row, class G>
void write_gradient(const Row& row, const KeptExponentials& kept, const RowGradient& r, int64_t n,
                    int64_t target, G* grad, bool past_caches) {
  constexpr bool kCapped = requires { row.cap; };
  const auto slope = [&](Vec y) __attribute__((always_inline)) {
    const Vec u = y / broadcast(r.softcap);
    return fma(broadcast(0.0f) - u, u, broadcast(1.0f));
  };
  float true_class = r.true_class;
  if constexpr (kCapped) true_class *= first_lane(slope(broadcast(row.at(target))));
  const ScaledExp exp_of(1.0f);
  const Vec factor = broadcast(r.along_p * r.inverse_sum);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    const Vec in_block = exp_of(broadcast(kept.shift(start) - r.max)) * factor;
    const auto along_p = [&](int64_t i, int) __attribute__((always_inline)) {
      return load(kept.at(i)) * in_block;
    };
    const auto whole = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const Vec w = r.weight ? load_partial(r.weight + i, lanes, 0.0f) : broadcast(1.0f);
      Vec g = fma(broadcast(-r.along_weight), w, along_p(i, lanes));
      if constexpr (kCapped) g = g * slope(row.load_partial(i, lanes, 0.0f));
      return g;
    };
    if (kCapped || r.along_weight != 0.0f) {
      write_row(grad, start, end, past_caches, whole);
    } else {
      write_row(grad, start, end, past_caches, along_p);
    }
  }
  grad[target] = from_float<G>(true_class);
  if (past_caches) fence();
}

// `scratch`: KeptExponentials' if there is a gradient.
template <class Row, class G>
void one_row(const CrossEntropyArgs& a, const Row& row, int64_t r, float weight_sum,
             float* scratch) {
  const int64_t target = a.targets[r];
  G* grad = a.grad ? static_cast<G*>(a.grad) + r * a.grad_row : nullptr;
  if (target == a.ignore_index) {
    if (a.losses) a.losses[r] = 0.0f;
    if (a.losses && a.stats) a.stats[2 * r] = a.stats[2 * r + 1] = 0.0f;
    if (grad) __builtin_memset(grad, 0, static_cast<size_t>(a.vocab) * sizeof(G));
    return;
  }
  const KeptExponentials kept(scratch, a.vocab);
  const RowStats stats =
      grad ? softmax_row<false>(row, a.vocab, 1.0f, kept) : softmax_row<false>(row, a.vocab, 1.0f);
  const float logprob = row_logprob(stats, 1.0f, row.at(target));
  const float lse = row_lse(stats, 1.0f);
  const float share = (a.weight ? a.weight[target] : 1.0f) * (1.0f - a.label_smoothing);
  const float smooth = a.label_smoothing / static_cast<float>(a.vocab);
  if (a.losses) {
    float loss = share == 0.0f ? 0.0f : -share * logprob;
    if (smooth > 0.0f) loss += smooth * (weight_sum * lse - weighted_sum(row, a.weight, a.vocab));
    a.losses[r] = loss + a.z_loss * (a.z_loss > 0.0f ? lse * lse : 0.0f);
    if (a.stats) {
      a.stats[2 * r] = stats.max;
      a.stats[2 * r + 1] = stats.sum;
    }
  }
  if (!grad) return;
  float scale = a.grad_output ? a.grad_output[r * a.grad_output_row] : 1.0f;
  if (a.total) scale = *a.total == 0.0f ? 0.0f : scale / *a.total;
  const float rest = smooth * weight_sum + (a.z_loss > 0.0f ? 2.0f * a.z_loss * lse : 0.0f);
  const float weight = smooth * (a.weight ? a.weight[target] : 1.0f);
  RowGradient g{};
  g.weight = a.weight;
  g.max = stats.max;
  g.inverse_sum = 1.0f / stats.sum;
  g.along_p = scale * (share + rest);
  g.along_weight = scale * smooth;
  g.true_class =
      scale * (share * __builtin_expm1f(logprob) + (rest * __builtin_expf(logprob) - weight));
  g.softcap = a.softcap;
  write_gradient(row, kept, g, a.vocab, target, grad,
                 a.grad != a.logits && a.rows * a.vocab * int64_t{sizeof(G)} >= kPastCaches);
}

template <class T, class G>
void all_rows(const CrossEntropyArgs& a) {
  double weight_sum = static_cast<double>(a.vocab);
  if (a.weight && a.label_smoothing > 0.0f) {
    weight_sum = 0.0;
    for (int64_t j = 0; j < a.vocab; ++j) weight_sum += a.weight[j];
  }
  const float sum = static_cast<float>(weight_sum);
  // About 64K logits are 20 us.
  parallel_rows(a.rows, 65536 / (a.vocab + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    float* scratch = a.grad ? ic::scratch(KeptExponentials::size(a.vocab)) : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.logits_row;
      if (a.softcap > 0.0f) {
        one_row<CappedRow<T>, G>(a, CappedRow<T>{x, a.softcap}, r, sum, scratch);
      } else {
        one_row<LogitsRow<T>, G>(a, LogitsRow<T>{x}, r, sum, scratch);
      }
    }
  });
}

}  // namespace

void cross_entropy_cpu(const CrossEntropyArgs& a) {
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return all_rows<BFloat16, BFloat16>(a);
    case Dtype::kFloat16:
      return all_rows<Float16, Float16>(a);
    default:
      return a.grad_dtype == Dtype::kBFloat16 ? all_rows<float, BFloat16>(a)
                                              : all_rows<float, float>(a);
  }
}

}  // namespace ic::IC_ISA
