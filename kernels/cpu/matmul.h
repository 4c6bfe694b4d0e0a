// Products of quantized rows and packed weights: what is multiplied, and in which pieces.
//
// Knows threads only as a function to call, so that tests run it without XLA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "path.h"

namespace jaxcompress {

// `tasks` calls of a function with 0 .. tasks - 1, in any order, on `threads` threads.
struct Workers {
  size_t threads;
  std::function<void(size_t tasks, const std::function<void(size_t)>&)> run;
};

// Products below this many stay on the calling thread: waking another takes longer.
constexpr size_t kSmall = size_t{1} << 20;

// The tasks in turn if `alone` or if there is one thread, else on all threads.
inline void each(const Workers& workers, bool alone, size_t tasks,
                 const std::function<void(size_t)>& fn) {
  if (!alone && workers.threads > 1 && tasks > 1) return workers.run(tasks, fn);
  for (size_t i = 0; i < tasks; ++i) fn(i);
}

// Bytes of a part of a scratch buffer, the next of which begins on a line.
inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

enum class Layout {
  kPanels = 0,       // [n / 16][quads][16][4]: what kernels/cpu/panels.py makes
  kRowMajor = 1,     // [k, n], or bit planes along k
  kColumnMajor = 2,  // [n, k]
};

struct Problem {
  size_t batch, m, k, n;
  int bits;      // of a weight's code
  size_t group;  // codes along k that share a scale; k at most, a multiple of 4 or k itself
  int digits;    // int8 digits of an activation
  Layout layout;

  size_t groups() const { return k ? (k + group - 1) / group : 1; }
  size_t rows() const { return m * static_cast<size_t>(digits); }
  // Byte rows of a weight: one a code, or the bit planes of blocks of 64.
  size_t byte_rows() const { return bits == 8 ? k : (k + kBlock - 1) / kBlock * 8 * bits; }
  size_t panels() const { return (n + kPanel - 1) / kPanel; }
  size_t panel_bytes() const { return (byte_rows() + kQuad - 1) / kQuad * kLine; }
  size_t weight_bytes() const {
    return layout == Layout::kPanels ? panels() * panel_bytes() : byte_rows() * n;
  }
  // From one row of codes to the next: whole blocks, and not a power of two, which would put
  // all rows into the same sets of the cache.
  size_t stride() const { return (k + kBlock - 1) / kBlock * kBlock + kBlock; }
  size_t scratch_bytes() const;
};

// The rows as codes, in memory that the caller gives.
struct Activations {
  int8_t* codes;    // [batch][rows][stride]
  int32_t* sums;    // [batch][rows][groups]
  float* scales;    // [batch][m]
};

Activations lay_out(const Problem& p, uint8_t* scratch);

// Rows of floats. `given` is null, or a scale for each batch.
void quantize_rows(const Path& path, const Problem& p, const float* x, float high,
                   const float* given, const Workers& workers, Activations to);

// Rows that are codes already.
void copy_rows(const Path& path, const Problem& p, const int8_t* x, const Workers& workers,
               Activations to);

struct Scales {
  const float* scale;  // [batch][groups][n]
  const int8_t* zero;  // the same, or null
};

// out[b][m][n], exact sums, modulo 2^32.
void multiply(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
              const Workers& workers, int32_t* out);

// out[b][m][n], scaled, and what follows.
void multiply(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
              Scales scales, const Epilogue& then, const Workers& workers, float* out);

}  // namespace jaxcompress
