// Kernels that violate one rule each, and some correct ones, to test the reports of the emulation. The program runs the
// kernel named by its first argument, in an order seeded by the second, and prints one report per line
// (test_cuda_emulation.py).
#include "cuda/device.h"

#include <map>

using namespace dk;
using namespace dk::dev;

struct Memory {
  const float* in;
  float* out;
};
constexpr int THREADS = 64;
constexpr uint32_t SHARED = 2048;
using Kernel = void (*)(Memory);

static uint32_t word(int i) { return smem_base() + 4 * i; }
static int lane() { return tid() & 31; }

// Shared by the kernels on copies: two groups of 4 bytes per thread.
static void copy_twice(Memory m) {
  for (int group = 0; group < 2; ++group) cp_async4(word(group * THREADS + tid()), m.in + tid()), cp_async_commit();
}

static const std::map<std::string, std::pair<int, Kernel>> KERNELS = {
    // blocks of a cluster, kernel
    // -- nothing wrong
    {"right: barriers",
     {1,
      [](Memory m) {
        for (int i = 0; i < 3; ++i) {
          sts_f32(word(tid()), ldg(m.in + tid()));
          syncthreads();
          stg(m.out + tid(), lds_f32(word(tid() ^ 33)));
          syncthreads();
        }
      }}},
    {"right: in a warp",
     {1,
      [](Memory m) {
        const uint32_t area = word(tid() / 32 * 128 + lane() * 4);
        sts16(area, {1, 2, 3, 4});
        syncwarp();
        uint32_t r[4];
        ldmatrix_x4(area, r);
        syncwarp();
        sts_u32(area, r[0]);
        stg(m.out + tid(), shfl_xor(as_float(lds_u32(area)), 1));
      }}},
    {"right: copies",
     {1,
      [](Memory m) {
        copy_twice(m);
        cp_async_wait<1>();
        syncthreads();
        stg(m.out + tid(), lds_f32(word(tid() ^ 33)));
        cp_async_wait<0>();
        syncthreads();
        stg(m.out + tid(), lds_f32(word(THREADS + (tid() ^ 33))));
      }}},
    {"right: cluster",
     {4,
      [](Memory m) {
        sts_f32(word(tid()), 1.0f);
        cluster_sync();
        stg(m.out + tid(), lds_f32_of((cluster_rank() + 1) % 4, word(tid() ^ 33)));
        cluster_sync();
        sts_f32(word(tid()), 2.0f);
      }}},
    // -- memory
    {"beyond shared memory", {1, [](Memory) { sts_f32(smem_base() + SHARED, 0.0f); }}},
    {"before shared memory", {1, [](Memory) { lds_f32(smem_base() - 4); }}},
    {"half beyond shared memory", {1, [](Memory) { sts16(smem_base() + SHARED - 8, {0, 0, 0, 0}); }}},
    {"misaligned in shared memory",
     {1,
      [](Memory) {
        if (tid() == 0) sts16(word(1), {0, 0, 0, 0});
      }}},
    {"beyond global memory", {1, [](Memory m) { ldg(m.in + THREADS); }}},
    {"write before global memory", {1, [](Memory m) { stg(m.out - 1, 0.0f); }}},
    {"copy from beyond global memory",
     {1,
      [](Memory m) {
        cp_async16(word(4 * tid()), m.in + THREADS - 2);
        cp_async_commit(), cp_async_wait<0>();
      }}},
    {"misaligned in global memory", {1, [](Memory m) { ldg16(m.in + 1); }}},
    {"uninitialised", {1, [](Memory) { lds_f32(word(tid())); }}},
    // -- order
    {"read after write", {1, [](Memory) { sts_f32(word(tid()), 0.0f), lds_f32(word(tid() ^ 32)); }}},
    {"read after write in a warp", {1, [](Memory) { sts_f32(word(tid()), 0.0f), lds_f32(word(tid() ^ 1)); }}},
    {"ldmatrix after write",
     {1,
      [](Memory) {
        uint32_t r[4];
        sts16(word(4 * tid()), {0, 0, 0, 0});
        ldmatrix_x4(word(4 * (tid() ^ 1)), r);
      }}},
    {"a shuffle is no barrier", {1, [](Memory) { sts_f32(word(tid()), 0.0f), shfl(0u, 0), lds_f32(word(tid() ^ 1)); }}},
    {"a warp's barrier is not a block's",
     {1, [](Memory) { sts_f32(word(tid()), 0.0f), syncwarp(), lds_f32(word(tid() ^ 32)); }}},
    {"write after read",
     {1,
      [](Memory) {
        sts_f32(word(tid()), 0.0f);
        syncthreads();
        lds_f32(word(tid() ^ 32));
        sts_f32(word(tid()), 1.0f);
      }}},
    {"write after write", {1, [](Memory) { sts_f32(word(0), 0.0f); }}},
    // -- copies
    {"no wait", {1, [](Memory m) { copy_twice(m), lds_f32(word(tid())), cp_async_wait<0>(); }}},
    {"short wait",
     {1, [](Memory m) { copy_twice(m), cp_async_wait<1>(), lds_f32(word(THREADS + tid())), cp_async_wait<0>(); }}},
    {"write over a copy", {1, [](Memory m) { copy_twice(m), sts_f32(word(tid()), 0.0f), cp_async_wait<0>(); }}},
    {"wait without barrier", {1, [](Memory m) { copy_twice(m), cp_async_wait<0>(), lds_f32(word(tid() ^ 32)); }}},
    {"never waited for", {1, copy_twice}},
    {"never committed", {1, [](Memory m) { cp_async4(word(tid()), m.in), cp_async_wait<0>(); }}},
    // -- collectives
    {"divergent",
     {1,
      [](Memory) {
        if (lane() < 16) shfl(0u, 1);
        else shfl_xor(0u, 1);
      }}},
    {"half a warp",
     {1,
      [](Memory) {
        if (lane() < 16) syncwarp();
      }}},
    {"half a block",
     {1,
      [](Memory) {
        if (tid() < 32) syncthreads();
      }}},
    {"early return",
     {1,
      [](Memory) {
        if (tid() == 5) return;
        syncthreads();
      }}},
    // -- clusters
    {"other block without barrier",
     {2,
      [](Memory) {
        sts_f32(word(tid()), 0.0f);
        syncthreads();
        lds_f32_of(cluster_rank() ^ 1, word(tid()));
        cluster_sync();
      }}},
    {"uninitialised in another block",
     {2,
      [](Memory) {
        cluster_sync();
        lds_f32_of(cluster_rank() ^ 1, word(tid()));
        cluster_sync();
      }}},
    {"no such block", {2, [](Memory) { lds_f32_of(2, word(0)); }}},
    {"write after another block's read",
     {2,
      [](Memory) {
        sts_f32(word(tid()), 0.0f);
        cluster_sync();
        if (cluster_rank() == 1) lds_f32_of(0, word(tid()));
        syncthreads();
        if (cluster_rank() == 0) sts_f32(word(tid()), 1.0f);
        cluster_sync();
      }}},
    {"no barrier before the end",
     {2,
      [](Memory) {
        sts_f32(word(tid()), 0.0f);
        cluster_sync();
        lds_f32_of(cluster_rank() ^ 1, word(tid()));
      }}},
};

int main(int count, char** arguments) {
  if (count == 1) {
    for (const auto& [name, _] : KERNELS) puts(name.c_str());
    return 0;
  }
  const auto& [cluster, kernel] = KERNELS.at(arguments[1]);
  emulation::options.seed = strtoull(arguments[2], nullptr, 10);
  alignas(16) float in[THREADS] = {}, out[THREADS];
  emulation::allow(in, sizeof in), emulation::allow(out, sizeof out);
  const char* error = launch<Memory>("faulty", kernel, {4, 1, cluster}, THREADS, SHARED, nullptr, {in, out});
  if (error) puts(error);
  for (const auto& [what, times] : emulation::report.errors) puts(what.c_str());
}
