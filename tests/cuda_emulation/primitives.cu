// Compares a GPU with the emulation (cuda_emulation.h): runs every primitive of csrc/cuda/device.h on random inputs and
// prints the results of each lane. The same source is compiled by nvcc for a GPU and by g++ for the emulation;
// primitives.py builds, runs and compares:
//
//   python tests/cuda_emulation/primitives.py       exit status 0: they agree; 1: the first difference, by primitive,
//   lane and word
//
// Random numbers are generated in separate statements, because the evaluation order of arguments is unspecified.
// The program prints one line per primitive, block and lane: name, kind of comparison, block, lane, and the words in
// hexadecimal.
#include "cuda/device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace dk {

constexpr int BLOCKS = 32, THREADS = 64, CLUSTER = 4, WORDS = 32;
constexpr uint32_t SHARED = 4096;
constexpr int SOURCE_WORDS = 1024;

struct Params {
  const uint32_t* source;   // random words
  uint32_t* out;            // [block][lane][probe][WORDS]
  int64_t block_words;
};

// The inputs of a probe.
struct Lane {
  const uint32_t* source;
  uint32_t* out;
  uint32_t salt, drawn = 0;

  DK_DEVICE uint32_t random() {
    uint32_t x = (++drawn * 0x9e3779b9u) ^ salt;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  }
  // 2^-7 to 2^9, either sign
  DK_DEVICE float number() { return dev::as_float((random() & 0x87ffffffu) + 0x3c000000u); }
  DK_DEVICE float integer() { return dev::to_float_rn(static_cast<int32_t>(random() % 17) - 8); }
  DK_DEVICE void put(int word, uint32_t v) { dev::stg(out + word, v); }
  DK_DEVICE void put(int word, float v) { put(word, dev::as_bits(v)); }
};

// Kinds of comparison: BITS: exactly; FLOAT: exactly, except for the bits of a NaN; EXP2 and LOG2: within the error
// bounds of the PTX manual.
#define DK_PROBE(NAME, COMPARED, WRITTEN)                \
  struct NAME {                                          \
    static constexpr const char* name = #NAME;           \
    static constexpr const char* compared = COMPARED;    \
    static constexpr int words = WRITTEN;                \
    static DK_DEVICE void run(Lane& l, uint32_t shared); \
  };                                                     \
  DK_DEVICE void NAME::run([[maybe_unused]] Lane& l, [[maybe_unused]] uint32_t shared)

// -- indices
DK_PROBE(place, "bits", 4) {
  l.put(0, static_cast<uint32_t>(dev::tid()));
  l.put(1, static_cast<uint32_t>(dev::bid_x()));
  l.put(2, static_cast<uint32_t>(dev::bid_y()));
  l.put(3, dev::smem_base() % 16);
}

// -- global memory
DK_PROBE(ldg, "bits", 8) {
  const uint32_t* p = l.source + l.random() % 32 * 4;
  const dev::u32x4 v = dev::ldg16(p);
  const dev::u32x2 w = dev::ldg8(p + 2);
  l.put(0, v.x), l.put(1, v.y), l.put(2, v.z), l.put(3, v.w), l.put(4, w.x), l.put(5, w.y), l.put(6, dev::ldg(p + 1));
  l.put(7, static_cast<uint32_t>(dev::ldg(reinterpret_cast<const uint16_t*>(p) + 3)));
}
DK_PROBE(stg, "bits", 8) {
  dev::stg16(l.out, {l.random(), l.random(), l.random(), l.random()});
  dev::stg8(l.out + 4, {l.random(), l.random()});
  dev::stg(l.out + 6, l.random());
  dev::stg(reinterpret_cast<uint16_t*>(l.out + 7), static_cast<uint16_t>(l.random()));
  dev::stg(reinterpret_cast<uint16_t*>(l.out + 7) + 1, static_cast<uint16_t>(l.random()));
}

