// Element types of tensors, and the scalar conversions that all kernels share.
#pragma once

#include <stdint.h>

// A rule that the CPU and the GPU share is one function, of this kind.
#if defined(__CUDACC__)
#define IC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IC_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ic {

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kBool, kUInt8 };

constexpr int size_of(Dtype d) {
  switch (d) {
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16:
      return 2;
    default:
      return 1;
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Always inlined: a per-ISA file must not leave a copy for the linker to share.
#if defined(__CUDACC__)
#define IC_SCALAR static __host__ __device__ __forceinline__
#else
#define IC_SCALAR static inline __attribute__((always_inline, unused))
#endif

IC_SCALAR float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

IC_SCALAR uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

IC_SCALAR float to_float(float x) { return x; }

IC_SCALAR float to_float(BFloat16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
IC_SCALAR BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

IC_SCALAR float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf, NaN
    return float_from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // 2^112 moves the exponent's bias from 15 to 127, denormals included.
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;
  return float_from_bits(bits_of_float(value) | sign);
}

IC_SCALAR Float16 to_float16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to inf
  if (magnitude < 0x38800000) {  // below 2^-14: the sum rounds to a multiple of 2^-24
    const float sum = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of_float(sum) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}

// from_float<T>(x): to_bfloat16 and its like, by type.
template <class T>
IC_SCALAR T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (__is_same(T, BFloat16)) {
    return to_bfloat16(x);
  } else {
    return to_float16(x);
  }
}

}  // namespace ic
