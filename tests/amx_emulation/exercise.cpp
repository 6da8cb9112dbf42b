// AMX instructions against plain loops, in every addressing mode, and invalid ones: `exercise NAME SEED`. Prints
// differences; returns 0 if there are none. Values are small integers, so that sums are exact in any order, except in
// `sums`, which are rounded as Intel's manual specifies; `results` prints these.
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

using Generator = std::mt19937;

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
  void shape(int tile, int r, int bytes) { rows[tile] = r, colsb[tile] = bytes; }
  void load() const {
    asm volatile("ldtilecfg %0" ::"m"(*this));
  }   // GCC 12's intrinsic declares only 8 of the 64 bytes
  static Config stored() {
    Config config;
    asm volatile("sttilecfg %0" : "=m"(config));
    return config;
  }
  bool operator==(const Config& other) const { return !memcmp(this, &other, sizeof *this); }
};

static uint16_t bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u >> 16;
}

static int uniform(Generator& random, int low, int high) { return std::uniform_int_distribution<>(low, high)(random); }

struct Matrix {   // rows of `stride` bytes
  int stride;
  std::vector<uint8_t> bytes;
  Matrix(int rows, int row_bytes, Generator& random)
      : stride(row_bytes + uniform(random, 0, 70)), bytes(rows * stride + 64, 0xEE) {}
  template <class T> T& at(int r, int c) { return reinterpret_cast<T*>(bytes.data() + r * stride)[c]; }
};

// A product of tiles of m x n floats and k pairs of bf16.
struct Product {
  int m, n, k;
  Matrix a, b, c, expected;
  Product(int m, int n, int k, Generator& random)
      : m(m), n(n), k(k), a(m, 4 * k, random), b(k, 4 * n, random), c(m, 4 * n, random), expected(c) {
    std::vector<int> left(m * 2 * k), right(2 * k * n);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < 2 * k; ++j) a.at<uint16_t>(i, j) = bf16(left[i * 2 * k + j] = uniform(random, -99, 99));
    for (int i = 0; i < 2 * k; ++i)
      for (int j = 0; j < n; ++j)
        b.at<uint16_t>(i / 2, 2 * j + i % 2) = bf16(right[i * n + j] = uniform(random, -99, 99));
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        int sum = uniform(random, -999, 999);
        c.at<float>(i, j) = sum;
        for (int x = 0; x < 2 * k; ++x) sum += left[i * 2 * k + x] * right[x * n + j];
        expected.at<float>(i, j) = sum;
      }
  }
  Config config() const {
    Config config;
    config.shape(5, m, 4 * n), config.shape(0, m, 4 * k), config.shape(7, k, 4 * n);
    return config;
  }
  void load() {
    asm volatile("" ::: "memory");   // GCC 12's intrinsics do not declare that they read memory
    _tile_loadd(5, c.bytes.data(), c.stride);
    _tile_stream_loadd(0, a.bytes.data(), a.stride);
    _tile_loadd(7, b.bytes.data(), b.stride);
  }
  void multiply() { _tile_dpbf16ps(5, 0, 7); }
  void store() {
    _tile_stored(5, c.bytes.data(), c.stride);
    asm volatile("" ::: "memory");
  }
  int wrong() const {   // also checks that nothing outside the tile was written
    const bool same = c.bytes == expected.bytes;
    if (!same) printf("wrong product of %d x %d x %d\n", m, n, k);
    return !same;
  }
  void print() {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) printf(" %08x", c.at<uint32_t>(i, j));
      puts("");
    }
  }
};

static int products(Generator& random) {
  int wrong = 0;
  for (int i = 0; i < 200; ++i) {
    const bool whole = i == 0;
    Product p(whole ? 16 : uniform(random, 1, 16), whole ? 16 : uniform(random, 1, 16),
              whole ? 16 : uniform(random, 1, 16), random);
    p.config().load();
    p.load(), p.multiply(), p.store();
    wrong += p.wrong();
  }
  _tile_release();
  return wrong;
}

// Two threads with shapes of their own, whose instructions alternate.
static int threads(Generator& random) {
  int wrong[2] = {};
  auto work = [](Generator random, int* wrong) {
    for (int i = 0; i < 50; ++i) {
      Product p(uniform(random, 1, 16), uniform(random, 1, 16), uniform(random, 1, 16), random);
      p.config().load();
      p.load(), std::this_thread::yield(), p.multiply(), std::this_thread::yield(), p.store();
      *wrong += p.wrong();
    }
    _tile_release();
  };
  std::thread first(work, Generator(random()), wrong), second(work, Generator(random()), wrong + 1);
  first.join(), second.join();
  return wrong[0] + wrong[1];
}

static int still_configured() {
  Config none;
  none.palette = 0;
  if (Config::stored() == none) return 0;
  return puts("tiles are still configured"), 1;
}

static Config static_config;

