// The emulation of csrc/cuda/device.h for tests: kernels run on the CPU, and every access is checked.
//
// A CUDA thread is a fibre; blocks, warps and lanes run in an order shuffled by the seed. Every run reports, by file
// and line of the kernel: out-of-bounds and misaligned accesses to shared and global memory; reads of shared memory
// that is uninitialised or has a cp.async in flight; missing barriers (by epochs, independent of the order of this
// run); divergent collectives; deadlocks; copies that are never waited for. Bank conflicts of ldmatrix are counted. A
// cp.async invalidates its destination when it is issued and completes when it is waited for. Not covered: speed,
// rounding inside mma, and misreadings of the PTX manual shared by both implementations (primitives.cu compares them on
// a GPU).
#pragma once
#include "machine.h"

namespace dk::emulation {

// -- number formats
inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float from_bfloat16(uint32_t u) { return bits_to_float(u << 16); }
inline uint32_t to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  if (f != f) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float from_float16(uint32_t u) {
  const uint16_t bits = static_cast<uint16_t>(u);
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline uint32_t to_float16(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

inline void ldmatrix(uint32_t address, uint32_t (&r)[4], bool transposed, const char* file, int line) {
  const dev::u32x4 row =
      shared_load<dev::u32x4>(address, file, line);   // before the collective, which does not order accesses
  Thread& t = *current;
  memcpy(t.in, &row, 16);
  t.in[4] = address;
  meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", file, line, [&](Thread* lanes) {
    for (int m = 0; m < 4; ++m) {
      int banks[8] = {}, ways = 0;
      for (int i = 0; i < 8; ++i) ways = std::max(ways, ++banks[lanes[m * 8 + i].in[4] >> 4 & 7]);
      ++report.ldmatrix, report.ldmatrix_ways += ways;
      const auto element = [&](int i, int j) { return lanes[m * 8 + i].in[j / 2] >> 16 * (j & 1) & 0xffffu; };
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, c = 2 * (l % 4);
        lanes[l].out[m] =
            transposed ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
      }
    }
  });
  memcpy(r, t.out, 16);
}

template <class Decode>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Decode& decode, const char* file,
         int line) {
  Thread& t = *current;
  memcpy(t.in, a, 16);
  t.in[4] = b0, t.in[5] = b1;
  memcpy(t.float_in, c, 16);
  meet_warp("mma", file, line, [&](Thread* lanes) {
    float A[16][16], B[16][8], C[16][8];
    ++report.mma;
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) {
        const int g = l / 4, q = 2 * (l % 4) + e;
        for (int i = 0; i < 4; ++i) A[g + 8 * (i & 1)][q + 8 * (i >> 1)] = decode(lanes[l].in[i] >> 16 * e & 0xffff);
        for (int i = 0; i < 2; ++i)
          B[q + 8 * i][g] = decode(lanes[l].in[4 + i] >> 16 * e & 0xffff),
                    C[g + 8 * i][q] = lanes[l].float_in[2 * i + e];
      }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) C[i][n] += A[i][k] * B[k][n];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < 2; ++e) lanes[l].float_out[2 * i + e] = C[l / 4 + 8 * i][2 * (l % 4) + e];
  });
  memcpy(c, t.float_out, 16);
}

inline uint32_t shuffle(uint32_t value, int from, const char* op, const char* file, int line) {
  Thread& t = *current;
  t.in[0] = value, t.in[1] = static_cast<uint32_t>(from);
  meet_warp(op, file, line, [](Thread* lanes) {
    for (int l = 0; l < 32; ++l) lanes[l].out[0] = lanes[lanes[l].in[1] & 31].in[0];
  });
  return t.out[0];
}

}   // namespace dk::emulation

