// decode_attention: one block per (prompt, head, 16 candidates). Arguments are checked in Python. The schedule and the
// step are on the device and are not checked here, which would synchronise. Text lengths are refused in Python.
#include <optional>

#include "cuda/decode_attention.h"

#include "ops/arguments.h"
#include "ops/cuda/common.h"

namespace dk {

static Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor image_k,
                               Tensor image_v, Tensor schedule, Tensor step, double scale, std::optional<Tensor>) {
  const OnDevice guard(q);
  for (const Tensor* image : {&image_k, &image_v})
    STD_TORCH_CHECK(image->stride(3) == 1 && image->stride(2) == image->size(3),
                    "rows of the cache must be contiguous");
  STD_TORCH_CHECK(prefix_k.is_contiguous() && prefix_v.is_contiguous(), "rows of the cache must be contiguous");

  Tensor out = new_output(q, {q.size(0), q.size(1), q.size(2)});
  const DecodeAttentionArgs a =
      decode_attention_args(q, k, v, prefix_k, prefix_v, image_k, image_v, out, schedule, step, scale);
  check_launch(cuda::decode_attention(a, prefix_k.size(2), current_stream(q)));
  return out;
}

}   // namespace dk

DK_REGISTER(m) { m.impl("decode_attention", TORCH_BOX(&dk::decode_attention)); }
