// Elements of tensors as float32, whatever their dtype: T is float, dev::BFloat16 or dev::Float16.
#pragma once
#include "cuda/device.h"

namespace dk {

template <class T> struct Element {
  using Stored = uint16_t;
  static DK_DEVICE float widen(uint16_t v) { return dev::unpack(T{}, v); }
};
template <> struct Element<float> {
  using Stored = float;
  static DK_DEVICE float widen(float v) { return v; }
};
template <class T> using Stored = typename Element<T>::Stored;

// Four elements in one access, aligned to their size.
DK_DEVICE void load_quad(float, const float* p, float (&x)[4]) {
  const dev::u32x4 v = dev::ldg16(p);
  x[0] = dev::as_float(v.x), x[1] = dev::as_float(v.y), x[2] = dev::as_float(v.z), x[3] = dev::as_float(v.w);
}
template <class T> DK_DEVICE void load_quad(T, const uint16_t* p, float (&x)[4]) {
  const dev::u32x2 v = dev::ldg8(p);
  x[0] = Element<T>::widen(static_cast<uint16_t>(v.x)), x[1] = Element<T>::widen(static_cast<uint16_t>(v.x >> 16));
  x[2] = Element<T>::widen(static_cast<uint16_t>(v.y)), x[3] = Element<T>::widen(static_cast<uint16_t>(v.y >> 16));
}

}  // namespace dk
