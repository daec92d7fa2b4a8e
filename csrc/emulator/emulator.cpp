// The emulator: fibers and their schedule, barriers, warp collectives, copies in flight, tensor
// cores.
#include "emulator.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "../dtype.h"
#include "shadow.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, size) ((void)(p), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(p, size) ((void)(p), (void)(size))
#endif

ic::emulator::dim3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee-saved registers on the running stack, its pointer in *saved, and goes on where
// `resume` was saved. System V x86-64; control words of the floating-point units are everywhere the
// same.
extern "C" void ic_switch_stack(void** saved, void* resume);
asm(R"(
.text
.hidden ic_switch_stack
.globl ic_switch_stack
.type ic_switch_stack, @function
ic_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ic_switch_stack, .-ic_switch_stack
)");

namespace ic::emulator {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN as float32, bfloat16 and float16

// ---- state

struct Copy {
  uint32_t to;
  const void* from;
  bool real;
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 index;
  State state = State::kReady;
  const void* waits_for = nullptr;
  const char* waits_in = "";
  Place waits_at;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// A collective that lanes of a warp have entered and not all those of its mask.
using Act = void (*)(void* const* lanes, uint32_t mask);
struct Collective {
  const char* name;
  uint32_t mask, arrived;
  Place at;
  Act act;
  bool orders_memory;
  void* lanes[kWarp];
};

struct Warp {
  uint32_t exited = 0;
  std::vector<Collective*> open;
};

struct Barrier {
  int yes = 0, result = 0;
  Place at;
  std::vector<int> arrived;
};

struct Array {
  size_t offset, bytes;
};

struct Block {
  int size = 0, live = 0, running = -1;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<int> ready;
  unsigned char* shared = nullptr;
  size_t dynamic_bytes = 0, static_bytes = 0, used_bytes = 0;
  std::map<const void*, Array> static_arrays;  // by their keys
  std::mt19937_64 random;
  Shadow shadow;
  std::string error;
  int idle_polls = 0;  // of flags, since a thread last got on
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  void* launcher_stack_pointer = nullptr;
  void* launcher_fake_stack = nullptr;
  const void* launcher_stack = nullptr;
  size_t launcher_stack_bytes = 0;
};

Schedule schedule;
Block block;
std::mutex one_launch;
constexpr size_t kSharedCapacity = kMaxSharedBytes + kMaxStaticSharedBytes;

Thread& me() { return block.threads[block.running]; }
Warp& my_warp() { return block.warps[block.running / kWarp]; }
[[maybe_unused]] bool on_fiber() { return block.running >= 0; }

// ---- fibers

void switch_stack(void** saved, void* resume, void** fake, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
  ic_switch_stack(saved, resume);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(on_fiber() ? me().fake_stack : block.launcher_fake_stack, nullptr,
                                  nullptr);
#else
  (void)fake, (void)stack, (void)bytes;
#endif
}

void enter(int thread, void** saved, void** fake) {
  block.running = thread;
  threadIdx = me().index;
  switch_stack(saved, me().stack_pointer, fake, me().stack, kStackBytes);
}

// Back to run(), for good if the thread is done or the block has failed.
void to_launcher(void** saved, void** fake) {
  block.running = -1;
  switch_stack(saved, block.launcher_stack_pointer, fake, block.launcher_stack,
               block.launcher_stack_bytes);
}

int next_ready() {
  std::vector<int>& ready = block.ready;
  if (ready.empty()) return -1;
  size_t at = 0;
  if (schedule.order == Order::kLast) at = ready.size() - 1;
  if (schedule.order == Order::kRandom) at = block.random() % ready.size();
  const int thread = ready[at];
  if (schedule.order == Order::kFirst) {
    ready.erase(ready.begin());
  } else {
    std::swap(ready[at], ready.back());
    ready.pop_back();
  }
  return thread;
}

// The running thread waits or is done: another one's turn.
void reschedule() {
  Thread& before = me();
  const int self = block.running, next = next_ready();
  if (next == self) return;
  void** fake = before.state == State::kDone ? nullptr : &before.fake_stack;
  if (next < 0) {
    to_launcher(&before.stack_pointer, fake);
  } else {
    enter(next, &before.stack_pointer, fake);
  }
}

void make_ready(int thread) {
  block.threads[thread].state = State::kReady;
  block.ready.push_back(thread);
}

void wait_for(const void* what, const char* in, const Place& at) {
  me().state = State::kWaiting;
  me().waits_for = what;
  me().waits_in = in;
  me().waits_at = at;
  reschedule();
}

// The others first, whatever the order.
void let_others_run() {
  make_ready(block.running);
  if (schedule.order == Order::kLast)
    std::rotate(block.ready.begin(), block.ready.end() - 1, block.ready.end());
  reschedule();
}

void finish_collective(int warp, Collective* c);

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!block.launcher_stack) {  // the first fiber comes from the launcher
    block.launcher_stack = stack;
    block.launcher_stack_bytes = bytes;
  }
#endif
  block.body(block.context);
  if (!me().open.empty() || !me().groups.empty())
    fail_block("a thread ended with copies in flight: cp_async_wait<0>() is missing");
  if (!block.barrier.arrived.empty())
    fail_block("barrier divergence: a thread ended while others wait at __syncthreads (" +
               name_of(block.barrier.at) + ")");
  me().state = State::kDone;
  --block.live;
  block.idle_polls = 0;
  Warp& warp = my_warp();
  warp.exited |= 1u << lane();
  for (Collective* c : std::vector<Collective*>(warp.open))
    if (c->mask >> lane() & 1) finish_collective(block.running / kWarp, c);
  reschedule();
  __builtin_unreachable();
}

