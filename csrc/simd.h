// The CPU kernels' vocabulary: a vector of 16 floats, loads and stores of every element type, exp
// and log.
//
// A vector has 16 lanes on every instruction set (one, two or four registers), every reduction is
// one fixed tree and fused multiply-adds are explicit. So a kernel's bits are the same on all
// levels with an FMA. Included by per-ISA files only: everything here is inlined into namespace
// ic::<level>.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
// GCC 12 takes the undefined vectors inside its own intrinsics for mistakes of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "dtype.h"

#define IC_INLINE inline __attribute__((always_inline))

namespace ic::IC_ISA {

inline constexpr int kLanes = 16;

#if defined(__AVX512F__)
inline constexpr int kNativeLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kNativeLanes = 8;
#else
inline constexpr int kNativeLanes = 4;
#endif
inline constexpr int kParts = kLanes / kNativeLanes;

using NativeFloat = float __attribute__((vector_size(4 * kNativeLanes)));
using NativeInt = int32_t __attribute__((vector_size(4 * kNativeLanes)));

struct VecInt {
  NativeInt part[kParts];
};

struct Vec {
  NativeFloat part[kParts];
};

// A lane is all ones (true) or zero.
using Mask = VecInt;

#define IC_EACH_PART for (int p = 0; p < kParts; ++p)
#define IC_BINARY(Type, Result, op)                  \
  IC_INLINE Result operator op(Type a, Type b) {     \
    Result r;                                        \
    IC_EACH_PART r.part[p] = a.part[p] op b.part[p]; \
    return r;                                        \
  }
IC_BINARY(Vec, Vec, +)
IC_BINARY(Vec, Vec, -)
IC_BINARY(Vec, Vec, *)
IC_BINARY(Vec, Vec, /)
IC_BINARY(Vec, Mask, <)
IC_BINARY(Vec, Mask, >)
IC_BINARY(Vec, Mask, <=)
IC_BINARY(Vec, Mask, >=)
IC_BINARY(Vec, Mask, ==)
IC_BINARY(VecInt, VecInt, +)
IC_BINARY(VecInt, VecInt, -)
IC_BINARY(VecInt, VecInt, *)
IC_BINARY(VecInt, VecInt, &)
IC_BINARY(VecInt, VecInt, |)
IC_BINARY(VecInt, VecInt, ^)
IC_BINARY(VecInt, Mask, <)
IC_BINARY(VecInt, Mask, ==)
#undef IC_BINARY

IC_INLINE Vec broadcast(float x) {
  Vec r;
  IC_EACH_PART r.part[p] =
      x - NativeFloat{};  // not 0 + x, which changes -0 and so stays an addition
  return r;
}

IC_INLINE VecInt broadcast_int(int32_t x) {
  VecInt r;
  IC_EACH_PART r.part[p] = NativeInt{} + x;
  return r;
}

IC_INLINE VecInt iota() {  // 0, 1, .. 15
  VecInt r;
  IC_EACH_PART for (int i = 0; i < kNativeLanes; ++i) r.part[p][i] = p * kNativeLanes + i;
  return r;
}

IC_INLINE Vec select(Mask m, Vec a, Vec b) {
  Vec r;
  IC_EACH_PART r.part[p] = m.part[p] ? a.part[p] : b.part[p];
  return r;
}

IC_INLINE VecInt select(Mask m, VecInt a, VecInt b) {
  VecInt r;
  IC_EACH_PART r.part[p] = m.part[p] ? a.part[p] : b.part[p];
  return r;
}

// Where a lane is NaN, the result is b's.
IC_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
IC_INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }

