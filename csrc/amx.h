// The matrix unit of Intel's CPUs (AMX): eight registers, each up to 16 rows of 64 bytes.
//
// Written as instructions because x86-64-v4 does not contain them: has_matrix_unit() says whether
// they may run. The compiler knows nothing of these registers and never uses them.
#pragma once

#include "simd.h"

namespace ic::IC_ISA::amx {

// Shapes of the eight registers, as ldtilecfg reads them.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Takes about 120 ns; all registers become 0.
IC_INLINE void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
IC_INLINE void release() { asm volatile("tilerelease"); }

template <int kRegister>
IC_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kRegister));
}

// Rows are `ld` words apart.
template <int kRegister>
IC_INLINE void load(const float* from, int64_t ld) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(ld * 4), "i"(kRegister)
               : "memory");
}
template <int kRegister>
IC_INLINE void store(float* to, int64_t ld) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(ld * 4), "i"(kRegister)
               : "memory");
}

// c[m][n] += the sum of a(m, k) b(k, n) over words k of two bfloat16: of the earlier elements and
// of the later ones, each one chain of fused multiply-adds, the two added up.
template <int kC, int kA, int kB>
IC_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace ic::IC_ISA::amx
