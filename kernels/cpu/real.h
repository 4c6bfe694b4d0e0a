// Floats and their bits, and rounding, in ways that a compiler vectorizes.
//
// In an unnamed namespace: every path has copies of its own.
#pragma once

#include <stdint.h>
#include <string.h>

namespace jaxcompress {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// 1.5 * 2^23: a float that is added to it has no bits left for a fraction.
constexpr float kRounder = 12582912.0f;

// Half to even, for magnitudes below 2^22.
inline float round_even(float x) { return (x + kRounder) - kRounder; }

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNaN = 0x7fc00000u;

}  // namespace
}  // namespace jaxcompress
