#pragma once
namespace dk {
enum class DType { float32, bfloat16, float16 };
}