// Every addressing mode: rows of 4 bytes are loaded, stored 5 bytes apart, and compared.
static int addresses(Generator& random) {
  int wrong = 0;
  alignas(64) static uint8_t in[4096], out[16 * 5];
  for (uint8_t& x : in) x = random();
  static_config.shape(3, 16, 4);
  asm volatile("ldtilecfg %0" ::"m"(static_config));   // relative to the instruction
  auto compare = [&](const char* form, const uint8_t* from, int64_t stride) {
    asm volatile("tilestored %%tmm3, (%0, %1)" ::"r"(out), "r"(int64_t{5}) : "memory");
    for (int r = 0; r < 16; ++r)
      if (memcmp(out + 5 * r, from + r * stride, 4)) ++wrong, printf("wrong rows by %s, row %d\n", form, r), r = 16;
    asm volatile("tilezero %tmm3");
  };
#define FORM(TEXT, BASE, INDEX, FROM, STRIDE)                                      \
  {                                                                                \
    register const uint8_t* base asm(BASE) = in + 2048;                            \
    register int64_t index asm(INDEX) = 7;                                         \
    asm volatile("tileloadd " TEXT ", %%tmm3" ::"r"(base), "r"(index) : "memory"); \
    compare(TEXT " with " BASE ", " INDEX, in + 2048 + (FROM), STRIDE);            \
  }
  FORM("(%0, %1)", "rax", "rcx", 0, 7)
  FORM("(%0, %1, 2)", "rbx", "rdx", 0, 14)
  FORM("(%0, %1, 4)", "rdi", "r12", 0, 28)
  FORM("(%0, %1, 8)", "r8", "rsi", 0, 56)
  FORM("(%0, %1)", "r12", "r13", 0, 7)
  FORM("(%0, %1)", "r13", "r9", 0, 7)
  FORM("100(%0, %1)", "r15", "r14", 100, 7)
  FORM("-100(%0, %1, 2)", "r10", "r11", -100, 14)
  FORM("1000(%0, %1)", "rax", "rdx", 1000, 7)
  FORM("-1000(%0, %1)", "rsi", "rax", -1000, 7)
  FORM("(%0)", "rcx", "rax", 0, 0)
  FORM("9(%0)", "r11", "rax", 9, 0)
  int64_t stride = 7;   // the frame pointer cannot be an operand
  asm volatile("xchg %0, %%rbp\n\ttileloadd (%1, %%rbp), %%tmm3\n\txchg %0, %%rbp"
               : "+r"(stride)
               : "r"(in + 2048)
               : "memory");
  compare("rbp", in + 2048, 7);
  const int64_t back = -9;
  asm volatile("tileloadd (%0, %1), %%tmm3" ::"r"(in + 2048), "r"(back) : "memory");
  compare("a negative stride", in + 2048, -9);
  void* low = mmap(reinterpret_cast<void*>(0x20000000), 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (low == MAP_FAILED) return puts("no low memory"), 1;
  memcpy(low, in, 4096);
  asm volatile("tileloadd 0x20000010(, %0, 4), %%tmm3" ::"r"(int64_t{3}) : "memory");
  compare("displacement and index", in + 16, 12);
  if (!(Config::stored() == static_config)) ++wrong, puts("wrong configuration stored");
  _tile_release();
  return wrong + still_configured();
}

// Configurations that a processor accepts, although they are useless: rows that are not whole words, and bytes that are
// ignored without a palette.
static int accepted() {
  int wrong = 0;
  Config config;
  config.shape(2, 3, 5);
  config.load();
  _tile_zero(2);
  if (!(Config::stored() == config)) ++wrong, puts("wrong configuration stored");
  config.palette = 0, config.reserved[3] = 1;
  config.load();
  return wrong + still_configured();
}

// Sums are rounded to nearest even, denormals are zero, infinities and NaN are as usual.
static int rounding(Generator& random) {
  struct Case {
    float a, b, c, expected;
  };
  const Case cases[] = {{0x1p-126f, 0x1p-1f, 0, 0},         {0x1p-127f, 0x1p10f, 0, 0},  {1, 1, 0x1p24f, 0x1p24f},
                        {3, 1, 0x1p24f, 0x1p24f + 4},       {-1, 1, 0x1p-127f, -1},      {0, 0, 0x1p-127f, 0},
                        {0x1p127f, 2, 0, __builtin_inff()}, {0x1p-126f, 1, 0, 0x1p-126f}};
  int wrong = 0;
  for (const Case& x : cases) {
    Product p(1, 1, 1, random);
    p.a.at<uint16_t>(0, 0) = bf16(x.a), p.b.at<uint16_t>(0, 0) = bf16(x.b), p.c.at<float>(0, 0) = x.c,
                        p.expected.at<float>(0, 0) = x.expected;
    p.a.at<uint16_t>(0, 1) = 0;
    p.config().load();
    p.load(), p.multiply(), p.store();
    if (p.wrong()) ++wrong, printf("%a * %a + %a is not %a but %a\n", x.a, x.b, x.c, x.expected, p.c.at<float>(0, 0));
  }
  _tile_release();
  return wrong;
}

// One element, as the manual specifies: chains of fused multiply-adds over the even and over the odd elements, their
// sum, plus the previous value. Separate from its caller, which sets the rounding mode.
__attribute__((noipa)) static float formula(const float* left, const float* right, int pairs, float there) {
  float even = 0, odd = 0;
  for (int k = 0; k < pairs; ++k) {
    even = __builtin_fmaf(left[2 * k], right[2 * k], even);
    odd = __builtin_fmaf(left[2 * k + 1], right[2 * k + 1], odd);
  }
  return there + (even + odd);
}

static float rounded_formula(const float* left, const float* right, int pairs, float there) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);   // to nearest even, denormals are zero
  const float sum = formula(left, right, pairs, there);
  _mm_setcsr(before);
  return sum;
}