void prepare(Thread& t) {
  ASAN_UNPOISON_MEMORY_REGION(t.stack, kStackBytes);  // of frames that a failed block left
  // As ic_switch_stack leaves it: six registers, then the address to return to. A function expects
  // the stack pointer 8 past a multiple of 16.
  void** top = reinterpret_cast<void**>(t.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
  t.state = State::kReady;
  t.fake_stack = nullptr;
  t.open.clear();
  t.groups.clear();
}

// ---- warp collectives

void finish_collective(int warp, Collective* c) {
  Warp& w = block.warps[warp];
  const uint32_t wanted = c->mask & ~w.exited;
  if ((c->arrived & wanted) != wanted) return;
  c->act(c->lanes, c->arrived);
  std::vector<int> met;
  for (int lane = 0; lane < kWarp; ++lane)
    if (c->arrived >> lane & 1) met.push_back(warp * kWarp + lane);
  if (c->orders_memory) block.shadow.meet(met);
  w.open.erase(std::find(w.open.begin(), w.open.end(), c));
  block.idle_polls = 0;
  for (int t : met)
    if (block.threads[t].state == State::kWaiting && block.threads[t].waits_for == c) make_ready(t);
  delete c;
}

std::string hex(uint32_t x) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

// The lanes of `mask` meet; the last one to come acts for all, on what each has passed.
void meet(const char* name, uint32_t mask, void* mine, Act act, bool orders_memory,
          const Place& at) {
  const int warp = block.running / kWarp, left = block.size - warp * kWarp;
  const uint32_t existing = left >= kWarp ? ~0u : (1u << left) - 1;
  if (!(mask >> lane() & 1))
    fail_block(std::string(name) + " (" + name_of(at) + "): the mask " + hex(mask) +
               " lacks the calling lane " + std::to_string(lane()));
  mask &= existing;
  Collective* c = nullptr;
  for (Collective* other : my_warp().open) {
    if (!(other->mask & mask)) continue;
    if (other->mask != mask || strcmp(other->name, name) != 0 || other->at.line() != at.line() ||
        other->at.column() != at.column())
      fail_block("warp divergence: lane " + std::to_string(lane()) + " is at " + name + " (" +
                 name_of(at) + "), mask " + hex(mask) + ", others at " + other->name + " (" +
                 name_of(other->at) + "), mask " + hex(other->mask));
    c = other;
  }
  if (!c) {
    c = new Collective{name, mask, 0, at, act, orders_memory, {}};
    my_warp().open.push_back(c);
  }
  c->lanes[lane()] = mine;
  c->arrived |= 1u << lane();
  const uint32_t wanted = mask & ~my_warp().exited;
  if ((c->arrived & wanted) == wanted) {
    finish_collective(warp, c);
  } else {
    wait_for(c, name, at);
  }
}

// ---- one block

std::string deadlock() {
  std::map<std::string, int> where;
  for (const Thread& t : block.threads)
    if (t.state == State::kWaiting)
      ++where[std::string(t.waits_in) + " (" + name_of(t.waits_at) + ")"];
  std::string text = "deadlock:";
  for (const auto& [place, threads] : where)
    text += " " + std::to_string(threads) + " threads at " + place + ",";
  return text + " " + std::to_string(block.size - block.live) + " ended";
}

void run_block() {
  block.live = block.size;
  block.running = -1;
  block.ready.clear();
  block.static_arrays.clear();
  block.barrier = {};
  block.warps.assign((block.size + kWarp - 1) / kWarp, {});
  block.used_bytes = (block.dynamic_bytes + 127) / 128 * 128;
  block.static_bytes = 0;
  block.error.clear();
  block.idle_polls = 0;
  block.launcher_stack = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(block.shared, kSharedCapacity);
  memset(block.shared, kPoison, kSharedCapacity);
  ASAN_POISON_MEMORY_REGION(block.shared + block.dynamic_bytes,
                            kSharedCapacity - block.dynamic_bytes);
  block.shadow.start(block.size);
  block.shadow.resize(block.used_bytes);
  for (int t = 0; t < block.size; ++t) {
    block.threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y,
                              t / (blockDim.x * blockDim.y)};
    prepare(block.threads[t]);
    block.ready.push_back(t);
  }
  enter(next_ready(), &block.launcher_stack_pointer, &block.launcher_fake_stack);
  if (block.error.empty() && block.live > 0) block.error = deadlock();
  for (Warp& warp : block.warps)
    for (Collective* c : warp.open) delete c;
}

