// The kernels of sparse_attention. A (batch, head) is processed by one thread or by several. `prepare` converts its
// keys and values, in parts. Then work items are independent: `attend` computes one and stores a partial result, and
// `finish` merges those of a tile in order. The backward pass has two phases per tile: `queries` computes dQ and passes
// on the weights and their gradients, in a layout of the kernel's own; `keys` accumulates dK and dV from them in the
// order of the tiles, in parts that each own their rows. The arithmetic of an element does not depend on the split of a
// head.
//
// In the backward pass, the heads that share one head of K and V (grouped queries) are one unit of work, number
// `shared` of B * H / group. Their tiles follow one another: index i is tile i % tiles of the group's head i / tiles.
#pragma once
#include "common/plan.h"
#include "common/sparse_attention.h"

namespace dk {

constexpr int TILE_ROWS = 32, GROUP_COLUMNS = 8;   // tile shape of the CPU kernels' plans

// Buffer sizes in floats, multiples of 16. Buffers are aligned to cache lines and uninitialised.
struct SparseAttentionSpace {
  int64_t head;   // per (batch, head)
  // state passed between two phases: per work item from `attend` to `finish`, per tile from `queries` to `keys`
  int64_t carry;
  int64_t thread;   // per thread, during a call
};

struct SparseAttentionKernel {
  SparseAttentionSpace (*space)(const SparseAttentionArgs&);
  void (*prepare)(const SparseAttentionArgs&, int64_t bh, int64_t part, int64_t parts, float* head);
  void (*attend)(const SparseAttentionArgs&, int64_t bh, const Plan::Item& item, const float* head, float* carry,
                 float* thread);
  // `carry`: that of the tile's items, one after the other
  void (*finish)(const SparseAttentionArgs&, int64_t bh, int64_t tile, float* carry, int64_t items);
};

struct SparseAttentionBackwardKernel {
  SparseAttentionSpace (*space)(const SparseAttentionBackwardArgs&);
  void (*prepare)(const SparseAttentionBackwardArgs&, int64_t shared, int64_t part, int64_t parts, float* head);
  void (*queries)(const SparseAttentionBackwardArgs&, int64_t shared, int64_t index, const float* head, float* carry,
                  float* thread);
  // `carry`: that of the tiles at indices [begin, end), one after the other. Successive calls cover all; the last one
  // writes grad_k and grad_v.
  void (*keys)(const SparseAttentionBackwardArgs&, int64_t shared, int64_t begin, int64_t end, int64_t part,
               int64_t parts, float* head, const float* carry);
};

// The kernel for a problem's element type and head dim
typedef SparseAttentionKernel ChooseSparseAttention(const SparseAttentionArgs&);
typedef SparseAttentionBackwardKernel ChooseSparseAttentionBackward(const SparseAttentionBackwardArgs&);

}   // namespace dk
