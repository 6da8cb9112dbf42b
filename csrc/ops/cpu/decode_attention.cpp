// decode_attention: checks the schedule and the step, allocates, and distributes (prompt, head, candidates) over
// threads. Arguments are checked in Python.
#include <optional>

#include "common/decode_schedule.h"
#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

static void check(const DecodeSchedule& s, int64_t words, int64_t step, const Tensor& prefix, const Tensor& image) {
  STD_TORCH_CHECK(words >= DecodeSchedule::HEADER_WORDS && s[schedule_header::magic] == DecodeSchedule::MAGIC &&
                      s[schedule_header::version] == DecodeSchedule::VERSION && s[schedule_header::length] == words,
                  "not a decode schedule of this version");
  STD_TORCH_CHECK(prefix.size(2) == s[schedule_header::text_len] && image.size(2) == s[schedule_header::slots],
                  "the schedule is of another cache");
  STD_TORCH_CHECK(prefix.is_contiguous() && image.stride(3) == 1 && image.stride(2) == image.size(3),
                  "rows of the cache must be contiguous");
  STD_TORCH_CHECK(0 <= step && step < s[schedule_header::steps], "all ", s[schedule_header::steps],
                  " tokens of the image have been decoded");
}

static Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor image_k,
                               Tensor image_v, Tensor schedule, Tensor step, double scale,
                               std::optional<Tensor> text_lengths) {
  const DecodeSchedule packed(static_cast<const int32_t*>(schedule.data_ptr()));
  const int64_t number = *static_cast<const int64_t*>(step.data_ptr());
  check(packed, schedule.numel(), number, prefix_k, image_k);
  check(packed, schedule.numel(), number, prefix_v, image_v);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  DecodeAttentionArgs a =
      decode_attention_args(q, k, v, prefix_k, prefix_v, image_k, image_v, out, schedule, step, scale);
  if (text_lengths) a.text_lengths = static_cast<const int64_t*>(text_lengths->data_ptr());

  // Two work items per thread: more candidates per item read the text less often, more items balance the load.
  const int64_t pieces_wanted = 2 * torch::stable::get_num_threads(), sequences = a.prompts * a.heads * a.candidates;
  const int64_t together = std::clamp<int64_t>(sequences / pieces_wanted, 1, MOST_CANDIDATES);
  const int64_t pieces = (a.candidates + together - 1) / together;
  const DecodeAttentionKernel& kernel = kernels().decode_attention;
  for_each_item(a.prompts * a.heads * pieces, kernel.workspace(a), [&](int64_t item, float* workspace) {
    const int64_t begin = item % pieces * together, head = item / pieces % a.heads, prompt = item / pieces / a.heads;
    kernel.run(a, workspace, prompt, head, begin, std::min(begin + together, a.candidates));
  });
  return out;
}

}   // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) { m.impl("decode_attention", TORCH_BOX(&dk::decode_attention)); }