void reserve(int threads) {
  if (!block.shared) {
    block.shared = static_cast<unsigned char*>(aligned_alloc(1024, kSharedCapacity));
    block.threads.reserve(kMaxThreads);
  }
  block.size = threads;
  while (static_cast<int>(block.threads.size()) < threads) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    IC_CHECK(stack != MAP_FAILED, "emulator: no memory for a stack");
    block.threads.emplace_back().stack = static_cast<unsigned char*>(stack);
  }
}

unsigned char* shared_at(uint32_t address, size_t bytes, const char* what, const Place& at) {
  if (address % bytes != 0)
    fail_block(std::string(what) + " (" + name_of(at) + "): shared address " +
               std::to_string(address) + " is not a multiple of " + std::to_string(bytes));
  if (address + bytes > block.used_bytes)
    fail_block(std::string(what) + " (" + name_of(at) + "): shared address " +
               std::to_string(address) + " is past the " + std::to_string(block.used_bytes) +
               " bytes of the block");
  return block.shared + address;
}

}  // namespace

// ---- errors

std::string name_of(const Place& at) {
  const char* slash = strrchr(at.file_name(), '/');
  return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

std::string name_of(const Site& site) {
  if (!site.pc) return name_of(site.at);
  Dl_info module;
  char text[256];
  snprintf(text, sizeof text, "address %#zx", static_cast<size_t>(site.pc));
  if (!dladdr(reinterpret_cast<void*>(site.pc), &module)) return text;
  // The address is that of the return from the inserted call; the one before belongs to the access.
  const size_t offset = site.pc - 1 - reinterpret_cast<uintptr_t>(module.dli_fbase);
  snprintf(text, sizeof text, "addr2line -s -e '%s' %#zx 2>/dev/null", module.dli_fname, offset);
  std::string line;
  if (FILE* pipe = popen(text, "r")) {
    char answer[256];
    if (fgets(answer, sizeof answer, pipe)) line = std::string(answer, strcspn(answer, " \n"));
    pclose(pipe);
  }
  if (!line.empty()) return line;
  snprintf(text, sizeof text, "offset %#zx", offset);
  return text;
}

void fail_block(const std::string& message) {
  char where[96];
  snprintf(where, sizeof where, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y,
           blockIdx.z, block.running);
  block.error = where + message;
  void* never_resumed;
  to_launcher(&never_resumed, nullptr);
  __builtin_unreachable();
}

// ---- launches

void set_schedule(Schedule s) { schedule = s; }

void run(dim3 grid, dim3 block_size, size_t shared_bytes, const char* file, int line,
         void (*body)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffff || shared_bytes > kMaxSharedBytes)
    fail(file, line, "launch: invalid configuration: grid ", grid.x, " x ", grid.y, " x ", grid.z,
         ", ", threads, " threads, ", shared_bytes, " bytes of shared memory");
  reserve(static_cast<int>(threads));
  block.dynamic_bytes = shared_bytes;
  block.body = body;
  block.context = context;
  blockDim = block_size;
  gridDim = grid;
  std::mt19937_64 random(schedule.seed);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i)
    order[i] = schedule.order == Order::kLast ? blocks - 1 - i : i;
  if (schedule.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
  for (uint64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    block.random.seed(random());
    run_block();
    if (!block.error.empty()) break;
  }
  ASAN_UNPOISON_MEMORY_REGION(block.shared, kSharedCapacity);
  if (!block.error.empty()) fail(file, line, "emulator: ", block.error, "; launched");
}

