// What gpu.cuh promises of each primitive, checked where it runs: `conformance` prints the
// primitives that break their promise, or "ok". Built by g++ it tests the emulator, by nvcc the
// GPU: each must agree with this file, so they agree with each other.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>

#include "../gpu.cuh"

namespace ic {
namespace {

#ifdef IC_EMULATED
void* allocate(size_t bytes) { return aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* p) { free(p); }
void wait() {}
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMallocManaged(&p, bytes), "allocation", nullptr);
  return p;
}
void release(void* p) { cudaFree(p); }
void wait() { check_cuda(cudaDeviceSynchronize(), "kernel", nullptr); }
#endif

// Zeroed memory of host and device.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(size_t count) : data(static_cast<T*>(allocate(count * sizeof(T)))) {
    memset(data, 0, count * sizeof(T));
  }
  ~Buffer() { release(data); }
  T& operator[](size_t i) { return data[i]; }
};

int broken = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++broken;
  printf("%s\n", what);
}

// ---- tensor cores

// Elements of a 16 x 16 tile are 16 row + column, in shared memory row by row.
__global__ void matrix_rows(uint32_t* out, bool transposed) {
  SHARED_ARRAY(uint4, tile, 16 * 2);
  uint16_t* element = reinterpret_cast<uint16_t*>(tile);
  for (int i = lane_index(); i < 256; i += kWarp) element[i] = static_cast<uint16_t>(i);
  __syncwarp();
  // Tiles 0..3: upper left, lower left, upper right, lower right.
  const int row = lane_index() % 16, half = lane_index() / 16;
  uint32_t r[4];
  if (transposed) {
    ldmatrix_x4_trans(r, smem_address(element + row * 16 + half * 8));
  } else {
    ldmatrix_x4(r, smem_address(element + row * 16 + half * 8));
  }
  for (int i = 0; i < 4; ++i) out[4 * lane_index() + i] = r[i];
}

void check_ldmatrix(bool transposed) {
  Buffer<uint32_t> out(4 * kWarp);
  launch(matrix_rows, dim3(1), dim3(kWarp), 0, nullptr, out.data, transposed);
  wait();
  bool right = true;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int tile = 0; tile < 4; ++tile)
      for (int k = 0; k < 2; ++k) {
        int row = lane / 4, column = lane % 4 * 2 + k;
        if (transposed) row = lane % 4 * 2 + k, column = lane / 4;
        const int expected = 16 * (row + tile % 2 * 8) + column + tile / 2 * 8;
        right = right && (out[4 * lane + tile] >> 16 * k & 0xffff) == uint32_t(expected);
      }
  expect(right, transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4");
}

// D = A B + 1 from fragments filled by their definition. Small integers: every product is exact.
IC_HOST_DEVICE float element_a(int row, int k) { return float((row * 5 + k * 3) % 17 - 8); }
IC_HOST_DEVICE float element_b(int k, int column) { return float((k * 7 + column * 2) % 13 - 6); }

template <class T>
__global__ void multiply(float* out) {
  const int g = lane_index() / 4, c = lane_index() % 4 * 2;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, k = c + i / 2 * 8;
    a[i] = pack2<T>(element_a(row, k), element_a(row, k + 1));
  }
  for (int i = 0; i < 2; ++i) b[i] = pack2<T>(element_b(c + 8 * i, g), element_b(c + 8 * i + 1, g));
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + c + i % 2] = d[i];
}

template <class T>
void check_mma(const char* name) {
  Buffer<float> out(16 * 8);
  launch(multiply<T>, dim3(1), dim3(kWarp), 0, nullptr, out.data);
  wait();
  bool right = true;
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float expected = 1.0f;
      for (int k = 0; k < 16; ++k) expected += element_a(row, k) * element_b(k, column);
      right = right && out[row * 8 + column] == expected;
    }
  expect(right, name);
}

// ---- copies

