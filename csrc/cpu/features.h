// Which instruction set the kernels run on: the best that was compiled and that this processor has, or the one
// DALLE_KERNELS_CPU_ISA names.
#pragma once
#include <string>
#include <vector>

namespace dk {
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);        // by this processor, and the system permits it
std::vector<Isa> isas_compiled();   // in rising order
Isa isa_active();                   // read once, at the first use
std::string isa_request();          // the environment variable, "" where unset
}   // namespace dk
