#pragma once
#include "common/decode_attention.h"

namespace dk::cuda {

// `text_len` and `slots` of the cache are what the schedule was made for. nullptr, or the error.
const char* decode_attention(const DecodeAttentionArgs& a, int64_t text_len, void* stream);

}   // namespace dk::cuda
