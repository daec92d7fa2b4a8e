// add_norm on the CPU: rows in parallel. A row is read from memory once; its statistics and what is
// made of them go over the copy in L1.
#include "add_norm.h"
#include "parallel.h"
#include "simd.h"

namespace ic::IC_ISA {
namespace {

// f with a null pointer of the elements' type.
template <class F>
IC_INLINE void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// Row r of a tensor of T.
template <class T>
IC_INLINE const T* row_of(const void* tensor, int64_t r, int64_t stride, T*) {
  return static_cast<const T*>(tensor) + r * stride;
}

// The row as floats: itself, or a copy in `scratch`.
const float* as_floats(const void* tensor, Dtype dtype, int64_t r, int64_t stride, int64_t n,
                       float* scratch) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(tensor) + r * stride;
  with_type(
      dtype, [&](auto* type) __attribute__((always_inline)) {
        const auto* from = row_of(tensor, r, stride, type);
        each_vector(
            n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
              store_lanes(scratch + i, load_lanes(from + i, lanes), lanes);
            });
      });
  return scratch;
}

// t of a row, in memory of its own.
void add_row(const AddNormArgs& a, int64_t r, float* total) {
  const float* x = static_cast<const float*>(a.x) + r * a.x_row;
  with_type(
      a.branch_dtype, [&](auto* type) __attribute__((always_inline)) {
        const auto* branch = row_of(a.branch, r, a.branch_row, type);
        each_vector(
            a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
              store_lanes(total + i, load_lanes(x + i, lanes) + load_lanes(branch + i, lanes),
                          lanes);
            });
      });
}

void norm_row(const AddNormArgs& a, int64_t r, const float* t) {
  const int64_t n = a.width;
  const float size = static_cast<float>(n);
  float mean = 0.0f;
  if (a.bias)
    mean = sum_vectors(
               n, [&](int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_lanes(t + i, lanes); }) /
           size;
  const Vec centre = broadcast(mean);
  const float squares = sum_vectors(
      n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec d = load_lanes(t + i, lanes, mean) - centre;
        return d * d;
      });
  const float rstd = 1.0f / __builtin_sqrtf(squares / size + a.eps);
  a.stats[2 * r] = mean;
  a.stats[2 * r + 1] = rstd;
  const Vec scale = broadcast(rstd);
  with_type(
      a.y_dtype, [&](auto* type) __attribute__((always_inline)) {
        auto* y = const_cast<decltype(type)>(row_of(a.y, r, n, type));
        each_vector(
            n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
              Vec out =
                  (load_lanes(t + i, lanes) - centre) * scale * load_lanes(a.weight + i, lanes);
              if (a.bias) out = out + load_lanes(a.bias + i, lanes);
              store_lanes(y + i, out, lanes);
            });
      });
}

// `scratch`: two rows. `sums`: this block's part of dweight and dbias.
void gradient_row(const AddNormGradArgs& a, int64_t r, float* scratch, float* sums) {
  const int64_t n = a.width;
  const float* t = as_floats(a.total, a.total_dtype, r, a.total_row, n, scratch);
  const float* dy = as_floats(a.grad_y, a.y_dtype, r, a.grad_row, n, scratch + n);
  const Vec centre = broadcast(a.stats[2 * r]), scale = broadcast(a.stats[2 * r + 1]);
  const auto normed = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return (load_lanes(t + i, lanes) - centre) * scale;
  };
  const auto weighted = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return load_lanes(dy + i, lanes) * load_lanes(a.weight + i, lanes);
  };
  const float along = sum_vectors(
      n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec norm = normed(i, lanes);
        const Vec sum = fma(load_lanes(dy + i, lanes), norm, load_lanes(sums + i, lanes));
        store_lanes(sums + i, sum, lanes);
        return weighted(i, lanes) * norm;
      });
  float even = 0.0f;
  if (a.grad_bias)
    even = sum_vectors(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          float* at = sums + n + i;
          store_lanes(at, load_lanes(dy + i, lanes) + load_lanes(at, lanes), lanes);
          return weighted(i, lanes);
        });
  const float size = static_cast<float>(n);
  const Vec pull = broadcast(-along / size), shift = broadcast(even / size);
  const float* through = a.grad_total ? a.grad_total + r * a.grad_total_row : nullptr;
  with_type(
      a.total_dtype, [&](auto* x_type) __attribute__((always_inline)) {
        auto* dx = const_cast<decltype(x_type)>(row_of(a.grad_x, r, n, x_type));
        with_type(
            a.y_dtype, [&](auto* y_type) __attribute__((always_inline)) {
              auto* branch = const_cast<decltype(y_type)>(row_of(a.grad_branch, r, n, y_type));
              each_vector(
                  n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
                    Vec g = fma(normed(i, lanes), pull, weighted(i, lanes) - shift) * scale;
                    if (through) g = g + load_lanes(through + i, lanes);
                    store_lanes(dx + i, g, lanes);
                    if (a.grad_branch) store_lanes(branch + i, g, lanes);
                  });
            });
      });
}

}  // namespace

void add_norm_cpu(const AddNormArgs& a) {
  // About 16K elements are 20 us.
  parallel_rows(a.rows, 16384 / (a.width + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    float* scratch = ic::scratch(a.width);
    for (int64_t r = begin; r < end; ++r) {
      if (a.branch) {
        float* total = a.total + r * a.width;
        add_row(a, r, total);
        norm_row(a, r, total);
      } else {
        norm_row(a, r, as_floats(a.x, a.x_dtype, r, a.x_row, a.width, scratch));
      }
    }
  });
}

void add_norm_backward_cpu(const AddNormGradArgs& a) {
  const int64_t n = a.width, blocks = add_norm_sums(a.rows);
  const int64_t grain = 16384 / (kAddNormRows * (n + 1)) + 1;
  parallel_rows(blocks, grain, a.threads, [&](int64_t begin, int64_t end) {
    float* scratch = ic::scratch(2 * n);
    for (int64_t block = begin; block < end; ++block) {
      float* sums = a.sums + block * 2 * n;
      __builtin_memset(sums, 0, static_cast<size_t>(2 * n) * sizeof(float));
      const int64_t first = block * kAddNormRows, past = first + kAddNormRows;
      for (int64_t r = first; r < past && r < a.rows; ++r) gradient_row(a, r, scratch, sums);
    }
  });
  const auto add_up = [&](const float* sums, float* to) __attribute__((always_inline)) {
    each_vector(
        n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          Vec sum = broadcast(0.0f);
          for (int64_t block = 0; block < blocks; ++block)
            sum = sum + load_lanes(sums + block * 2 * n + i, lanes);
          store_lanes(to + i, sum, lanes);
        });
  };
  add_up(a.sums, a.grad_weight);
  if (a.grad_bias) add_up(a.sums + n, a.grad_bias);
}

}  // namespace ic::IC_ISA
