// The instruction set of the kernels: the fastest compiled one that this processor supports, or the one that
// DALLE_KERNELS_CPU_ISA names.
#pragma once
#include <string>
#include <vector>

namespace dk {
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);        // by the processor and the operating system
std::vector<Isa> isas_compiled();   // in ascending order
std::string isa_request();          // the environment variable, "" if unset

struct IsaChoice {
  Isa isa;
  std::string reason;
};
// Among instruction sets that a processor supports, in ascending order; `vendor`: as cpuid names it
IsaChoice choose_isa(const std::vector<Isa>& supported, const std::string& vendor, const std::string& request);
const IsaChoice& isa_choice();   // on this processor; determined once, on first use
}   // namespace dk
