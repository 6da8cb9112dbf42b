// sparse_attention, forward and backward: checks the plan, allocates, spreads (batch, head, work items or tiles) over threads. Arguments were checked in Python.
#include <vector>

#include "common/plan.h"
#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

static void check_plan(const Tensor& plan, int64_t n) {
  const int32_t* p = static_cast<const int32_t*>(plan.data_ptr());
  STD_TORCH_CHECK(plan.numel() >= Plan::HEADER && p[Plan::MAGIC] == Plan::MAGIC_VALUE && p[Plan::VERSION] == Plan::VERSION_VALUE && p[Plan::TOTAL] == plan.numel(),
                  "not a plan of this version");
  STD_TORCH_CHECK(p[Plan::N] == n && p[Plan::TILE_ROWS] == TILE_ROWS && p[Plan::GROUP_COLUMNS] == GROUP_COLUMNS,
                  "the plan was compiled for another length or tile shape");
}

// How heads are done: the last heads % threads (all, where there are fewer than threads) by all threads together, the others by one thread each.
struct Division {
  explicit Division(const SparseAttentionArgs& a) {
    constexpr int64_t PRODUCTS = 1 << 18;   // worth waking a thread for: some 10 us. What a row costs beside its products is as 16 more columns and dims.
    const Plan plan(a.plan);
    const int64_t heads = a.batch * a.heads, products = heads * plan.tiles() * TILE_ROWS * (plan[Plan::MOST_COLUMNS] + 16) * (a.head_dim + 16);
    threads = std::clamp<int64_t>(products / PRODUCTS, 1, torch::stable::get_num_threads());
    together = heads % threads;
    apart = heads - together;
  }
  int64_t pieces(int64_t per_thread) const { return (per_thread * threads + together - 1) / together; }   // of a head, for each thread to have some
  int64_t threads, apart, together;
};

// The tiles from begin to end, the heaviest first, so that no thread begins a heavy one when the others are done
static std::vector<int64_t> heaviest_first(const Plan& plan, int64_t begin, int64_t end) {
  std::vector<int64_t> tiles, groups(plan.tiles());
  for (int64_t t = begin; t < std::min<int64_t>(end, plan.tiles()); ++t) {
    tiles.push_back(t);
    for (int64_t e = plan.begin(t); e < plan.begin(t + 1); ++e) groups[t] += plan.entry(e).groups;
  }
  std::stable_sort(tiles.begin(), tiles.end(), [&](int64_t a, int64_t b) { return groups[a] > groups[b]; });
  return tiles;
}

template <class Args, class Kernel>
static void prepare_together(const Args& a, const Kernel& kernel, const Division& heads, float* shared, int64_t head_floats) {
  const int64_t parts = heads.pieces(1);
  for_each_item(heads.together * parts, 0, [&](int64_t item, float*) {
    const int64_t head = item / parts;
    kernel.prepare(a, heads.apart + head, item % parts, parts, shared + head * head_floats);
  }, heads.threads);
}

// The first heads, by one thread each: tile by tile
static void forward_apart(const SparseAttentionArgs& a, const SparseAttentionKernel& kernel, const Division& heads) {
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.plan);
  std::vector<Plan::Item> items;
  for (int64_t i = 0; i < plan[Plan::ITEMS]; ++i) items.push_back(plan.item(i));
  std::sort(items.begin(), items.end(), [](const Plan::Item& x, const Plan::Item& y) { return x.begin < y.begin; });
  const int64_t left_floats = std::max(1, plan[Plan::PARTIALS]) * space.left;   // more than a tile leaves; what is not touched takes no memory
  for_each_item(heads.apart, space.head + left_floats + space.thread, [&](int64_t bh, float* head) {
    float *left = head + space.head, *thread = left + left_floats;
    kernel.prepare(a, bh, 0, 1, head);
    for (auto item = items.begin(); item != items.end();) {
      const int32_t tile = item->tile;
      int64_t count = 0;
      for (; item != items.end() && item->tile == tile; ++item) kernel.attend(a, bh, *item, head, left + count++ * space.left, thread);
      kernel.finish(a, bh, tile, left, count);
    }
  }, heads.threads);
}

