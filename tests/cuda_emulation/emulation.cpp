// The Python interface of the emulated library besides the operations.
#include "cuda/device.h"

#define DK_EXPORT extern "C" __attribute__((visibility("default")))
namespace emu = dk::emulation;

DK_EXPORT void dk_emulation_begin(uint64_t seed, int capability) {
  emu::options = {seed, capability};
  emu::report = {};
  emu::ranges.clear();
}
DK_EXPORT void dk_emulation_allow(const void* p, uint64_t bytes) { emu::allow(p, bytes); }

// Writes one report per line; returns the number of bytes needed.
DK_EXPORT uint64_t dk_emulation_errors(char* text, uint64_t size) {
  std::string all;
  for (const auto& [what, count] : emu::report.errors) all += what + " x" + std::to_string(count) + "\n";
  snprintf(text, size, "%s", all.c_str());
  return all.size() + 1;
}
// launches, mma, ldmatrix, and shared memory passes of ldmatrix (equal without bank conflicts)
DK_EXPORT void dk_emulation_counts(long (&counts)[4]) {
  counts[0] = emu::report.launches, counts[1] = emu::report.mma, counts[2] = emu::report.ldmatrix,
  counts[3] = emu::report.ldmatrix_ways;
}
