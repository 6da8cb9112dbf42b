// Runs AMX machine code on any processor with AVX2 and FMA. Preloaded (LD_PRELOAD), this library grants the request for
// permission to use tiles, and executes hidden tile instructions, which trap on every processor (SIGILL), on tiles in
// memory, one set per thread, by the rules of Intel's manual ("Instruction Set Reference", and "AMX Instruction
// Exception Classes" of volume 1). The first byte of a hidden instruction is FIRST_BYTE; amx.py hides them.
// Instructions that a processor with AMX would reject end the process with a message; so does a configuration that a
// thread still holds when the process ends. Memory is accessed by ordinary loads and stores, so an invalid address is
// an ordinary SIGSEGV. Supported: tilezero, tileloadd(t1), tilestored, tdpbf16ps, ldtilecfg, sttilecfg, tilerelease;
// palette 1; no start row.
#include <dlfcn.h>
#include <immintrin.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;
constexpr long SYS_ARCH_PRCTL = 158, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;

struct Config {   // layout in memory
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];   // bytes per row of TILES tiles; the rest is reserved
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "");

struct alignas(64) Tile {
  uint8_t row[MOST_ROWS][MOST_BYTES];
};

thread_local Config config;   // palette 0: none
thread_local Tile tiles[TILES];
std::atomic<long> executed{0}, holders{0};   // instructions; threads with a configuration
std::atomic<bool> permitted{false};
struct sigaction others = {};   // the program's own SIGILL handler

// -- decoding: VEX.128.W0.0F38 49, 4B and 5C, except for the first byte

enum Prefix { NONE, P66, F3, F2 };   // VEX.pp

struct Instruction {
  const uint8_t* at;
  uint8_t opcode, prefix, reg, rm, vvvv;
  bool memory, sib;
  uint8_t* address;   // of a memory operand
  int64_t stride;     // with SIB: the scaled index
  int length;
};

[[noreturn]] void refuse(const Instruction& i, const char* why) {
  Dl_info where = {};
  dladdr(i.at, &where);
  const char* file = where.dli_fname ? where.dli_fname : "?";
  dprintf(2, "AMX emulation: %s (instruction %02x, operands %d %d %d, at %p = %s+0x%lx)\n", why, i.opcode, i.reg, i.rm,
          i.vvvv, i.at, file, static_cast<long>(i.at - static_cast<uint8_t*>(where.dli_fbase)));
  abort();
}

int32_t read_int32(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// The operand of ModRM (at `p`), SIB and displacement.
void decode_memory(const uint8_t* p, bool index_extended, bool base_extended, const greg_t* registers,
                   Instruction& out) {
  static const int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const int mod = *p >> 6;
  int base = *p & 7;
  ++p;
  if (out.sib) {
    const int index = (*p >> 3 & 7) + 8 * index_extended;
    if (index != 4) out.stride = static_cast<int64_t>(registers[ORDER[index]]) << (*p >> 6);
    base = *p & 7;
    ++p;
  }
  const bool displacement_only = mod == 0 && base == 5;   // with SIB absolute, else relative to the next instruction
  int64_t displacement = 0;
  if (mod == 1) displacement = static_cast<int8_t>(*p), p += 1;
  if (mod == 2 || displacement_only) displacement = read_int32(p), p += 4;
  out.length = static_cast<int>(p - out.at);
  int64_t from = registers[ORDER[base + 8 * base_extended]];
  if (displacement_only) from = out.sib ? 0 : reinterpret_cast<int64_t>(p);
  out.address = reinterpret_cast<uint8_t*>(from + displacement);
}

bool decode(const greg_t* registers, Instruction& out) {
  const uint8_t* p = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (p[0] != FIRST_BYTE || (p[1] & 0x9F) != 0x82 || (p[2] & 0x84) != 0) return false;   // map 0F38, R clear, W0, 128
  out = {p,
         p[3],
         static_cast<uint8_t>(p[2] & 3),
         static_cast<uint8_t>(p[4] >> 3 & 7),
         static_cast<uint8_t>(p[4] & 7),
         static_cast<uint8_t>(~p[2] >> 3 & 15),
         p[4] < 0xC0,
         false,
         nullptr,
         0,
         5};
  if (out.opcode != 0x49 && out.opcode != 0x4B && out.opcode != 0x5C) return false;
  out.sib = out.memory && out.rm == 4;
  if (out.memory) decode_memory(p + 4, !(p[1] & 0x40), !(p[1] & 0x20), registers, out);
  return true;
}

// -- execution

void set(const Config& c) {
  holders += c.palette - config.palette;
  config = c;
  memset(tiles, 0, sizeof tiles);
}

void configure(const Instruction& i) {
  Config c;
  memcpy(&c, i.address, sizeof c);
  if (c.palette > 1) refuse(i, "ldtilecfg: no such palette");
  if (c.palette == 0) return set({});   // the other bytes are ignored
  // A processor accepts any start row, from which an interrupted load or store resumes. Kernels do not use it.
  if (c.start_row) refuse(i, "ldtilecfg: a start row is not emulated");
  for (uint8_t x : c.reserved)
    if (x) refuse(i, "ldtilecfg: reserved bytes are set");
  for (int t = 0; t < 16; ++t) {
    if (t >= TILES && (c.rows[t] || c.colsb[t])) refuse(i, "ldtilecfg: shapes of more than 8 tiles");
    if (c.rows[t] > MOST_ROWS || c.colsb[t] > MOST_BYTES)
      refuse(i, "ldtilecfg: a tile of more than 16 rows or 64 bytes a row");
    if (!c.rows[t] != !c.colsb[t]) refuse(i, "ldtilecfg: a tile with rows or columns alone");
  }
  set(c);
}

void check_tile(const Instruction& i, int tile) {
  if (!config.palette) refuse(i, "no tiles are configured");
  if (tile >= TILES || !config.rows[tile]) refuse(i, "this tile is not configured");
}

// A tile whose rows are not whole words can only be configured and zeroed.
void check_words(const Instruction& i, int tile) {
  check_tile(i, tile);
  if (config.colsb[tile] % 4) refuse(i, "this tile's rows are not whole words");
}

void move(const Instruction& i, bool load) {
  check_words(i, i.reg);
  const int colsb = config.colsb[i.reg];
  if (load) memset(&tiles[i.reg], 0, sizeof(Tile));
  for (int r = 0; r < config.rows[i.reg]; ++r) {
    uint8_t *outside = i.address + r * i.stride, *inside = tiles[i.reg].row[r];
    memcpy(load ? inside : outside, load ? outside : inside, colsb);
  }
}

// The first and the second bfloat16 of every pair, as floats
__m256 even_floats(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
__m256 odd_floats(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))); }

