// Run-time choice of the instruction set. Every <op>_cpu.cpp is compiled once per level into the
// namespace ic::<level>; IC_CPU_KERNEL declares them all and the function that picks one.
//
// Per-level files hold no inline code of the standard library: the linker would keep one copy of
// such a function for all levels, perhaps the one that this machine cannot run.
#pragma once

namespace ic {

// x86_64_amx has the code of x86_64_v4, which asks has_matrix_unit() where it multiplies.
#if defined(__x86_64__)
#define IC_ISA_LEVELS(X) X(x86_64) X(x86_64_v3) X(x86_64_v4) X(x86_64_amx)
#else
#define IC_ISA_LEVELS(X) X(native_isa)
#endif

// In increasing order, so that a level implies those before it.
enum class Isa : int {
#define IC_LEVEL(level) level,
  IC_ISA_LEVELS(IC_LEVEL)
#undef IC_LEVEL
};

Isa best_isa();             // what this machine runs; asks the kernel for the matrix unit
Isa current_isa();          // what the kernels use: best_isa() unless set
void set_isa(Isa);          // for tests; throws where the machine lacks it
const char* isa_name(Isa);  // "x86_64_v4"
bool has_bfloat16_dot();    // the machine multiplies bfloat16 pairs, so such products are fast
bool has_matrix_unit();     // current_isa() multiplies matrices of bfloat16 (Intel AMX)

}  // namespace ic

// Declares `void name(const Args&)` at every level, and ic::name, which calls the current one. The
// emulated module has the CUDA kernels only.
#if defined(IC_EMULATED)
#define IC_CPU_KERNEL(name, Args) \
  inline void name(const Args&) { __builtin_trap(); }
#elif defined(__x86_64__)
#define IC_CPU_KERNEL(name, Args)      \
  namespace x86_64 {                   \
  void name(const Args&);              \
  }                                    \
  namespace x86_64_v3 {                \
  void name(const Args&);              \
  }                                    \
  namespace x86_64_v4 {                \
  void name(const Args&);              \
  }                                    \
  inline void name(const Args& args) { \
    switch (current_isa()) {           \
      case Isa::x86_64:                \
        return x86_64::name(args);     \
      case Isa::x86_64_v3:             \
        return x86_64_v3::name(args);  \
      case Isa::x86_64_v4:             \
      case Isa::x86_64_amx:            \
        return x86_64_v4::name(args);  \
    }                                  \
  }
#else
#define IC_CPU_KERNEL(name, Args) \
  namespace native_isa {          \
  void name(const Args&);         \
  }                               \
  inline void name(const Args& args) { native_isa::name(args); }
#endif
