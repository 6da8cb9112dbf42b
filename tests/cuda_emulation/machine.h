// The emulated machine: threads as fibres, their scheduling, checked memory, and grids. cuda_emulation.h implements the
// functions of csrc/cuda/device.h on it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define DK_DEVICE inline
#define DK_KERNEL(threads, min_blocks) void
#define DK_PARAM const
#define DK_UNROLL_FOR for
#define DK_ROLLED_FOR for
#define DK_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()   // the caller's position in the kernel

namespace dk::emulation {

// -- settings and reports
struct Options {
  uint64_t seed = 1;
  int capability = 90;
};
struct Report {
  std::map<std::string, long> errors;   // "file:line: what" -> count
  long ldmatrix = 0, ldmatrix_ways = 0, mma = 0, launches = 0;
};
inline Options options;
inline Report report;
struct Range {
  uintptr_t low, high;
};
inline std::map<uintptr_t, Range> ranges;   // global memory that kernels may access
inline void allow(const void* p, size_t bytes) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(p);
  if (bytes) {
    Range& range = ranges[low];
    range = {low, std::max(range.high, low + bytes)};
  }
}

struct Random {
  uint64_t state = 1;
  void seed(uint64_t s) {
    state = s * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 8; ++i) next();
  }
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  uint32_t below(size_t n) { return next() % n; }
  template <class T> void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i-- > 1;) std::swap(v[i], v[below(i + 1)]);
  }
};
inline Random random_order;

// -- threads as fibres
constexpr size_t STACK = 256 << 10;
constexpr uint32_t SMEM_BASE = 0x400;   // shared addresses do not start at 0

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
  bool valid;
  const char* file;
  int line;
};

struct Thread {
  int index = 0;           // in the cluster
  int tid = 0, rank = 0;   // in its block; rank of its block
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = STACK;
  void* fake_stack = nullptr;   // AddressSanitizer's
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  bool done = false;
  const char *op = "", *file = "";
  int line = 0;
  uint32_t block_epoch = 1, warp_epoch = 1, cluster_epoch = 1;   // barriers passed
  std::vector<Copy> open;                                        // copies not yet committed
  std::vector<std::vector<Copy>> groups;
  size_t landed = 0;        // completed groups
  uint32_t in[8], out[4];   // registers in a collective
  float float_in[4], float_out[4];
};

struct Meeting {   // a collective of the threads of a warp, block or cluster
  int arrived = 0;
  const char *op = "", *file = "";
  int line = 0;
  bool bad = false;
  std::vector<int> waiting;
};

struct Cell {   // four bytes of shared memory
  enum { NEVER_WRITTEN, IN_FLIGHT, VALID };
  static constexpr int NOBODY = -1, SEVERAL_WARPS = -2;
  uint8_t state = NEVER_WRITTEN;
  bool several_lanes = false;             // whether several lanes of the reader's warp have read
  int writer = NOBODY, reader = NOBODY;   // index
  uint32_t write_epoch = 0, write_warp_epoch = 0, write_cluster_epoch = 0;
  uint32_t read_epoch = 0, read_warp_epoch = 0, remote_read_cluster_epoch = 0;
};

struct Block {
  int64_t x = 0;
  Meeting barrier;
  char *map = nullptr, *smem = nullptr;
  size_t map_bytes = 0;
  std::vector<Cell> shadow;
  uint32_t remote_read_cluster_epoch = 0;   // the last epoch in which another block read this memory
  int live = 0;
};

struct Cluster {                        // the unit that runs at a time: one block, or the blocks of a cluster
  int threads = 0, blocks = 1, y = 0;   // threads of a block
  uint32_t smem_bytes = 0;
  std::vector<Block> block;
  std::vector<Thread> thread;
  std::vector<Meeting> warp;
  Meeting barrier;
  std::vector<std::vector<int>> ready;   // by warp
  std::vector<int> priority;
  int policy = 0, ready_count = 0, live = 0;
  Thread main;
  std::function<void()> body;
};
inline Cluster* cluster = nullptr;
inline Thread* current = nullptr;
inline Block& block_of(const Thread& t) { return cluster->block[t.rank]; }

inline void error(const char* what, const char* file, int line, const std::string& more = "") {
  const char* name = strrchr(file, '/');
  ++report.errors[std::string(name ? name + 1 : file) + ":" + std::to_string(line) + ": " + what +
                  (more.empty() ? "" : ": " + more)];
}

#if defined(__x86_64__)
// ucontext is 20 times slower, because it makes a system call
extern "C" void dk_emulation_switch(void** save, void* load);
asm(R"(.text
.p2align 4
.weak dk_emulation_switch
.type dk_emulation_switch,@function
dk_emulation_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size dk_emulation_switch,.-dk_emulation_switch
)");
#endif

