// The kernels of sparse_attention. A (batch, head) is done by one thread, or by many: `prepare` writes what its tiles
// read, in parts; then the plan's work items are independent: `attend` does one and leaves a partial result, and
// `finish` merges those of a tile, in order. A backward pass goes over the tiles twice: `queries` gives dQ of a tile
// and leaves its weights and their gradients, in a form of the kernel's own; from them `keys` adds to dK and dV, in the
// order of the tiles, in parts that each own what they write. However a head is cut, the arithmetic of every element is
// the same.
#pragma once
#include "common/plan.h"
#include "common/sparse_attention.h"

namespace dk {

constexpr int TILE_ROWS = 32, GROUP_COLUMNS = 8;   // the tile shape the CPU kernels read plans of

// Floats, in multiples of 16, of buffers that begin at a cache line and are not cleared.
struct SparseAttentionSpace {
  int64_t head;   // of a (batch, head)
  // state passed between two phases: of a work item, from `attend` to `finish`; of a tile, from `queries` to `keys`
  int64_t carry;
  int64_t thread;   // of a thread, during a call
};

struct SparseAttentionKernel {
  SparseAttentionSpace (*space)(const SparseAttentionArgs&);
  void (*prepare)(const SparseAttentionArgs&, int64_t bh, int64_t part, int64_t parts, float* head);
  void (*attend)(const SparseAttentionArgs&, int64_t bh, const Plan::Item& item, const float* head, float* carry,
                 float* thread);
  // `carry`: of its items, one after the other
  void (*finish)(const SparseAttentionArgs&, int64_t bh, int64_t tile, float* carry, int64_t items);
};

struct SparseAttentionBackwardKernel {
  SparseAttentionSpace (*space)(const SparseAttentionBackwardArgs&);
  void (*prepare)(const SparseAttentionBackwardArgs&, int64_t bh, int64_t part, int64_t parts, float* head);
  void (*queries)(const SparseAttentionBackwardArgs&, int64_t bh, int64_t tile, const float* head, float* carry,
                  float* thread);
  // `carry`: of tiles [tile_begin, tile_end), one after the other. Successive calls cover all tiles; the last one
  // writes grad_k and grad_v.
  void (*keys)(const SparseAttentionBackwardArgs&, int64_t bh, int64_t tile_begin, int64_t tile_end, int64_t part,
               int64_t parts, float* head, const float* carry);
};

// The kernel for a problem's element type and head dim
typedef SparseAttentionKernel ChooseSparseAttention(const SparseAttentionArgs&);
typedef SparseAttentionBackwardKernel ChooseSparseAttentionBackward(const SparseAttentionBackwardArgs&);

}   // namespace dk
