// decode_attention: one block per (prompt, head, 16 candidates). Arguments were checked in Python. The schedule and the step are on the device, where nobody
// waits to look at them.
#include "cuda/decode_attention.h"

#include "ops/cuda/common.h"

namespace dk {

static SequenceStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

static Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor image_k, Tensor image_v, Tensor schedule, Tensor step,
                               double scale) {
  const OnDevice guard(q);
  for (const Tensor* image : {&image_k, &image_v})
    STD_TORCH_CHECK(image->stride(3) == 1 && image->stride(2) == image->size(3), "rows of the cache must be contiguous");
  STD_TORCH_CHECK(prefix_k.is_contiguous() && prefix_v.is_contiguous(), "rows of the cache must be contiguous");
  STD_TORCH_CHECK(image_k.stride(0) == image_v.stride(0) && image_k.stride(1) == image_v.stride(1), "keys and values must be stored alike");

  Tensor out = new_output(q, {q.size(0), q.size(1), q.size(2)});
  DecodeAttentionArgs a;
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.prefix_k = prefix_k.data_ptr(), a.prefix_v = prefix_v.data_ptr(), a.image_k = image_k.data_ptr(), a.image_v = image_v.data_ptr();
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v), a.image_strides = strides_of(image_k);
  a.prompts = prefix_k.size(0), a.candidates = q.size(0) / a.prompts, a.heads = q.size(1), a.head_dim = q.size(2);
  a.schedule = static_cast<const int32_t*>(schedule.data_ptr());
  a.step = static_cast<const int64_t*>(step.data_ptr());
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(q);
  check_launch(cuda::decode_attention(a, prefix_k.size(2), current_stream(q)));
  return out;
}

}  // namespace dk

DK_REGISTER(m) { m.impl("decode_attention", TORCH_BOX(&dk::decode_attention)); }
