#include "pages.h"

#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace ic {
namespace {

constexpr int64_t kPage = int64_t{2} << 20;
constexpr size_t kIdleBlocks = 8;

// Never destroyed: tensors may outlive whatever order the process ends in.
struct Store {
  std::mutex mutex;
  std::vector<Pages> idle;  // oldest first
};

Store& store() {
  static Store* const s = new Store;
  return *s;
}

Pages map_pages(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes + kPage);
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {nullptr, 0};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t at = (begin + kPage - 1) / kPage * kPage;
  if (at > begin) munmap(mapped, at - begin);
  munmap(reinterpret_cast<void*>(at + bytes), begin + kPage - at);
  void* data = reinterpret_cast<void*>(at);
  (void)madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return {data, bytes};
}

void unmap_pages(Pages p) { munmap(p.data, static_cast<size_t>(p.bytes)); }

}  // namespace

// The lock is only tried: a forked child may have inherited it locked, and then goes without.
Pages take_pages(int64_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  std::unique_lock<std::mutex> lock(store().mutex, std::try_to_lock);
  if (lock.owns_lock()) {
    std::vector<Pages>& idle = store().idle;
    auto best = idle.end();
    for (auto p = idle.begin(); p != idle.end(); ++p)
      if (p->bytes >= bytes && p->bytes / 2 <= bytes &&
          (best == idle.end() || p->bytes < best->bytes))
        best = p;
    if (best != idle.end()) {
      const Pages found = *best;
      idle.erase(best);
      return found;
    }
  }
  return map_pages(bytes);
}

void give_pages(Pages p) {
  std::unique_lock<std::mutex> lock(store().mutex, std::try_to_lock);
  if (!lock.owns_lock()) return unmap_pages(p);
  std::vector<Pages>& idle = store().idle;
  (void)madvise(p.data, static_cast<size_t>(p.bytes), MADV_FREE);
  idle.push_back(p);
  if (idle.size() <= kIdleBlocks) return;
  const Pages oldest = idle.front();
  idle.erase(idle.begin());
  lock.unlock();
  unmap_pages(oldest);
}

}  // namespace ic
