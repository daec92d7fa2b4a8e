// The vocabulary of the CUDA kernels: one function per instruction, shared memory, and launches.
// The only file with inline PTX, plain `__shared__` and `<<<>>>`.
//
// Under nvcc a primitive is its PTX. Under g++ with IC_EMULATED it is its twin in emulator/gpu.h,
// which also supplies CUDA's own built-ins (threadIdx, __syncthreads, __shfl_*_sync, atomicAdd,
// ...), so a kernel is one source for both. What follows the two is written once, on top of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "check.h"
#include "dtype.h"

#ifdef IC_EMULATED
#include "emulator/gpu.h"
#else
#include <cuda_runtime.h>

// A block's array of a fixed size. Uninitialised.
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
// The block's dynamic shared memory, as many bytes as launch() was told. 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define IC_GPU __device__ __forceinline__

namespace ic {

// ---- launches

// A torch stream and the place of the launch, for its error message.
struct Stream {
  cudaStream_t handle;
  const char* file;
  int line;
  Stream(void* stream, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : handle(static_cast<cudaStream_t>(stream)), file(file_name(file)), line(line) {}
};

inline void check_cuda(cudaError_t error, const char* what, const Stream& at) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch starts clean
  fail(at.file, at.line, what, ": ", cudaGetErrorString(error));
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...)
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Args... args) {
  // Above 48 KB, a kernel's own arrays included, a block has to ask.
  if (shared_bytes > 0)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a launch", stream);
  kernel<<<grid, block, shared_bytes, stream.handle>>>(static_cast<Parameters>(args)...);
  check_cuda(cudaGetLastError(), "launch", stream);
}

// A memset node where the stream is being captured.
inline void zero_on_stream(void* p, size_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(p, 0, bytes, stream.handle), "memset", stream);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device", nullptr);
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "device attribute", nullptr);
  return value;
}

// Multiprocessors of the current device, for grids of persistent blocks.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The most shared memory that a block may ask for: 227 KB on sm_90, 163 on sm_80, 99 on sm_86 and
// sm_89.
inline int max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// ---- addresses and 16-byte accesses

// A shared-memory address as ldmatrix and cp.async take it.
IC_GPU uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes of global memory that are read once: they take no place in L1.
IC_GPU uint4 load16_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 aligned bytes of global memory of which only those in [begin, end) are used, one or more. The
// others may be anybody's: no such access crosses a page. kStreaming: they take no place in L1.
template <bool kStreaming>
IC_GPU uint4 load16_part(const void* p, const void*, const void*) {
  if constexpr (kStreaming) return load16_streaming(p);
  return *static_cast<const uint4*>(p);
}

// 16 bytes of global memory that are not read again soon: first to leave L2.
IC_GPU void store16_streaming(void* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- asynchronous copies, global to shared

// Starts copying 16 bytes; with `real` false the source is not touched and zeros arrive. Both
// addresses are multiples of 16.
IC_GPU void cp_async16(uint32_t to, const void* from, bool real = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}

IC_GPU void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups are in flight. Other threads see the data after a
// barrier.
template <int kPending>
IC_GPU void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores

// Four 8x8 tiles of 16-bit elements: lane l passes the address of row l % 8 of tile l / 8. Lane l
// gets of each tile elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; with _trans, of column l
// / 4.
IC_GPU void ldmatrix_x4(uint32_t (&tiles)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row)
               : "memory");
}

IC_GPU void ldmatrix_x4_trans(uint32_t (&tiles)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row)
               : "memory");
}

// D (16x8, float32) += A (16x16) B (16x8), elements of type T = BFloat16 or Float16. With g = lane
// / 4 and c = 2 (lane % 4), a lane holds
//   d[0..1]: row g, columns c, c+1         d[2..3]: row g + 8
//   a[0]: row g, k = c, c+1                a[1]: row g + 8
//   a[2]: row g, k = c+8, c+9              a[3]: row g + 8, k = c+8, c+9
//   b0: k = c, c+1 of column g             b1: k = c+8, c+9
template <class T>
IC_GPU void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define IC_MMA(T, type)                                                                        \
  template <>                                                                                  \
  IC_GPU void mma_m16n8k16<T>(float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
  }
