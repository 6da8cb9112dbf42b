// Running argmax per lane; ties go to the first.
#pragma once
#include "cpu/vec.h"

namespace dk::DK_ISA {

struct ArgMax {
  Vec best = splat(-INF);
  IVec index = {}, nan = {};   // nan: all bits set where one was seen

  DK_INLINE void take(Vec x, int32_t i) {
    const IVec better = x > best;
    best = better ? x : best;
    index = better ? i - IVec{} : index;
    nan |= x != x;
  }
};

}   // namespace dk::DK_ISA
