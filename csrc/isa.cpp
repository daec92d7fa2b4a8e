#include "isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "check.h"

namespace ic {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

#if defined(__x86_64__)
// The matrix unit, and the kernel's permission for this process to use its registers.
bool ask_for_matrix_unit() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  static const bool amx = v4 && ask_for_matrix_unit();
  return amx ? Isa::x86_64_amx : v4 ? Isa::x86_64_v4 : v3 ? Isa::x86_64_v3 : Isa::x86_64;
#else
  return Isa::native_isa;
#endif
}

Isa current_isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == kUnset) {
    level = static_cast<int>(best_isa());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa(Isa isa) {
  IC_CHECK(isa <= best_isa(), "set_isa: this machine runs up to ", isa_name(best_isa()), ", got ",
           isa_name(isa));
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
#define IC_LEVEL(level) \
  case Isa::level:      \
    return #level;
    IC_ISA_LEVELS(IC_LEVEL)
#undef IC_LEVEL
  }
  return "unknown";
}

bool has_matrix_unit() {
#if defined(__x86_64__)
  return current_isa() == Isa::x86_64_amx;
#else
  return false;
#endif
}

bool has_bfloat16_dot() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace ic
