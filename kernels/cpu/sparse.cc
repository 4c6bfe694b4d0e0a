#include "sparse.h"

#include <algorithm>
#include <atomic>

#include "sparse_path.h"

namespace jaxcompress {
namespace {

// Columns whose sums are turned back together: a line of the result for each row.
constexpr size_t kTogether = 16;
constexpr size_t kWidest = 64;

// One tile of rows times the columns that are asked for.
class SparseTile {
 public:
  SparseTile(const Path& path, const SparseProblem& p, const SparseWeights& w, size_t batch,
             size_t row, const float* turned, const float* row_scales, float* out)
      : loops_(*path.sparse), p_(p), starts_(w.starts + batch * (p.n + 1)),
        places_(w.places + batch * p.kept), values_(w.values ? w.values + batch * p.kept : nullptr),
        codes_(w.codes ? w.codes + batch * p.kept : nullptr),
        scale_(w.scale ? w.scale + batch * p.n : nullptr), rows_(std::min(p.tile(), p.m - row)),
        width_(p.width(row)), turned_(turned),
        row_scales_(row_scales ? row_scales + batch * p.m + row : nullptr),
        out_(out + (batch * p.m + row) * p.n) {}

  bool run(size_t first, size_t last) {
    for (size_t n = first; n < last; n += kTogether) {
      const size_t columns = std::min(kTogether, last - n);
      for (size_t c = 0; c < columns; ++c) {
        SparseRun run;
        if (!run_of(n + c, &run)) return false;
        if (width_ > 1) {
          loops_.column(turned_, width_, run, sums_ + c * width_);
        } else {
          lines_[c] = loops_.dot(turned_, run);
        }
      }
      if (width_ > 1) loops_.turn(sums_, columns, width_, rows_, kTogether, lines_);
      for (size_t r = 0; r < rows_; ++r) finish(r, n, columns);
    }
    return true;
  }

 private:
  bool run_of(size_t n, SparseRun* run) const {
    const int64_t begin = starts_[n], end = starts_[n + 1];
    if (begin < 0 || end < begin || end > static_cast<int64_t>(p_.kept)) return false;
    run->places = places_ + begin;
    run->values = values_ ? values_ + begin : nullptr;
    run->codes = codes_ ? codes_ + begin : nullptr;
    run->count = static_cast<size_t>(end - begin);
    return loops_.within(run->places, run->count, p_.k);
  }

  // In the order of the dense integer product, which gives the same floats.
  void finish(size_t r, size_t n, size_t columns) const {
    const float* sums = lines_ + r * kTogether;
    float* out = out_ + r * p_.n + n;
    const float row = row_scales_ ? row_scales_[r] : 1.0f;
    if (scale_) {
      for (size_t c = 0; c < columns; ++c) out[c] = sums[c] * row * scale_[n + c];
    } else {
      for (size_t c = 0; c < columns; ++c) out[c] = sums[c] * row;
    }
  }

  const SparsePath& loops_;
  const SparseProblem& p_;
  const int32_t* const starts_;
  const uint16_t* const places_;
  const float* const values_;
  const int8_t* const codes_;
  const float* const scale_;
  const size_t rows_, width_;
  const float* const turned_;
  const float* const row_scales_;
  float* const out_;
  alignas(64) float sums_[kTogether * kWidest];   // [columns][width]
  alignas(64) float lines_[kWidest * kTogether];  // [rows][columns]
};

}  // namespace

size_t SparseProblem::width(size_t row) const {
  if (m == 1) return 1;
  size_t width = 4;
  while (width < std::min(tile(), m - row)) width *= 2;
  return width;
}

size_t SparseProblem::turned_bytes() const {
  if (!turned() || m == 0) return 0;
  const size_t last = (tiles() - 1) * tile();
  return batch * k * (last + width(last)) * sizeof(float);
}

size_t SparseProblem::scratch_bytes() const {
  const size_t codes = quantized ? aligned(batch * m * k) + aligned(batch * m * sizeof(float)) : 0;
  return aligned(turned_bytes()) + codes;
}

bool multiply(const Path& path, const SparseProblem& p, SparseRows rows,
              const SparseWeights& weights, const Workers& workers, uint8_t* scratch, float* out) {
  if (p.batch == 0 || p.m == 0 || p.n == 0) return true;
  const SparsePath& loops = *path.sparse;
  const bool alone = p.m * p.kept * p.batch < kSmall;
  const size_t tiles = p.tiles(), tile = p.tile(), stride = p.turned_bytes() / 4 / p.batch;

  float* turned = reinterpret_cast<float*>(scratch);
  scratch += aligned(p.turned_bytes());
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  float* row_scales =
      p.quantized ? reinterpret_cast<float*>(scratch + aligned(p.batch * p.m * p.k)) : nullptr;
  if (p.quantized) {
    constexpr size_t kChunk = 8;
    const size_t count = p.batch * p.m;
    each(workers, alone, (count + kChunk - 1) / kChunk, [&](size_t task) {
      for (size_t row = task * kChunk; row < std::min(count, (task + 1) * kChunk); ++row) {
        const float* given = rows.given ? rows.given + row / p.m : nullptr;
        row_scales[row] =
            path.quantize(rows.x + row * p.k, p.k, 1, rows.high, given, codes + row * p.k, p.k);
      }
    });
  }
  if (p.turned()) {
    constexpr size_t kChunk = 128;
    const size_t chunks = (p.k + kChunk - 1) / kChunk;
    each(workers, alone, p.batch * tiles * chunks, [&](size_t task) {
      const size_t batch = task / chunks / tiles, row = task / chunks % tiles * tile;
      const size_t i = task % chunks * kChunk, width = p.width(row);
      float* to = turned + batch * stride + row * p.k + i * width;
      const size_t from = (batch * p.m + row) * p.k + i, count = std::min(tile, p.m - row);
      const size_t length = std::min(kChunk, p.k - i);
      if (p.quantized) {
        loops.turn_codes(codes + from, count, p.k, length, width, to);
      } else {
        loops.turn(rows.x + from, count, p.k, length, width, to);
      }
    });
  }

  // Whole lines of the result; enough tasks to even out threads of different speeds.
  const size_t lines = (p.n + kTogether - 1) / kTogether;
  const size_t chunk =
      std::max<size_t>(1, std::min(lines, p.batch * tiles * lines / (8 * workers.threads)));
  const size_t chunks = (lines + chunk - 1) / chunk;
  std::atomic<bool> valid{true};
  each(workers, alone, p.batch * tiles * chunks, [&](size_t task) {
    const size_t batch = task / chunks / tiles, row = task / chunks % tiles * tile;
    const size_t first = task % chunks * chunk * kTogether;
    const float* x = p.turned() ? turned + batch * stride + row * p.k : rows.x + batch * p.k;
    SparseTile block(path, p, weights, batch, row, x, row_scales, out);
    if (!block.run(first, std::min(p.n, first + chunk * kTogether))) valid = false;
  });
  return valid;
}

}  // namespace jaxcompress
