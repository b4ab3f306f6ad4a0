// Elements of the caller's dtypes, read into and written from the precision computed in (float for the 16-bit types).
#pragma once
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <limits>

#include "../kernels.h"

namespace deq {

inline float from_bfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest even; finite values beyond the largest bfloat16 become infinity.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t bits) {
  const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                                 : std::ldexp(static_cast<float>(mantissa | 1024), static_cast<int>(exponent) - 25);
  return bits & 0x8000 ? -value : value;
}

inline uint16_t to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  // In units of the last place, an integer after rounding to nearest even; a carry moves into the exponent by itself.
  const uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | static_cast<uint16_t>((static_cast<uint32_t>(exponent + 14) << 10) + units);
}

inline double element(const void* data, int32_t type, int64_t index) {
  switch (type) {
    case DEQ_FLOAT64:
      return static_cast<const double*>(data)[index];
    case DEQ_BFLOAT16:
      return from_bfloat16(static_cast<const uint16_t*>(data)[index]);
    case DEQ_FLOAT16:
      return from_float16(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline int64_t element_bytes(int32_t type) { return type == DEQ_FLOAT64 ? 8 : type == DEQ_FLOAT32 ? 4 : 2; }

// dst[k] = scale * src[first + k * stride]
template <class T>
void load_row(const DeqView& view, int32_t type, int64_t first, T scale, int64_t n, T* dst) {
  const int64_t stride = view.stride[2];
  if (type == DEQ_FLOAT32 || type == DEQ_FLOAT64) {
    const T* src = static_cast<const T*>(view.data) + first;
    if (stride == 1) {
      for (int64_t k = 0; k < n; ++k) dst[k] = scale * src[k];
    } else {
      for (int64_t k = 0; k < n; ++k) dst[k] = scale * src[k * stride];
    }
  } else {
    for (int64_t k = 0; k < n; ++k) dst[k] = scale * static_cast<T>(element(view.data, type, first + k * stride));
  }
}

// dst[first + k] = scale * src[k], pulled back to the largest finite value of the dtype where it would overflow.
// Returns false if any element had to be.
template <class T>
bool store_row(const DeqView& view, int32_t type, int64_t first, T scale, int64_t n, const T* src) {
  const T largest = type == DEQ_BFLOAT16  ? static_cast<T>(3.3895313892515355e38)
                    : type == DEQ_FLOAT16 ? static_cast<T>(65504.0)
                                          : std::numeric_limits<T>::max();
  bool in_range = true;
  for (int64_t k = 0; k < n; ++k) {
    T value = scale * src[k];
    if (!(std::fabs(value) <= largest)) {
      in_range = false;
      value = std::copysign(largest, src[k]);
    }
    if (type == DEQ_BFLOAT16) {
      static_cast<uint16_t*>(view.data)[first + k] = to_bfloat16(static_cast<float>(value));
    } else if (type == DEQ_FLOAT16) {
      static_cast<uint16_t*>(view.data)[first + k] = to_float16(static_cast<float>(value));
    } else {
      static_cast<T*>(view.data)[first + k] = value;
    }
  }
  return in_range;
}

}  // namespace deq