// -- shared memory: written by one thread, read by another with other widths
DK_PROBE(shared_memory, "bits", 20) {
  const uint32_t mine = shared + dev::tid() * 48, other = shared + (THREADS - 1 - dev::tid()) * 48;
  dev::sts16(mine, {l.random(), l.random(), l.random(), l.random()});
  dev::sts8(mine + 16, {l.random(), l.random()});
  dev::sts_u32(mine + 24, l.random());
  dev::sts_f32(mine + 28, l.number());
  dev::sts16(mine + 32, {l.random(), l.random(), l.random(), l.random()});
  dev::syncthreads();
  DK_UNROLL_FOR (int i = 0; i < 6; ++i) l.put(i, dev::lds_u32(other + 4 * i));
  const dev::u32x4 v = dev::lds16(other + 16);
  const dev::u32x2 w = dev::lds8(other + 32);
  l.put(6, v.x), l.put(7, v.y), l.put(8, v.z), l.put(9, v.w), l.put(10, w.x), l.put(11, w.y);
  l.put(12, dev::lds_f32(other + 28));
  DK_UNROLL_FOR (int i = 0; i < 6; ++i) l.put(13 + i, static_cast<uint32_t>(dev::lds_u16(other + 2 * i)));
  l.put(19, 0u);
}
DK_PROBE(cp_async, "bits", 12) {
  const uint32_t mine = shared + dev::tid() * 48, other = shared + (dev::tid() ^ 33) * 48;
  const uint32_t valid = l.random();
  dev::cp_async16(mine, l.source + l.random() % 64 * 4);
  dev::cp_async16(mine + 16, l.source + l.random() % 64 * 4, valid & 1);
  dev::cp_async_commit();
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) dev::cp_async4(mine + 32 + 4 * i, l.source + l.random() % 256, valid >> i & 2);
  dev::cp_async_commit();
  dev::cp_async_wait<1>();
  dev::syncthreads();
  DK_UNROLL_FOR (int i = 0; i < 8; ++i) l.put(i, dev::lds_u32(other + 4 * i));
  dev::cp_async_wait<0>();
  dev::syncthreads();
  DK_UNROLL_FOR (int i = 8; i < 12; ++i) l.put(i, dev::lds_u32(other + 4 * i));
}

// -- collective over a warp
DK_PROBE(shfl_xor, "bits", 10) {
  DK_UNROLL_FOR (int i = 0; i < 5; ++i)
    l.put(i, dev::shfl_xor(l.random(), 1 << i)), l.put(5 + i, dev::shfl_xor(l.number(), 1 << i));
}
DK_PROBE(shfl, "bits", 4) {
  DK_UNROLL_FOR (int i = 0; i < 2; ++i) {
    const int from = l.random() & 31;
    l.put(i, dev::shfl(l.random(), from)), l.put(2 + i, dev::shfl(l.number(), from));
  }
}
DK_PROBE(ballot, "bits", 2) {
  const bool v = l.random() & 1;
  l.put(0, dev::ballot(v)), l.put(1, dev::ballot(!v));
}
template <bool TRANSPOSED> DK_DEVICE void load_matrices(Lane& l, uint32_t shared) {
  const uint32_t warp = shared + dev::tid() / 32 * 1024, lane = dev::tid() & 31;
  DK_UNROLL_FOR (int i = 0; i < 2; ++i)
    dev::sts16(warp + lane * 32 + 16 * i, {l.random(), l.random(), l.random(), l.random()});
  dev::syncwarp();
  uint32_t r[4];
  const uint32_t row = warp + (lane * 13 + 5) % 32 * 32 + (lane & 16);   // unordered rows with gaps
  if constexpr (TRANSPOSED) dev::ldmatrix_x4_trans(row, r);
  else dev::ldmatrix_x4(row, r);
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) l.put(i, r[i]);
}
DK_PROBE(ldmatrix, "bits", 4) { load_matrices<false>(l, shared); }
DK_PROBE(ldmatrix_trans, "bits", 4) { load_matrices<true>(l, shared); }