inline void jump(Thread* from, Thread* to, bool forever) {
  current = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
  (void)forever;
#if defined(__x86_64__)
  static void* nowhere;   // discards the state of a fibre that ends
  dk_emulation_switch(forever ? &nowhere : &from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

inline void wake(int index) {
  cluster->ready[index / 32].push_back(index);
  ++cluster->ready_count;
}

inline Thread* next_thread() {   // the main thread if no thread can run
  Cluster& c = *cluster;
  if (c.ready_count == 0) return &c.main;
  int warp = -1;
  if (c.policy == 0) {   // any warp; otherwise one warp runs ahead as far as barriers allow
    do warp = random_order.below(c.ready.size());
    while (c.ready[warp].empty());
  } else {
    for (int w : c.priority)
      if (!c.ready[w].empty()) {
        warp = w;
        break;
      }
  }
  auto& lanes = c.ready[warp];
  const size_t i = c.policy == 2 ? lanes.size() - 1 : random_order.below(lanes.size());
  const int index = lanes[i];
  lanes[i] = lanes.back();
  lanes.pop_back();
  --c.ready_count;
  return &c.thread[index];
}

inline void let_others_run() {
  Thread *me = current, *to = next_thread();
  if (to != me) jump(me, to, false);
}

// All threads of a group arrive; the last one performs the collective.
template <class Together>
void meet(Meeting& m, int size, const char* op, const char* file, int line, const Together& together) {
  Thread& me = *current;
  me.op = op, me.file = file, me.line = line;
  if (m.arrived && (strcmp(m.op, op) != 0 || m.line != line)) {
    error("divergent collective", file, line,
          std::string(op) + " meets " + m.op + " of line " + std::to_string(m.line));
    m.bad = true;
  }
  m.op = op, m.file = file, m.line = line;
  if (++m.arrived < size) {
    m.waiting.push_back(me.index);
    let_others_run();
    return;
  }
  if (!m.bad) together();
  m.bad = false, m.arrived = 0;
  for (int index : m.waiting) wake(index);
  m.waiting.clear();
  wake(me.index);
  let_others_run();
}
template <class Together> void meet_warp(const char* op, const char* file, int line, const Together& together) {
  const int warp = current->index / 32;
  meet(cluster->warp[warp], 32, op, file, line, [&] { together(&cluster->thread[warp * 32]); });
}

// -- memory
inline char* shared_out_of_bounds() {
  static char sink[64];
  return sink;
}
inline bool in_shared_memory(uint32_t address, uint32_t bytes, const char* file, int line) {
  const uint32_t at = address - SMEM_BASE;
  if (at > cluster->smem_bytes || at + bytes > cluster->smem_bytes) {
    error("shared memory out of bounds", file, line);
    return false;
  }
  if (at % bytes) error("misaligned shared access", file, line);
  return true;
}

inline void check_read(Cell& c, Thread& t, const char* file, int line) {
  if (c.state == Cell::NEVER_WRITTEN) error("read of uninitialised shared memory", file, line);
  if (c.state == Cell::IN_FLIGHT) error("read of shared memory with a cp.async in flight", file, line);
  const bool same_warp = c.writer >= 0 && c.writer / 32 == t.index / 32;
  const bool ordered = c.writer < 0 || c.writer == t.index || c.write_epoch != t.block_epoch ||
                       (same_warp && c.write_warp_epoch != t.warp_epoch);
  if (!ordered) error("read after write without a barrier", file, line);
  if (c.read_epoch == t.block_epoch && c.reader != t.index && c.reader != Cell::NOBODY) {
    if (c.reader == Cell::SEVERAL_WARPS || c.reader / 32 != t.index / 32) c.reader = Cell::SEVERAL_WARPS;
    else c.reader = t.index, c.several_lanes = true;
  } else {
    c.reader = t.index, c.several_lanes = false;
  }
  c.read_epoch = t.block_epoch, c.read_warp_epoch = t.warp_epoch;
}

enum class Write { STORE, COPY_ISSUED, COPY_LANDED };
inline void check_write(Cell& c, Thread& t, Write kind, const char* file, int line) {
  const bool landing = kind == Write::COPY_LANDED;
  if (!landing && c.state == Cell::IN_FLIGHT) error("write over a cp.async in flight", file, line);
  const bool same_warp = c.writer >= 0 && c.writer / 32 == t.index / 32;
  const bool ordered = c.writer < 0 || c.writer == t.index || c.write_epoch != t.block_epoch ||
                       (same_warp && c.write_warp_epoch != t.warp_epoch);
  if (!ordered) error("write after write without a barrier", file, line);
  if (!landing && c.reader != Cell::NOBODY && c.read_epoch == t.block_epoch) {
    const bool only_mine = c.reader == t.index && !c.several_lanes;
    const bool warp_synced = c.reader >= 0 && c.reader / 32 == t.index / 32 && c.read_warp_epoch != t.warp_epoch;
    if (!only_mine && !warp_synced) error("write after read without a barrier", file, line);
  }
  if (c.remote_read_cluster_epoch == t.cluster_epoch)
    error("write after another block's read without a cluster barrier", file, line);
  c.writer = t.index, c.write_epoch = t.block_epoch, c.write_warp_epoch = t.warp_epoch,
  c.write_cluster_epoch = t.cluster_epoch;
  c.state = kind == Write::COPY_ISSUED ? Cell::IN_FLIGHT : Cell::VALID;
}

template <class T> T shared_load(uint32_t address, const char* file, int line) {
  T value;
  memset(&value, 0xff, sizeof value);
  if (!in_shared_memory(address, sizeof(T), file, line)) return value;
  Block& b = block_of(*current);
  const uint32_t at = address - SMEM_BASE;
  for (uint32_t i = at / 4; i < (at + sizeof(T) + 3) / 4; ++i) check_read(b.shadow[i], *current, file, line);
  memcpy(&value, b.smem + at, sizeof value);
  return value;
}
inline char* shared_write(uint32_t address, uint32_t bytes, Write kind, const char* file, int line) {
  if (!in_shared_memory(address, bytes, file, line)) return shared_out_of_bounds();
  Block& b = block_of(*current);
  const uint32_t at = address - SMEM_BASE;
  for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) check_write(b.shadow[i], *current, kind, file, line);
  return b.smem + at;
}
template <class T> void shared_store(uint32_t address, const T& value, const char* file, int line) {
  memcpy(shared_write(address, sizeof(T), Write::STORE, file, line), &value, sizeof value);
}

inline float load_of_other_block(uint32_t rank, uint32_t address, const char* file, int line) {
  if (rank >= static_cast<uint32_t>(cluster->blocks)) {
    error("no such block in the cluster", file, line);
    return NAN;
  }
  if (static_cast<int>(rank) == current->rank) return shared_load<float>(address, file, line);
  if (!in_shared_memory(address, 4, file, line)) return NAN;
  Block& b = cluster->block[rank];
  Cell& c = b.shadow[(address - SMEM_BASE) / 4];
  if (b.live < cluster->threads) error("read of the shared memory of a block that may have ended", file, line);
  if (c.state != Cell::VALID) error("read of uninitialised shared memory of another block", file, line);
  if (c.write_cluster_epoch == current->cluster_epoch)
    error("read of another block's memory without a cluster barrier", file, line);
  c.remote_read_cluster_epoch = b.remote_read_cluster_epoch = current->cluster_epoch;
  float value;
  memcpy(&value, b.smem + (address - SMEM_BASE), 4);
  return value;
}

inline bool in_global_memory(const void* p, size_t bytes, const char* file, int line) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  if (a % bytes) error("misaligned global access", file, line);
  auto it = ranges.upper_bound(a);
  if (it == ranges.begin() || a + bytes > (--it)->second.high) {
    error("global memory out of bounds", file, line);
    return false;
  }
  return true;
}
template <class T> T global_load(const void* p, const char* file, int line) {
  T value;
  memset(&value, 0xff, sizeof value);
  if (in_global_memory(p, sizeof value, file, line)) memcpy(&value, p, sizeof value);
  return value;
}
template <class T> void global_store(void* p, const T& value, const char* file, int line) {
  if (in_global_memory(p, sizeof value, file, line)) memcpy(p, &value, sizeof value);
}

