// decode_attention: checks the schedule and the step, allocates, spreads (prompt, head, candidates) over threads. Arguments were checked in Python.
#include "common/decode_schedule.h"
#include "ops/cpu/common.h"

namespace dk {

static SequenceStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

static void check(const DecodeSchedule& s, int64_t words, int64_t step, const Tensor& prefix, const Tensor& image) {
  STD_TORCH_CHECK(words >= DecodeSchedule::HEADER && s[DecodeSchedule::MAGIC] == DecodeSchedule::MAGIC_VALUE &&
                      s[DecodeSchedule::VERSION] == DecodeSchedule::VERSION_VALUE && s[DecodeSchedule::TOTAL] == words,
                  "not a decode schedule of this version");
  STD_TORCH_CHECK(prefix.size(2) == s[DecodeSchedule::TEXT_LEN] && image.size(2) == s[DecodeSchedule::SLOTS], "the schedule is of another cache");
  STD_TORCH_CHECK(prefix.is_contiguous() && image.stride(3) == 1 && image.stride(2) == image.size(3), "rows of the cache must be contiguous");
  STD_TORCH_CHECK(0 <= step && step < s[DecodeSchedule::STEPS], "all ", s[DecodeSchedule::STEPS], " tokens of the image have been decoded");
}

static Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor image_k, Tensor image_v, Tensor schedule, Tensor step,
                               double scale) {
  DecodeAttentionArgs a;
  a.schedule = static_cast<const int32_t*>(schedule.data_ptr());
  a.step = static_cast<const int64_t*>(step.data_ptr());
  check(DecodeSchedule(a.schedule), schedule.numel(), *a.step, prefix_k, image_k);
  check(DecodeSchedule(a.schedule), schedule.numel(), *a.step, prefix_v, image_v);
  STD_TORCH_CHECK(image_k.stride(0) == image_v.stride(0) && image_k.stride(1) == image_v.stride(1), "keys and values must be stored alike");

  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.prefix_k = prefix_k.data_ptr(), a.prefix_v = prefix_v.data_ptr(), a.image_k = image_k.data_ptr(), a.image_v = image_v.data_ptr();
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v), a.image_strides = strides_of(image_k);
  a.prompts = prefix_k.size(0), a.candidates = q.size(0) / a.prompts, a.heads = q.size(1), a.head_dim = q.size(2);
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(q);

  // As many candidates per piece as keep every thread busy twice: the more share a piece, the less often the text is read.
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

}  // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) { m.impl("decode_attention", TORCH_BOX(&dk::decode_attention)); }
