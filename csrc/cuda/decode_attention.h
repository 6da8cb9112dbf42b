#pragma once
#include "common/decode_attention.h"

namespace dk::cuda {

// The schedule must match the cache's `text_len` and slots. Returns nullptr or the error.
const char* decode_attention(const DecodeAttentionArgs& a, int64_t text_len, void* stream);

}   // namespace dk::cuda