inline void issue_copy(uint32_t to, const void* from, uint32_t bytes, bool valid, const char* file, int line) {
  if (valid) valid = in_global_memory(from, bytes, file, line);
  // invalid from now until the wait
  memset(shared_write(to, bytes, Write::COPY_ISSUED, file, line), 0xff, bytes);
  current->open.push_back({to, from, bytes, valid, file, line});
}
inline void land_copies(size_t but_youngest) {
  Thread& t = *current;
  for (; t.landed + but_youngest < t.groups.size(); ++t.landed)
    for (const Copy& c : t.groups[t.landed]) {
      char* to = shared_write(c.to, c.bytes, Write::COPY_LANDED, c.file, c.line);
      if (c.valid) memcpy(to, c.from, c.bytes);
      else memset(to, 0, c.bytes);
    }
}

// -- running a cluster
inline void end_thread() {
  Thread& t = *current;
  Block& b = block_of(t);
  for (size_t i = t.landed; i < t.groups.size(); ++i)
    if (!t.groups[i].empty())
      error("kernel ends with a cp.async never waited for", t.groups[i][0].file, t.groups[i][0].line);
  if (!t.open.empty()) error("kernel ends with a cp.async never committed", t.open[0].file, t.open[0].line);
  if (b.remote_read_cluster_epoch == t.cluster_epoch)
    error("a block ends while others may read its shared memory", t.file, t.line);
  t.done = true;
  --b.live, --cluster->live;
}
inline void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  cluster->body();
  end_thread();
  jump(current, next_thread(), true);
}

