// Reads a packed decode schedule (csrc/common/decode_schedule.h) from device memory.
#pragma once
#include "common/decode_schedule.h"
#include "cuda/device.h"

namespace dk {

struct DeviceDecodeSchedule {
  using Runs = DecodeSchedule::Runs;   // `pairs` on the device

  DK_DEVICE int32_t steps() const { return at(schedule_header::steps); }
  DK_DEVICE int32_t slot(int64_t step) const { return dev::ldg(words(step)); }   // of the step's own key
  DK_DEVICE Runs image(int64_t step) const { return runs(words(step) + 1); }     // slots
  DK_DEVICE Runs text(int64_t step) const { return runs(words(step) + 3); }      // text positions

  const int32_t* p;

 private:
  DK_DEVICE int32_t at(schedule_header::ScheduleHeader word) const { return dev::ldg(p + word); }
  DK_DEVICE const int32_t* words(int64_t step) const {
    return p + at(schedule_header::steps_at) + step * DecodeSchedule::STEP_WORDS;
  }
  DK_DEVICE Runs runs(const int32_t* first_and_count) const {
    return {p + at(schedule_header::runs_at) + 2 * static_cast<int64_t>(dev::ldg(first_and_count)),
            dev::ldg(first_and_count + 1)};
  }
};

}   // namespace dk
