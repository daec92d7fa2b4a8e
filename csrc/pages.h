// Memory for large outputs on the CPU, which stays mapped from one call to the next.
//
// The system zeroes every page of a fresh mapping, and on a virtual machine may have to fetch it
// from the host: that takes several times as long as the kernel that fills it. So a block that
// comes back is kept for the next one of about its size. Blocks are whole huge pages of 2 MiB. The
// system may take the pages of an idle one (MADV_FREE) when memory is short.
#pragma once

#include <cstdint>

namespace ic {

struct Pages {
  void* data;
  int64_t bytes;
};

Pages take_pages(int64_t bytes);  // at least so many, their contents arbitrary; null: no memory
void give_pages(Pages);           // what take_pages gave, whole

}  // namespace ic
