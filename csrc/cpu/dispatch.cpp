#include "cpu/features.h"
#include "cpu/kernels.h"

namespace dk {

namespace portable {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512_bf16 {
const Kernels& table();
}
namespace amx {
const Kernels& table();
}

const Kernels& kernels() {
  switch (isa_choice().isa) {
#if defined(DK_HAS_AMX)
    case Isa::amx:
      return amx::table();
#endif
#if defined(DK_HAS_AVX512_BF16)
    case Isa::avx512_bf16:
      return avx512_bf16::table();
#endif
#if defined(DK_HAS_AVX512)
    case Isa::avx512:
      return avx512::table();
#endif
#if defined(DK_HAS_AVX2)
    case Isa::avx2:
      return avx2::table();
#endif
    default:
      return portable::table();
  }
}

}   // namespace dk