// a * b + c, rounded once (twice where the machine has no fused multiply-add).
IC_INLINE NativeFloat fma(NativeFloat a, NativeFloat b, NativeFloat c) {
#if defined(__AVX512F__)
  return (NativeFloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (NativeFloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < kNativeLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
IC_INLINE Vec fma(Vec a, Vec b, Vec c) {
  IC_EACH_PART c.part[p] = fma(a.part[p], b.part[p], c.part[p]);
  return c;
}

IC_INLINE VecInt bits(Vec a) {
  VecInt r;
  IC_EACH_PART r.part[p] = (NativeInt)a.part[p];
  return r;
}

IC_INLINE Vec from_bits(VecInt a) {
  Vec r;
  IC_EACH_PART r.part[p] = (NativeFloat)a.part[p];
  return r;
}

IC_INLINE VecInt operator^(VecInt a, uint32_t b) {
  return a ^ broadcast_int(static_cast<int32_t>(b));
}

struct WideProduct {
  VecInt high, low;
};

// Each lane times m, both unsigned. The machine multiplies every other lane at a time.
IC_INLINE WideProduct multiply_wide(VecInt a, uint32_t m) {
  using Wide = uint64_t __attribute__((vector_size(4 * kNativeLanes)));
  const NativeInt keep_low = (NativeInt)(Wide{} + 0xffffffffu);
  WideProduct r;
  IC_EACH_PART {
    const Wide odd_lanes = (Wide)a.part[p] >> 32;
#if defined(__AVX512F__)
    const Wide even = (Wide)_mm512_mul_epu32((__m512i)a.part[p], _mm512_set1_epi32(m));
    const Wide odd = (Wide)_mm512_mul_epu32((__m512i)odd_lanes, _mm512_set1_epi32(m));
#elif defined(__AVX2__)
    const Wide even = (Wide)_mm256_mul_epu32((__m256i)a.part[p], _mm256_set1_epi32(m));
    const Wide odd = (Wide)_mm256_mul_epu32((__m256i)odd_lanes, _mm256_set1_epi32(m));
#elif defined(__x86_64__)
    const Wide even = (Wide)_mm_mul_epu32((__m128i)a.part[p], _mm_set1_epi32(m));
    const Wide odd = (Wide)_mm_mul_epu32((__m128i)odd_lanes, _mm_set1_epi32(m));
#else
    const Wide even = ((Wide)a.part[p] & 0xffffffffu) * m, odd = odd_lanes * m;
#endif
    r.high.part[p] = (NativeInt)(even >> 32) | ((NativeInt)odd & ~keep_low);
    r.low.part[p] = ((NativeInt)even & keep_low) | (NativeInt)(odd << 32);
  }
  return r;
}

IC_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m.part[0], (__m512i)m.part[0]) != 0;
#else
  using Wide = int64_t __attribute__((vector_size(4 * kNativeLanes)));
  int64_t joined = 0;
  IC_EACH_PART for (int i = 0; i < kNativeLanes / 2; ++i) joined |= ((Wide)m.part[p])[i];
  return joined != 0;
#endif
}

IC_INLINE VecInt shift_left(VecInt a, int n) {
  IC_EACH_PART a.part[p] <<= n;
  return a;
}

IC_INLINE VecInt shift_right(VecInt a, int n) {  // arithmetic
  IC_EACH_PART a.part[p] >>= n;
  return a;
}

IC_INLINE Vec int_to_float(VecInt a) {
  Vec r;
  IC_EACH_PART r.part[p] = __builtin_convertvector(a.part[p], NativeFloat);
  return r;
}

// The tree is the same on every level: lane i meets i + 8, then i + 4, i + 2, i + 1.
using Lanes = float __attribute__((vector_size(4 * kLanes)));

IC_INLINE Lanes lanes_of(Vec a) {
  Lanes r;
  __builtin_memcpy(&r, &a, sizeof r);
  return r;
}

template <class Combine>
IC_INLINE float reduce(Vec a, Combine combine) {
  const Lanes x = lanes_of(a);
  const auto y = combine(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  auto z =
      combine(__builtin_shufflevector(y, y, 0, 1, 2, 3), __builtin_shufflevector(y, y, 4, 5, 6, 7));
  z = combine(z, __builtin_shufflevector(z, z, 2, 3, 0, 1));
  return combine(z, __builtin_shufflevector(z, z, 1, 0, 3, 2))[0];
}

IC_INLINE float reduce_add(Vec a) {
  return reduce(a, [](auto x, auto y) __attribute__((always_inline)) { return x + y; });
}
IC_INLINE float reduce_max(Vec a) {
  return reduce(a, [](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; });
}
IC_INLINE float reduce_min(Vec a) {
  return reduce(a, [](auto x, auto y) __attribute__((always_inline)) { return x < y ? x : y; });
}

// Lanes 1, 0, 3, 2, ..
IC_INLINE Vec swap_neighbours(Vec a) {
  const Lanes x = lanes_of(a);
  const Lanes y =
      __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  Vec r;
  __builtin_memcpy(&r, &y, sizeof r);
  return r;
}

// Lanes n, n + 1, .. 15, then zeros.
template <int n>
IC_INLINE Vec shift_down(Vec a) {
  const Lanes x = lanes_of(a);
  const Lanes y =
      __builtin_shufflevector(x, Lanes{}, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8,
                              n + 9, n + 10, n + 11, n + 12, n + 13, n + 14, n + 15);
  Vec r;
  __builtin_memcpy(&r, &y, sizeof r);
  return r;
}

// Lanes 0, 0, 1, 1, .. 7, 7.
IC_INLINE Vec repeat_each(Vec a) {
  const Lanes x = lanes_of(a);
  const Lanes y = __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  Vec r;
  __builtin_memcpy(&r, &y, sizeof r);
  return r;
}

// Rows become columns: four rounds of 16 shuffles.
#if defined(__AVX512F__)
IC_INLINE void transpose(Vec (&rows)[kLanes]) {
  // Shuffles within 128 bits first: on a Zen 4 a quarter faster than rounds of two-source permutes.
  __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    const __m512 x = (__m512)rows[i].part[0], y = (__m512)rows[i + 1].part[0];
    a[i] = _mm512_unpacklo_ps(x, y);
    a[i + 1] = _mm512_unpackhi_ps(x, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {  // b[i + c]: column c of each 128 bits, rows i .. i + 3
    b[i] = (__m512)_mm512_unpacklo_pd((__m512d)a[i], (__m512d)a[i + 2]);
    b[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)a[i], (__m512d)a[i + 2]);
    b[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)a[i + 1], (__m512d)a[i + 3]);
    b[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)a[i + 1], (__m512d)a[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c].part[0] = (NativeFloat)_mm512_shuffle_f32x4(even0, even1, 0x88);
    rows[4 + c].part[0] = (NativeFloat)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
    rows[8 + c].part[0] = (NativeFloat)_mm512_shuffle_f32x4(even0, even1, 0xdd);
    rows[12 + c].part[0] = (NativeFloat)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}
#else
// Each round deals row i and row i + 8 out to rows 2i and 2i + 1. Not inlined: the rows do not fit
// the registers, and the compiler takes a second over it.
__attribute__((noinline)) inline void transpose(Vec (&rows)[kLanes]) {
  Lanes a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = lanes_of(rows[i]);
  const auto deal =
      [](const Lanes(&from)[kLanes], Lanes(&to)[kLanes]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Lanes x = from[i], y = from[i + kLanes / 2];
      to[2 * i] =
          __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                              14, 30, 15, 31);
    }
  };
  deal(a, b);
  deal(b, a);
  deal(a, b);
  deal(b, a);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&rows[i], &a[i], sizeof a[i]);
}
#endif

