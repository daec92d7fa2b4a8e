// What g++ sees in place of CUDA: built-in variables and functions, and gpu.cuh's primitives. A
// kernel compiled against it runs on emulator.cpp, for tests.
//
// Everything that threads do together (barriers, shuffles, votes, ldmatrix, mma) takes its place in
// the source as a default argument: threads that meet must have come by the same line, and errors
// name it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <source_location>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define IC_GPU inline __attribute__((always_inline))

#define SHARED_ARRAY(T, name, count)     \
  static const char name##_of_block = 0; \
  T(&name)                               \
  [count] = *static_cast<T(*)[count]>(   \
      ic::emulator::static_shared(&name##_of_block, sizeof(T) * (count), alignof(T)))
#define DYNAMIC_SHARED(name) unsigned char* name = ic::emulator::dynamic_shared()

struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using ic::emulator::dim3;
using ic::emulator::Place;

// ---- barriers and votes

inline void __syncthreads(Place at = Place::current()) { ic::emulator::block_barrier(0, at); }
inline int __syncthreads_count(int yes, Place at = Place::current()) {
  return ic::emulator::block_barrier(yes, at);
}
inline int __syncthreads_or(int yes, Place at = Place::current()) {
  return ic::emulator::block_barrier(yes, at) > 0;
}
inline int __syncthreads_and(int yes, Place at = Place::current()) {
  return ic::emulator::block_barrier(!yes, at) == 0;
}
inline void __syncwarp(uint32_t mask = ~0u, Place at = Place::current()) {
  ic::emulator::warp_barrier(mask, at);
}
inline uint32_t __ballot_sync(uint32_t mask, int yes, Place at = Place::current()) {
  return ic::emulator::ballot(mask, yes, at);
}
inline int __any_sync(uint32_t mask, int yes, Place at = Place::current()) {
  return ic::emulator::ballot(mask, yes, at) != 0;
}
inline int __all_sync(uint32_t mask, int yes, Place at = Place::current()) {
  return ic::emulator::ballot(mask, !yes, at) == 0;
}

// ---- shuffles

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, Place at = Place::current()) {
  const int first = ic::emulator::lane() & ~(width - 1);
  return ic::emulator::shuffle(mask, value, first | (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32, Place at = Place::current()) {
  const int lane = ic::emulator::lane(), end = (lane & ~(width - 1)) + width;
  return ic::emulator::shuffle(mask, value, (lane ^ flip) < end ? lane ^ flip : lane, at);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned offset, int width = 32,
                   Place at = Place::current()) {
  const int lane = ic::emulator::lane(), left = width - 1 - (lane & (width - 1));
  return ic::emulator::shuffle(
      mask, value, static_cast<int>(offset) <= left ? lane + static_cast<int>(offset) : lane, at);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned offset, int width = 32,
                 Place at = Place::current()) {
  const int lane = ic::emulator::lane(), before = lane & (width - 1);
  return ic::emulator::shuffle(
      mask, value, static_cast<int>(offset) <= before ? lane - static_cast<int>(offset) : lane, at);
}

// ---- atomics, relaxed as CUDA's: a switch to another thread of the block may come before and
// after

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return ic::emulator::atomic(p, [=](T before) { return static_cast<T>(before + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return ic::emulator::atomic(p, [=](T before) { return before > v ? before : v; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return ic::emulator::atomic(p, [=](T before) { return before < v ? before : v; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return ic::emulator::atomic(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return ic::emulator::atomic(p, [=](T before) { return before == expected ? v : before; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- arithmetic

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}

namespace ic {

using emulator::dim3;

// ---- launches: the grid has run when launch() returns

struct Stream {
  const char* file;
  int line;
  Stream(void*, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : file(file_name(file)), line(line) {}
};

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Args... args) {
  auto body = [=] { kernel(static_cast<Parameters>(args)...); };
  emulator::run(
      grid, block, shared_bytes, stream.file, stream.line,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

inline void zero_on_stream(void* p, size_t bytes, Stream) { memset(p, 0, bytes); }
inline int multiprocessors() { return 3; }  // few, so that persistent blocks take several turns
inline int max_shared_bytes() { return emulator::kMaxSharedBytes; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// ---- the primitives of gpu.cuh

using emulator::smem_address;

IC_GPU uint4 load16_streaming(const void* p) { return *static_cast<const uint4*>(p); }
template <bool kStreaming>
inline uint4 load16_part(const void* p, const void* begin, const void* end) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), from = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t to = reinterpret_cast<uintptr_t>(end);
  if (at % 16 != 0) fail("gpu.h", __LINE__, "load16_part: the address is not a multiple of 16");
  const size_t first = from > at ? from - at : 0, last = to < at + 16 ? to - at : 16;
  uint4 v = {~0u, ~0u, ~0u, ~0u};  // NaN
  memcpy(reinterpret_cast<char*>(&v) + first, static_cast<const char*>(p) + first, last - first);
  return v;
}
IC_GPU void store16_streaming(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

IC_GPU void cp_async16(uint32_t to, const void* from, bool real = true,
                       Place at = Place::current()) {
  emulator::copy16(to, from, real, at);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int kPending>
IC_GPU void cp_async_wait() {
  emulator::copy_wait(kPending);
}

IC_GPU void ldmatrix_x4(uint32_t (&tiles)[4], uint32_t row, Place at = Place::current()) {
  emulator::load_matrix(tiles, row, false, at);
}
IC_GPU void ldmatrix_x4_trans(uint32_t (&tiles)[4], uint32_t row, Place at = Place::current()) {
  emulator::load_matrix(tiles, row, true, at);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Place at = Place::current()) {
  emulator::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, BFloat16>, at);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float2 unpack2(uint32_t both) {
  return {to_float(T{static_cast<uint16_t>(both)}), to_float(T{static_cast<uint16_t>(both >> 16)})};
}

IC_GPU int computed_here(int x) { return x; }

inline uint32_t load_acquire(const uint32_t* p) {
  return *static_cast<const volatile uint32_t*>(p);
}
inline void store_release(uint32_t* p, uint32_t v) { *static_cast<volatile uint32_t*>(p) = v; }
inline void wait_for_flag(const uint32_t* flag, uint32_t value, Place at = Place::current()) {
  emulator::wait_for_flag(flag, value, at);
}

}  // namespace ic
