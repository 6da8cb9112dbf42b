#pragma once
#include "common/sparse_attention.h"

namespace dk {

constexpr int TILE_ROWS = 32, GROUP_COLUMNS = 8;   // the tile shape the CPU kernels read plans of

struct SparseAttentionKernel {
  int64_t (*workspace)(const SparseAttentionArgs&);   // floats
  void (*run)(const SparseAttentionArgs&, float* workspace, int64_t bh, int64_t tile_begin, int64_t tile_end);
};
struct SparseAttentionBackwardKernel {
  int64_t (*workspace)(const SparseAttentionBackwardArgs&);
  void (*run)(const SparseAttentionBackwardArgs&, float* workspace, int64_t bh);
};

}  // namespace dk