namespace dk::dev {   // the same names as on a GPU
namespace emu = dk::emulation;

inline int tid() { return emu::current->tid; }
inline int64_t bid_x() { return emu::block_of(*emu::current).x; }
inline int bid_y() { return emu::cluster->y; }
inline uint32_t cluster_rank() { return emu::current->rank; }

template <class T> T ldg(const T* p, DK_AT) { return emu::global_load<T>(p, file, line); }
inline u32x2 ldg8(const void* p, DK_AT) { return emu::global_load<u32x2>(p, file, line); }
inline u32x4 ldg16(const void* p, DK_AT) { return emu::global_load<u32x4>(p, file, line); }
template <class T> void stg(T* p, T v, DK_AT) { emu::global_store(p, v, file, line); }
inline void stg8(void* p, u32x2 v, DK_AT) { emu::global_store(p, v, file, line); }
inline void stg16(void* p, u32x4 v, DK_AT) { emu::global_store(p, v, file, line); }

inline uint32_t smem_base() { return emu::SMEM_BASE; }
inline uint16_t lds_u16(uint32_t a, DK_AT) { return emu::shared_load<uint16_t>(a, file, line); }
inline uint32_t lds_u32(uint32_t a, DK_AT) { return emu::shared_load<uint32_t>(a, file, line); }
inline float lds_f32(uint32_t a, DK_AT) { return emu::shared_load<float>(a, file, line); }
inline u32x2 lds8(uint32_t a, DK_AT) { return emu::shared_load<u32x2>(a, file, line); }
inline u32x4 lds16(uint32_t a, DK_AT) { return emu::shared_load<u32x4>(a, file, line); }
inline void sts_u32(uint32_t a, uint32_t v, DK_AT) { emu::shared_store(a, v, file, line); }
inline void sts_f32(uint32_t a, float v, DK_AT) { emu::shared_store(a, v, file, line); }
inline void sts8(uint32_t a, u32x2 v, DK_AT) { emu::shared_store(a, v, file, line); }
inline void sts16(uint32_t a, u32x4 v, DK_AT) { emu::shared_store(a, v, file, line); }
inline float lds_f32_of(uint32_t rank, uint32_t a, DK_AT) { return emu::load_of_other_block(rank, a, file, line); }
inline void cp_async16(uint32_t to, const void* from, bool valid = true, DK_AT) {
  emu::issue_copy(to, from, 16, valid, file, line);
}
inline void cp_async4(uint32_t to, const void* from, bool valid = true, DK_AT) {
  emu::issue_copy(to, from, 4, valid, file, line);
}
inline void cp_async_commit() {
  emu::current->groups.push_back(std::move(emu::current->open));
  emu::current->open.clear();
}
template <int N> void cp_async_wait() { emu::land_copies(N); }

inline void syncwarp(DK_AT) {
  emu::meet_warp("syncwarp", file, line, [](emu::Thread*) {});
  ++emu::current->warp_epoch;
}
inline uint32_t shfl(uint32_t v, int lane, DK_AT) { return emu::shuffle(v, lane, "shfl", file, line); }
inline uint32_t shfl_xor(uint32_t v, int lanes, DK_AT) {
  return emu::shuffle(v, (tid() & 31) ^ lanes, "shfl_xor", file, line);
}
inline float shfl(float v, int lane, DK_AT) {
  return emu::bits_to_float(shfl(emu::float_to_bits(v), lane, file, line));
}
inline float shfl_xor(float v, int lanes, DK_AT) {
  return emu::bits_to_float(shfl_xor(emu::float_to_bits(v), lanes, file, line));
}
inline uint32_t ballot(bool v, DK_AT) {
  emu::Thread& t = *emu::current;
  t.in[0] = v;
  emu::meet_warp("ballot", file, line, [](emu::Thread* lanes) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) bits |= lanes[l].in[0] << l;
    for (int l = 0; l < 32; ++l) lanes[l].out[0] = bits;
  });
  return t.out[0];
}
inline void ldmatrix_x4(uint32_t a, uint32_t (&r)[4], DK_AT) { emu::ldmatrix(a, r, false, file, line); }
inline void ldmatrix_x4_trans(uint32_t a, uint32_t (&r)[4], DK_AT) { emu::ldmatrix(a, r, true, file, line); }

struct BFloat16 {};
struct Float16 {};
inline void mma(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, DK_AT) {
  emu::mma(c, a, b0, b1, emu::from_bfloat16, file, line);
}
inline void mma(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, DK_AT) {
  emu::mma(c, a, b0, b1, emu::from_float16, file, line);
}
inline uint32_t pack(BFloat16, float low, float high) { return emu::to_bfloat16(low) | emu::to_bfloat16(high) << 16; }
inline uint32_t pack(Float16, float low, float high) { return emu::to_float16(low) | emu::to_float16(high) << 16; }
inline float unpack(BFloat16, uint16_t v) { return emu::from_bfloat16(v); }
inline float unpack(Float16, uint16_t v) { return emu::from_float16(v); }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
// the logarithm of a denormal is that of 0
inline float log2_approx(float x) { return std::log2(std::fabs(x) < 1.17549435e-38f ? 0.0f : x); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul_rn(float a, float b) { return a * b; }   // the library is built with -ffp-contract=off
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float to_float_rn(uint32_t v) { return static_cast<float>(v); }
inline float to_float_rn(int32_t v) { return static_cast<float>(v); }
inline float as_float(uint32_t v) { return emu::bits_to_float(v); }
inline uint32_t as_bits(float v) { return emu::float_to_bits(v); }
inline uint32_t mul_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int popcount(uint32_t v) { return __builtin_popcount(v); }
inline float inf() { return INFINITY; }

inline void syncthreads(DK_AT) {
  emu::Thread& t = *emu::current;
  emu::meet(emu::block_of(t).barrier, emu::cluster->threads, "syncthreads", file, line, [] {});
  ++t.block_epoch, t.warp_epoch = 1;
}
inline void cluster_sync(DK_AT) {
  emu::Thread& t = *emu::current;
  emu::meet(emu::cluster->barrier, static_cast<int>(emu::cluster->thread.size()), "cluster_sync", file, line, [] {});
  ++t.cluster_epoch, ++t.block_epoch, t.warp_epoch = 1;
}

inline const char* failure(const char* kernel, const char* what) {
  static char text[256];
  snprintf(text, sizeof text, "CUDA kernel %s: %s", kernel, what);
  return text;
}
template <class P>
const char* launch(const char* name, void (*kernel)(P), Grid grid, int threads, uint32_t smem, void*, const P& params) {
  if (grid.x == 0 || grid.y == 0) return nullptr;
  if (grid.x > 0x7fffffff || grid.y > 65535) return failure(name, "the problem has more blocks than a grid can hold");
  if (threads % 32 || threads > 1024) return failure(name, "invalid configuration argument");
  if (smem > 227 * 1024 || grid.x % grid.cluster) return failure(name, "invalid argument");
  emu::run_grid(grid.x, static_cast<int>(grid.y), grid.cluster, threads, smem, [&] { kernel(params); });
  return nullptr;
}
inline int compute_capability() { return emu::options.capability; }
inline int shared_memory_per_block() { return emu::options.capability >= 90 ? 227 * 1024 : 163 * 1024; }

}   // namespace dk::dev