// ---- shared memory

unsigned char* dynamic_shared() { return block.shared; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  const auto [found, fresh] = block.static_arrays.try_emplace(key);
  Array& array = found->second;
  if (fresh) {
    constexpr size_t kGap = 64;  // so that the byte past an array is nobody's
    alignment = std::max<size_t>(alignment, 16);
    array.offset = (block.used_bytes + kGap + alignment - 1) / alignment * alignment;
    array.bytes = bytes;
    block.used_bytes = array.offset + bytes;
    block.static_bytes += bytes;
    if (block.static_bytes > kMaxStaticSharedBytes)
      fail_block("the SHARED_ARRAYs of a block are too large");
    if (block.static_bytes + block.dynamic_bytes > kMaxSharedBytes)
      fail_block("a block's SHARED_ARRAYs and dynamic shared memory are too large together");
    ASAN_UNPOISON_MEMORY_REGION(block.shared + array.offset, bytes);
    block.shadow.resize(block.used_bytes);
  }
  return block.shared + array.offset;
}

uint32_t smem_address(const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - block.shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(block.used_bytes))
    fail_block("smem_address of what is not in shared memory");
  return static_cast<uint32_t>(offset);
}

// ---- barriers, votes, shuffles

int lane() { return block.running % kWarp; }

int block_barrier(int yes, Place at) {
  Barrier& b = block.barrier;
  if (block.live < block.size)
    fail_block("barrier divergence: __syncthreads (" + name_of(at) + ") after " +
               std::to_string(block.size - block.live) + " threads have ended");
  if (b.arrived.empty()) {
    b.at = at;
    b.yes = 0;
  } else if (b.at.line() != at.line() || b.at.column() != at.column()) {
    fail_block("barrier divergence: __syncthreads (" + name_of(at) + ") while others wait at (" +
               name_of(b.at) + ")");
  }
  b.yes += yes != 0;
  b.arrived.push_back(block.running);
  if (static_cast<int>(b.arrived.size()) < block.size) {
    wait_for(&b, "__syncthreads", at);
    return b.result;
  }
  b.result = b.yes;
  block.shadow.meet(b.arrived);
  block.idle_polls = 0;
  std::vector<int> released = std::move(b.arrived);
  b.arrived.clear();
  for (int t : released)
    if (t != block.running) make_ready(t);
  return b.result;
}

