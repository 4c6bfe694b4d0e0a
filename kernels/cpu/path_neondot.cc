// NEON with the dot product of Armv8.2, four rows x 16 columns.
//
// It multiplies signed bytes by signed bytes. A weight with its top bit flipped is the weight
// less 128, so 128 times the sum of the row's codes is added, once for each row of a tile.

#include <arm_neon.h>

#include "loops.h"

namespace jaxcompress {
namespace {

constexpr size_t kVectors = kPanel / 4;  // of four columns each

inline int8x16_t signed_quads(const uint8_t* weights) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights), vdupq_n_u8(0x80)));
}

inline int8x16_t broadcast(const int8_t* codes) {
  int32_t quad;
  memcpy(&quad, codes, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

template <size_t kRows, size_t kPanels>
void tile_of(Rows x, const uint8_t* weights, size_t pitch, size_t quads, uint32_t* acc) {
  constexpr size_t kSums = kPanels * kVectors;
  int32x4_t sums[kRows][kSums];
#pragma GCC unroll 4
  for (size_t i = 0; i < kRows; ++i) {
    int32_t total = 0;
    for (size_t k = 0; k < kQuad * quads; ++k) total += x.codes[i * x.stride + k];
    const uint32x4_t more = vdupq_n_u32(128u * static_cast<uint32_t>(total));
#pragma GCC unroll 16
    for (size_t j = 0; j < kSums; ++j) {
      const uint32x4_t from = vld1q_u32(acc + i * kColumns + 4 * j);
      sums[i][j] = vreinterpretq_s32_u32(vaddq_u32(from, more));
    }
  }
  for (size_t q = 0; q < quads; ++q, weights += kLine) {
    int8x16_t codes[kRows];
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) codes[i] = broadcast(x.codes + i * x.stride + kQuad * q);
#pragma GCC unroll 16
    for (size_t j = 0; j < kSums; ++j) {
      const int8x16_t w = signed_quads(weights + j / kVectors * pitch + j % kVectors * 16);
#pragma GCC unroll 4
      for (size_t i = 0; i < kRows; ++i) sums[i][j] = vdotq_s32(sums[i][j], w, codes[i]);
    }
    if (kRows == 1) {
      for (size_t p = 0; p < kPanels; ++p) __builtin_prefetch(weights + p * pitch + kAhead);
    }
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (size_t j = 0; j < kSums; ++j) {
      vst1q_u32(acc + i * kColumns + 4 * j, vreinterpretq_u32_s32(sums[i][j]));
    }
  }
}

// One row takes all panels together: it waits for memory. More have registers for one.
void tile(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch, size_t quads,
          uint32_t* acc) {
  if (count == 1 && panels == kWide) return tile_of<1, kWide>(x, weights, pitch, quads, acc);
  for (size_t p = 0; p < panels; ++p, weights += pitch, acc += kPanel) {
    switch (count) {
      case 1: tile_of<1, 1>(x, weights, pitch, quads, acc); break;
      case 2: tile_of<2, 1>(x, weights, pitch, quads, acc); break;
      case 3: tile_of<3, 1>(x, weights, pitch, quads, acc); break;
      case 4: tile_of<4, 1>(x, weights, pitch, quads, acc); break;
    }
  }
}

}  // namespace

extern const Path kNeonDot = JAXCOMPRESS_PATH("neondot", 4, tile, runs_by<tile>, nullptr, nullptr, nullptr, kSparsePortable);

}  // namespace jaxcompress
