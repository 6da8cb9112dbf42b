// Shared by the launchers for the CPU: threads and workspaces.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "ops/common.h"

namespace dk {

// Cache-line aligned buffers that each thread keeps and grows: one for what it works on, and one that it may lend to all threads.
enum class Buffer { own, shared };
template <Buffer> float* workspace(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local int64_t capacity = 0;
  if (floats > capacity) {
    capacity = 0;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    capacity = floats;
  }
  return buffer.get();
}

// Runs run(item, workspace) for every item in [0, items), each thread taking the next one when it is free.
template <class Run> void for_each_item(int64_t items, int64_t workspace_floats, const Run& run, int64_t most_threads = torch::stable::get_num_threads()) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(items, most_threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    float* buffer = workspace<Buffer::own>(workspace_floats);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(item, buffer);
  });
}

}  // namespace dk
