#pragma once
#include "common/decode_attention.h"

namespace dk {

constexpr int MOST_CANDIDATES = 32;   // per call of `run`

struct DecodeAttentionKernel {
  int64_t (*workspace)(const DecodeAttentionArgs&);   // floats
  // One head of candidates [begin, end) of a prompt. The split of candidates into calls does not change their results.
  void (*run)(const DecodeAttentionArgs&, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end);
};

}   // namespace dk
