// Cuts cache-line aligned buffers off a workspace. On a null pointer it only counts, so one constructor both sizes and lays out a kernel's buffers.
#pragma once
#include <cstdint>

namespace dk {

struct Arena {
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return p;
  }
  float* base;
  int64_t used = 0;
};

}  // namespace dk
