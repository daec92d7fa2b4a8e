// What every byte of a block's shared memory has seen: who wrote it, who read it, whether a copy
// into it is in flight. Two accesses by different threads, one of them a write, must be ordered by
// barriers: each thread has a vector clock that barriers join (as FastTrack, Flanagan and Freund
// 2009).
//
// Only the check build has it (IC_EMULATOR_CHECK): there the kernels are compiled with
// -fsanitize=thread, and the calls that this inserts before every load and store end here instead
// of in libtsan.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "emulator.h"

namespace ic::emulator {

// Where an access was made: a primitive's place in the source, or an address in the code.
struct Site {
  uintptr_t pc = 0;
  Place at{};
  Site() = default;
  Site(uintptr_t pc) : pc(pc) {}
  Site(Place at) : at(at) {}
};

std::string name_of(const Place&);  // "gae.cu:120"
std::string name_of(const Site&);

#ifdef IC_EMULATOR_CHECK

class Shadow {
 public:
  void start(int threads);
  void resize(size_t bytes);  // shared memory that this block has so far
  void read(int thread, size_t offset, size_t size, Site);
  void write(int thread, size_t offset, size_t size, Site);
  void atomic(int thread, size_t offset, size_t size, Site);
  void copy_started(int thread, size_t offset, size_t size, Site);
  void copy_landed(int thread, size_t offset, size_t size);
  void meet(const std::vector<int>& threads);  // they have all reached one barrier

 private:
  using Clock = uint32_t;
  static constexpr uint32_t kNone = ~0u;

  struct Byte {
    Clock write_clock = 0, read_clock = 0;
    uint16_t writer = 0, reader = 0;
    uint32_t readers = kNone;  // clocks of all readers, once two of them are not ordered
    bool written = false, was_read = false, in_flight = false, by_atomic = false;
    Site write_site, read_site;
  };

  Clock& clock(int thread, int of) { return clocks_[static_cast<size_t>(thread) * threads_ + of]; }
  bool seen(int thread, int of, Clock at) { return thread == of || at <= clock(thread, of); }
  void check_write_seen(const Byte&, int thread, size_t offset, const char* what, Site);
  void check_reads_seen(const Byte&, int thread, size_t offset, const char* what, Site);
  void set_writer(Byte&, int thread, Site);

  int threads_ = 0;
  std::vector<Clock> clocks_;  // (threads, threads)
  std::vector<Byte> bytes_;
  std::vector<Clock> readers_;  // rows of `threads_`
  std::vector<uint32_t> free_;
};

#else

class Shadow {
 public:
  void start(int) {}
  void resize(size_t) {}
  void read(int, size_t, size_t, Site) {}
  void write(int, size_t, size_t, Site) {}
  void atomic(int, size_t, size_t, Site) {}
  void copy_started(int, size_t, size_t, Site) {}
  void copy_landed(int, size_t, size_t) {}
  void meet(const std::vector<int>&) {}
};

#endif

// Ends the running block with an error. For the emulator and the checker, on a fiber.
[[noreturn]] void fail_block(const std::string& message);

}  // namespace ic::emulator