// ---- memory: n lanes (0..16) of an element type as floats and back, rounded to nearest even ----

IC_INLINE Vec load(const float* from) {
  Vec r;
  __builtin_memcpy(&r, from, sizeof r);
  return r;
}

IC_INLINE void store(float* to, Vec a) { __builtin_memcpy(to, &a, sizeof a); }

IC_INLINE Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  Vec r;
  r.part[0] = (NativeFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return r;
#else
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = to_float(from[i]);
  return load(lane);
#endif
}

#if defined(__AVX512F__)
IC_INLINE __m256i half_words(BFloat16, Vec a) {
  const __m512i x = (__m512i)a.part[0];
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

IC_INLINE __m256i half_words(Float16, Vec a) {
  return _mm512_cvtps_ph((__m512)a.part[0], _MM_FROUND_TO_NEAREST_INT);
}
#endif

IC_INLINE void store(BFloat16* to, Vec a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half_words(BFloat16{}, a));
#else
  float lane[kLanes];
  store(lane, a);
  for (int i = 0; i < kLanes; ++i) to[i] = to_bfloat16(lane[i]);
#endif
}

IC_INLINE Vec load(const Float16* from) {
#if defined(__AVX512F__)
  Vec r;
  r.part[0] =
      (NativeFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return r;
#elif defined(__F16C__)
  Vec r;
  IC_EACH_PART r.part[p] = (NativeFloat)_mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * kNativeLanes)));
  return r;
