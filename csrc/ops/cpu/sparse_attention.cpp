// sparse_attention, forward and backward: checks the plan, allocates, and distributes (batch, head, work items or
// tiles) over threads. Arguments are checked in Python.
#include <optional>
#include <vector>

#include "common/plan.h"
#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

static void check_plan(const Tensor& plan, int64_t n, int64_t queries) {
  const int32_t* p = static_cast<const int32_t*>(plan.data_ptr());
  STD_TORCH_CHECK(plan.numel() >= Plan::HEADER_WORDS && p[plan_header::magic] == Plan::MAGIC &&
                      p[plan_header::version] == Plan::VERSION && p[plan_header::length] == plan.numel(),
                  "not a plan of this version");
  STD_TORCH_CHECK(p[plan_header::n] == n && p[plan_header::first] == n - queries && p[plan_header::rows] == TILE_ROWS &&
                      p[plan_header::columns] == GROUP_COLUMNS,
                  "the plan was compiled for another length or tile shape");
}

// The options of the operation
struct Options {
  std::optional<Tensor> text_lengths, seed;
  double dropout_p;
  int64_t head_offset;

  void set(SparseAttentionArgs& a) const {
    if (text_lengths) a.text_lengths = static_cast<const int64_t*>(text_lengths->data_ptr());
    a.kept_factor = 1.0f;
    if (!seed) return;
    a.seeds = static_cast<const int64_t*>(seed->data_ptr());
    a.head_offset = head_offset;
    a.threshold = static_cast<uint32_t>(dropout_p * 0x1p32);   // as in the reference
    a.kept_factor = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
};

// Most heads run one per thread; the last `heads % threads` (all, if there are fewer heads than threads) are split
// across all threads. In the backward pass, heads that share K and V count as one.
struct HeadSplit {
  HeadSplit(const SparseAttentionArgs& a, int64_t heads) {
    // Minimum multiply-adds per thread (about 10 us). + 16 models the per-row overhead.
    constexpr int64_t PRODUCTS = 1 << 18;
    const Plan plan(a.plan);
    const int64_t products =
        a.batch * a.heads * plan.tiles() * TILE_ROWS * (plan[plan_header::most_columns] + 16) * (a.head_dim + 16);
    threads = std::clamp<int64_t>(products / PRODUCTS, 1, torch::stable::get_num_threads());
    split = heads % threads;
    whole = heads - split;
  }
  // number of parts of a split head
  int64_t parts(int64_t per_thread) const { return (per_thread * threads + split - 1) / split; }
  int64_t threads, whole, split;
};

// The indices [begin, end) of tiles, longest processing time first, so that no thread starts a long tile when the
// others are done.
static std::vector<int64_t> longest_first(const Plan& plan, int64_t begin, int64_t end) {
  std::vector<int64_t> indices, groups;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i % plan.tiles();
    indices.push_back(i);
    groups.push_back(0);
    for (int64_t e = plan.begin(t); e < plan.begin(t + 1); ++e) groups.back() += plan.entry(e).groups;
  }
  std::stable_sort(indices.begin(), indices.end(),
                   [&](int64_t a, int64_t b) { return groups[a - begin] > groups[b - begin]; });
  return indices;
}

template <class Args, class Kernel>
static void prepare_split_heads(const Args& a, const Kernel& kernel, const HeadSplit& heads, float* shared,
                                int64_t head_floats) {
  const int64_t parts = heads.parts(1);
  for_each_item(
      heads.split * parts, 0,
      [&](int64_t item, float*) {
        const int64_t head = item / parts;
        kernel.prepare(a, heads.whole + head, item % parts, parts, shared + head * head_floats);
      },
      heads.threads);
}

// The whole heads, tile by tile
static void forward_whole_heads(const SparseAttentionArgs& a, const SparseAttentionKernel& kernel,
                                const HeadSplit& heads) {
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.plan);
  std::vector<Plan::Item> items;
  for (int64_t i = 0; i < plan[plan_header::items]; ++i) items.push_back(plan.item(i));
  std::sort(items.begin(), items.end(), [](const Plan::Item& x, const Plan::Item& y) { return x.begin < y.begin; });
  // an upper bound per tile; untouched pages take no memory
  const int64_t carry_floats = std::max(1, plan[plan_header::partials]) * space.carry;
  for_each_item(
      heads.whole, space.head + carry_floats + space.thread,
      [&](int64_t bh, float* head) {
        float *carry = head + space.head, *thread = carry + carry_floats;
        kernel.prepare(a, bh, 0, 1, head);
        for (auto item = items.begin(); item != items.end();) {
          const int32_t tile = item->tile;
          int64_t count = 0;
          for (; item != items.end() && item->tile == tile; ++item)
            kernel.attend(a, bh, *item, head, carry + count++ * space.carry, thread);
          kernel.finish(a, bh, tile, carry, count);
        }
      },
      heads.threads);
}

