// The inner loops of the sparse product, compiled once for each width of vectors.
//
// Like a `Path` it includes no C++ library header. Products and sums may be one rounding
// here, so two of these need not give the same floats.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace jaxcompress {

// The values of one column, of either kind.
struct SparseRun {
  const uint16_t* places;
  const float* values;  // or, if null,
  const int8_t* codes;
  size_t count;
};

struct SparsePath {
  // turned[i * width + r] = x[r * pitch + i], 0 for r from `rows` on.
  void (*turn)(const float* x, size_t rows, size_t pitch, size_t k, size_t width, float* turned);
  void (*turn_codes)(const int8_t* x, size_t rows, size_t pitch, size_t k, size_t width,
                     float* turned);

  // sums[r] = sum over the run of value * turned[place * width + r]; `width` is 4, 8, 16, 32
  // or 64.
  void (*column)(const float* turned, size_t width, SparseRun run, float* sums);

  // The same for one row.
  float (*dot)(const float* x, SparseRun run);

  // Whether all places are below k.
  bool (*within)(const uint16_t* places, size_t count, size_t k);
};

extern const SparsePath kSparsePortable, kSparseAvx2, kSparseAvx512;

}  // namespace jaxcompress
