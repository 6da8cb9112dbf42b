#include "cpu/features.h"

#include <cstdlib>

namespace dk {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::portable;
}

std::vector<Isa> isas_compiled() {
  std::vector<Isa> list{Isa::portable};
#if defined(DK_HAS_AVX2)
  list.push_back(Isa::avx2);
#endif
#if defined(DK_HAS_AVX512)
  list.push_back(Isa::avx512);
#endif
  return list;
}

std::string isa_request() {
  const char* asked = std::getenv("DALLE_KERNELS_CPU_ISA");
  return asked ? asked : "";
}

Isa isa_active() {
  static const Isa active = [] {
    Isa best = Isa::portable;
    for (Isa isa : isas_compiled()) {
      if (!isa_supported(isa)) continue;
      if (isa_request() == isa_name(isa)) return isa;
      best = isa;
    }
    return best;
  }();
  return active;
}

}  // namespace dk