void warp_barrier(uint32_t mask, Place at) {
  meet("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, true, at);
}

uint32_t ballot(uint32_t mask, bool yes, Place at) {
  struct Vote {
    bool yes;
    uint32_t all;
  } vote{yes, 0};
  const Act count = [](void* const* lanes, uint32_t present) {
    uint32_t all = 0;
    for (int i = 0; i < kWarp; ++i)
      if (present >> i & 1 && static_cast<Vote*>(lanes[i])->yes) all |= 1u << i;
    for (int i = 0; i < kWarp; ++i)
      if (present >> i & 1) static_cast<Vote*>(lanes[i])->all = all;
  };
  meet("a vote", mask, &vote, count, false, at);
  return vote.all;
}

uint64_t shuffle_bits(uint32_t mask, uint64_t value, int source, Place at) {
  struct Lane {
    uint64_t value, received;
    int source;
  } mine{value, value, source};
  const Act exchange = [](void* const* lanes, uint32_t present) {
    for (int i = 0; i < kWarp; ++i) {
      if (!(present >> i & 1)) continue;
      Lane* to = static_cast<Lane*>(lanes[i]);
      if (!(present >> to->source & 1))
        fail_block("a shuffle's lane " + std::to_string(i) + " reads lane " +
                   std::to_string(to->source) + ", which takes no part");
      to->received = static_cast<Lane*>(lanes[to->source])->value;
    }
  };
  meet("a shuffle", mask, &mine, exchange, false, at);
  return mine.received;
}

// ---- copies in flight

namespace {

void deliver(const Copy& c) {
  if (c.real) {
    memcpy(block.shared + c.to, c.from, 16);
  } else {
    memset(block.shared + c.to, 0, 16);
  }
}

}  // namespace

void copy16(uint32_t to, const void* from, bool real, Place at) {
  unsigned char* destination = shared_at(to, 16, "cp_async16", at);
  if (real && reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail_block("cp_async16 (" + name_of(at) + "): the global address is not a multiple of 16");
  block.shadow.copy_started(block.running, to, 16, at);
  const Copy copy{to, from, real};
  const bool early = schedule.arrival == Arrival::kEarly ||
                     (schedule.arrival == Arrival::kRandom && block.random() % 2 == 0);
  if (early) {
    deliver(copy);
  } else {
    memset(destination, kPoison, 16);
  }
  me().open.push_back(copy);
}

void copy_commit() {
  me().groups.push_back(std::move(me().open));
  me().open.clear();
}

void copy_wait(int pending) {
  auto& groups = me().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& c : groups.front()) {
      block.shadow.copy_landed(block.running, c.to, 16);
      deliver(c);
    }
    groups.erase(groups.begin());
  }
}

// ---- tensor cores