IC_MMA(BFloat16, "bf16")
IC_MMA(Float16, "f16")
#undef IC_MMA

// ---- arithmetic

// 2^x within 2 ulp; denormal results are 0.
IC_GPU float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, `low` in the lower half.
template <class T>
IC_GPU uint32_t pack2(float low, float high) {
  uint32_t both;
  if constexpr (__is_same(T, BFloat16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

template <class T>
IC_GPU float2 unpack2(uint32_t both) {
  if constexpr (__is_same(T, BFloat16)) {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  } else {
    float2 v;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(both));
    return v;
  }
}

// x, of which the compiler knows nothing: what follows from it is computed where it is needed, not
// kept in registers from before a loop.
IC_GPU int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- between blocks

// What the releasing thread wrote before (and what it saw, after a barrier) is visible after the
// acquire.
IC_GPU uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

IC_GPU void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Waits until another block has released `value` or more. It must be a block that is running or
// done, whatever the hardware's order: one that drew an earlier ticket (draw_ticket).
IC_GPU void wait_for_flag(const uint32_t* flag, uint32_t value) {
  while (load_acquire(flag) < value) __nanosleep(20);
}

}  // namespace ic
#endif  // IC_EMULATED

namespace ic {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

IC_GPU int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
IC_GPU int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// ---- shuffles of any type of whole words

template <class T, class Shuffle>
IC_GPU T shuffle_words(T value, Shuffle shuffle) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  memcpy(&value, words, sizeof(T));
  return value;
}

// The value of lane + offset; beyond lane 31 its own.
template <class T>
IC_GPU T shuffle_down(T value, int offset) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_down_sync(kAllLanes, w, offset); });
}

template <class T>
IC_GPU T shuffle_up(T value, int offset) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_up_sync(kAllLanes, w, offset); });
}

template <class T>
IC_GPU T shuffle_xor(T value, int offset) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_xor_sync(kAllLanes, w, offset); });
}

// The value of lane `source`, for all.
template <class T>
IC_GPU T shuffle_from(T value, int source) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_sync(kAllLanes, w, source); });
}

// ---- reductions

struct Sum {
  template <class T>
  IC_GPU T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {  // fmaxf's rule: the other one where one is NaN
  IC_GPU float operator()(float a, float b) const { return fmaxf(a, b); }
};

// combine over the warp, for every lane: a butterfly, so that a commutative `combine` gives all
// lanes the same bits. The order is fixed by the lanes.
template <class T, class Combine>
IC_GPU T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, shuffle_xor(value, offset));
  return value;
}

// combine over a block of kWarps warps, for every thread, in the order of the warps. All threads
// call it; it may be called again at once.
template <int kWarps, class T, class Combine>
IC_GPU T block_reduce(T value, Combine combine) {
  value = warp_reduce(value, combine);
  if constexpr (kWarps == 1) return value;
  SHARED_ARRAY(T, of_warp, kWarps);
  if (lane_index() == 0) of_warp[warp_index()] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = combine(value, of_warp[w]);
  __syncthreads();  // before of_warp is written again
  return value;
}

template <class T>
IC_GPU T warp_sum(T value) {
  return warp_reduce(value, Sum());
}
IC_GPU float warp_max(float value) { return warp_reduce(value, Max()); }

template <int kWarps, class T>
IC_GPU T block_sum(T value) {
  return block_reduce<kWarps>(value, Sum());
}
template <int kWarps>
IC_GPU float block_max(float value) {
  return block_reduce<kWarps>(value, Max());
}

// ---- tickets

// A number for the whole block, counted from 0 in the order in which blocks start. Whatever waits
// for another block orders its work by tickets: the holder of an earlier one is running or done,
// whatever the hardware's order of blocks. `counter` is 0 before the launch. All threads call it,
// once.
IC_GPU uint32_t draw_ticket(uint32_t* counter) {
  SHARED_ARRAY(uint32_t, ticket, 1);
  if (threadIdx.x == 0) ticket[0] = atomicAdd(counter, 1u);
  __syncthreads();
  return ticket[0];
}

}  // namespace ic
