// The loops of a `SparsePath` for vectors of `kVector` bytes, the largest that the CPU has.
//
// In an unnamed namespace: every path has copies of its own.
#pragma once

#include <string.h>

#include "sparse_path.h"

namespace jaxcompress {
namespace {

template <size_t kBytes>
struct Floats {
  typedef float Type __attribute__((vector_size(kBytes)));
  static constexpr size_t kLanes = kBytes / sizeof(float);

  static Type load(const float* from) {
    Type v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static void store(float* to, Type v) { memcpy(to, &v, sizeof v); }
};

using Four = Floats<16>::Type;

#if defined(__clang__) || __GNUC__ >= 12
#define JAXCOMPRESS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define JAXCOMPRESS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourPlaces{__VA_ARGS__}))
#endif

inline Four load_four(const float* from) { return Floats<16>::load(from); }

inline Four load_four(const int8_t* from) {
  typedef int8_t FourCodes __attribute__((vector_size(4)));
  typedef int32_t FourWords __attribute__((vector_size(16)));
  FourCodes codes;
  memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(__builtin_convertvector(codes, FourWords), Four);
}

// x[0..3][0..3] to turned[0..3][0..3].
template <class From>
inline void turn_four(const From* x, size_t pitch, float* turned, size_t width) {
  const Four a = load_four(x), b = load_four(x + pitch), c = load_four(x + 2 * pitch),
             d = load_four(x + 3 * pitch);
  const Four ab_low = JAXCOMPRESS_SHUFFLE(a, b, 0, 4, 1, 5);
  const Four ab_high = JAXCOMPRESS_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = JAXCOMPRESS_SHUFFLE(c, d, 0, 4, 1, 5);
  const Four cd_high = JAXCOMPRESS_SHUFFLE(c, d, 2, 6, 3, 7);
  Floats<16>::store(turned, JAXCOMPRESS_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  Floats<16>::store(turned + width, JAXCOMPRESS_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  Floats<16>::store(turned + 2 * width, JAXCOMPRESS_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  Floats<16>::store(turned + 3 * width, JAXCOMPRESS_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
}

template <class From>
void turn(const From* x, size_t rows, size_t pitch, size_t k, size_t width, float* turned) {
  constexpr size_t kLine = 16;  // entries that are read of a row before the next
  for (size_t start = 0; start < k; start += kLine) {
    const size_t end = start + kLine < k ? start + kLine : k;
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      size_t i = start;
      for (; i + 4 <= end; i += 4) {
        turn_four(x + r * pitch + i, pitch, turned + i * width + r, width);
      }
      for (; i < end; ++i) {
        for (size_t j = r; j < r + 4; ++j) {
          turned[i * width + j] = static_cast<float>(x[j * pitch + i]);
        }
      }
    }
    for (; r < width; ++r) {
      for (size_t i = start; i < end; ++i) {
        turned[i * width + r] = r < rows ? static_cast<float>(x[r * pitch + i]) : 0.0f;
      }
    }
  }
}

// `kRows` of the `kWidth` rows of every run. Several values at a time where a few vectors alone
// would wait for each other's sums.
template <size_t kVector, size_t kWidth, size_t kRows, class Value>
inline void sum_rows(const float* turned, const Value* values, const SparseRuns& runs,
                     float* sums) {
  using V = Floats<(kRows * sizeof(float) < kVector ? kRows * sizeof(float) : kVector)>;
  constexpr size_t kVectors = kRows / V::kLanes, kAtOnce = kVectors >= 4 ? 1 : 4 / kVectors;
  for (size_t run = 0; run < runs.count; ++run) {
    float* to = sums + runs.columns[run] * kWidth;
    typename V::Type acc[kAtOnce][kVectors] = {};
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) acc[0][v] = V::load(to + v * V::kLanes);
    const size_t end = runs.starts[run + 1];
    for (size_t i = runs.starts[run]; i < end; i += kFill) {
#pragma GCC unroll 4
      for (size_t u = 0; u < kFill; ++u) {
        const float* row = turned + runs.places[i + u] * kWidth;
        const float value = static_cast<float>(values[i + u]);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          acc[u % kAtOnce][v] += value * V::load(row + v * V::kLanes);
        }
      }
    }
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (size_t u = 1; u < kAtOnce; ++u) acc[0][v] += acc[u][v];
      V::store(to + v * V::kLanes, acc[0][v]);
    }
  }
}

// Eight vectors of sums at most: the others go a second time over the runs.
template <size_t kVector, size_t kWidth, class Value>
inline void sum_all(const float* turned, const Value* values, const SparseRuns& runs,
                    float* sums) {
  constexpr size_t kMost = 8 * kVector / sizeof(float);
  constexpr size_t kRows = kWidth < kMost ? kWidth : kMost;
  for (size_t r = 0; r < kWidth; r += kRows) {
    sum_rows<kVector, kWidth, kRows>(turned + r, values, runs, sums + r);
  }
}

template <size_t kVector, class Value>
inline void columns_of(const float* turned, size_t width, const Value* values,
                       const SparseRuns& runs, float* sums) {
  switch (width) {
    case 4: return sum_all<kVector, 4>(turned, values, runs, sums);
    case 8: return sum_all<kVector, 8>(turned, values, runs, sums);
    case 16: return sum_all<kVector, 16>(turned, values, runs, sums);
    case 32: return sum_all<kVector, 32>(turned, values, runs, sums);
    case 64: return sum_all<kVector, 64>(turned, values, runs, sums);
  }
}

template <size_t kVector>
void columns(const float* turned, size_t width, SparseRuns runs, float* sums) {
  if (runs.values) return columns_of<kVector>(turned, width, runs.values, runs, sums);
  columns_of<kVector>(turned, width, runs.codes, runs, sums);
}

template <class Value>
inline void dots_of(const float* x, const Value* values, const SparseRuns& runs, float* sums) {
  for (size_t run = 0; run < runs.count; ++run) {
    float* to = sums + runs.columns[run] * kFill;
    Four acc = load_four(to);
    const size_t end = runs.starts[run + 1];
    for (size_t i = runs.starts[run]; i < end; i += kFill) {
      const uint16_t* at = runs.places + i;
      const Four row = {x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
      acc += load_four(values + i) * row;
    }
    Floats<16>::store(to, acc);
  }
}

void dots(const float* x, SparseRuns runs, float* sums) {
  if (runs.values) return dots_of(x, runs.values, runs, sums);
  dots_of(x, runs.codes, runs, sums);
}

// `kRows` rows x `kVectors` vectors of columns, all of whose sums are in registers.
template <size_t kVector, size_t kRows, size_t kVectors>
inline void block_tile(const float* x, size_t pitch, size_t k, const SparseBlocks& blocks,
                       size_t column, size_t columns, float* out, size_t out_pitch) {
  using V = Floats<kVector>;
  typename V::Type acc[kRows][kVectors] = {};
  for (size_t b = 0; b < blocks.count; ++b) {
    const size_t start = static_cast<size_t>(blocks.rows[b]) * blocks.height;
    const size_t left = k - start, height = left < blocks.height ? left : blocks.height;
    const float* w = blocks.values + b * blocks.height * blocks.width + column;
    for (size_t h = 0; h < height; ++h, w += blocks.width) {
      typename V::Type row[kVectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) row[v] = V::load(w + v * V::kLanes);
#pragma GCC unroll 6
      for (size_t r = 0; r < kRows; ++r) {
        const float value = x[r * pitch + start + h];
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) acc[r][v] += value * row[v];
      }
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    memcpy(out + r * out_pitch, acc[r], columns * sizeof(float));
  }
}

template <size_t kVector, size_t kVectors>
inline void block_rows(const float* x, size_t rows, size_t pitch, size_t k,
                       const SparseBlocks& blocks, size_t column, size_t columns, float* out,
                       size_t out_pitch) {
  switch (rows) {
    case 1: return block_tile<kVector, 1, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
    case 2: return block_tile<kVector, 2, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
    case 3: return block_tile<kVector, 3, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
    case 4: return block_tile<kVector, 4, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
    case 5: return block_tile<kVector, 5, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
    default: return block_tile<kVector, 6, kVectors>(x, pitch, k, blocks, column, columns, out, out_pitch);
  }
}

// As many columns at a time as 6 rows of sums leave registers for: 64, 16 or 8. Blocks are
// multiples of 16 wide.
template <size_t kVector>
void blocks(const float* x, size_t rows, size_t pitch, size_t k, SparseBlocks blocks,
            size_t first, size_t columns, float* out, size_t out_pitch) {
  constexpr size_t kWide = kVector == 64 ? 4 : 2, kLanes = kVector / sizeof(float);
  for (size_t r = 0; r < rows; r += 6) {
    const size_t count = rows - r < 6 ? rows - r : 6;
    const float* from = x + r * pitch;
    for (size_t c = 0; c < columns;) {
      const bool wide = first + c + kWide * kLanes <= blocks.width;
      const size_t step = (wide ? kWide : 1) * kLanes, here = columns - c < step ? columns - c : step;
      float* to = out + r * out_pitch + c;
      if (wide) {
        block_rows<kVector, kWide>(from, count, pitch, k, blocks, first + c, here, to, out_pitch);
      } else {
        block_rows<kVector, 1>(from, count, pitch, k, blocks, first + c, here, to, out_pitch);
      }
      c += step;
    }
  }
}

bool within(const uint16_t* places, size_t count, size_t k) {
  uint16_t largest = 0;
  for (size_t i = 0; i < count; ++i) largest = places[i] > largest ? places[i] : largest;
  return count == 0 || largest < k;
}

#define JAXCOMPRESS_SPARSE(bytes) {turn<float>, turn<int8_t>, columns<bytes>, dots, blocks<bytes>, within}

}  // namespace
}  // namespace jaxcompress