inline void prepare_thread(Thread& t) {
  t.done = false, t.block_epoch = t.warp_epoch = t.cluster_epoch = 1, t.landed = 0;
  t.open.clear(), t.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(t.stack, STACK);
#endif
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(t.stack + STACK);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&fibre_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  t.stack_pointer = sp;
#else
  getcontext(&t.context);
  t.context.uc_stack = {t.stack, 0, STACK};
  makecontext(&t.context, fibre_main, 0);
#endif
  wake(t.index);
}

inline void report_deadlock() {
  std::map<std::string, int> places;
  const Thread* stuck = nullptr;
  for (const Thread& t : cluster->thread)
    if (!t.done) ++places[std::string(t.op) + " of line " + std::to_string(t.line)], stuck = &t;
  std::string text;
  for (const auto& [place, count] : places) text += std::to_string(count) + " threads at " + place + "; ";
  error("deadlock", stuck->file, stuck->line, text);
}

inline bool run_cluster(Cluster& c) {
  c.ready_count = 0, c.live = c.threads * c.blocks, c.policy = random_order.below(3);
  c.barrier = {};
  for (auto& lanes : c.ready) lanes.clear();
  for (Meeting& m : c.warp) m = {};
  random_order.shuffle(c.priority);
  for (Block& b : c.block) {
    b.barrier = {}, b.live = c.threads, b.remote_read_cluster_epoch = 0;
    memset(b.smem, 0xff, c.smem_bytes);
    std::fill(b.shadow.begin(), b.shadow.end(), Cell{});
  }
  for (Thread& t : c.thread) prepare_thread(t);
  current = &c.main;
  let_others_run();
  if (c.live) report_deadlock();
  return c.live == 0;
}

inline void allocate(Cluster& c) {
  const size_t page = 4096, body = (c.smem_bytes + page - 1) / page * page;
  for (Block& b : c.block) {   // ends at an inaccessible page
    b.map_bytes = body + 2 * page;
    b.map = static_cast<char*>(mmap(nullptr, b.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    b.smem = b.map + page + (body - (c.smem_bytes + 15) / 16 * 16);
    mprotect(b.map, page, PROT_NONE);
    mprotect(b.map + page + body, page, PROT_NONE);
    b.shadow.resize(c.smem_bytes / 4 + 1);
  }
  const int count = c.threads * c.blocks;
  c.thread = std::vector<Thread>(count);
  c.warp.resize(count / 32), c.ready.resize(count / 32);
  for (int w = 0; w < count / 32; ++w) c.priority.push_back(w);
  char* stacks = static_cast<char*>(
      mmap(nullptr, STACK * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int i = 0; i < count; ++i)
    c.thread[i].index = i, c.thread[i].tid = i % c.threads, c.thread[i].rank = i / c.threads,
    c.thread[i].stack = stacks + STACK * i;
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* low;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &c.main.stack_bytes);
  pthread_attr_destroy(&attributes);
  c.main.stack = static_cast<char*>(low);
#endif
}
inline void release(Cluster& c) {
  munmap(c.thread[0].stack, STACK * c.thread.size());
  for (Block& b : c.block) munmap(b.map, b.map_bytes);
}

inline void run_grid(int64_t x, int y, int blocks, int threads, uint32_t smem, std::function<void()> body) {
  Cluster c;
  c.threads = threads, c.blocks = blocks, c.smem_bytes = smem, c.body = std::move(body);
  c.block = std::vector<Block>(blocks);
  allocate(c);
  cluster = &c;
  random_order.seed(options.seed + report.launches++);
  std::vector<int64_t> order(x / blocks * y);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  random_order.shuffle(order);   // blocks run in any order
  for (int64_t i : order) {
    c.y = static_cast<int>(i / (x / blocks));
    for (int r = 0; r < blocks; ++r) c.block[r].x = i % (x / blocks) * blocks + r;
    if (!run_cluster(c)) break;
  }
  release(c);
  cluster = nullptr, current = nullptr;
}

}   // namespace dk::emulation
