// rotary on the CPU: tokens in parallel, eight pairs of a head at a time.
#include "parallel.h"
#include "rotary.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

template <class T>
void one_token(const RotaryArgs& a, int64_t n) {
  const float* cos = a.cos + a.positions[n] * (a.dim / 2);
  const float* sin = a.sin + a.positions[n] * (a.dim / 2);
  // The first of a pair takes its sine with a minus, on the way back the second.
  const VecInt odd = iota() & broadcast_int(1);
  const VecInt sign = shift_left(odd ^ broadcast_int(a.back ? 0 : 1), 31);
  for (const RotaryPart& part : a.parts) {
    const T* from = static_cast<const T*>(part.from) + n * part.from_row;
    T* to = static_cast<T*>(part.to) + n * part.to_row;
    for (int64_t h = 0; h < part.heads; ++h, from += part.from_head, to += part.to_head) {
      if (!part.turned) {
        __builtin_memcpy(to, from, static_cast<size_t>(a.dim) * sizeof(T));
        continue;
      }
      each_vector(
          a.dim, [&](int64_t i, int lanes) __attribute__((always_inline)) {
            const Vec x = load_lanes(from + i, lanes);
            const Vec c = repeat_each(load_partial(cos + i / 2, lanes / 2, 0.0f));
            const Vec s = repeat_each(load_partial(sin + i / 2, lanes / 2, 0.0f));
            const Vec across = from_bits(bits(swap_neighbours(x) * s) ^ sign);
            store_lanes(to + i, x * c + across, lanes);
          });
    }
  }
}

template <class T>
void all_tokens(const RotaryArgs& a) {
  int64_t heads = 0;
  for (const RotaryPart& part : a.parts) heads += part.heads;
  // About 32K elements are 20 us.
  parallel_rows(a.rows, 32768 / (heads * a.dim + 1) + 1, a.threads,
                [&](int64_t begin, int64_t end) {
                  for (int64_t n = begin; n < end; ++n) one_token<T>(a, n);
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