// The split heads: all work items, longest processing time first, then the tiles that several items share
static void forward_split_heads(const SparseAttentionArgs& a, const SparseAttentionKernel& kernel,
                                const HeadSplit& heads) {
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.plan);
  const int64_t head_floats = space.head + plan[plan_header::partials] * space.carry;
  float* shared = workspace<Buffer::shared>(heads.split * head_floats);
  if (space.head > 0) prepare_split_heads(a, kernel, heads, shared, head_floats);
  for_each_item(
      heads.split * plan[plan_header::items], space.carry + space.thread,
      [&](int64_t i, float* own) {
        const int64_t bh = heads.whole + i % heads.split;
        const Plan::Item item = plan.item(i / heads.split);
        float *head = shared + i % heads.split * head_floats,
              *carry = item.partial < 0 ? own : head + space.head + item.partial * space.carry;
        kernel.attend(a, bh, item, head, carry, own + space.carry);
        if (item.partial < 0) kernel.finish(a, bh, item.tile, carry, 1);
      },
      heads.threads);
  for_each_item(
      heads.split * plan[plan_header::split_tiles], 0,
      [&](int64_t i, float*) {
        const Plan::SplitTile tile = plan.split_tile(i / heads.split);
        float* carry = shared + i % heads.split * head_floats + space.head + tile.first * space.carry;
        kernel.finish(a, heads.whole + i % heads.split, tile.tile, carry, tile.count);
      },
      heads.threads);
}

static std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor,
                                                   std::vector<int64_t>, double scale,
                                                   std::optional<Tensor> text_lengths, std::optional<Tensor> seed,
                                                   double dropout_p, int64_t head_offset) {
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, torch::headeronly::ScalarType::Float);
  check_plan(plan, k.size(2), q.size(2));
  SparseAttentionArgs a = sparse_attention_args(q, k, v, out, lse, plan, scale);
  Options{text_lengths, seed, dropout_p, head_offset}.set(a);
  const SparseAttentionKernel kernel = kernels().sparse_attention(a);
  const HeadSplit heads(a, a.batch * a.heads);
  if (heads.whole) forward_whole_heads(a, kernel, heads);
  if (heads.split) forward_split_heads(a, kernel, heads);
  return {out, lse};
}

// The split heads: rounds of tiles, with `queries` and then `keys` in parallel. The carry of a round should stay in the
// threads' caches.
static void backward_split_heads(const SparseAttentionBackwardArgs& a, const SparseAttentionBackwardKernel& kernel,
                                 const HeadSplit& heads) {
  constexpr int64_t CARRY_FLOATS = 1 << 18;   // per thread: 1 MB
  const SparseAttentionSpace space = kernel.space(a);
  const Plan plan(a.forward.plan);
  const int64_t tiles = plan.tiles() * a.forward.group, parts = heads.parts(2);
  const int64_t fitting = heads.threads * CARRY_FLOATS / (heads.split * space.carry);
  const int64_t round = std::min<int64_t>(tiles, std::max(heads.parts(4), fitting));
  float *shared = workspace<Buffer::shared>(heads.split * (space.head + round * space.carry)),
        *carry = shared + heads.split * space.head;
  prepare_split_heads(a, kernel, heads, shared, space.head);
  for (int64_t begin = 0; begin < tiles; begin += round) {
    const std::vector<int64_t> order = longest_first(plan, begin, std::min(begin + round, tiles));
    const int64_t count = order.size();
    for_each_item(
        heads.split * count, space.thread,
        [&](int64_t item, float* thread) {
          const int64_t head = item % heads.split, tile = order[item / heads.split];
          kernel.queries(a, heads.whole + head, tile, shared + head * space.head,
                         carry + (head * round + tile - begin) * space.carry, thread);
        },
        heads.threads);
    for_each_item(
        heads.split * parts, 0,
        [&](int64_t item, float*) {
          const int64_t head = item / parts;
          kernel.keys(a, heads.whole + head, begin, begin + count, item % parts, parts, shared + head * space.head,
                      carry + head * round * space.carry);
        },
        heads.threads);
  }
}

static std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                    Tensor out, Tensor lse, Tensor plan, Tensor,
                                                                    std::vector<int64_t>, double scale,
                                                                    std::optional<Tensor> text_lengths,
                                                                    std::optional<Tensor> seed, double dropout_p,
                                                                    int64_t head_offset) {
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k),
         grad_v = torch::stable::empty_like(v);
  SparseAttentionBackwardArgs a;
  check_plan(plan, k.size(2), q.size(2));
  a.forward = sparse_attention_args(q, k, v, out, lse, plan, scale);
  Options{text_lengths, seed, dropout_p, head_offset}.set(a.forward);
  const int64_t first = k.size(2) - q.size(2);
  a.grad_out = from_token(grad_out, first), a.grad_q = from_token(grad_q, first);
  a.grad_k = grad_k.data_ptr(), a.grad_v = grad_v.data_ptr();
  a.grad_out_strides = strides_of(grad_out), a.grad_q_strides = strides_of(grad_q);
  a.grad_k_strides = strides_of(grad_k), a.grad_v_strides = strides_of(grad_v);
  const SparseAttentionBackwardKernel kernel = kernels().sparse_attention_backward(a);
  const SparseAttentionSpace space = kernel.space(a);
  const HeadSplit heads(a.forward, a.forward.batch * a.forward.heads / a.forward.group);
  const int64_t tiles = Plan(a.forward.plan).tiles() * a.forward.group;
  for_each_item(
      heads.whole, space.head + space.carry + space.thread,
      [&](int64_t shared, float* head) {
        float *carry = head + space.head, *thread = carry + space.carry;
        kernel.prepare(a, shared, 0, 1, head);
        for (int64_t i = 0; i < tiles; ++i) {
          kernel.queries(a, shared, i, head, carry, thread);
          kernel.keys(a, shared, i, i + 1, 0, 1, head, carry);
        }
      },
      heads.threads);
  if (heads.split) backward_split_heads(a, kernel, heads);
  return {grad_q, grad_k, grad_v};
}

}   // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&dk::sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&dk::sparse_attention_backward));
}