// -- 16-bit types. Sums of products of small integers are exact in any order.
template <class T> DK_DEVICE uint32_t integers(Lane& l) {
  const float low = l.integer(), high = l.integer();
  return dev::pack(T{}, low, high);
}
template <class T> DK_DEVICE void multiply(Lane& l) {
  float c[4];
  uint32_t a[4], b[2];
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) c[i] = l.integer();
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) a[i] = integers<T>(l);
  DK_UNROLL_FOR (int i = 0; i < 2; ++i) b[i] = integers<T>(l);
  dev::mma(T{}, c, a, b[0], b[1]);
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) l.put(i, c[i]);
}
DK_PROBE(mma_bfloat16, "bits", 4) { multiply<dev::BFloat16>(l); }
DK_PROBE(mma_float16, "bits", 4) { multiply<dev::Float16>(l); }
template <class T> DK_DEVICE void convert(Lane& l) {
  const float ordinary = l.number(), any = dev::as_float(l.random());
  l.put(0, dev::pack(T{}, ordinary, any)), l.put(1, dev::pack(T{}, any, ordinary));
  l.put(2, dev::pack(T{}, ordinary * 1e-6f, ordinary * 512.0f));   // float16: denormals, and beyond the largest
  l.put(3, dev::pack(T{}, dev::inf(), -dev::inf()));
}
DK_PROBE(pack_bfloat16, "bits", 4) { convert<dev::BFloat16>(l); }
DK_PROBE(pack_float16, "bits", 4) { convert<dev::Float16>(l); }
DK_PROBE(unpack_bfloat16, "float", 4) {
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) l.put(i, dev::unpack(dev::BFloat16{}, static_cast<uint16_t>(l.random())));
}
DK_PROBE(unpack_float16, "float", 4) {
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) l.put(i, dev::unpack(dev::Float16{}, static_cast<uint16_t>(l.random())));
}

// -- arithmetic
DK_PROBE(exp2_approx, "exp2", 8) {
  DK_UNROLL_FOR (int i = 0; i < 5; ++i) l.put(i, dev::exp2_approx(l.number() * 0.25f));
  l.put(5, dev::exp2_approx(-dev::inf())), l.put(6, dev::exp2_approx(dev::inf())),
      l.put(7, dev::exp2_approx(dev::as_float(l.random())));
}
DK_PROBE(log2_approx, "log2", 8) {
  // 0.5 to 2
  DK_UNROLL_FOR (int i = 0; i < 4; ++i)
    l.put(i, dev::log2_approx(dev::as_float(0x3f000000u + l.random() % 0x01000000u)));
  DK_UNROLL_FOR (int i = 4; i < 6; ++i) l.put(i, dev::log2_approx(dev::as_float(l.random())));
  l.put(6, dev::log2_approx(0.0f)), l.put(7, dev::log2_approx(dev::inf()));
}
DK_PROBE(arithmetic, "float", 9) {
  const float a = l.number(), b = l.number(), c = l.number(), any = dev::as_float(l.random()),
              nan = dev::as_float(0x7fc00000u);
  l.put(0, dev::max(a, b)), l.put(1, dev::min(a, b)), l.put(2, dev::max(a, nan)), l.put(3, dev::min(nan, b));
  l.put(4, dev::fma(a, b, c)), l.put(5, dev::mul_rn(a, any)), l.put(6, dev::add_rn(a, any)),
      l.put(7, dev::sub_rn(any, b));
  l.put(8, dev::add_rn(dev::mul_rn(a, b), c));   // not fused
}
DK_PROBE(integer_arithmetic, "bits", 6) {
  const uint32_t a = l.random(), b = l.random();
  l.put(0, dev::mul_high(a, b)), l.put(1, static_cast<uint32_t>(dev::popcount(a)));
  l.put(2, dev::to_float_rn(a)), l.put(3, dev::to_float_rn(static_cast<int32_t>(b)));
  l.put(4, dev::as_bits(dev::as_float(a & 0x7f7fffffu))), l.put(5, dev::inf());
}

// -- collective over a cluster
DK_PROBE(cluster, "bits", 5) {
  dev::sts_f32(shared + dev::tid() * 4, l.number());
  dev::cluster_sync();
  l.put(0, dev::cluster_rank());
  DK_UNROLL_FOR (int rank = 0; rank < CLUSTER; ++rank)
    l.put(1 + rank, dev::lds_f32_of(rank, shared + (dev::tid() ^ 17) * 4));
  dev::cluster_sync();
}