// Column n of a row: the sums over even and over odd elements, by fused multiply-adds; then their sum, plus the
// previous value.
__attribute__((noinline)) void tdpbf16ps(const Instruction& i) {
  const int c = i.reg, a = i.rm, b = i.vvvv;
  check_words(i, c), check_words(i, a), check_words(i, b);
  if (c == a || c == b || a == b) refuse(i, "tdpbf16ps: its three tiles are not different");
  if (config.rows[c] != config.rows[a] || config.colsb[c] != config.colsb[b] || config.colsb[a] != 4 * config.rows[b])
    refuse(i, "tdpbf16ps: the tiles' shapes do not match");
  constexpr int WIDTH = sizeof(__m256);
  for (int m = 0; m < config.rows[c]; ++m)
    for (int n = 0; n < config.colsb[c]; n += WIDTH) {
      __m256 even = _mm256_setzero_ps(), odd = even;
      for (int k = 0; k < config.rows[b]; ++k) {
        const __m256i left = _mm256_set1_epi32(read_int32(tiles[a].row[m] + 4 * k));
        const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(tiles[b].row[k] + n));
        even = _mm256_fmadd_ps(even_floats(left), even_floats(right), even);
        odd = _mm256_fmadd_ps(odd_floats(left), odd_floats(right), odd);
      }
      float* out = reinterpret_cast<float*>(tiles[c].row[m] + n);   // values beyond colsb are never read
      _mm256_store_ps(out, _mm256_add_ps(_mm256_load_ps(out), _mm256_add_ps(even, odd)));
    }
}

bool execute(const Instruction& i) {
  if (!permitted) refuse(i, "the process did not ask for permission to use tiles");
  switch (i.opcode << 8 | i.prefix) {
    case 0x4900 | NONE:
      if (i.memory && i.reg == 0) return configure(i), true;
      if (!i.memory && i.reg == 0 && i.rm == 0) return set({}), true;
      return false;
    case 0x4900 | P66:
      if (!i.memory || i.reg) return false;
      memcpy(i.address, &config, sizeof config);
      return true;
    case 0x4900 | F2:
      if (i.memory || i.rm) return false;
      check_tile(i, i.reg);
      memset(&tiles[i.reg], 0, sizeof(Tile));
      return true;
    case 0x4B00 | F2:
    case 0x4B00 | P66:
      return i.sib ? move(i, true), true : false;
    case 0x4B00 | F3:
      return i.sib ? move(i, false), true : false;
    case 0x5C00 | F3:
      if (i.memory) return false;
      _mm_setcsr(0x9fc0);   // round to nearest even, denormals are zero; returning from the signal restores the mode
      tdpbf16ps(i);
      return true;
    default:
      return false;
  }
}

// -- the process

template <class Function> Function next(const char* name) { return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name)); }
int real_sigaction(int number, const struct sigaction* action, struct sigaction* old) {
  static const auto real = next<int (*)(int, const struct sigaction*, struct sigaction*)>("sigaction");
  return real(number, action, old);
}

void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  long count = 0;
  for (; decode(registers, instruction) && execute(instruction);
       ++count)   // executes consecutive instructions, because traps are slow
    registers[REG_RIP] += instruction.length;
  executed.fetch_add(count, std::memory_order_relaxed);
  if (count) return;
  if (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN) {
    real_sigaction(SIGILL, &others, nullptr);   // the instruction traps again and ends the process
  } else if (others.sa_flags & SA_SIGINFO) {
    others.sa_sigaction(number, info, context);
  } else {
    others.sa_handler(number);
  }
}

__attribute__((constructor)) void begin() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  real_sigaction(SIGILL, &action, &others);
}

__attribute__((destructor)) void end() {
  if (executed) dprintf(2, "AMX emulation: %ld instructions\n", executed.load());
  if (!holders) return;
  dprintf(2, "AMX emulation: %ld threads did not release their tiles\n", holders.load());
  _exit(1);
}

}   // namespace

extern "C" {

// Others, such as Python's faulthandler, also install a SIGILL handler; it is kept for other instructions.
int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (number != SIGILL) return real_sigaction(number, action, old);
  if (old) *old = others;
  if (action) others = *action;
  return 0;
}

long syscall(long number, ...) noexcept {
  static const auto real = next<long (*)(long, ...)>("syscall");
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& x : a) x = va_arg(list, long);
  va_end(list);
  if (number == SYS_ARCH_PRCTL && a[0] == REQUEST_PERMISSION && a[1] == TILE_DATA) return permitted = true, 0;
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
}
