// The inner loops of the sparse product, compiled once for each width of vectors.
//
// Like a `Path` it includes no C++ library header. Products and sums may be one rounding
// here, so two of these need not give the same floats.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace jaxcompress {

// Runs are filled up to a multiple of this many values, with zeros.
constexpr size_t kFill = 4;

// The runs of a part of a group of columns.
struct SparseRuns {
  const uint16_t* places;
  const float* values;  // or, if null,
  const int8_t* codes;
  const int32_t* starts;   // of each run in these three, and the end of the last
  const uint8_t* columns;  // of each run
  size_t count;
};

// Kept blocks of one column of blocks, `[count][height][width]`, and the first row of each.
struct SparseBlocks {
  const float* values;
  const int32_t* rows;  // in blocks
  size_t count, height, width;
};

struct SparsePath {
  // turned[i * width + r] = x[r * pitch + i], 0 for r from `rows` on.
  void (*turn)(const float* x, size_t rows, size_t pitch, size_t k, size_t width, float* turned);
  void (*turn_codes)(const int8_t* x, size_t rows, size_t pitch, size_t k, size_t width,
                     float* turned);

  // sums[column * width + r] += sum over a run of value * turned[place * width + r]; `width` is
  // 4, 8, 16, 32 or 64.
  void (*columns)(const float* turned, size_t width, SparseRuns runs, float* sums);

  // The same for one row, four sums of each column that are still to be added.
  void (*dots)(const float* x, SparseRuns runs, float* sums);

  // out[r][c] = sum over the blocks of x[r] times column `first` + c, for `rows` rows of x and
  // `columns` columns, `pitch` and `out_pitch` apart; `first` is a multiple of 64.
  void (*blocks)(const float* x, size_t rows, size_t pitch, size_t k, SparseBlocks blocks,
                 size_t first, size_t columns, float* out, size_t out_pitch);

  // Whether all places are below k.
  bool (*within)(const uint16_t* places, size_t count, size_t k);
};

extern const SparsePath kSparsePortable, kSparseAvx2, kSparseAvx512;

}  // namespace jaxcompress
