// Reads the packed decode schedule that dalle_kernels/decode_schedule.py writes (the format is described there).
#pragma once
#include <cstdint>

namespace dk {

// Words of the header; dalle_kernels/decode_schedule.py has the same list.
namespace schedule_header {
enum ScheduleHeader : int {
  magic = 0,
  version = 1,
  text_len = 2,
  steps = 3,
  slots = 4,
  runs = 5,
  steps_at = 6,
  runs_at = 7,
  length = 8,
};
}   // namespace schedule_header

struct DecodeSchedule {
  explicit DecodeSchedule(const int32_t* packed) : p(packed) {}
  static constexpr int32_t MAGIC = 0x4443444b, VERSION = 1;
  static constexpr int HEADER_WORDS = 16, STEP_WORDS = 5;

  // `count` pairs of begin and length, ascending.
  struct Runs {
    const int32_t* pairs;
    int32_t count;
  };

  int32_t operator[](schedule_header::ScheduleHeader word) const { return p[word]; }
  int32_t slot(int64_t step) const { return at(step)[0]; }        // of the step's own key
  Runs image(int64_t step) const { return runs(at(step) + 1); }   // slots
  Runs text(int64_t step) const { return runs(at(step) + 3); }    // text positions

  const int32_t* p;

 private:
  const int32_t* at(int64_t step) const { return p + p[schedule_header::steps_at] + step * STEP_WORDS; }
  Runs runs(const int32_t* first_and_count) const {
    return {p + p[schedule_header::runs_at] + 2 * first_and_count[0], first_and_count[1]};
  }
};

}   // namespace dk
