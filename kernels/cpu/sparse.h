// Products of rows of floats and a sparse matrix: the places of each column's values, in runs.
//
// The rows are turned first, so that a vector holds one entry of many of them: each value of
// the weight is then multiplied with whole vectors, wherever it lies.
#pragma once

#include "matmul.h"

namespace jaxcompress {

struct SparseProblem {
  size_t batch, m, k, n;
  size_t kept;     // values of each batch, padding at the end included
  bool quantized;  // the rows become int8 codes first

  // Rows that are turned together: as many as stay in the second cache with all of k.
  size_t tile() const { return k <= 2048 ? 64 : k <= 4096 ? 32 : 16; }
  // Of a tile that begins at `row`, filled up to what the loops are made for; 1 for one row.
  size_t width(size_t row) const;
  size_t tiles() const { return (m + tile() - 1) / tile(); }
  // One row is read as it is, but its codes have to become floats.
  bool turned() const { return m > 1 || quantized; }
  size_t turned_bytes() const;
  size_t scratch_bytes() const;
};

struct SparseWeights {
  const int32_t* starts;    // [batch][n + 1], where each column's run begins
  const uint16_t* places;   // [batch][kept], the index along k of each value
  const float* values;      // [batch][kept]; or, if null,
  const int8_t* codes;      // the same, to be scaled by
  const float* scale;       // [batch][n]
};

struct SparseRows {
  const float* x;      // [batch][m][k]
  float high;          // the largest code of a quantized row
  const float* given;  // a scale a batch, or null
};

// out[batch][m][n]; false if the runs or the places are not those of a k x n matrix.
bool multiply(const Path& path, const SparseProblem& p, SparseRows rows,
              const SparseWeights& weights, const Workers& workers, uint8_t* scratch, float* out);

}  // namespace jaxcompress