__global__ void copy(const uint4* in, uint4* out) {
  DYNAMIC_SHARED(memory);
  uint4* staged = reinterpret_cast<uint4*>(memory);
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  cp_async16(smem_address(staged + t), in + t);
  cp_async_commit();
  cp_async16(smem_address(staged + n + t), in + n + t, t % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  store16_streaming(out + t, staged[n - 1 - t]);
  cp_async_wait<0>();
  __syncthreads();
  out[n + t] = staged[n + (t ^ 1)];
  store16_streaming(out + 2 * n + t, load16_streaming(in + t));
}

void check_copies() {
  constexpr int kThreads = 64;
  // Above 48 KB, so that the launch opts in.
  constexpr size_t kBytes = 64 * 1024;
  Buffer<uint4> in(2 * kThreads), out(3 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = make_uint4(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
  launch(copy, dim3(1), dim3(kThreads), kBytes, nullptr, in.data, out.data);
  wait();
  const auto same = [](uint4 a, uint4 b) {
    return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
  };
  bool first = true, second = true, direct = true;
  for (int t = 0; t < kThreads; ++t) {
    const uint4 real = t % 2 == 1 ? in[kThreads + (t ^ 1)] : make_uint4(0, 0, 0, 0);
    first = first && same(out[t], in[kThreads - 1 - t]);
    second = second && same(out[kThreads + t], real);
    direct = direct && same(out[2 * kThreads + t], in[t]);
  }
  expect(first, "cp_async16, cp_async_wait<1>");
  expect(second, "cp_async16 of nothing, cp_async_wait<0>");
  expect(direct, "load16_streaming, store16_streaming");
}

// ---- arithmetic

template <class T>
__global__ void convert(const float* in, uint32_t* packed, float* back) {
  const uint32_t both = pack2<T>(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
  const float2 v = unpack2<T>(both);
  packed[threadIdx.x] = both;
  back[2 * threadIdx.x] = v.x;
  back[2 * threadIdx.x + 1] = v.y;
}

template <class T>
void check_conversions(const char* name) {
  constexpr int kCount = 1024;
  Buffer<float> in(kCount), back(kCount);
  Buffer<uint32_t> packed(kCount / 2);
  uint32_t state = 1;
  for (int i = 0; i < kCount; ++i) {
    state = state * 1664525u + 1013904223u;
    in[i] = ldexpf(static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f, i % 60 - 40);
  }
  const float edges[] = {0.0f,      -0.0f,    1.0f + 0x1p-8f, 1.0f + 0x1p-11f, 65504.0f, 65520.0f,
                         -INFINITY, 0x1p-24f, 0x1p-25f,       0x1p-130f,       3e38f,    INFINITY};
  for (size_t i = 0; i < sizeof edges / sizeof *edges; ++i) in[i] = edges[i];
  launch(convert<T>, dim3(1), dim3(kCount / 2), 0, nullptr, in.data, packed.data, back.data);
  wait();
  bool right = true;
  for (int i = 0; i < kCount; ++i) {
    const T expected = from_float<T>(in[i]);
    right = right && (packed[i / 2] >> 16 * (i % 2) & 0xffff) == expected.bits;
    right = right && bits_of_float(back[i]) == bits_of_float(to_float(expected));
  }
  expect(right, name);
}

__global__ void powers(const float* in, float* out) {
  out[threadIdx.x] = exp2_approx(in[threadIdx.x]);
}

void check_exp2() {
  constexpr int kCount = 1024;
  Buffer<float> in(kCount), out(kCount);
  for (int i = 0; i < kCount; ++i) in[i] = -126.0f + 0.25f * static_cast<float>(i);
  in[0] = -INFINITY, in[1] = -127.5f, in[2] = 0.0f;
  launch(powers, dim3(1), dim3(kCount), 0, nullptr, in.data, out.data);
  wait();
  bool right = out[0] == 0.0f && out[1] == 0.0f && out[2] == 1.0f;
  for (int i = 3; i < kCount; ++i) {
    const double truth = exp2(static_cast<double>(in[i]));
    right = right && (truth > 3.4e38 || fabs(out[i] - truth) <= truth * 0x1p-22);
  }
  expect(right, "exp2_approx");
}

// ---- warps, blocks, the grid

struct Triple {
  float x;
  int y;
  uint32_t z;
};

struct Results {
  Triple down, up, flipped, from;
  int sum;
  float largest;
};

__global__ void together(Results* out) {
  const int t = static_cast<int>(threadIdx.x), lane = lane_index();
  const Triple mine{0.5f * lane, lane, 100u + lane};
  Results r;
  r.down = shuffle_down(mine, 3);
  r.up = shuffle_up(mine, 5);
  r.flipped = shuffle_xor(mine, 9);
  r.from = shuffle_from(mine, 7);
  r.sum = block_sum<4>(t) + block_sum<4>(1);  // twice, at once
  r.largest = block_max<4>(static_cast<float>((t * 37) % 101));
  out[t] = r;
}

void check_warps() {
  constexpr int kThreads = 4 * kWarp;
  Buffer<Results> out(kThreads);
  launch(together, dim3(1), dim3(kThreads), 0, nullptr, out.data);
  wait();
  const auto is = [](Triple v, int lane) {
    return v.x == 0.5f * lane && v.y == lane && v.z == 100u + lane;
  };
  bool shuffles = true, reductions = true;
  for (int t = 0; t < kThreads; ++t) {
    const int lane = t % kWarp;
    shuffles = shuffles && is(out[t].down, lane + 3 < kWarp ? lane + 3 : lane) &&
               is(out[t].up, lane >= 5 ? lane - 5 : lane) && is(out[t].flipped, lane ^ 9) &&
               is(out[t].from, 7);
    reductions = reductions && out[t].sum == kThreads * (kThreads - 1) / 2 + kThreads &&
                 out[t].largest == 100.0f;
  }
  expect(shuffles, "shuffle_down, _up, _xor, _from");
  expect(reductions, "block_sum, block_max");
}

// Each block adds its number to what the one before it has released.
__global__ void chain(uint32_t* ticket, uint32_t* flags, uint32_t* sums) {
  const uint32_t number = draw_ticket(ticket);
  if (threadIdx.x != 0) return;
  uint32_t before = 0;
  if (number > 0) {
    wait_for_flag(flags + number - 1, 1);
    before = sums[number - 1];
  }
  sums[number] = before + number;
  store_release(flags + number, 1);
}

void check_tickets() {
  constexpr int kBlocks = 500;
  Buffer<uint32_t> memory(1 + 2 * kBlocks);
  memory[0] = 7;
  zero_on_stream(memory.data, sizeof(uint32_t), nullptr);
  launch(chain, dim3(kBlocks), dim3(kWarp), 0, nullptr, memory.data, memory.data + 1,
         memory.data + 1 + kBlocks);
  wait();
  bool right = true;
  for (uint32_t i = 0; i < kBlocks; ++i)
    right = right && memory[1 + kBlocks + i] == i * (i + 1) / 2;
  expect(right, "draw_ticket, wait_for_flag, store_release, zero_on_stream");
}

void check_limits() {
  expect(multiprocessors() > 0 && max_shared_bytes() >= 48 * 1024, "limits of the device");
  bool refused = false;
  try {
    launch(powers, dim3(1), dim3(2048), 0, nullptr, nullptr, nullptr);
  } catch (const std::runtime_error& error) {
    refused = strstr(error.what(), "conformance.cu:") != nullptr;
  }
  expect(refused, "a launch that cannot be says where");
}

}  // namespace
}  // namespace ic

int main() {
  using namespace ic;
  check_ldmatrix(false);
  check_ldmatrix(true);
  check_mma<BFloat16>("mma_m16n8k16 of bfloat16");
  check_mma<Float16>("mma_m16n8k16 of float16");
  check_copies();
  check_conversions<BFloat16>("pack2, unpack2 of bfloat16");
  check_conversions<Float16>("pack2, unpack2 of float16");
  check_exp2();
  check_warps();
  check_tickets();
  check_limits();
  if (broken == 0) puts("ok");
  return broken != 0;
}
