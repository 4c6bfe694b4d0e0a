// Tiles of 256-bit vectors, for any way to multiply quads: a path gives `Weights`, `Codes`
// (what it makes of a vector of either, once), `dot`, and the rows that its registers hold.
#pragma once

#include <immintrin.h>

#include "loops.h"

namespace jaxcompress {
namespace {

template <class Isa, int kRows, int kPanels>
void tile_of(Rows x, const uint8_t* weights, size_t pitch, size_t quads, uint32_t* acc) {
  constexpr int kVectors = 2 * kPanels;
  __m256i sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = _mm256_loadu_si256(reinterpret_cast<__m256i*>(acc + i * kColumns + 8 * j));
    }
  }
  for (size_t q = 0; q < quads; ++q, weights += kLine) {
    typename Isa::Weights w[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const uint8_t* at = weights + j / 2 * pitch + j % 2 * 32;
      w[j] = Isa::weights(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      if (kRows == 1) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t quad;
      memcpy(&quad, x.codes + i * x.stride + kQuad * q, sizeof quad);
      const typename Isa::Codes v = Isa::codes(_mm256_set1_epi32(quad));
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) Isa::dot(sums[i][j], w[j], v);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + i * kColumns + 8 * j), sums[i][j]);
    }
  }
}

// Several rows: one panel at a time, or there are too few registers. One row: all of them.
template <class Isa>
void tile256(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch,
             size_t quads, uint32_t* acc) {
  if (count == 1 && panels == kWide) {
    return tile_of<Isa, 1, kWide>(x, weights, pitch, quads, acc);
  }
  for (size_t p = 0; p < panels; ++p, weights += pitch, acc += kPanel) {
    switch (count) {
      case 1: tile_of<Isa, 1, 1>(x, weights, pitch, quads, acc); break;
      case 2: tile_of<Isa, 2, 1>(x, weights, pitch, quads, acc); break;
      case 3: tile_of<Isa, 3, 1>(x, weights, pitch, quads, acc); break;
      case 4: tile_of<Isa, 4, 1>(x, weights, pitch, quads, acc); break;
      case 5: tile_of<Isa, 5, 1>(x, weights, pitch, quads, acc); break;
      case 6: tile_of<Isa, 6, 1>(x, weights, pitch, quads, acc); break;
    }
  }
}

// The dot product instruction, in one of its two encodings.
#define JAXCOMPRESS_VPDPBUSD(name, prefix, constraint)                                  \
  struct name {                                                                         \
    using Weights = __m256i;                                                            \
    using Codes = __m256i;                                                              \
    static __m256i weights(__m256i w) { return w; }                                     \
    static __m256i codes(__m256i x) { return x; }                                       \
    static inline __attribute__((always_inline)) void dot(__m256i& acc, __m256i w, __m256i x) { \
      asm(prefix "vpdpbusd %2, %1, %0" : "+" constraint(acc) : constraint(w), constraint(x)); \
    }                                                                                   \
  }

}  // namespace
}  // namespace jaxcompress
