// rotary on the CPU: tokens in parallel. A token's cosines and sines are laid out once as its heads
// need them, so that a vector takes two products and a sum whichever way the pairs lie.
#include "parallel.h"
#include "rotary.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

constexpr int64_t kMostDim = 512;  // multiples of kLanes

// Each lane with its neighbour: 1, 0, 3, 2, ..
IC_INLINE Vec swap_neighbours(Vec x) {
  NativeInt order;
  for (int i = 0; i < kNativeLanes; ++i) order[i] = i ^ 1;
  for (int p = 0; p < kParts; ++p) x.part[p] = __builtin_shuffle(x.part[p], order);
  return x;
}

template <class T>
IC_INLINE Vec load_lanes(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : load_partial(from, static_cast<int>(n), 0.0f);
}

template <class T>
IC_INLINE void store_lanes(T* to, Vec x, int64_t n) {
  n >= kLanes ? store(to, x) : store_partial(to, x, static_cast<int>(n));
}

// What elements are multiplied by, and what their partners are: (cos, -sin) for a's, (cos, sin) for
// b's.
struct Turn {
  float own[kMostDim], other[kMostDim];

  Turn(const RotaryArgs& a, int64_t token) {
    const int64_t half = a.dim / 2, from = a.positions[token] * half;
    const int64_t step = a.interleaved ? 2 : 1, partner = a.interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
      const float sin = a.back ? -a.sin[from + i] : a.sin[from + i];
      own[i * step] = own[i * step + partner] = a.cos[from + i];
      other[i * step] = -sin;
      other[i * step + partner] = sin;
    }
  }
};

template <class T>
void turn_head(const RotaryArgs& a, const Turn& turn, const T* x, T* out) {
  const int64_t half = a.dim / 2;
  if (a.interleaved) {
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const Vec own = load_lanes(x + d, a.dim - d);
      const Vec turned = own * load(turn.own + d) + swap_neighbours(own) * load(turn.other + d);
      store_lanes(out + d, turned, a.dim - d);
    }
    return;
  }
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t n = half - d;
    const Vec first = load_lanes(x + d, n), second = load_lanes(x + half + d, n);
    const Vec cos = load(turn.own + d), sin = load_lanes(turn.other + half + d, n);
    store_lanes(out + d, first * cos - second * sin, n);
    store_lanes(out + half + d, second * cos + first * sin, n);
  }
}

template <class T>
void all_tokens(const RotaryArgs& a) {
  // About 32K elements are 20 us.
  const int64_t grain = 32768 / (a.heads * a.dim + 1) + 1;
  parallel_rows(a.tokens, grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Turn turn(a, t);
      const T* x = static_cast<const T*>(a.x) + t * a.token;
      T* out = static_cast<T*>(a.out) + t * a.heads * a.dim;
      for (int64_t h = 0; h < a.heads; ++h, x += a.head, out += a.dim) {
        if (h < a.turned) {
          turn_head(a, turn, x, out);
        } else {
          __builtin_memcpy(out, x, a.dim * sizeof(T));
        }
      }
    }
  });
}

}  // namespace

void rotary_cpu(const RotaryArgs& a) {
  switch (a.dtype) {
    case Dtype::kBFloat16:
      return all_tokens<BFloat16>(a);
    case Dtype::kFloat16:
      return all_tokens<Float16>(a);
    default:
      return all_tokens<float>(a);
  }
}

}  // namespace ic::IC_ISA
