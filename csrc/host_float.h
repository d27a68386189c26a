// CUDA's 16-bit types in plain C++, for host.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// bfloat16 is the upper half of a float, rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// IEEE half: five bits of exponent, ten of mantissa, rounded to nearest even; below 2^-14 in steps of 2^-24.
struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return x.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.f) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const int steps = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 at the exponent's power of two
  return {uint16_t(sign | (((exponent + 14) << 10) + steps))};
}
