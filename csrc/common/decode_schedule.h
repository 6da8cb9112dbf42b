// Reads the packed decode schedule that dalle_kernels/decode_schedule.py writes (the format is described there).
#pragma once
#include <cstdint>

namespace dk {

struct DecodeSchedule {
  explicit DecodeSchedule(const int32_t* packed) : p(packed) {}
  enum Field { MAGIC, VERSION, TEXT_LEN, STEPS, SLOTS, RUNS, STEPS_AT, RUNS_AT, TOTAL };
  static constexpr int32_t MAGIC_VALUE = 0x4443444b, VERSION_VALUE = 1;
  static constexpr int HEADER = 16, STEP_WORDS = 5;

  // `count` pairs of begin and length, ascending.
  struct Runs {
    const int32_t* pairs;
    int32_t count;
  };

  int32_t operator[](Field field) const { return p[field]; }
  int32_t slot(int64_t step) const { return at(step)[0]; }                               // of the step's own key
  Runs image(int64_t step) const { return runs(at(step) + 1); }                          // slots
  Runs text(int64_t step) const { return runs(at(step) + 3); }                           // text positions

  const int32_t* p;

 private:
  const int32_t* at(int64_t step) const { return p + p[STEPS_AT] + step * STEP_WORDS; }
  Runs runs(const int32_t* first_and_count) const { return {p + p[RUNS_AT] + 2 * first_and_count[0], first_and_count[1]}; }
};

}  // namespace dk
