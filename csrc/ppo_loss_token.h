// ppo_loss's terms of a token, once for both back ends: V is a vector of 16 tokens on the CPU and a
// float on the GPU. Include it where broadcast, select, exp and fma of V are known.
#pragma once

#include "ppo_loss.h"

#ifndef IC_ISA
#define IC_ISA gpu
#endif

namespace ic::IC_ISA {

// 0 at masked tokens, and where there is no such input.
template <class V>
struct PpoToken {
  V logprob, old_logprob, advantage, weight, value, old_value, target, entropy, ref_logprob;
};

template <class V>
struct PpoTerms {
  V d, ratio, policy, clipped;         // clipped and value_clipped are 1 or 0
  V error, value_loss, value_clipped;  // with values
  V kl;                                // with ref_logprobs
  V loss;
  V slope, value_slope;  // of the loss in logprob; of value_loss in the value
};

template <class V>
IC_HOST_DEVICE V ppo_clamp(V x, float low, float high) {  // NaN stays
  x = select(x < broadcast(low), broadcast(low), x);
  return select(x > broadcast(high), broadcast(high), x);
}

template <class V>
IC_HOST_DEVICE PpoTerms<V> ppo_terms(const PpoLossArgs& a, const PpoToken<V>& t) {
  const V zero = broadcast(0.0f), one = broadcast(1.0f);
  PpoTerms<V> r{};
  const V raw = t.logprob - t.old_logprob;
  r.d = ppo_clamp(raw, -20.0f, 20.0f);
  r.ratio = exp(r.d);
  const V plain = zero - r.ratio * t.advantage;
  const V bounded = ppo_clamp(r.ratio, a.ratio_low, a.ratio_high);
  const V clipped = zero - bounded * t.advantage;
  const auto use_clipped = clipped > plain;
  r.clipped = select(use_clipped, one, zero);
  r.policy = select(use_clipped, clipped, plain);
  // d(policy)/d(logprob) is policy itself where the plain branch counts and the clamp does not.
  r.slope = select(use_clipped, zero, plain);
  r.slope = select((raw < broadcast(-20.0f)) | (raw > broadcast(20.0f)), zero, r.slope);
  if (a.dual_clip >= 0) {
    const V limit = broadcast(-a.dual_clip) * t.advantage;
    const auto cut = (t.advantage < zero) & (r.policy > limit);
    r.policy = select(cut, limit, r.policy);
    r.slope = select(cut, zero, r.slope);
  }
  if (a.weights) {
    r.policy = r.policy * t.weight;
    r.slope = r.slope * t.weight;
  }
  r.loss = r.policy;

  if (a.values) {
    r.error = t.target - t.value;
    V twice = r.error * r.error;
    r.value_slope = zero - r.error;
    if (a.value_clip_range >= 0) {
      const V step = t.value - t.old_value;
      const V near = t.old_value + ppo_clamp(step, -a.value_clip_range, a.value_clip_range);
      const V bound = near - t.target;
      const auto outside =
          (step < broadcast(-a.value_clip_range)) | (step > broadcast(a.value_clip_range));
      const auto use_bound = outside & (bound * bound > twice);
      twice = select(use_bound, bound * bound, twice);
      r.value_slope = select(use_bound, zero, r.value_slope);
      r.value_clipped = select(use_bound, one, zero);
    }
    r.value_loss = broadcast(0.5f) * twice;
    r.loss = fma(broadcast(a.value_coef), r.value_loss, r.loss);
  }
  if (a.entropy) r.loss = fma(broadcast(-a.entropy_coef), t.entropy, r.loss);
  if (a.ref_logprobs) {
    const V from_ref = t.ref_logprob - t.logprob;
    const V odds = exp(from_ref);
    r.kl = odds - one - from_ref;
    r.loss = fma(broadcast(a.kl_coef), r.kl, r.loss);
    r.slope = fma(broadcast(a.kl_coef), one - odds, r.slope);
  }
  return r;
}

// What a token adds to each statistic, in PpoStatistic's order; `add(which, term)` for those that
// there are, and kStatistics for the loss.
template <class V, class Add>
IC_HOST_DEVICE void ppo_each_sum(const PpoLossArgs& a, const PpoToken<V>& t, const PpoTerms<V>& r,
                                 Add add) {
  if (a.values) {
    if (a.value_clip_range >= 0) add(kValueClipped, r.value_clipped);
    add(kValueLoss, r.value_loss);
    add(kReturns, t.target);
    add(kReturnsSquared, t.target * t.target);
    add(kError, r.error);
    add(kErrorSquared, r.error * r.error);
  }
  if (a.entropy) add(kEntropy, t.entropy);
  if (a.ref_logprobs) add(kKl, r.kl);
  add(kCount, broadcast(1.0f));
  add(kPolicyLoss, r.policy);
  add(kApproxKl, broadcast(0.5f) * r.d * r.d);
  add(kRatio, r.ratio);
  add(kClipped, r.clipped);
  add(kStatistics, r.loss);
}

}  // namespace ic::IC_ISA
