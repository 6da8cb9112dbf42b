// Allocates cache-line aligned buffers from a workspace. With a null pointer it only counts, so that one constructor
// both sizes and lays out a kernel's buffers.
#pragma once
#include <cstdint>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dk {

struct Arena {
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)   // a poisoned line follows each buffer
    if (p)
      __asan_unpoison_memory_region(p, (base + used - p) * sizeof(float)), __asan_poison_memory_region(base + used, 64);
    used += 16;
#endif
    return p;
  }
  float* base;
  int64_t used = 0;
};

}   // namespace dk