template <class... Probes> DK_KERNEL(THREADS, 1) run_probes(DK_PARAM Params p) {
  const int64_t block = dev::bid_x();
  uint32_t* out = p.out + block * p.block_words + dev::tid() * static_cast<int64_t>(sizeof...(Probes) * WORDS);
  uint32_t salt = static_cast<uint32_t>(block * THREADS + dev::tid()) * 0x85ebca6bu;
  const auto run = [&](auto probe) {
    Lane lane{p.source, out, salt};
    decltype(probe)::run(lane, dev::smem_base());
    dev::syncthreads();
    out += WORDS, salt += 0xc2b2ae35u;
  };
  (run(Probes{}), ...);
}

const char* run_on_device(const char* (*launch)(const Params&), Params p, std::vector<uint32_t>& source,
                          std::vector<uint32_t>& out);

template <class... Probes> int run_and_print(int cluster) {
  const int64_t block_words = static_cast<int64_t>(THREADS) * sizeof...(Probes) * WORDS;
  std::vector<uint32_t> source(SOURCE_WORDS), out(BLOCKS * block_words);
  for (int i = 0; i < SOURCE_WORDS; ++i) source[i] = (i + 1) * 0x9e3779b1u ^ i << 7;
  static int clusters;
  clusters = cluster;
  const auto launch = [](const Params& p) {
    return dev::launch("primitives", run_probes<Probes...>, {BLOCKS, 1, clusters}, THREADS, SHARED, nullptr, p);
  };
  const char* error = run_on_device(launch, {nullptr, nullptr, block_words}, source, out);
  if (error) return fprintf(stderr, "%s\n", error), 1;
  const uint32_t* word = out.data();
  for (int block = 0; block < BLOCKS; ++block)
    for (int lane = 0; lane < THREADS; ++lane) {
      const auto print = [&](auto probe) {
        using Probe = decltype(probe);
        printf("%s %s %d %d", Probe::name, Probe::compared, block, lane);
        for (int i = 0; i < Probe::words; ++i) printf(" %08x", word[i]);
        printf("\n");
        word += WORDS;
      };
      (print(Probes{}), ...);
    }
  return 0;
}

#if defined(__CUDACC__)
const char* run_on_device(const char* (*launch)(const Params&), Params p, std::vector<uint32_t>& source,
                          std::vector<uint32_t>& out) {
  uint32_t *source_there = nullptr, *out_there = nullptr;
  cudaMalloc(&source_there, source.size() * 4), cudaMalloc(&out_there, out.size() * 4);
  cudaMemcpy(source_there, source.data(), source.size() * 4, cudaMemcpyHostToDevice);
  p.source = source_there, p.out = out_there;
  if (const char* error = launch(p)) return error;
  cudaMemcpy(out.data(), out_there, out.size() * 4, cudaMemcpyDeviceToHost);
  const cudaError_t error = cudaGetLastError();   // of any call above
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
const char* run_on_device(const char* (*launch)(const Params&), Params p, std::vector<uint32_t>& source,
                          std::vector<uint32_t>& out) {
  emulation::allow(source.data(), source.size() * 4), emulation::allow(out.data(), out.size() * 4);
  p.source = source.data(), p.out = out.data();
  if (const char* error = launch(p)) return error;
  for (const auto& [what, count] : emulation::report.errors) fprintf(stderr, "%s\n", what.c_str());
  return emulation::report.errors.empty() ? nullptr : "the emulation found errors";
}
#endif

int conformance() {
  const int failed =
      run_and_print<place, ldg, stg, shared_memory, cp_async, shfl_xor, shfl, ballot, ldmatrix, ldmatrix_trans,
                    mma_bfloat16, mma_float16, pack_bfloat16, pack_float16, unpack_bfloat16, unpack_float16,
                    exp2_approx, log2_approx, arithmetic, integer_arithmetic>(1);
  if (failed || dev::compute_capability() < 90) return failed;
  return run_and_print<cluster>(CLUSTER);
}

}   // namespace dk

int main() { return dk::conformance(); }
