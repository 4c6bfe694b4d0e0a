// Products of rows of floats and a sparse matrix: the places of each column's values, in runs.
//
// The rows are turned first, so that a vector holds one entry of many of them: each value of
// the weight is then multiplied with whole vectors, wherever it lies. A group of columns goes
// through `k` together, part by part: what one of them has read of the turned rows is in a
// near cache for the others. The values lie in that order, a stream; within a part the columns
// with few values come first, so that the length of a run is foreseen.
#pragma once

#include "matmul.h"

namespace jaxcompress {

// Columns of a group; the last has what is left.
constexpr size_t kGroup = 64;

struct SparseProblem {
  size_t batch, m, k, n;
  size_t part;     // entries along k that are gone through at once; 256 of 32 rows are 32 KB
  size_t kept;     // values of each batch, padding at the end included
  bool quantized;  // the rows become int8 codes first

  // Rows that are turned together: what is left of the last 64 is filled up to a power of two.
  size_t tile() const { return m % 64 > 32 && m % 64 <= 48 ? 32 : 64; }
  // Of a tile that begins at `row`, filled up to what the loops are made for; 1 for one row.
  size_t width(size_t row) const;
  size_t tiles() const { return (m + tile() - 1) / tile(); }
  // One row is read as it is, but its codes have to become floats.
  bool turned() const { return m > 1 || quantized; }
  size_t parts() const { return (k + part - 1) / part; }
  size_t starts() const { return n * parts() + 1; }
  size_t turned_bytes() const;
  size_t scratch_bytes() const;
};

struct SparseWeights {
  // Where a run begins, a multiple of 4: of the first part of each column of the first group,
  // of the second part, ..., of the next group.
  const int32_t* starts;    // [batch][n * parts + 1]
  const uint8_t* columns;   // [batch][n * parts], which column of its group a run is of
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
              const SparseWeights& weights, const Epilogue& then, const Workers& workers,
              uint8_t* scratch, float* out);

// Whole blocks are kept.
struct BlockProblem {
  size_t batch, m, k, n;
  size_t height, width;  // of a block; `width` a multiple of 16
  size_t slots;          // blocks that there is room for in each column of blocks

  size_t across() const { return (n + width - 1) / width; }
  size_t down() const { return (k + height - 1) / height; }
};

// Which blocks they are.
struct BlockPlaces {
  const int32_t* rows;    // of blocks, [batch][across][slots]
  const int32_t* counts;  // how many of the slots are used, [batch][across]; or null, all are

  // The slots that a column uses, or -1 if one of them, or of their rows, is not there.
  int64_t used(const BlockProblem& p, size_t column) const {
    const int32_t* at = rows + column * p.slots;
    const int64_t count = counts ? counts[column] : static_cast<int64_t>(p.slots);
    if (count < 0 || count > static_cast<int64_t>(p.slots)) return -1;
    for (int64_t s = 0; s < count; ++s) {
      if (at[s] < 0 || static_cast<size_t>(at[s]) >= p.down()) return -1;
    }
    return count;
  }
};

// out[batch][m][n] of x[batch][m][k] and values[batch][across][slots][height][width]; false if
// one of the places is not in the matrix.
bool multiply(const Path& path, const BlockProblem& p, const float* x, const float* values,
              BlockPlaces places, const Epilogue& then, const Workers& workers, float* out);

// The same of int8 codes, for rows that become codes first.
struct BlockCodes {
  // `[batch][across]`, then panels of all slots of a column of blocks, [width / 16][slots]
  // [height / 4][16][4], codes plus 128; or, with `by_rows`, [slots][height][width], plain codes.
  const uint8_t* values;
  bool by_rows;
  const float* scale;  // [batch][n]
  // Bytes of the scratch buffer: codes of the rows, sums of each row of blocks, scales.
  static size_t stride(const BlockProblem& p);
  static size_t scratch_bytes(const BlockProblem& p);
};

// `height` a multiple of 4.
bool multiply(const Path& path, const BlockProblem& p, SparseRows x, const BlockCodes& weights,
              BlockPlaces places, const Epilogue& then, const Workers& workers, uint8_t* scratch,
              float* out);

}  // namespace jaxcompress
