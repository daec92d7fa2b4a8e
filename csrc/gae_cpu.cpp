// gae on the CPU: rows run in parallel, sixteen steps of one at a time.
#include "gae.h"
#include "gae_row.h"
#include "parallel.h"

namespace ic::IC_ISA {

void gae_cpu(const GaeArgs& a) {
  // Packed rows are short as a rule; 4096 steps are about 15 us.
  const int64_t per_row = a.cu_seqlens ? a.steps / (a.rows + 1) + 1 : a.steps;
  parallel_rows(a.rows, 4096 / (per_row + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) gae_row(a, row);
  });
  gae_clear_gaps(a);
}

}  // namespace ic::IC_ISA
