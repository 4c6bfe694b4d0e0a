// A path is one set of instructions: the five inner loops of every product, compiled for it.
//
// Each path is one file, compiled with its own flags, and the CPU says at run time which may
// run. All give the same integers and, since none contracts a product and a sum into one
// rounding, the same floats. A path includes no C++ library header: an inline function of
// the library, compiled with AVX-512 here, could be the copy that the linker keeps for all.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace jaxcompress {

// Codes along k in a 32-bit lane: what one dot product instruction sums.
constexpr size_t kQuad = 4;
// Columns of a panel, [quads][16][4]: a quad of each is 64 bytes, a line of the cache.
constexpr size_t kPanel = 16;
constexpr size_t kLine = kPanel * kQuad;
// Panels, and columns, that are multiplied together at most.
constexpr size_t kWide = 4;
constexpr size_t kColumns = kWide * kPanel;
// Codes along `k` of one block of bit planes.
constexpr size_t kBlock = 64;

// Where the rows of activations lie once they are codes.
struct Rows {
  const int8_t* codes;  // [rows][stride], zeros from k on
  size_t stride;
};

enum class Activation { kNone = 0, kRelu = 1, kGelu = 2, kGeluExact = 3, kSilu = 4 };

// What follows a product: y = activation(y + bias) + residual.
struct Epilogue {
  const float* bias;      // [batch][n], or null
  const float* residual;  // [batch][m][n], or null
  Activation activation;

  bool empty() const { return !bias && !residual && activation == Activation::kNone; }
  // For a tile of the result that begins at element `column` of all biases, and element `at` of
  // all results.
  Epilogue from(size_t column, size_t at) const {
    return {bias ? bias + column : nullptr, residual ? residual + at : nullptr, activation};
  }
};

// A whole group of codes:
// out[i][c] (+)= (sums of products - offset * sums[i * pitch]) * row_scale[i] * scale[c].
struct Group {
  const int32_t* sums;
  size_t pitch;
  uint32_t offset;
  const float* row_scale;  // or null, for groups that rows are not multiplied into yet
  const float* scale;      // of all columns of the panels
  bool add;
  float* out;
  size_t out_pitch;
};

struct SparsePath;

struct Path {
  const char* name;
  // Rows that `tile` takes at once at most.
  size_t rows;

  // acc[i][c] += sum over quads of weights (unsigned) x codes (signed), modulo 2^32.
  // `weights` are 1 to 4 panels, `pitch` bytes apart; `acc` is [count][kColumns].
  void (*tile)(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch,
               size_t quads, uint32_t* acc);

  // The same for codes of several stretches of a row, the first of which `starts` gives (in codes
  // from `x`), each of `quads`; the weights of one follow those of the other.
  void (*tile_runs)(Rows x, const int32_t* starts, size_t runs, size_t count,
                    const uint8_t* weights, size_t panels, size_t pitch, size_t quads,
                    uint32_t* acc);

  // The same for codes of four bits, decoded in registers: `blocks` of 64 codes, as bit planes.
  // For few rows, which wait for memory: a steady stream. Null where `decode` has to do.
  void (*tile4)(Rows x, size_t count, const uint8_t* planes, size_t panels, size_t pitch,
                size_t blocks, uint32_t* acc);

  // `tile` and `tile4` of a whole group, from `start` to `scale`, without a way through memory.
  // Null, both, where the four have to do.
  void (*tile_group)(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch,
                     size_t quads, const Group& group);
  void (*tile4_group)(Rows x, size_t count, const uint8_t* planes, size_t panels, size_t pitch,
                      size_t blocks, const Group& group);

  // `digits` rows of codes for one row of floats; returns the row's scale.
  // One digit: codes = round(clip(x / scale, -high, high)), scale = max|x| / high, or the
  // given one if it is not null. More digits: x to 2^-28 of the row's largest magnitude.
  // A row that is not finite: codes 0, scale NaN.
  float (*quantize)(const float* x, size_t k, int digits, float high, const float* scale,
                    int8_t* codes, size_t stride);

  // Codes of `bits` below 8, plus 2^(bits - 1), of one block of a panel: from [2 bits][16][4]
  // bytes of bit planes to [16][16][4].
  void (*decode)(const uint8_t* planes, int bits, uint8_t* weights);

  // A panel of `quads` from `rows` byte rows and `columns` columns of a matrix with these
  // steps; zeros where it has none. `flip` is xored into what is there.
  void (*gather)(const uint8_t* w, size_t row_step, size_t column_step, size_t rows,
                 size_t columns, uint8_t flip, size_t quads, uint8_t* panel);

  // acc[i][c] = -(offset + zero[c]) * sums[i * pitch]; null for no zero points.
  void (*start)(size_t count, size_t columns, int32_t offset, const int8_t* zero,
                const int32_t* sums, size_t pitch, uint32_t* acc);

  // out[i][c] (+)= acc[i][c] * scale[c]
  void (*scale)(const uint32_t* acc, size_t count, size_t columns, const float* scale, bool add,
                float* out);

  // out[i][c] = acc[i][c] * row_scale[i] * scale[c]
  void (*finish)(const uint32_t* acc, size_t count, size_t columns, const float* row_scale,
                 const float* scale, float* out, size_t pitch);

  // out[i][c] = row_scale[i] * sum over digits d of sums[digits * i + d][c] / 128^d
  void (*join)(const float* sums, size_t count, size_t columns, int digits,
               const float* row_scale, float* out, size_t pitch);

  // A tile of the result, rows `pitch` apart, as are those of the residual.
  void (*epilogue)(Epilogue what, size_t count, size_t columns, float* out, size_t pitch);

  // Sums of `group` codes each, the last group shorter.
  void (*sum)(const int8_t* codes, size_t k, size_t group, int32_t* sums);

  // The loops of sparse products, sparse_path.h.
  const SparsePath* sparse;
};

// The path of this name, or the best there is for an empty one; null if this CPU lacks it.
const Path* find_path(const char* name);

}  // namespace jaxcompress
