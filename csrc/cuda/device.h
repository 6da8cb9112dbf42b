// The device primitives: everything that a kernel does beyond plain arithmetic. There are two implementations: PTX
// here, and for tests on a CPU an emulation that checks every access (tests/cuda_emulation/cuda_emulation.h).
//
// Rules for kernels. Shared memory is addressed in bytes by uint32_t, and accessed only through these functions; so is
// global memory, whose rows must be aligned to the width of the access. Conditions around collectives (mma, ldmatrix,
// shfl, vote, syncwarp) must be uniform in a warp, those around barriers uniform in a block (or cluster), and no thread
// returns before the last of them. Register arrays are indexed by constants: loops over them are DK_UNROLLed.
#pragma once
#include <cstdint>

namespace dk::dev {
struct alignas(8) u32x2 {
  uint32_t x, y;
};
struct alignas(16) u32x4 {
  uint32_t x, y, z, w;
};
struct Grid {
  int64_t x;
  int64_t y = 1;
  int cluster = 1;   // blocks along x that run together and can read each other's shared memory (sm_90 and later)
};
}   // namespace dk::dev

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

#include <cstdio>

#define DK_DEVICE __device__ __forceinline__
#define DK_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define DK_PARAM const __grid_constant__
#define DK_UNROLL_FOR _Pragma("unroll") for
#define DK_ROLLED_FOR _Pragma("unroll 1") for   // if unrolling would cost registers

namespace dk::dev {

// -- indices
DK_DEVICE int tid() { return threadIdx.x; }
DK_DEVICE int64_t bid_x() { return blockIdx.x; }
DK_DEVICE int bid_y() { return blockIdx.y; }
DK_DEVICE uint32_t cluster_rank() {   // 0 before sm_90, which has no clusters
#if __CUDA_ARCH__ >= 900
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  return 0;
#endif
}

// -- global memory
template <class T> DK_DEVICE T ldg(const T* p) { return __ldg(p); }   // data that no kernel in flight writes
DK_DEVICE u32x2 ldg8(const void* p) {
  const uint2 v = __ldg(static_cast<const uint2*>(p));
  return {v.x, v.y};
}
DK_DEVICE u32x4 ldg16(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
template <class T> DK_DEVICE void stg(T* p, T v) { *p = v; }
DK_DEVICE void stg8(void* p, u32x2 v) { *static_cast<uint2*>(p) = make_uint2(v.x, v.y); }
DK_DEVICE void stg16(void* p, u32x4 v) { *static_cast<uint4*>(p) = make_uint4(v.x, v.y, v.z, v.w); }

// -- shared memory
extern __shared__ __align__(1024) unsigned char shared_memory[];
DK_DEVICE uint32_t smem_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)); }
DK_DEVICE uint16_t lds_u16(uint32_t a) {
  uint16_t r;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(a) : "memory");
  return r;
}
DK_DEVICE uint32_t lds_u32(uint32_t a) {
  uint32_t r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(a) : "memory");
  return r;
}
DK_DEVICE float lds_f32(uint32_t a) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(a) : "memory");
  return r;
}
DK_DEVICE u32x2 lds8(uint32_t a) {
  u32x2 r;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(a) : "memory");
  return r;
}
DK_DEVICE u32x4 lds16(uint32_t a) {
  u32x4 r;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(a)
               : "memory");
  return r;
}
DK_DEVICE void sts_u32(uint32_t a, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
DK_DEVICE void sts_f32(uint32_t a, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"); }
DK_DEVICE void sts8(uint32_t a, u32x2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory");
}
DK_DEVICE void sts16(uint32_t a, u32x4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Reads the shared memory of block `rank` of this cluster; `a` is an address in the calling block
DK_DEVICE float lds_f32_of([[maybe_unused]] uint32_t rank, uint32_t a) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  float r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(a), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(r) : "r"(there) : "memory");
  return r;
#else
  return lds_f32(a);
#endif
}

// Asynchronous copies from global to shared memory. valid == false writes zeros and does not read the source.
DK_DEVICE void cp_async16(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DK_DEVICE void cp_async4(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
DK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the N most recent groups of this thread.
template <int N> DK_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// -- collective over a warp
DK_DEVICE void syncwarp() { __syncwarp(); }
DK_DEVICE float shfl_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DK_DEVICE uint32_t shfl_xor(uint32_t v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DK_DEVICE float shfl(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DK_DEVICE uint32_t shfl(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DK_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
DK_DEVICE void ldmatrix_x4(uint32_t a, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
DK_DEVICE void ldmatrix_x4_trans(uint32_t a, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}

// -- 16-bit types, packed in pairs, the lower one first
struct BFloat16 {};
struct Float16 {};
// c [16, 8] += a [16, 16] b [16, 8], with the fragment layout of PTX's mma.m16n8k16
DK_DEVICE void mma(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DK_DEVICE void mma(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DK_DEVICE uint32_t pack(BFloat16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DK_DEVICE uint32_t pack(Float16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DK_DEVICE float unpack(BFloat16, uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
DK_DEVICE float unpack(Float16, uint16_t v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}

// -- arithmetic
DK_DEVICE float exp2_approx(float x) {   // denormal results are 0
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DK_DEVICE float log2_approx(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DK_DEVICE float max(float a, float b) { return fmaxf(a, b); }   // ignores NaN
DK_DEVICE float min(float a, float b) { return fminf(a, b); }
DK_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
DK_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }   // never fused with a sum
DK_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
DK_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
DK_DEVICE float to_float_rn(uint32_t v) { return __uint2float_rn(v); }
DK_DEVICE float to_float_rn(int32_t v) { return __int2float_rn(v); }
DK_DEVICE float as_float(uint32_t v) { return __uint_as_float(v); }
DK_DEVICE uint32_t as_bits(float v) { return __float_as_uint(v); }
DK_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DK_DEVICE int popcount(uint32_t v) { return __popc(v); }
DK_DEVICE float inf() { return __uint_as_float(0x7f800000u); }

// -- collective over a block or a cluster
DK_DEVICE void syncthreads() { __syncthreads(); }
DK_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// -- launching, on the host; functions return nullptr or the error
inline const char* failure(const char* kernel, const char* what) {
  static thread_local char text[256];
  snprintf(text, sizeof text, "CUDA kernel %s: %s", kernel, what);
  return text;
}

template <class P>
const char* launch(const char* name, void (*kernel)(P), Grid grid, int threads, uint32_t smem, void* stream,
                   const P& params) {
  if (grid.x == 0 || grid.y == 0) return nullptr;
  if (grid.x > 0x7fffffff || grid.y > 65535) return failure(name, "the problem has more blocks than a grid can hold");
  cudaError_t error = cudaSuccess;
  if (smem > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error == cudaSuccess && grid.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  return error == cudaSuccess ? nullptr : failure(name, cudaGetErrorString(error));
}

// Properties of the current device.
inline int compute_capability() {   // 90 for sm_90; 0 if there is no device
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
}
inline int shared_memory_per_block() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return bytes;
}

}   // namespace dk::dev
#endif
