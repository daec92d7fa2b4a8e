#include "shadow.h"

#ifdef IC_EMULATOR_CHECK

#include <algorithm>

namespace ic::emulator {

void Shadow::start(int threads) {
  threads_ = threads;
  clocks_.assign(static_cast<size_t>(threads) * threads, 0);
  for (int t = 0; t < threads; ++t) clock(t, t) = 1;
  bytes_.clear();
  readers_.clear();
  free_.clear();
}

void Shadow::resize(size_t bytes) { bytes_.resize(bytes); }

void Shadow::check_write_seen(const Byte& byte, int thread, size_t offset, const char* what,
                              Site site) {
  if (!byte.written || seen(thread, byte.writer, byte.write_clock)) return;
  fail_block("race in shared memory, byte " + std::to_string(offset) + ": " + what + " by thread " +
             std::to_string(thread) + " (" + name_of(site) + ") and write by thread " +
             std::to_string(byte.writer) + " (" + name_of(byte.write_site) +
             ") with no barrier between");
}

void Shadow::check_reads_seen(const Byte& byte, int thread, size_t offset, const char* what,
                              Site site) {
  const auto check = [&](int reader, Clock at) {
    if (seen(thread, reader, at)) return;
    fail_block("race in shared memory, byte " + std::to_string(offset) + ": " + what +
               " by thread " + std::to_string(thread) + " (" + name_of(site) +
               ") and read by thread " + std::to_string(reader) + " (" + name_of(byte.read_site) +
               ") with no barrier between");
  };
  if (!byte.was_read) return;
  if (byte.readers == kNone) return check(byte.reader, byte.read_clock);
  for (int t = 0; t < threads_; ++t)
    check(t, readers_[static_cast<size_t>(byte.readers) * threads_ + t]);
}

void Shadow::read(int thread, size_t offset, size_t size, Site site) {
  for (size_t i = offset; i < offset + size; ++i) {
    Byte& byte = bytes_.at(i);
    if (byte.in_flight)
      fail_block("read of shared memory, byte " + std::to_string(i) + " (" + name_of(site) +
                 "), into which a copy is in flight (" + name_of(byte.write_site) + ")");
    if (!byte.written)
      fail_block("read of uninitialised shared memory, byte " + std::to_string(i) + " (" +
                 name_of(site) + ")");
    check_write_seen(byte, thread, i, "read", site);
    const Clock now = clock(thread, thread);
    if (byte.readers != kNone) {
      readers_[static_cast<size_t>(byte.readers) * threads_ + thread] = now;
    } else if (byte.was_read && !seen(thread, byte.reader, byte.read_clock)) {
      if (free_.empty()) {
        free_.push_back(static_cast<uint32_t>(readers_.size() / threads_));
        readers_.resize(readers_.size() + threads_);
      }
      byte.readers = free_.back();
      free_.pop_back();
      Clock* row = &readers_[static_cast<size_t>(byte.readers) * threads_];
      std::fill(row, row + threads_, 0);
      row[byte.reader] = byte.read_clock;
      row[thread] = now;
    } else {
      byte.reader = static_cast<uint16_t>(thread);
      byte.read_clock = now;
    }
    byte.was_read = true;
    byte.read_site = site;
  }
}

void Shadow::set_writer(Byte& byte, int thread, Site site) {
  if (byte.readers != kNone) free_.push_back(byte.readers);
  byte.readers = kNone;
  byte.was_read = false;
  byte.written = true;
  byte.writer = static_cast<uint16_t>(thread);
  byte.write_clock = clock(thread, thread);
  byte.write_site = site;
}

void Shadow::write(int thread, size_t offset, size_t size, Site site) {
  for (size_t i = offset; i < offset + size; ++i) {
    Byte& byte = bytes_.at(i);
    if (byte.in_flight)
      fail_block("write to shared memory, byte " + std::to_string(i) + " (" + name_of(site) +
                 "), into which a copy is in flight (" + name_of(byte.write_site) + ")");
    check_write_seen(byte, thread, i, "write", site);
    check_reads_seen(byte, thread, i, "write", site);
    set_writer(byte, thread, site);
    byte.by_atomic = false;
  }
}

// Atomic accesses race with plain ones, not with each other.
void Shadow::atomic(int thread, size_t offset, size_t size, Site site) {
  for (size_t i = offset; i < offset + size; ++i) {
    Byte& byte = bytes_.at(i);
    if (!byte.written)
      fail_block("atomic access to uninitialised shared memory (" + name_of(site) + ")");
    if (!byte.by_atomic) check_write_seen(byte, thread, i, "atomic access", site);
    check_reads_seen(byte, thread, i, "atomic access", site);
    set_writer(byte, thread, site);
    byte.by_atomic = true;
  }
}

void Shadow::copy_started(int thread, size_t offset, size_t size, Site site) {
  write(thread, offset, size, site);
  for (size_t i = offset; i < offset + size; ++i) bytes_[i].in_flight = true;
}

void Shadow::copy_landed(int thread, size_t offset, size_t size) {
  for (size_t i = offset; i < offset + size; ++i) {
    bytes_[i].in_flight = false;
    bytes_[i].write_clock = clock(thread, thread);
  }
}

void Shadow::meet(const std::vector<int>& threads) {
  std::vector<Clock> all(threads_, 0);
  for (int t : threads)
    for (int of = 0; of < threads_; ++of) all[of] = std::max(all[of], clock(t, of));
  for (int t : threads) {
    std::copy(all.begin(), all.end(), &clock(t, 0));
    ++clock(t, t);
  }
}

}  // namespace ic::emulator

#endif
