#include "cpu/features.h"

#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dk {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

#if defined(__x86_64__)
static bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

// AMX tiles are 8 KB of thread state, which Linux saves only for processes that request it. The request fails on
// processors without AMX.
static bool tiles_permitted() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  static const bool permitted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
  return permitted;
}
#endif

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512_bf16) return avx512 && has_avx512_bf16();
  if (isa == Isa::amx) return avx512 && has_avx512_bf16() && tiles_permitted();
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
#if defined(DK_HAS_AVX512_BF16)
  list.push_back(Isa::avx512_bf16);
#endif
#if defined(DK_HAS_AMX)
  list.push_back(Isa::amx);
#endif
  return list;
}

std::string isa_request() {
  const char* asked = std::getenv("DALLE_KERNELS_CPU_ISA");
  return asked ? asked : "";
}

// Instruction sets that a vendor's processors have, but that are slower there than the one below. A table and not a
// measurement at start-up, so that results do not depend on timings.
struct Slower {
  Isa isa;
  const char *vendor, *reason;
};
constexpr Slower SLOWER[] = {
    // Xeon with AMX hidden, one thread, row attention over 256 + 32x32 tokens in bfloat16: forward 28.8 ms against 23.8
    // with avx512, backward 71.9 against 50.7. On Zen 4 avx512_bf16 is the faster one.
    {Isa::avx512_bf16, "GenuineIntel", "Intel's bfloat16 dot product has half the rate of a multiply-add"},
};

IsaChoice choose_isa(const std::vector<Isa>& supported, const std::string& vendor, const std::string& request) {
  IsaChoice best{Isa::portable, "the only one that this processor supports"};
  for (Isa isa : supported) {
    if (request == isa_name(isa)) return {isa, "DALLE_KERNELS_CPU_ISA"};
    const Slower* slower = nullptr;
    for (const Slower& entry : SLOWER)
      if (entry.isa == isa && vendor == entry.vendor) slower = &entry;
    if (slower) best.reason = std::string("faster than ") + isa_name(isa) + " here: " + slower->reason;
    else if (isa != Isa::portable) best = {isa, "the best that this processor supports"};
  }
  return best;
}

static std::string vendor() {
#if defined(__x86_64__)
  unsigned level = 0, name[3] = {};
  __get_cpuid(0, &level, &name[0], &name[2], &name[1]);
  return std::string(reinterpret_cast<const char*>(name), sizeof name);
#else
  return "";
#endif
}

const IsaChoice& isa_choice() {
  static const IsaChoice choice = [] {
    std::vector<Isa> supported;
    for (Isa isa : isas_compiled())
      if (isa_supported(isa)) supported.push_back(isa);
    return choose_isa(supported, vendor(), isa_request());
  }();
  return choice;
}

}   // namespace dk
