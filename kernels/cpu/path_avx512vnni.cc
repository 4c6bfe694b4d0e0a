// AVX-512 with VNNI: 6 rows x 64 columns in 24 of the 32 registers.

#include <immintrin.h>

#include "loops.h"

namespace jaxcompress {
namespace {

// Not the intrinsic: gcc 12 copies the accumulator before each and then spills, which
// halves the speed.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i weights, __m512i codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(codes));
}

inline __attribute__((always_inline)) __m512i broadcast(const int8_t* codes) {
  int32_t quad;
  memcpy(&quad, codes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

template <int kRows, int kVectors>
void tile_of(Rows x, const int32_t* starts, size_t runs, const uint8_t* weights, size_t pitch,
             size_t quads, uint32_t* acc) {
  __m512i sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_loadu_si512(acc + i * kColumns + kPanel * j);
  }
  for (size_t r = 0; r < runs; ++r) {
    const int8_t* codes = x.codes + starts[r];
    for (size_t q = 0; q < quads; ++q, weights += kLine, codes += kQuad) {
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        w[j] = _mm512_loadu_si512(weights + j * pitch);
        // Few rows wait for memory, which the hardware alone does not read ahead far enough.
        if (kRows <= 4) _mm_prefetch(reinterpret_cast<const char*>(weights + j * pitch + kAhead), _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i v = broadcast(codes + i * x.stride);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) dot(sums[i][j], w[j], v);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_si512(acc + i * kColumns + kPanel * j, sums[i][j]);
  }
}

template <int kVectors>
void tile_panels(Rows x, const int32_t* starts, size_t runs, size_t count, const uint8_t* weights,
                 size_t pitch, size_t quads, uint32_t* acc) {
  switch (count) {
    case 1: return tile_of<1, kVectors>(x, starts, runs, weights, pitch, quads, acc);
    case 2: return tile_of<2, kVectors>(x, starts, runs, weights, pitch, quads, acc);
    case 3: return tile_of<3, kVectors>(x, starts, runs, weights, pitch, quads, acc);
    case 4: return tile_of<4, kVectors>(x, starts, runs, weights, pitch, quads, acc);
    case 5: return tile_of<5, kVectors>(x, starts, runs, weights, pitch, quads, acc);
    case 6: return tile_of<6, kVectors>(x, starts, runs, weights, pitch, quads, acc);
  }
}

void tile_runs(Rows x, const int32_t* starts, size_t runs, size_t count, const uint8_t* weights,
               size_t panels, size_t pitch, size_t quads, uint32_t* acc) {
  switch (panels) {
    case 1: return tile_panels<1>(x, starts, runs, count, weights, pitch, quads, acc);
    case 2: return tile_panels<2>(x, starts, runs, count, weights, pitch, quads, acc);
    case 3: return tile_panels<3>(x, starts, runs, count, weights, pitch, quads, acc);
    case 4: return tile_panels<4>(x, starts, runs, count, weights, pitch, quads, acc);
  }
}

void tile(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch, size_t quads,
          uint32_t* acc) {
  const int32_t start = 0;
  tile_runs(x, &start, 1, count, weights, panels, pitch, quads, acc);
}

template <int kRows, int kVectors>
void tile4_of(Rows x, const uint8_t* planes, size_t pitch, size_t blocks, uint32_t* acc) {
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-0x78);  // 0x88
  __m512i sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_loadu_si512(acc + i * kColumns + kPanel * j);
  }
  for (size_t q = 0; q < 8 * blocks; ++q, planes += kLine) {
    // A line has quad q of its block in the low halves of its bytes, quad q + 8 in the high.
    const int8_t* codes = x.codes + q / 8 * kBlock + q % 8 * kQuad;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const __m512i line = _mm512_xor_si512(_mm512_loadu_si512(planes + j * pitch), flip);
      const __m512i first = _mm512_and_si512(line, low);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
      _mm_prefetch(reinterpret_cast<const char*>(planes + j * pitch + kAhead), _MM_HINT_T0);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        dot(sums[i][j], first, broadcast(codes + i * x.stride));
        dot(sums[i][j], second, broadcast(codes + i * x.stride + kBlock / 2));
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_si512(acc + i * kColumns + kPanel * j, sums[i][j]);
  }
}

template <int kVectors>
void tile4_panels(Rows x, size_t count, const uint8_t* planes, size_t pitch, size_t blocks,
                  uint32_t* acc) {
  switch (count) {
    case 1: return tile4_of<1, kVectors>(x, planes, pitch, blocks, acc);
    case 2: return tile4_of<2, kVectors>(x, planes, pitch, blocks, acc);
    case 3: return tile4_of<3, kVectors>(x, planes, pitch, blocks, acc);
    case 4: return tile4_of<4, kVectors>(x, planes, pitch, blocks, acc);
    case 5: return tile4_of<5, kVectors>(x, planes, pitch, blocks, acc);
    case 6: return tile4_of<6, kVectors>(x, planes, pitch, blocks, acc);
  }
}

void tile4(Rows x, size_t count, const uint8_t* planes, size_t panels, size_t pitch,
           size_t blocks, uint32_t* acc) {
  switch (panels) {
    case 1: return tile4_panels<1>(x, count, planes, pitch, blocks, acc);
    case 2: return tile4_panels<2>(x, count, planes, pitch, blocks, acc);
    case 3: return tile4_panels<3>(x, count, planes, pitch, blocks, acc);
    case 4: return tile4_panels<4>(x, count, planes, pitch, blocks, acc);
  }
}

}  // namespace

extern const Path kAvx512Vnni = JAXCOMPRESS_PATH("avx512vnni", 6, tile, tile_runs, tile4, kSparseAvx512);

}  // namespace jaxcompress