#else
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = to_float(from[i]);
  return load(lane);
#endif
}

IC_INLINE void store(Float16* to, Vec a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half_words(Float16{}, a));
#elif defined(__F16C__)
  IC_EACH_PART _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * kNativeLanes),
                                _mm256_cvtps_ph((__m256)a.part[p], _MM_FROUND_TO_NEAREST_INT));
#else
  float lane[kLanes];
  store(lane, a);
  for (int i = 0; i < kLanes; ++i) to[i] = to_float16(lane[i]);
#endif
}

// The first n lanes from memory, the others `fill`; nothing past the n-th element is touched.
template <class T>
IC_INLINE Vec load_partial(const T* from, int n, float fill) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < n ? to_float(from[i]) : fill;
  return load(lane);
}
template <class T>
IC_INLINE void store_partial(T* to, Vec a, int n) {
  T lane[kLanes];
  store(lane, a);
  for (int i = 0; i < n; ++i) to[i] = lane[i];
}
#if defined(__AVX512F__)
IC_INLINE Vec load_partial(const float* from, int n, float fill) {
  Vec r;
  r.part[0] = (NativeFloat)_mm512_mask_loadu_ps(_mm512_set1_ps(fill),
                                                static_cast<__mmask16>((1u << n) - 1), from);
  return r;
}
IC_INLINE void store_partial(float* to, Vec a, int n) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)a.part[0]);
}
IC_INLINE Vec load_partial(const BFloat16* from, int n, float fill) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from));
  Vec r;
  r.part[0] = (NativeFloat)_mm512_mask_blend_ps(first, _mm512_set1_ps(fill),
                                                (__m512)_mm512_slli_epi32(wide, 16));
  return r;
}
IC_INLINE Vec load_partial(const Float16* from, int n, float fill) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  const __m512 wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first, from));
  Vec r;
  r.part[0] = (NativeFloat)_mm512_mask_blend_ps(first, _mm512_set1_ps(fill), wide);
  return r;
}
#endif

// ---- rows of n elements: whole vectors, and a last one of fewer lanes ----

template <class T>
IC_INLINE Vec load_lanes(const T* from, int lanes, float fill = 0.0f) {
  return lanes == kLanes ? load(from) : load_partial(from, lanes, fill);
}

template <class T>
IC_INLINE void store_lanes(T* to, Vec a, int lanes) {
  lanes == kLanes ? store(to, a) : store_partial(to, a, lanes);
}

// f(i, lanes) for each vector.
template <class F>
IC_INLINE void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The sum of f(i, lanes) over all vectors; f gives 0 in lanes past the end.
template <class F>
IC_INLINE float sum_vectors(int64_t n, F f) {
  const Vec zero = broadcast(0.0f);
  Vec sum[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + f(i + j * kLanes, kLanes);
  for (; i + kLanes <= n; i += kLanes) sum[0] = sum[0] + f(i, kLanes);
  if (i < n) sum[0] = sum[0] + f(i, static_cast<int>(n - i));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Elements from `at` to the next address where store_past_caches may begin, 0 or more below kLanes.
template <class T>
IC_INLINE int lanes_to_line(const T* at) {
  constexpr uintptr_t kBytes = kLanes * sizeof(T);
  const uintptr_t past = reinterpret_cast<uintptr_t>(at) % kBytes;
  return static_cast<int>((kBytes - past) % kBytes / sizeof(T));
}

// Like store, to an aligned address, around the caches where the machine can. Visible to other
// threads after a fence().
template <class T>
IC_INLINE void store_past_caches(T* to, Vec a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    _mm512_stream_ps(to, (__m512)a.part[0]);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half_words(T{}, a));
  }
#else
  store(to, a);
#endif
}

