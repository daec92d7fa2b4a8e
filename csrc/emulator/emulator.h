// Runs CUDA kernels on a CPU, for tests: it shows wrong logic, missing barriers, reads of data in
// flight, divergence and deadlocks. It says nothing of speed.
//
// A thread of a block is a fiber; it runs until it has to wait. Which of those that can run goes
// next is the schedule's: first come, last come, or at random from a seed. Blocks run one after
// another, so a block can wait for another one only if that came before. Shared memory is filled
// with NaN before each block.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <source_location>

namespace ic::emulator {

using Place = std::source_location;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class Order { kFirst, kLast, kRandom };
// When the data of cp.async arrives: at the wait, with NaN in its place until then (the worst
// case); at once; or either, at random.
enum class Arrival { kLate, kEarly, kRandom };

struct Schedule {
  Order order = Order::kRandom;
  Arrival arrival = Arrival::kLate;
  uint64_t seed = 0;
};
void set_schedule(Schedule);

constexpr size_t kMaxSharedBytes = 227 * 1024;       // of a block: sm_90
constexpr size_t kMaxStaticSharedBytes = 48 * 1024;  // of them, SHARED_ARRAYs

// Runs body(context) as every thread of every block. Throws std::runtime_error that names the
// block, the thread and the line of the kernel which went wrong.
void run(dim3 grid, dim3 block, size_t shared_bytes, const char* file, int line,
         void (*body)(void*), void* context);

// ---- what kernels call, through gpu.h

unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment);
uint32_t smem_address(const void*);

int lane();
int block_barrier(int yes, Place);  // how many threads said yes
void warp_barrier(uint32_t mask, Place);
uint32_t ballot(uint32_t mask, bool yes, Place);
uint64_t shuffle_bits(uint32_t mask, uint64_t value, int source, Place);

void copy16(uint32_t to, const void* from, bool real, Place);
void copy_commit();
void copy_wait(int pending);
void load_matrix(uint32_t (&tiles)[4], uint32_t row, bool transposed, Place);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16,
                  Place);
void wait_for_flag(const uint32_t* flag, uint32_t value, Place);
void atomic_access(const void*, size_t);  // lets other threads run, then tells the checker

template <class T>
T shuffle(uint32_t mask, T value, int source, Place at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles are of 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(mask, bits, source, at);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// Threads switch only where they wait, so a plain read and write are atomic.
template <class T, class Change>
__attribute__((no_sanitize("thread"))) T atomic(T* p, Change change) {
  atomic_access(p, sizeof(T));
  const T before = *p;
  *p = change(before);
  return before;
}

}  // namespace ic::emulator

extern ic::emulator::dim3 threadIdx, blockIdx, blockDim, gridDim;
