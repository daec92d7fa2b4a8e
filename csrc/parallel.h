// The CPU thread pool: parallel_rows(n, grain, threads, f) calls f(begin, end) on pieces of [0, n).
//
// Workers sleep between calls; pieces of `grain` rows are handed out dynamically, so a slow core
// does not hold up the others. Results must not depend on who ran a piece: every row's output is a
// function of that row alone. One call at a time owns the pool: a nested or concurrent one runs on
// its calling thread. A forked child starts a pool of its own.
#pragma once

#include <cstdint>

namespace ic {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

void parallel_range(int64_t n, int64_t grain, int threads, RangeFunction f, void* context);

// `grain`: rows in a piece; choose it so that a piece is worth about 20 microseconds or more.
template <class F>
void parallel_rows(int64_t n, int64_t grain, int threads, F&& f) {
  if (threads <= 1 || n <= grain) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  parallel_range(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<decltype(&f)>(context))(begin, end);
      },
      &f);
}

// Memory of the calling thread, in huge pages, kept from call to call: what a task packs and sums
// up in, overwritten by the thread's next call. On a page boundary.
float* scratch(int64_t floats);

}  // namespace ic
