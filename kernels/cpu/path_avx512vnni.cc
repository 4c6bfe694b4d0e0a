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

// Sums that begin and end in memory.
struct InMemory {
  uint32_t* acc;

  __m512i first(int i, int j) const { return _mm512_loadu_si512(acc + i * kColumns + kPanel * j); }
  void last(int i, int j, __m512i sum) const {
    _mm512_storeu_si512(acc + i * kColumns + kPanel * j, sum);
  }
};

// Those of a whole group, which is scaled and added to what the groups before it gave; or, of the
// only group, multiplied by the scales of rows too.
template <bool kOnly>
struct OfGroup {
  const Group& g;

  __m512i first(int i, int) const {
    const uint32_t less = static_cast<uint32_t>(g.sums[i * g.pitch]) * g.offset;
    return _mm512_set1_epi32(static_cast<int32_t>(0u - less));
  }
  void last(int i, int j, __m512i sum) const {
    typedef int32_t Words __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
    float* out = g.out + i * g.out_pitch + kPanel * j;
    // Not the intrinsic, of which gcc 12 warns.
    Floats scaled = __builtin_convertvector((Words)sum, Floats);
    if (kOnly) scaled *= g.row_scale[i];
    scaled *= Floats(_mm512_loadu_ps(g.scale + kPanel * j));
    if (!kOnly && g.add) scaled += Floats(_mm512_loadu_ps(out));
    _mm512_storeu_ps(out, scaled);
  }
};

// Codes of several runs; see `tile_runs`.
struct Bytes {
  const int32_t* starts;
  size_t runs, quads;

  template <int kRows, int kVectors>
  inline __attribute__((always_inline)) void multiply(Rows x, const uint8_t* weights, size_t pitch,
                                                      __m512i (&sums)[kRows][kVectors]) const {
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
        add<kRows, kVectors>(codes, x.stride, w, sums);
      }
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void add(const int8_t* codes, size_t stride,
                                                        const __m512i (&w)[kVectors],
                                                        __m512i (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i v = broadcast(codes + i * stride);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) dot(sums[i][j], w[j], v);
    }
  }
};

// Codes of four bits, decoded in registers: a line has quad q of its block in the low halves of
// its bytes, quad q + 8 in the high ones.
struct Planes {
  size_t blocks;

  template <int kRows, int kVectors>
  inline __attribute__((always_inline)) void multiply(Rows x, const uint8_t* planes, size_t pitch,
                                                      __m512i (&sums)[kRows][kVectors]) const {
    const __m512i low = _mm512_set1_epi8(15), top = _mm512_set1_epi8(8);
    for (size_t q = 0; q < 8 * blocks; ++q, planes += kLine) {
      const int8_t* codes = x.codes + q / 8 * kBlock + q % 8 * kQuad;
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const __m512i line = _mm512_loadu_si512(planes + j * pitch);
        w[j] = _mm512_ternarylogic_epi32(line, low, top, 0x6a);  // (line & low) ^ top
        _mm_prefetch(reinterpret_cast<const char*>(planes + j * pitch + kAhead), _MM_HINT_T0);
      }
      Bytes::add<kRows, kVectors>(codes, x.stride, w, sums);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {  // again from the first cache: registers are few
        const __m512i line = _mm512_srli_epi16(_mm512_loadu_si512(planes + j * pitch), 4);
        w[j] = _mm512_ternarylogic_epi32(line, low, top, 0x6a);
      }
      Bytes::add<kRows, kVectors>(codes + kBlock / 2, x.stride, w, sums);
    }
  }
};

template <int kRows, int kVectors, class Weights, class Sums>
void tile_of(Rows x, const Weights& by, const uint8_t* weights, size_t pitch, const Sums& to) {
  __m512i sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = to.first(i, j);
  }
  by.template multiply<kRows, kVectors>(x, weights, pitch, sums);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) to.last(i, j, sums[i][j]);
  }
}

template <int kVectors, class Weights, class Sums>
void tile_panels(Rows x, size_t count, const Weights& by, const uint8_t* weights, size_t pitch,
                 const Sums& to) {
  switch (count) {
    case 1: return tile_of<1, kVectors>(x, by, weights, pitch, to);
    case 2: return tile_of<2, kVectors>(x, by, weights, pitch, to);
    case 3: return tile_of<3, kVectors>(x, by, weights, pitch, to);
    case 4: return tile_of<4, kVectors>(x, by, weights, pitch, to);
    case 5: return tile_of<5, kVectors>(x, by, weights, pitch, to);
    case 6: return tile_of<6, kVectors>(x, by, weights, pitch, to);
  }
}

template <class Weights, class Sums>
void tile_with(Rows x, size_t count, const Weights& by, const uint8_t* weights, size_t panels,
               size_t pitch, const Sums& to) {
  switch (panels) {
    case 1: return tile_panels<1>(x, count, by, weights, pitch, to);
    case 2: return tile_panels<2>(x, count, by, weights, pitch, to);
    case 3: return tile_panels<3>(x, count, by, weights, pitch, to);
    case 4: return tile_panels<4>(x, count, by, weights, pitch, to);
  }
}

void tile_runs(Rows x, const int32_t* starts, size_t runs, size_t count, const uint8_t* weights,
               size_t panels, size_t pitch, size_t quads, uint32_t* acc) {
  tile_with(x, count, Bytes{starts, runs, quads}, weights, panels, pitch, InMemory{acc});
}

void tile(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch, size_t quads,
          uint32_t* acc) {
  const int32_t start = 0;
  tile_runs(x, &start, 1, count, weights, panels, pitch, quads, acc);
}

void tile4(Rows x, size_t count, const uint8_t* planes, size_t panels, size_t pitch,
           size_t blocks, uint32_t* acc) {
  tile_with(x, count, Planes{blocks}, planes, panels, pitch, InMemory{acc});
}

template <class Weights>
void tile_with_group(Rows x, size_t count, const Weights& by, const uint8_t* weights,
                     size_t panels, size_t pitch, const Group& group) {
  if (group.row_scale) {
    tile_with(x, count, by, weights, panels, pitch, OfGroup<true>{group});
  } else {
    tile_with(x, count, by, weights, panels, pitch, OfGroup<false>{group});
  }
}

void tile_group(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch,
                size_t quads, const Group& group) {
  const int32_t start = 0;
  tile_with_group(x, count, Bytes{&start, 1, quads}, weights, panels, pitch, group);
}

void tile4_group(Rows x, size_t count, const uint8_t* planes, size_t panels, size_t pitch,
                 size_t blocks, const Group& group) {
  tile_with_group(x, count, Planes{blocks}, planes, panels, pitch, group);
}

}  // namespace

extern const Path kAvx512Vnni = JAXCOMPRESS_PATH("avx512vnni", 6, tile, tile_runs, tile4, tile_group, tile4_group, kSparseAvx512);

}  // namespace jaxcompress