// The last heads together: all work items, the heaviest first, then the tiles that several items share
static void forward_together(const SparseAttentionArgs& a, const SparseAttentionKernel& kernel, const Division& heads) {
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.plan);
  const int64_t head_floats = space.head + plan[Plan::PARTIALS] * space.left;
  float* shared = workspace<Buffer::shared>(heads.together * head_floats);
  if (space.head > 0) prepare_together(a, kernel, heads, shared, head_floats);
  for_each_item(heads.together * plan[Plan::ITEMS], space.left + space.thread, [&](int64_t i, float* own) {
    const int64_t bh = heads.apart + i % heads.together;
    const Plan::Item item = plan.item(i / heads.together);
    float *head = shared + i % heads.together * head_floats, *left = item.partial < 0 ? own : head + space.head + item.partial * space.left;
    kernel.attend(a, bh, item, head, left, own + space.left);
    if (item.partial < 0) kernel.finish(a, bh, item.tile, left, 1);
  }, heads.threads);
  for_each_item(heads.together * plan[Plan::SPLIT_TILES], 0, [&](int64_t i, float*) {
    const Plan::SplitTile split = plan.split_tile(i / heads.together);
    float* left = shared + i % heads.together * head_floats + space.head + split.first * space.left;
    kernel.finish(a, heads.apart + i % heads.together, split.tile, left, split.count);
  }, heads.threads);
}

static std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor, std::vector<int64_t>, double scale) {
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, torch::headeronly::ScalarType::Float);
  check_plan(plan, q.size(2));
  const SparseAttentionArgs a = sparse_attention_args(q, k, v, out, lse, plan, scale);
  const SparseAttentionKernel kernel = kernels().sparse_attention(a);
  const Division heads(a);
  if (heads.apart) forward_apart(a, kernel, heads);
  if (heads.together) forward_together(a, kernel, heads);
  return {out, lse};
}

// The last heads together: rounds of tiles, of which `queries` and then `keys` run in parallel. What a round leaves should stay in the threads' caches.
static void backward_together(const SparseAttentionBackwardArgs& a, const SparseAttentionBackwardKernel& kernel, const Division& heads) {
  constexpr int64_t LEFT_FLOATS = 1 << 18;   // of a thread: 1 MB
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.forward.plan);
  const int64_t fitting = heads.threads * LEFT_FLOATS / (heads.together * space.left), parts = heads.pieces(2);
  const int64_t round = std::min<int64_t>(plan.tiles(), std::max(heads.pieces(4), fitting));
  float *shared = workspace<Buffer::shared>(heads.together * (space.head + round * space.left)), *left = shared + heads.together * space.head;
  prepare_together(a, kernel, heads, shared, space.head);
  for (int64_t begin = 0; begin < plan.tiles(); begin += round) {
    const std::vector<int64_t> order = heaviest_first(plan, begin, begin + round);
    const int64_t count = order.size();
    for_each_item(heads.together * count, space.thread, [&](int64_t item, float* thread) {
      const int64_t head = item % heads.together, tile = order[item / heads.together];
      kernel.queries(a, heads.apart + head, tile, shared + head * space.head, left + (head * round + tile - begin) * space.left, thread);
    }, heads.threads);
    for_each_item(heads.together * parts, 0, [&](int64_t item, float*) {
      const int64_t head = item / parts;
      kernel.keys(a, heads.apart + head, begin, begin + count, item % parts, parts, shared + head * space.head, left + head * round * space.left);
    }, heads.threads);
  }
}

static std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan, Tensor,
                                                                    std::vector<int64_t>, double scale) {
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k), grad_v = torch::stable::empty_like(v);
  SparseAttentionBackwardArgs a;
  check_plan(plan, q.size(2));
  a.forward = sparse_attention_args(q, k, v, out, lse, plan, scale);
  a.grad_out = grad_out.data_ptr(), a.grad_q = grad_q.data_ptr(), a.grad_k = grad_k.data_ptr(), a.grad_v = grad_v.data_ptr();
  a.grad_out_strides = strides_of(grad_out), a.grad_q_strides = strides_of(grad_q);
  a.grad_k_strides = strides_of(grad_k), a.grad_v_strides = strides_of(grad_v);
  const SparseAttentionBackwardKernel kernel = kernels().sparse_attention_backward(a);
  const SparseAttentionSpace space = kernel.space(a);
  const Division heads(a.forward);
  const int64_t tiles = Plan(a.forward.plan).tiles();
  for_each_item(heads.apart, space.head + space.left + space.thread, [&](int64_t bh, float* head) {
    float *left = head + space.head, *thread = left + space.left;
    kernel.prepare(a, bh, 0, 1, head);
    for (int64_t t = 0; t < tiles; ++t) {
      kernel.queries(a, bh, t, head, left, thread);
      kernel.keys(a, bh, t, t + 1, 0, 1, head, left);
    }
  }, heads.threads);
  if (heads.together) backward_together(a, kernel, heads);
  return {grad_q, grad_k, grad_v};
}

}  // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&dk::sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&dk::sparse_attention_backward));
}
