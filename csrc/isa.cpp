#include "isa.h"

#include <atomic>

#include "check.h"

namespace ic {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::x86_64_v4 : v3 ? Isa::x86_64_v3 : Isa::x86_64;
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

bool has_bfloat16_dot() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace ic
