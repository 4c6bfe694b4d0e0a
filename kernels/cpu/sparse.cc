#include "sparse.h"

#include <algorithm>
#include <atomic>

#include "sparse_path.h"

namespace jaxcompress {
namespace {

// Columns whose sums are turned back together: a line of the result for each row.
constexpr size_t kResults = 16;
constexpr size_t kWidest = 64;
// Work on one value is that of 16 rows at least; less of it than this stays on the calling
// thread.
constexpr size_t kSmallSparse = size_t{1} << 20;

// One tile of rows times the columns that are asked for.
class SparseTile {
 public:
  SparseTile(const Path& path, const SparseProblem& p, const SparseWeights& w, size_t batch,
             size_t row, const float* turned, const float* row_scales, const Epilogue& then,
             float* out)
      : path_(path), loops_(*path.sparse), p_(p), starts_(w.starts + batch * p.starts()),
        columns_(w.columns + batch * (p.starts() - 1)),
        places_(w.places + batch * p.kept), values_(w.values ? w.values + batch * p.kept : nullptr),
        codes_(w.codes ? w.codes + batch * p.kept : nullptr),
        scale_(w.scale ? w.scale + batch * p.n : nullptr), rows_(std::min(p.tile(), p.m - row)),
        width_(p.width(row)), turned_(turned),
        row_scales_(row_scales ? row_scales + batch * p.m + row : nullptr),
        then_(then.from(batch * p.n, (batch * p.m + row) * p.n)),
        out_(out + (batch * p.m + row) * p.n) {}

  // Column n and the others of its group; false if their runs are not valid.
  bool run(size_t n) {
    const size_t count = std::min(kGroup, p_.n - n), parts = p_.parts(), lanes = lanes_of();
    SparseRuns runs = {places_, values_, codes_, starts_ + n * parts, columns_ + n * parts, count};
    if (!valid(runs, count * parts)) return false;
    std::fill_n(sums_, count * lanes, 0.0f);
    for (size_t part = 0; part < parts; ++part, runs.starts += count, runs.columns += count) {
      if (width_ > 1) {
        loops_.columns(turned_, width_, runs, sums_);
      } else {
        loops_.dots(turned_, runs, sums_);
      }
    }
    for (size_t c = 0; c < count; c += kResults) {
      const size_t together = std::min(kResults, count - c);
      loops_.turn(sums_ + c * lanes, together, lanes, lanes, kResults, lines_);
      if (width_ == 1) {
        for (size_t i = kResults; i < kFill * kResults; ++i) lines_[i % kResults] += lines_[i];
      }
      for (size_t r = 0; r < rows_; ++r) finish(lines_ + r * kResults, r, n + c, together);
    }
    if (!then_.empty()) path_.epilogue(then_.from(n, n), rows_, count, out_ + n, p_.n);
    return true;
  }

 private:
  // Sums of a column.
  size_t lanes_of() const { return std::max(width_, kFill); }

  // Whether the runs of a group lie one behind the other, are filled up, belong to its columns,
  // and have their places below k.
  bool valid(const SparseRuns& runs, size_t all) const {
    const int32_t* starts = runs.starts;
    if (starts[0] < 0 || starts[all] > static_cast<int64_t>(p_.kept)) return false;
    int32_t uneven = 0, back = 0;
    for (size_t i = 0; i < all; ++i) {
      uneven |= starts[i];
      back |= starts[i + 1] - starts[i];
    }
    uint8_t last = 0;
    for (size_t i = 0; i < all; ++i) last = std::max(last, runs.columns[i]);
    if ((uneven | starts[all]) % kFill || back < 0 || (all && last >= runs.count)) return false;
    return loops_.within(places_ + starts[0], starts[all] - starts[0], p_.k);
  }

  // In the order of the dense integer product, which gives the same floats.
  void finish(const float* sums, size_t r, size_t n, size_t columns) const {
    float* out = out_ + r * p_.n + n;
    const float row = row_scales_ ? row_scales_[r] : 1.0f;
    if (scale_) {
      for (size_t c = 0; c < columns; ++c) out[c] = sums[c] * row * scale_[n + c];
    } else {
      for (size_t c = 0; c < columns; ++c) out[c] = sums[c] * row;
    }
  }

  const Path& path_;
  const SparsePath& loops_;
  const SparseProblem& p_;
  const int32_t* const starts_;
  const uint8_t* const columns_;
  const uint16_t* const places_;
  const float* const values_;
  const int8_t* const codes_;
  const float* const scale_;
  const size_t rows_, width_;
  const float* const turned_;
  const float* const row_scales_;
  const Epilogue then_;
  float* const out_;
  alignas(64) float sums_[kGroup * kWidest];     // [columns][lanes]
  alignas(64) float lines_[kWidest * kResults];   // [rows][columns]
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
              const SparseWeights& weights, const Epilogue& then, const Workers& workers,
              uint8_t* scratch, float* out) {
  if (p.batch == 0 || p.m == 0 || p.n == 0) return true;
  const SparsePath& loops = *path.sparse;
  const bool alone = std::max<size_t>(16, p.m) * p.kept * p.batch < kSmallSparse;
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

  // Enough tasks to even out threads of different speeds.
  const size_t groups = (p.n + kGroup - 1) / kGroup, tasks = 8 * workers.threads;
  const size_t chunk = std::max<size_t>(1, std::min(groups, p.batch * tiles * groups / tasks));
  const size_t chunks = (groups + chunk - 1) / chunk;
  std::atomic<bool> valid{true};
  each(workers, alone, p.batch * tiles * chunks, [&](size_t task) {
    const size_t batch = task / chunks / tiles, row = task / chunks % tiles * tile;
    const float* x = p.turned() ? turned + batch * stride + row * p.k : rows.x + batch * p.k;
    SparseTile block(path, p, weights, batch, row, x, row_scales, then, out);
    const size_t first = task % chunks * chunk;
    for (size_t g = first; g < std::min(groups, first + chunk); ++g) {
      if (!block.run(g * kGroup)) valid = false;
    }
  });
  return valid;
}

}  // namespace jaxcompress