IC_INLINE void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Writes the lanes that the mask has, next to each other, and returns their number. All 16 elements
// of `to` may be written.
IC_INLINE int store_packed(float* to, Vec a, Mask m) {
#if defined(__AVX512F__)
  const __mmask16 lanes = _mm512_test_epi32_mask((__m512i)m.part[0], (__m512i)m.part[0]);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(lanes, (__m512)a.part[0]));
  return __builtin_popcount(lanes);
#else
  float lane[kLanes];
  int32_t kept[kLanes];
  store(lane, a);
  __builtin_memcpy(kept, &m, sizeof kept);
  int n = 0;
  for (int i = 0; i < kLanes; ++i) {
    to[n] = lane[i];
    n -= kept[i];
  }
  return n;
#endif
}

// Bytes as a mask: a lane is true where its byte is not 0; lanes from n on are false.
IC_INLINE Mask load_mask(const uint8_t* from, int n) {
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < n && from[i] ? -1 : 0;
  Mask r;
  __builtin_memcpy(&r, lane, sizeof r);
  return r;
}

// ---- functions: at most 2 ulp on normal results ----

// e^x; 0 below -104, inf above 89, NaN stays. Cody and Waite's reduction, a polynomial of degree 6
// fitted for the least relative error (3e-9) on |r| <= ln(2)/2, and the power of two in two exact
// steps.
IC_INLINE Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = select(x < broadcast(-104.0f), broadcast(-104.0f), x);
  x = select(x > broadcast(89.0f), broadcast(89.0f), x);
  const Vec shifted = fma(x, broadcast(0x1.715476p+0f), broadcast(kRound));
  const Vec n = shifted - broadcast(kRound);
  Vec r = fma(n, broadcast(-0x1.62e400p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  Vec q = broadcast(0x1.6a23cep-10f);
  q = fma(q, r, broadcast(0x1.123a20p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  const Vec value = fma(r * r, q, r) + broadcast(1.0f);
  const VecInt exponent = bits(shifted) - broadcast_int(0x4b400000);
  const VecInt half = shift_right(exponent, 1);
  const VecInt bias = broadcast_int(127);
  return value * from_bits(shift_left(half + bias, 23)) *
         from_bits(shift_left(exponent - half + bias, 23));
}

// 2^(x c) for products up to 127, which are not rounded; 0 where it would not be a normal number
// (below -126). The polynomial of kDegree 4 or 6 is fitted for the least relative error (3e-6 or
// 2e-9) on [-1/2, 1/2]. 2^0 is exactly 1, NaN stays.
template <int kDegree = 6>
IC_INLINE Vec exp2_normal(Vec x, Vec c) {
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, c, round);
  const Vec n = shifted - round;
  const Vec f = fma(x, c, broadcast(0.0f) - n);
  Vec q;
  if constexpr (kDegree == 4) {
    q = broadcast(0x1.3a02ccp-7f);
    q = fma(q, f, broadcast(0x1.c9fc46p-5f));
    q = fma(q, f, broadcast(0x1.ec0378p-3f));
    q = fma(q, f, broadcast(0x1.62e12cp-1f));
  } else {
    q = broadcast(0x1.41fbbcp-13f);
    q = fma(q, f, broadcast(0x1.5f3e54p-10f));
    q = fma(q, f, broadcast(0x1.3b2d4cp-7f));
    q = fma(q, f, broadcast(0x1.c6aee8p-5f));
    q = fma(q, f, broadcast(0x1.ebfbdcp-3f));
    q = fma(q, f, broadcast(0x1.62e430p-1f));
  }
  q = fma(q, f, broadcast(1.0f));
  const Vec power = from_bits(shift_left(bits(shifted), 23) + broadcast_int(0x3f800000));
  return select(n < broadcast(-126.0f), broadcast(0.0f), q * power);
}
inline constexpr float kLog2E = 0x1.715476p+0f;

// e^x for x up to 88, at two thirds of exp's cost; 0 where it would not be a normal number (below
// -87). One step of reduction: ln 2 to float32 is off by 2e-9 for each power of two.
IC_INLINE Vec exp_normal(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, broadcast(0x1.715476p+0f), broadcast(kRound));
  const Vec r = fma(shifted - broadcast(kRound), broadcast(-0x1.62e430p-1f), x);
  Vec q = broadcast(0x1.6a23cep-10f);
  q = fma(q, r, broadcast(0x1.123a20p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  q = fma(q, r, broadcast(1.0f));
  q = fma(q, r, broadcast(1.0f));
  const Vec power = from_bits(shift_left(bits(shifted), 23) + broadcast_int(0x3f800000));
  return select(x < broadcast(-87.0f), broadcast(0.0f), q * power);
}

struct Shares {
  Vec first, second;
};

// 1 / (1 + e^-x) and 1 / (1 + e^x), which sum to 1: the smaller one keeps its digits. NaN stays.
IC_INLINE Shares sigmoid(Vec x) {
  const VecInt sign = broadcast_int(INT32_MIN);
  const Vec power = exp_normal(from_bits(bits(x) | sign)), one = broadcast(1.0f);
  const Vec large = one / (one + power), small = power * large;
  const Mask below = x < broadcast(0.0f);
  return {select(below, small, large), select(below, large, small)};
}

// ln(2^exponent m), f = m - 1. With s = f / (m + 1): ln m = 2 atanh(s), its series to s^9.
IC_INLINE Vec log_of_parts(VecInt exponent, Vec m, Vec f) {
  const Vec s = f / (m + broadcast(1.0f));
  const Vec z = s * s;
  Vec q = broadcast(2.0f / 9.0f);
  q = fma(q, z, broadcast(2.0f / 7.0f));
  q = fma(q, z, broadcast(2.0f / 5.0f));
  q = fma(q, z, broadcast(2.0f / 3.0f));
  const Vec e = int_to_float(exponent);
  // 2s = f - s f exactly enough: the leading term keeps f's full precision.
  const Vec tail = fma(s * z, q, fma(e, broadcast(0x1.7f7d1cp-20f), s * (broadcast(0.0f) - f)));
  return fma(e, broadcast(0x1.62e400p-1f), f + tail);
}

// ln x for normal x > 0 (0 and denormals give about -88), by way of m in [sqrt(1/2), sqrt(2)).
IC_INLINE Vec log(Vec x) {
  const VecInt offset = bits(x) - broadcast_int(0x3f3504f3);  // sqrt(1/2)
  const VecInt exponent = shift_right(offset, 23);
  const Vec m = from_bits((offset & broadcast_int(0x007fffff)) + broadcast_int(0x3f3504f3));
  return log_of_parts(exponent, m, m - broadcast(1.0f));
}

// ln(1 + x) for x > -1: exact to the last bits near 0 too.
IC_INLINE Vec log1p(Vec x) {
  const VecInt offset = bits(x + broadcast(1.0f)) - broadcast_int(0x3f3504f3);
  const VecInt exponent = shift_right(offset, 23);
  const Vec m = from_bits((offset & broadcast_int(0x007fffff)) + broadcast_int(0x3f3504f3));
  const Vec f = select(exponent == broadcast_int(0), x, m - broadcast(1.0f));
  return log_of_parts(exponent, m, f);
}

// Cephes' tanhf: an odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
IC_INLINE Vec tanh(Vec x) {
  const Vec z = x * x, one = broadcast(1.0f);
  Vec q = broadcast(-5.70498872745e-3f);
  q = fma(q, z, broadcast(2.06390887954e-2f));
  q = fma(q, z, broadcast(-5.37397155531e-2f));
  q = fma(q, z, broadcast(1.33314422036e-1f));
  q = fma(q, z, broadcast(-3.33332819422e-1f));
  const Vec small = fma(q * z, x, x);
  const VecInt sign = bits(x) & broadcast_int(INT32_MIN);
  const Vec size = from_bits(bits(x) ^ sign);
  const Vec large = one - broadcast(2.0f) / (exp(size + size) + one);
  return select(size > broadcast(0.625f), from_bits(bits(large) | sign), small);
}

#undef IC_EACH_PART

}  // namespace ic::IC_ISA