void load_matrix(uint32_t (&tiles)[4], uint32_t row, bool transposed, Place at) {
  struct Lane {
    uint32_t* tiles;
    uint32_t row;
    bool transposed;
    Place at;
  } mine{tiles, row, transposed, at};
  const Act load = [](void* const* lanes, uint32_t) {
    const int first = block.running / kWarp * kWarp;
    for (int tile = 0; tile < 4; ++tile) {
      uint16_t element[8][8];
      for (int r = 0; r < 8; ++r) {
        const Lane* from = static_cast<Lane*>(lanes[tile * 8 + r]);
        memcpy(element[r], shared_at(from->row, 16, "ldmatrix", from->at), 16);
        block.shadow.read(first + tile * 8 + r, from->row, 16, from->at);
      }
      for (int i = 0; i < kWarp; ++i) {
        Lane* to = static_cast<Lane*>(lanes[i]);
        const int line = i / 4, at = i % 4 * 2;
        const uint16_t low = to->transposed ? element[at][line] : element[line][at];
        const uint16_t high = to->transposed ? element[at + 1][line] : element[line][at + 1];
        to->tiles[tile] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  };
  meet(transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", ~0u, &mine, load, false, at);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16,
                  Place at) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    bool bfloat16;
  } mine{d, a, {b0, b1}, bfloat16};
  const Act multiply = [](void* const* lanes, uint32_t) {
    float a[16][16], b[16][8];
    for (int i = 0; i < kWarp; ++i) {
      const Lane* lane = static_cast<Lane*>(lanes[i]);
      const int group = i / 4, pair = i % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const auto element = [&](uint32_t both) {
          const uint16_t bits = static_cast<uint16_t>(both >> 16 * half);
          return lane->bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
        };
        for (int r = 0; r < 4; ++r)
          a[group + r % 2 * 8][pair + r / 2 * 8 + half] = element(lane->a[r]);
        for (int r = 0; r < 2; ++r) b[pair + r * 8 + half][group] = element(lane->b[r]);
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      const Lane* lane = static_cast<Lane*>(lanes[i]);
      for (int r = 0; r < 4; ++r) {
        const int row = i / 4 + r / 2 * 8, column = i % 4 * 2 + r % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lane->d[r] += sum;
      }
    }
  };
  meet(bfloat16 ? "mma of bfloat16" : "mma of float16", ~0u, &mine, multiply, false, at);
}

// ---- between blocks

// Earlier blocks have run to their end, so a flag is set already or by another thread of this
// block. When all that can run have polled in vain, nobody is left to set it.
void wait_for_flag(const uint32_t* flag, uint32_t value, Place at) {
  while (*static_cast<const volatile uint32_t*>(flag) < value) {
    if (++block.idle_polls > 4 * block.size)
      fail_block("deadlock: wait_for_flag (" + name_of(at) +
                 ") for a flag that no earlier ticket sets");
    let_others_run();
  }
  block.idle_polls = 0;
}

void atomic_access(const void* p, size_t size) {
  let_others_run();
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - block.shared;
  if (offset >= 0 && offset < static_cast<ptrdiff_t>(kSharedCapacity))
    block.shadow.atomic(block.running, offset, size,
                        Site(reinterpret_cast<uintptr_t>(__builtin_return_address(0))));
}

}  // namespace ic::emulator

// ---- what -fsanitize=thread inserts before each load and store of a kernel

#ifdef IC_EMULATOR_CHECK

namespace ic::emulator {

static void access(const void* p, size_t size, bool write, void* pc) {
  if (!on_fiber()) return;
  const ptrdiff_t at = static_cast<const unsigned char*>(p) - block.shared;
  if (at < 0 || at >= static_cast<ptrdiff_t>(kSharedCapacity)) return;
  const Site site(reinterpret_cast<uintptr_t>(pc));
  const size_t offset = at;
  bool inside = offset + size <= block.dynamic_bytes;
  for (const auto& [key, array] : block.static_arrays)
    inside = inside || (offset >= array.offset && offset + size <= array.offset + array.bytes);
  if (!inside)
    fail_block(std::string(write ? "write" : "read") + " outside every shared array (" +
               name_of(site) + ")");
  if (write) {
    block.shadow.write(block.running, offset, size, site);
  } else {
    block.shadow.read(block.running, offset, size, site);
  }
}

}  // namespace ic::emulator

#define IC_TSAN_ACCESS(size)                                           \
  void __tsan_read##size(void* p) {                                    \
    ic::emulator::access(p, size, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_write##size(void* p) {                                   \
    ic::emulator::access(p, size, true, __builtin_return_address(0));  \
  }                                                                    \
  void __tsan_unaligned_read##size(void* p) {                          \
    ic::emulator::access(p, size, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_unaligned_write##size(void* p) {                         \
    ic::emulator::access(p, size, true, __builtin_return_address(0));  \
  }                                                                    \
  void __tsan_volatile_read##size(void* p) {                           \
    ic::emulator::access(p, size, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_volatile_write##size(void* p) {                          \
    ic::emulator::access(p, size, true, __builtin_return_address(0));  \
  }

extern "C" {
IC_TSAN_ACCESS(1)
IC_TSAN_ACCESS(2)
IC_TSAN_ACCESS(4)
IC_TSAN_ACCESS(8)
IC_TSAN_ACCESS(16)
void __tsan_read_range(void* p, size_t size) {
  ic::emulator::access(p, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  ic::emulator::access(p, size, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {  // guards of function-local statics
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}

#endif
