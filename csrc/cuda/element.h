// Conversion of tensor elements to and from float32. T is float, dev::BFloat16 or dev::Float16.
#pragma once
#include "cuda/device.h"

namespace dk {

template <class T> struct Element {
  using Stored = uint16_t;
  static DK_DEVICE float widen(uint16_t v) { return dev::unpack(T{}, v); }
  static DK_DEVICE uint16_t narrow(float v) { return static_cast<uint16_t>(dev::pack(T{}, v, v)); }
};
template <> struct Element<float> {
  using Stored = float;
  static DK_DEVICE float widen(float v) { return v; }
  static DK_DEVICE float narrow(float v) { return v; }
};
template <class T> using Stored = typename Element<T>::Stored;

// Four elements in one access, aligned to their size.
DK_DEVICE dev::u32x4 packed_quad(float, const float (&x)[4]) {
  return {dev::as_bits(x[0]), dev::as_bits(x[1]), dev::as_bits(x[2]), dev::as_bits(x[3])};
}
template <class T> DK_DEVICE dev::u32x2 packed_quad(T, const float (&x)[4]) {
  return {dev::pack(T{}, x[0], x[1]), dev::pack(T{}, x[2], x[3])};
}
DK_DEVICE void unpack_quad(float, dev::u32x4 v, float (&x)[4]) {
  x[0] = dev::as_float(v.x), x[1] = dev::as_float(v.y), x[2] = dev::as_float(v.z), x[3] = dev::as_float(v.w);
}
template <class T> DK_DEVICE void unpack_quad(T, dev::u32x2 v, float (&x)[4]) {
  x[0] = Element<T>::widen(static_cast<uint16_t>(v.x)), x[1] = Element<T>::widen(static_cast<uint16_t>(v.x >> 16));
  x[2] = Element<T>::widen(static_cast<uint16_t>(v.y)), x[3] = Element<T>::widen(static_cast<uint16_t>(v.y >> 16));
}

DK_DEVICE void load_quad(float, const float* p, float (&x)[4]) { unpack_quad(float{}, dev::ldg16(p), x); }
template <class T> DK_DEVICE void load_quad(T, const uint16_t* p, float (&x)[4]) { unpack_quad(T{}, dev::ldg8(p), x); }
DK_DEVICE void store_quad(float, float* p, const float (&x)[4]) { dev::stg16(p, packed_quad(float{}, x)); }
template <class T> DK_DEVICE void store_quad(T, uint16_t* p, const float (&x)[4]) { dev::stg8(p, packed_quad(T{}, x)); }

// The same in shared memory.
DK_DEVICE void load_shared_quad(float, uint32_t at, float (&x)[4]) { unpack_quad(float{}, dev::lds16(at), x); }
template <class T> DK_DEVICE void load_shared_quad(T, uint32_t at, float (&x)[4]) {
  unpack_quad(T{}, dev::lds8(at), x);
}
DK_DEVICE void store_shared_quad(float, uint32_t at, const float (&x)[4]) { dev::sts16(at, packed_quad(float{}, x)); }
template <class T> DK_DEVICE void store_shared_quad(T, uint32_t at, const float (&x)[4]) {
  dev::sts8(at, packed_quad(T{}, x));
}

}   // namespace dk
