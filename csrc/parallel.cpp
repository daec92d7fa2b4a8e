#include "parallel.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace ic {
namespace {

struct Job {
  RangeFunction f;
  void* context;
  int64_t n;
  int64_t grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      f(context, begin, std::min(n, begin + grain));
    }
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    if (inside_) return job.work();  // first, for this thread may hold the lock
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return job.work();
    {
      std::lock_guard<std::mutex> lock(state_);
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
      job_ = &job;
      seats_ = helpers;
    }
    if (helpers == 1) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    inside_ = true;
    job.work();
    inside_ = false;
    {  // Whoever has not sat down by now is not waited for.
      std::lock_guard<std::mutex> lock(state_);
      seats_ = 0;
      job_ = nullptr;
    }
    spin_until([this] { return busy_ == 0; });
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    inside_ = true;
    for (;;) {
      spin_until([this] { return seats_ > 0; });
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [this] { return seats_ > 0; });
      Job* job = job_;
      --seats_;
      ++busy_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  // Looks for a short while before going to sleep: to be woken takes 50 us in a virtual machine,
  // and the next call of a model, or the end of the last piece, is often nearer than that.
  template <class Condition>
  static void spin_until(const Condition& holds) {
    constexpr auto kLong = std::chrono::microseconds(50);
    const auto end = std::chrono::steady_clock::now() + kLong;
    while (std::chrono::steady_clock::now() < end)
      for (int i = 0; i < 32; ++i) {
        if (holds()) return;
        pause();
      }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex owner_;  // held by the one call that has the pool
  std::mutex state_;  // guards changes of what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  std::atomic<int> seats_{0};  // helpers that may still join the job
  std::atomic<int> busy_{0};   // helpers at work
  int workers_ = 0;
  static thread_local bool inside_;  // this thread runs a piece: a nested call stays on it
};

thread_local bool Pool::inside_ = false;

// Never destroyed: its threads are asleep in it when the process ends. A forked child has none of
// the threads and perhaps a locked mutex, so it gets a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& get_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p) return *p;
  static const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)at_fork;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

void parallel_range(int64_t n, int64_t grain, int threads, RangeFunction f, void* context) {
  Job job{f, context, n, std::max<int64_t>(1, grain)};
  const int64_t pieces = (n + job.grain - 1) / job.grain;
  get_pool().run(job, static_cast<int>(std::min<int64_t>(threads, pieces) - 1));
}

float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  constexpr size_t kPage = size_t{2} << 20;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  if (bytes > size) {
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    size = 0;
    memory.reset();
    memory.reset(static_cast<float*>(std::aligned_alloc(kPage, rounded)));
    if (!memory) throw std::bad_alloc();
    (void)madvise(memory.get(), rounded, MADV_HUGEPAGE);
    size = rounded;
  }
  return memory.get();
}

}  // namespace ic
