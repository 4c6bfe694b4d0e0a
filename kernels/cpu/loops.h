// The loops that a compiler vectorizes well by itself, compiled once for each path.
//
// In an unnamed namespace: every path has copies of its own.
#pragma once

#include <string.h>

#include "epilogue.h"
#include "path.h"
#include "real.h"
#include "sparse_path.h"

namespace jaxcompress {
namespace {

// Bytes of a panel that are read ahead.
constexpr size_t kAhead = 2048;

// Magnitudes of floats compare like their bits, and NaN comes out on top.
uint32_t largest_magnitude(const float* x, size_t k) {
  uint32_t largest = 0;
  for (size_t i = 0; i < k; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// One int8 a float. The same operations in the same order as the reference in JAX, a true
// division included, so that the codes are the same.
float quantize_once(const float* x, size_t k, float high, const float* given, int8_t* codes) {
  float scale;
  if (given) {
    scale = *given;
  } else {
    const uint32_t largest = largest_magnitude(x, k);
    scale = float_of(largest) * (1.0f / high);
    if (bits_of(scale) < 0x00800000u) scale = 1.0f;  // zero or denormal
    if (largest >= kInfinity) scale = float_of(kNaN);
  }
  for (size_t i = 0; i < k; ++i) {
    float v = x[i] / scale;
    v = v > high ? high : v;
    v = v < -high ? -high : v;
    v = v == v ? v : 0.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(v)));
  }
  return scale;
}

// x = scale * (d0 + d1 / 128 + d2 / 128^2 + ...), each digit an int8, the scale a power of
// two: nothing is lost above 2^-28 of the row's largest magnitude with four digits.
float quantize_digits(const float* x, size_t k, int digits, int8_t* codes, size_t stride) {
  const uint32_t largest = largest_magnitude(x, k);
  const bool zero = float_of(largest) < 1e-30f, finite = largest < kInfinity;
  // Twice the power of two at or below largest / 127: the first digit is at most 127.
  const uint32_t power = bits_of(float_of(largest) / 127.0f) & kInfinity;
  const float scale = zero || !finite ? 1.0f : 2.0f * float_of(power);
  for (size_t i = 0; i < k; ++i) {
    float rest = zero || !finite ? 0.0f : x[i] / scale;
    for (int d = 0; d < digits; ++d) {
      const float digit = round_even(rest);
      codes[d * stride + i] = static_cast<int8_t>(static_cast<int32_t>(digit));
      rest = (rest - digit) * 128.0f;
    }
  }
  return finite ? scale : float_of(kNaN);
}

float quantize(const float* x, size_t k, int digits, float high, const float* scale,
               int8_t* codes, size_t stride) {
  switch (digits) {  // a constant for the inner loop
    case 1: return quantize_once(x, k, high, scale, codes);
    case 3: return quantize_digits(x, k, 3, codes, stride);
    default: return quantize_digits(x, k, 4, codes, stride);
  }
}

// Eight bytes at a time: vector units shift words, not bytes.
constexpr uint64_t every_byte(uint64_t byte) { return 0x0101010101010101ull * byte; }

inline uint64_t load(const uint8_t* from) {
  uint64_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

inline void store(uint8_t* to, uint64_t word) { memcpy(to, &word, sizeof word); }

// A plane of `kWidth` bits at byte row `kStart` of a block, onto bit `kShift` of the codes.
// Byte j of a plane has the codes j, j + 8 w, j + 16 w, ..., so four neighbouring bytes have
// four neighbouring codes, and a quad stays a quad. With the last plane the top bit flips,
// which adds 2^(bits - 1).
template <int kWidth, int kStart, int kShift, bool kLast>
inline void decode_plane(const uint8_t* __restrict planes, uint8_t* __restrict weights) {
  constexpr uint64_t kMask = every_byte((1 << kWidth) - 1);
  constexpr uint64_t kFlip = kLast ? every_byte(1 << (kWidth - 1)) : 0;
  constexpr size_t kBytes = 2 * kWidth * kLine;  // of the plane
  planes += kStart / 4 * kLine;
  for (int part = 0; part < 8 / kWidth; ++part) {
    uint8_t* to = weights + part * kBytes;
    for (size_t i = 0; i < kBytes; i += 8) {
      const uint64_t code = (((load(planes + i) >> (part * kWidth)) & kMask) ^ kFlip) << kShift;
      store(to + i, kShift ? load(to + i) | code : code);
    }
  }
}

void decode(const uint8_t* planes, int bits, uint8_t* weights) {
  // The next strip: each is a short run of bytes, over before the hardware reads ahead.
  for (int line = 0; line < 2 * bits; ++line) __builtin_prefetch(planes + line * kLine + kAhead);
  switch (bits) {
    case 2: return decode_plane<2, 0, 0, true>(planes, weights);
    case 3:
      decode_plane<2, 0, 0, false>(planes, weights);
      return decode_plane<1, 16, 2, true>(planes, weights);
    case 4: return decode_plane<4, 0, 0, true>(planes, weights);
    case 5:
      decode_plane<4, 0, 0, false>(planes, weights);
      return decode_plane<1, 32, 4, true>(planes, weights);
    case 6:
      decode_plane<4, 0, 0, false>(planes, weights);
      return decode_plane<2, 32, 4, true>(planes, weights);
    case 7:
      decode_plane<4, 0, 0, false>(planes, weights);
      decode_plane<2, 32, 4, false>(planes, weights);
      return decode_plane<1, 48, 6, true>(planes, weights);
  }
}

void gather(const uint8_t* w, size_t row_step, size_t column_step, size_t rows, size_t columns,
            uint8_t flip, size_t quads, uint8_t* panel) {
  const uint32_t flips = 0x01010101u * flip;
  for (size_t q = 0; q < quads; ++q, panel += kLine, w += kQuad * row_step) {
    const size_t left = rows > kQuad * q ? rows - kQuad * q : 0;
    if (left >= kQuad && columns == kPanel && column_step == 1) {
      const uint8_t *a = w, *b = a + row_step, *c = b + row_step, *d = c + row_step;
      // Every row is a page of its own: nothing else reads ahead.
      for (size_t i = 0; i < kQuad; ++i) __builtin_prefetch(w + (8 * kQuad + i) * row_step);
      for (size_t n = 0; n < kPanel; ++n) {
        panel[kQuad * n] = a[n] ^ flip;
        panel[kQuad * n + 1] = b[n] ^ flip;
        panel[kQuad * n + 2] = c[n] ^ flip;
        panel[kQuad * n + 3] = d[n] ^ flip;
      }
    } else if (left >= kQuad && columns == kPanel && row_step == 1) {
      for (size_t n = 0; n < kPanel; ++n) {
        uint32_t quad;
        memcpy(&quad, w + n * column_step, kQuad);
        quad ^= flips;
        memcpy(panel + kQuad * n, &quad, kQuad);
      }
    } else {
      memset(panel, 0, kLine);
      for (size_t n = 0; n < columns; ++n) {
        for (size_t i = 0; i < kQuad && i < left; ++i) {
          panel[kQuad * n + i] = w[i * row_step + n * column_step] ^ flip;
        }
      }
    }
  }
}

void start(size_t count, size_t columns, int32_t offset, const int8_t* zero, const int32_t* sums,
           size_t pitch, uint32_t* acc) {
  for (size_t i = 0; i < count; ++i, acc += kColumns, sums += pitch) {
    const uint32_t row = -static_cast<uint32_t>(*sums);
    if (zero) {
      for (size_t c = 0; c < columns; ++c) acc[c] = row * static_cast<uint32_t>(offset + zero[c]);
    } else {
      for (size_t c = 0; c < kColumns; ++c) acc[c] = row * static_cast<uint32_t>(offset);
    }
  }
}

inline float real(uint32_t sum) { return static_cast<float>(static_cast<int32_t>(sum)); }

// One row each; inlined, so that a constant number of columns is a constant of the loop.
inline void scale_row(const uint32_t* __restrict acc, const float* __restrict scale, bool add,
                      size_t columns, float* __restrict out) {
  if (add) {
    for (size_t c = 0; c < columns; ++c) out[c] += real(acc[c]) * scale[c];
  } else {
    for (size_t c = 0; c < columns; ++c) out[c] = real(acc[c]) * scale[c];
  }
}

inline void finish_row(const uint32_t* __restrict acc, float row, const float* __restrict scale,
                       size_t columns, float* __restrict out) {
  for (size_t c = 0; c < columns; ++c) out[c] = real(acc[c]) * row * scale[c];
}

void scale(const uint32_t* acc, size_t count, size_t columns, const float* scale, bool add,
           float* out) {
  for (size_t i = 0; i < count; ++i, acc += kColumns, out += kColumns) {
    if (columns == kColumns) {
      scale_row(acc, scale, add, kColumns, out);
    } else {
      scale_row(acc, scale, add, columns, out);
    }
  }
}

void finish(const uint32_t* acc, size_t count, size_t columns, const float* row_scale,
            const float* scale, float* out, size_t pitch) {
  for (size_t i = 0; i < count; ++i, acc += kColumns, out += pitch) {
    if (columns == kColumns) {
      finish_row(acc, row_scale[i], scale, kColumns, out);
    } else {
      finish_row(acc, row_scale[i], scale, columns, out);
    }
  }
}

template <int kDigits>
void join_digits(const float* __restrict sums, size_t count, size_t columns,
                 const float* row_scale, float* __restrict out, size_t pitch) {
  for (size_t i = 0; i < count; ++i, sums += kDigits * kColumns, out += pitch) {
    const float row = row_scale[i];
    for (size_t c = 0; c < columns; ++c) {
      float total = sums[(kDigits - 1) * kColumns + c];
      for (int d = kDigits - 2; d >= 0; --d) total = sums[d * kColumns + c] + total / 128.0f;
      out[c] = total * row;
    }
  }
}

void join(const float* sums, size_t count, size_t columns, int digits, const float* row_scale,
          float* out, size_t pitch) {
  switch (digits) {  // a constant for the inner loop
    case 1: return join_digits<1>(sums, count, columns, row_scale, out, pitch);
    case 3: return join_digits<3>(sums, count, columns, row_scale, out, pitch);
    default: return join_digits<4>(sums, count, columns, row_scale, out, pitch);
  }
}

void sum(const int8_t* codes, size_t k, size_t group, int32_t* sums) {
  for (size_t start = 0; start < k; start += group) {
    const size_t end = k - start < group ? k : start + group;
    int32_t total = 0;
    for (size_t i = start; i < end; ++i) total += codes[i];
    *sums++ = total;
  }
}

// For a tile that begins each run anew.
template <void (*kTile)(Rows, size_t, const uint8_t*, size_t, size_t, size_t, uint32_t*)>
void runs_by(Rows x, const int32_t* starts, size_t runs, size_t count, const uint8_t* weights,
             size_t panels, size_t pitch, size_t quads, uint32_t* acc) {
  for (size_t r = 0; r < runs; ++r, weights += quads * kLine) {
    kTile({x.codes + starts[r], x.stride}, count, weights, panels, pitch, quads, acc);
  }
}

// What a path shares with the others; it adds its tile.
#define JAXCOMPRESS_PATH(name, rows, tile, tile_runs, tile4, tile_group, tile4_group, sparse)     \
  {name,       rows,        tile,     tile_runs, tile4,  tile_group, tile4_group, quantize, \
   decode,     gather,      start,    scale,     finish, join,       epilogue,    sum,      \
   &sparse}

}  // namespace
}  // namespace jaxcompress
