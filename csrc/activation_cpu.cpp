// activation on the CPU: rows in parallel, a vector of elements at a time. An element's bits are a
// function of its inputs alone, whether it lies in a whole vector or in a row's tail.
#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

struct Point {
  Vec value, slope;  // f(x), f'(x)
};

// f(x) = x sigmoid(u).
IC_INLINE Point times_sigmoid(Vec x, Vec u, Vec u_slope) {
  const Shares s = sigmoid(u);
  const Vec value = x * s.first;
  return {value, fma(value * s.second, u_slope, s.first)};
}

IC_INLINE Point silu(Vec x) { return times_sigmoid(x, x, broadcast(1.0f)); }

IC_INLINE Point gelu(Vec x) {
  constexpr float kLinear = 1.5957691216f, kCubic = kLinear * 0.044715f;  // 2 sqrt(2 / pi)
  const Vec square = x * x;
  return times_sigmoid(x, x * fma(broadcast(kCubic), square, broadcast(kLinear)),
                       fma(broadcast(3.0f * kCubic), square, broadcast(kLinear)));
}

template <class T>
void one_row(const ActivationArgs& a, int64_t r) {
  const int64_t n = a.width;
  const T* x = static_cast<const T*>(a.x) + r * a.x_row;
  const T* grad = a.grad ? static_cast<const T*>(a.grad) + r * a.grad_row : nullptr;
  T* out = static_cast<T*>(a.out) + r * a.out_row;
  if (a.gated && grad) {
    each_vector(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const Point gate = silu(load_lanes(x + i, lanes));
          const Vec g = load_lanes(grad + i, lanes), up = load_lanes(x + n + i, lanes);
          store_lanes(out + i, g * up * gate.slope, lanes);
          store_lanes(out + n + i, g * gate.value, lanes);
        });
  } else if (a.gated) {
    each_vector(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const Vec gate = silu(load_lanes(x + i, lanes)).value;
          store_lanes(out + i, gate * load_lanes(x + n + i, lanes), lanes);
        });
  } else if (grad) {
    each_vector(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const Vec slope = gelu(load_lanes(x + i, lanes)).slope;
          store_lanes(out + i, slope * load_lanes(grad + i, lanes), lanes);
        });
  } else {
    each_vector(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          store_lanes(out + i, gelu(load_lanes(x + i, lanes)).value, lanes);
        });
  }
}

template <class T>
void all_rows(const ActivationArgs& a) {
  // About 32K elements are 20 us.
  parallel_rows(a.rows, 32768 / (a.width + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) one_row<T>(a, r);
  });
}

}  // namespace

void activation_cpu(const ActivationArgs& a) {
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return all_rows<BFloat16>(a);
    case Dtype::kFloat16:
      return all_rows<Float16>(a);
    default:
      return all_rows<float>(a);
  }
}

}  // namespace ic::IC_ISA
