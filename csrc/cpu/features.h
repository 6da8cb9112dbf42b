// The instruction set of the kernels: the best compiled one that this processor supports, or the one that
// DALLE_KERNELS_CPU_ISA names.
#pragma once
#include <string>
#include <vector>

namespace dk {
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);        // by the processor and the operating system
std::vector<Isa> isas_compiled();   // in ascending order
Isa isa_active();                   // determined once, on first use
std::string isa_request();          // the environment variable, "" if unset
}   // namespace dk
