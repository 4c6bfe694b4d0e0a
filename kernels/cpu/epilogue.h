// What may follow a product, on a tile that is still in the cache.
//
// In an unnamed namespace: every path has copies of its own, and all give the same floats.
#pragma once

#include "path.h"
#include "real.h"

namespace jaxcompress {
namespace {

// 1 / (1 + exp(-t)), 0 below -87; exp(-t) = 2^n exp(r), |r| at most half of log 2.
inline float sigmoid(float given) {
  float t = given > 87.0f ? 87.0f : given;
  t = t < -87.0f ? -87.0f : t;
  const float n = round_even(t * -1.44269504f);
  const float r = (-t - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  float p = 0.0013950599823147058f;
  p = p * r + 0.008368954062461853f;
  p = p * r + 0.04166620597243309f;
  p = p * r + 0.166665181517601f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const uint32_t power = bits_of(n + kRounder) << 23;  // what is above n is shifted out
  const float share = 1.0f / (1.0f + float_of(bits_of(p) + power));
  return given < -87.0f ? 0.0f : share;
}

// GELU is x times the share of a normal distribution below x. That share is a sigmoid too, of
// this odd polynomial in x (a weighted minimax fit for |x| up to 6), 3e-8 from it at most; of
// what is below, nothing is left.
inline float normal_logit(float given) {
  const float x = given > 6.0f ? 6.0f : given, t = x * x;
  float p = 2.6908860556451586e-11f;
  p = p * t + 2.3446113939229463e-09f;
  p = p * t + -2.45801714982008e-07f;
  p = p * t + 7.789160918036941e-06f;
  p = p * t + -0.00011009949957951903f;
  p = p * t + -6.60583536955528e-05f;
  p = p * t + 0.07266674935817719f;
  p = p * t + 1.5957697629928589f;
  return given < -6.0f ? -100.0f : p * x;
}

template <Activation kActivation>
inline float activated(float x) {
  switch (kActivation) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    // (1 + tanh(u)) / 2 is a sigmoid of 2 u; the constant is 2 sqrt(2 / pi).
    case Activation::kGelu: return x * sigmoid(1.595769122f * (x + 0.044715f * (x * x * x)));
    case Activation::kGeluExact: return x * sigmoid(normal_logit(x));
    case Activation::kSilu: return x * sigmoid(x);
    default: return x;
  }
}

template <Activation kActivation>
inline void activate(size_t columns, float* out) {
  for (size_t c = 0; c < columns; ++c) out[c] = activated<kActivation>(out[c]);
}

inline void add_row(const float* __restrict more, size_t columns, float* __restrict out) {
  for (size_t c = 0; c < columns; ++c) out[c] += more[c];
}

void epilogue(Epilogue e, size_t count, size_t columns, float* out, size_t pitch) {
  for (size_t i = 0; i < count; ++i, out += pitch) {
    if (e.bias) add_row(e.bias, columns, out);
    switch (e.activation) {
      case Activation::kNone: break;
      case Activation::kRelu: activate<Activation::kRelu>(columns, out); break;
      case Activation::kGelu: activate<Activation::kGelu>(columns, out); break;
      case Activation::kGeluExact: activate<Activation::kGeluExact>(columns, out); break;
      case Activation::kSilu: activate<Activation::kSilu>(columns, out); break;
    }
    if (e.residual) add_row(e.residual + i * pitch, columns, out);
  }
}

}  // namespace
}  // namespace jaxcompress
