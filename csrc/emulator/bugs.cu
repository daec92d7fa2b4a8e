// Kernels with one mistake each, to test the emulator: `bugs <case> <broken|fixed> <order>
// <arrival> <seed>` prints what it says of the case, "wrong values" if the kernel ran but computed
// nonsense, or "ok". The exit status is 0 for "ok" only.
#include <stdio.h>
#include <stdlib.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../gpu.cuh"

namespace ic {
namespace {

// ---- barriers

__global__ void neighbour(int* out, bool fixed) {
  SHARED_ARRAY(int, x, 64);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (fixed) __syncthreads();
  out[threadIdx.x] = x[(threadIdx.x + 33) % 64];
}

// The next round writes what slower threads are still to read.
__global__ void rounds(int* out, bool fixed) {
  SHARED_ARRAY(int, x, 64);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    x[threadIdx.x] = round;
    __syncthreads();
    sum += x[(threadIdx.x + 33) % 64];
    if (fixed) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void shuffle_is_no_barrier(int* out, bool fixed) {
  SHARED_ARRAY(int, x, 64);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (fixed) {
    __syncwarp();
  } else {
    __shfl_sync(kAllLanes, 0, 0);
  }
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(int* out, bool fixed) {
  if (fixed) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void barrier_after_the_end(int* out, bool fixed) {
  if (!fixed && threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

// ---- warps

__global__ void absent_lane(int* out, bool fixed) {
  const int lane = lane_index();
  if (lane < 16) out[threadIdx.x] = __shfl_sync(0xffffu, lane, fixed ? 15 : 20);
}

__global__ void wrong_mask(int* out, bool fixed) {
  if (lane_index() < 16) {
    out[threadIdx.x] = __shfl_xor_sync(fixed ? 0xffffu : kAllLanes, 1, 1);
  } else {
    __syncwarp(0xffff0000u);
  }
  __syncthreads();
}

// ---- memory

__global__ void uninitialised(int* out, bool fixed) {
  SHARED_ARRAY(int, x, 65);
  if (fixed && threadIdx.x == 0) x[64] = 0;
  x[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x + 1];
}

__global__ void past_shared(int* out, bool fixed) {
  SHARED_ARRAY(int, x, 64);
  volatile int* y = x;
  y[threadIdx.x + (fixed ? 0 : 1)] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void past_global(int* out, bool fixed) { out[threadIdx.x + (fixed ? 0 : 64)] = 1; }

// ---- copies

__global__ void early_wait(int* out, const int* in, bool fixed) {
  SHARED_ARRAY(int4, x, 2 * 64);
  for (int half = 0; half < 2; ++half) {
    cp_async16(smem_address(&x[half * 64 + threadIdx.x]), in + 4 * threadIdx.x);
    cp_async_commit();
  }
  if (fixed) {
    cp_async_wait<0>();
  } else {
    cp_async_wait<1>();
  }
  out[threadIdx.x] = x[64 + threadIdx.x].x;
  cp_async_wait<0>();
}

__global__ void copy_without_barrier(int* out, const int* in, bool fixed) {
  SHARED_ARRAY(int4, x, 64);
  cp_async16(smem_address(&x[threadIdx.x]), in + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  if (fixed) __syncthreads();
  out[threadIdx.x] = x[(threadIdx.x + 33) % 64].x;
}

__global__ void never_waited(int* out, const int* in, bool fixed) {
  SHARED_ARRAY(int4, x, 64);
  cp_async16(smem_address(&x[threadIdx.x]), in + 4 * threadIdx.x);
  cp_async_commit();
  if (fixed) cp_async_wait<0>();
  out[threadIdx.x] = 0;
}

__global__ void misaligned_rows(int* out, bool fixed) {
  SHARED_ARRAY(int4, x, 40);
  for (int i = threadIdx.x; i < 40; i += 32) x[i] = int4{1, 1, 1, 1};
  __syncwarp();
  uint32_t tiles[4];
  ldmatrix_x4(tiles, smem_address(x) + threadIdx.x * 16 + (fixed ? 0 : 8));
  out[threadIdx.x] = static_cast<int>(tiles[0]);
}

// ---- blocks

// Block b waits for block b - 1, which only tickets make sure to have started.
__global__ void chain(uint32_t* flags, bool fixed) {
  const uint32_t number = fixed ? draw_ticket(flags) : blockIdx.x;
  if (threadIdx.x != 0) return;
  if (number > 0) wait_for_flag(flags + number, 1);
  store_release(flags + number + 1, 1);
}

// ---- cases

constexpr int kThreads = 64;

// Runs kernel(out, ..., fixed) with one block; every out[i] must be expected(i).
template <class Kernel, class Expected, class... Args>
bool right(Kernel kernel, int threads, bool fixed, Expected expected, Args... args) {
  constexpr int kUntouched = 0x5afe;
  std::vector<int> out(kThreads, kUntouched);
  launch(kernel, dim3(1), dim3(threads), 0, nullptr, out.data(), args..., fixed);
  for (int i = 0; i < threads; ++i)
    if (out[i] != kUntouched && out[i] != expected(i)) return false;
  return true;
}

bool run_case(const std::string& name, bool fixed) {
  const auto any = [](int) { return 0; };
  const auto ones = [](int) { return 1; };
  const auto shifted = [](int i) { return (i + 33) % kThreads; };
  std::vector<int4> in(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = {i, i, i, i};
  const int* from = &in[0].x;
  if (name == "missing_barrier") return right(neighbour, kThreads, fixed, shifted);
  if (name == "missing_trailing_barrier")
    return right(rounds, kThreads, fixed, [](int) { return 3; });
  if (name == "shuffle_is_no_barrier")
    return right(shuffle_is_no_barrier, kThreads, fixed, [](int i) { return i ^ 1; });
  if (name == "divergent_barrier") return right(divergent_barrier, kThreads, fixed, any);
  if (name == "barrier_after_the_end") return right(barrier_after_the_end, kThreads, fixed, any);
  if (name == "absent_lane") return right(absent_lane, kThreads, fixed, [](int) { return 15; });
  if (name == "wrong_mask") return right(wrong_mask, kThreads, fixed, ones);
  if (name == "uninitialised") return right(uninitialised, kThreads, fixed, any);
  if (name == "past_shared") return right(past_shared, kThreads, fixed, ones);
  if (name == "past_global") return right(past_global, kThreads, fixed, ones);
  if (name == "early_wait")
    return right(early_wait, kThreads, fixed, [](int i) { return i; }, from);
  if (name == "copy_without_barrier")
    return right(copy_without_barrier, kThreads, fixed, shifted, from);
  if (name == "never_waited") return right(never_waited, kThreads, fixed, any, from);
  if (name == "misaligned_rows") return right(misaligned_rows, kWarp, fixed, ones);
  if (name == "chain") {
    std::vector<uint32_t> flags(10);
    launch(chain, dim3(9), dim3(kWarp), 0, nullptr, flags.data(), fixed);
    return true;
  }
  throw std::runtime_error("no such case: " + name);
}

}  // namespace
}  // namespace ic

int main(int count, char** arguments) {
  using namespace ic::emulator;
  if (count != 6) return 2;
  const std::string order = arguments[3], arrival = arguments[4];
  set_schedule({order == "first"  ? Order::kFirst
                : order == "last" ? Order::kLast
                                  : Order::kRandom,
                arrival == "late"    ? Arrival::kLate
                : arrival == "early" ? Arrival::kEarly
                                     : Arrival::kRandom,
                strtoull(arguments[5], nullptr, 10)});
  try {
    const bool right = ic::run_case(arguments[1], std::string(arguments[2]) == "fixed");
    puts(right ? "ok" : "wrong values");
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    puts(error.what());
    return 1;
  }
}
