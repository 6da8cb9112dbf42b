// The interface of the launchers (csrc/ops): one table of kernels per instruction set, on raw pointers and strides,
// independent of torch. Kernels run independent work items; the launcher distributes the items over threads and gives
// each thread a workspace.
#pragma once
#include "cpu/decode_attention.h"
#include "cpu/gumbel_softmax.h"
#include "cpu/sample_tokens.h"
#include "cpu/sparse_attention.h"

namespace dk {

struct Kernels {
  ChooseSparseAttention* sparse_attention;
  ChooseSparseAttentionBackward* sparse_attention_backward;
  DecodeAttentionKernel decode_attention;
  GumbelSoftmaxKernel gumbel_softmax;
  GumbelSoftmaxBackwardKernel gumbel_softmax_backward;
  SampleTokensKernel sample_tokens;
};

const Kernels& kernels();   // of the active instruction set

}   // namespace dk
