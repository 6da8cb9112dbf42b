// Shared by the launchers for the CPU: threads, workspaces and large outputs.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <pthread.h>

#if defined(__linux__)
#include <sys/mman.h>
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23   // since Linux 5.14; older C libraries do not define it
#endif
#endif

#include "cpu/kernels.h"
#include "ops/common.h"

namespace dk {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool KEPT = false;   // buffers are not reused, so that AddressSanitizer knows their bounds
#else
constexpr bool KEPT = true;
#endif

// Cache-line aligned buffers that each thread keeps and grows: one of its own, and one that it may share with all
// threads.
enum class Buffer { own, shared };
template <Buffer> float* workspace(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local int64_t capacity = 0;
  if (floats > capacity || !KEPT) {
    capacity = 0;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    capacity = floats;
  }
  return buffer.get();
}

// A forked process has none of its parent's threads, and the inherited pool would wait for them. Forks are recorded
// from the first use of the pool.
inline bool forked = false;
inline bool threads_lost() {
  [[maybe_unused]] static const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return forked;
}

// Runs run(begin, end) for parts of [0, count) on PyTorch's threads, or in the calling thread only after a fork.
template <class Run> void in_parallel(int64_t count, const Run& run) {
  if (count > 1 && torch::stable::get_num_threads() > 1 && threads_lost()) return run(0, count);
  torch::stable::parallel_for(0, count, 1, run);
}

// Runs run(item, workspace) for every item in [0, items). A free thread takes the next item.
template <class Run>
void for_each_item(int64_t items, int64_t workspace_floats, const Run& run,
                   int64_t most_threads = torch::stable::get_num_threads()) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(items, most_threads);
  in_parallel(threads, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    float* buffer = workspace<Buffer::own>(workspace_floats);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(item, buffer);
  });
}

// Populates the pages of a large output in parallel, with huge pages where available, before the kernel runs. malloc
// maps and unmaps such blocks on every call, and page faults in the kernel can take longer than the kernel itself.
constexpr int64_t PAGE = 4096, FRESH_BYTES = 4 << 20, SHARE_BYTES = 2 << 20;
inline Tensor fresh(Tensor t) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.data_ptr()), begin = (first + PAGE - 1) / PAGE * PAGE;
  const int64_t bytes = static_cast<int64_t>(first + t.numel() * t.element_size() - begin) / PAGE * PAGE;
  if (bytes < FRESH_BYTES) return t;
  // advice only: if it fails, pages are faulted in as usual
  madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);
  in_parallel((bytes + SHARE_BYTES - 1) / SHARE_BYTES, [&](int64_t from, int64_t to) {
    madvise(reinterpret_cast<void*>(begin + from * SHARE_BYTES), std::min(to * SHARE_BYTES, bytes) - from * SHARE_BYTES,
            MADV_POPULATE_WRITE);
  });
#endif
  return t;
}

}   // namespace dk