// The bits of a random number with an exponent within 8 of `middle`; if that is 0, any bits.
static uint32_t any_number(Generator& random, int middle) {
  const uint32_t bits = random();
  return middle ? (bits & 0x807fffff) | uniform(random, std::max(0, middle - 8), middle + 8) << 23 : bits;
}

static float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return std::isnan(x) ? __builtin_nanf("") : x;   // the manual does not specify which NaN
}

// Products of about 2^0 (within a factor of 2^16), of about 2^-134, many of which underflow, and of any numbers,
// including infinity and NaN.
static int sums(Generator& random, bool print) {
  int wrong = 0;
  for (int i = 0; i < 80; ++i) {
    const int middle = i % 4 == 0 ? 0 : i % 4 == 1 ? 60 : 127;
    Product p(uniform(random, 1, 16), uniform(random, 1, 16), uniform(random, 1, 16), random);
    std::vector<float> left(p.m * 2 * p.k), right(p.n * 2 * p.k);   // right: transposed
    auto element = [&](uint16_t& bfloat16) {
      const uint32_t bits = any_number(random, middle) & 0xffff0000;
      bfloat16 = bits >> 16;
      return from_bits(bits);
    };
    for (int r = 0; r < p.m; ++r)
      for (int j = 0; j < 2 * p.k; ++j) left[r * 2 * p.k + j] = element(p.a.at<uint16_t>(r, j));
    for (int n = 0; n < p.n; ++n)
      for (int j = 0; j < 2 * p.k; ++j) right[n * 2 * p.k + j] = element(p.b.at<uint16_t>(j / 2, 2 * n + j % 2));
    for (int r = 0; r < p.m; ++r)
      for (int n = 0; n < p.n; ++n) {
        const float there = from_bits(p.c.at<uint32_t>(r, n) = any_number(random, middle ? 2 * middle - 127 : 0));
        p.expected.at<float>(r, n) = rounded_formula(&left[r * 2 * p.k], &right[n * 2 * p.k], p.k, there);
      }
    p.config().load();
    p.load(), p.multiply(), p.store();
    for (Matrix* matrix : {&p.c, &p.expected})
      for (int r = 0; r < p.m; ++r)
        for (int n = 0; n < p.n; ++n) matrix->at<float>(r, n) = from_bits(matrix->at<uint32_t>(r, n));
    if (print) p.print();
    else wrong += p.wrong();
  }
  _tile_release();
  return wrong;
}

static void fault(const std::string& name, Generator& random) {
  Product p(4, 5, 6, random);
  Config config = p.config();
  if (name == "too many rows") config.shape(1, 17, 64);
  if (name == "rows too long") config.shape(1, 16, 65);
  if (name == "rows without columns") config.shape(1, 16, 0);
  if (name == "palette 2") config.palette = 2;
  if (name == "reserved") config.reserved[5] = 1;
  if (name == "wrong shape") config.shape(0, 4, 20);
  if (name == "part of a word") config.shape(0, 4, 23);
  if (name == "part of a word stored") config.shape(1, 4, 23);
  if (name != "unconfigured") config.load();
  if (name == "released") _tile_release();
  if (name == "another tile") _tile_zero(6);
  if (name == "part of a word stored") _tile_stored(1, p.c.bytes.data(), p.c.stride);
  if (name == "no address") _tile_loadd(5, nullptr, 0);
  if (name == "not AMX") asm volatile("ud2");
  p.load();
  if (name == "same tile")
    asm volatile(".byte 0xC4, 0xE2, 0x7A, 0x5C, 0xE8");   // tdpbf16ps tmm5, tmm0, tmm0, which assemblers reject
  p.multiply();
  if (name != "held") _tile_release();
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  Generator random(std::stoul(arguments[2]));
  if (name != "no permission") syscall(SYS_arch_prctl, 0x1023, 18);
  if (name == "products") return products(random);
  if (name == "addresses") return addresses(random);
  if (name == "accepted") return accepted();
  if (name == "sums" || name == "results") return sums(random, name == "results");
  if (name == "rounding") return rounding(random);
  if (name == "threads") return threads(random);
  return fault(name, random), 0;
}
