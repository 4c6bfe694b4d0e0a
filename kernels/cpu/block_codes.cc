#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "sparse.h"

namespace jaxcompress {
namespace {

// Rows that pass the codes of 64 columns; whole tiles.
constexpr size_t kRows = 48;
// Rows of a block that are put into panels at once.
constexpr size_t kStrip = 64;

struct Codes {
  const int8_t* codes;   // [batch][m][stride], zeros from k on
  const int32_t* sums;   // [batch][m][down]
  const float* scales;   // [batch][m]
};

// Some rows times up to 64 columns of a column of blocks.
class Tile {
 public:
  Tile(const Path& path, const BlockProblem& p, const Codes& x, const BlockCodes& w,
       const std::vector<int32_t>& starts, size_t column, size_t row, size_t count)
      : path_(path), p_(p), w_(w), starts_(starts), count_(count),
        stride_(BlockCodes::stride(p)), first_(column / p.across() * p.m + row),
        codes_(x.codes + first_ * stride_), sums_(x.sums + first_ * p.down()),
        scales_(x.scales + first_),
        values_(w.values + column * p.slots * p.height * p.width) {}

  // Columns c .. c + columns of the block; to `out` from there on.
  void run(size_t c, size_t columns, const float* scale, float* out) {
    const size_t panels = (columns + kPanel - 1) / kPanel;
    for (size_t i = 0; i < count_; ++i) {
      uint32_t sum = 0;
      for (const int32_t start : starts_) {
        sum += static_cast<uint32_t>(sums_[i * p_.down() + start / p_.height]);
      }
      std::fill_n(acc_ + i * kColumns, kColumns, -128u * sum);
    }
    if (w_.by_rows) {
      for (size_t s = 0; s < starts_.size(); ++s) gathered(s, c, panels);
    } else {
      const size_t pitch = p_.slots * p_.height * kPanel;
      multiply(starts_.data(), starts_.size(), values_ + c / kPanel * pitch, panels, pitch,
               p_.height / kQuad);
    }
    path_.finish(acc_, count_, columns, scales_, scale, out, p_.n);
  }

 private:
  void multiply(const int32_t* starts, size_t runs, const uint8_t* weights, size_t panels,
                size_t pitch, size_t quads) {
    for (size_t i = 0; i < count_; i += path_.rows) {
      path_.tile_runs({codes_ + i * stride_, stride_}, starts, runs, std::min(path_.rows, count_ - i),
                      weights, panels, pitch, quads, acc_ + i * kColumns);
    }
  }

  // A block whose bytes lie by rows, strip by strip.
  void gathered(size_t slot, size_t c, size_t panels) {
    for (size_t h = 0; h < p_.height; h += kStrip) {
      const size_t height = std::min(kStrip, p_.height - h), pitch = height * kPanel;
      const uint8_t* from = values_ + (slot * p_.height + h) * p_.width + c;
      for (size_t i = 0; i < panels; ++i) {
        path_.gather(from + i * kPanel, p_.width, 1, height, kPanel, 0x80, height / kQuad,
                     panels_ + i * pitch);
      }
      const int32_t start = starts_[slot] + static_cast<int32_t>(h);
      multiply(&start, 1, panels_, panels, pitch, height / kQuad);
    }
  }

  const Path& path_;
  const BlockProblem& p_;
  const BlockCodes& w_;
  const std::vector<int32_t>& starts_;
  const size_t count_, stride_, first_;
  const int8_t* const codes_;
  const int32_t* const sums_;
  const float* const scales_;
  const uint8_t* const values_;
  alignas(64) uint8_t panels_[kStrip * kColumns];
  alignas(64) uint32_t acc_[kRows * kColumns];
};

Codes quantize(const Path& path, const BlockProblem& p, SparseRows x, const Workers& workers,
               uint8_t* scratch) {
  constexpr size_t kChunk = 8;
  const size_t count = p.batch * p.m, stride = BlockCodes::stride(p), down = p.down();
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + aligned(count * stride));
  float* scales = reinterpret_cast<float*>(scratch + aligned(count * stride) + aligned(count * down * 4));
  each(workers, count * p.k < (size_t{1} << 15), (count + kChunk - 1) / kChunk, [&](size_t task) {
    for (size_t row = task * kChunk; row < std::min(count, (task + 1) * kChunk); ++row) {
      int8_t* to = codes + row * stride;
      const float* given = x.given ? x.given + row / p.m : nullptr;
      scales[row] = path.quantize(x.x + row * p.k, p.k, 1, x.high, given, to, stride);
      std::memset(to + p.k, 0, stride - p.k);
      path.sum(to, down * p.height, p.height, sums + row * down);
    }
  });
  return {codes, sums, scales};
}

}  // namespace

size_t BlockCodes::stride(const BlockProblem& p) { return aligned(p.down() * p.height) + 64; }

size_t BlockCodes::scratch_bytes(const BlockProblem& p) {
  const size_t count = p.batch * p.m;
  return aligned(count * stride(p)) + aligned(count * p.down() * 4) + aligned(count * 4);
}

bool multiply(const Path& path, const BlockProblem& p, SparseRows x, const BlockCodes& weights,
              BlockPlaces places, const Epilogue& then, const Workers& workers, uint8_t* scratch,
              float* out) {
  if (p.batch == 0 || p.m == 0 || p.n == 0) return true;
  const Codes codes = quantize(path, p, x, workers, scratch);
  const size_t across = p.across(), chunks = (p.m + kRows - 1) / kRows;
  const bool alone = p.m * p.batch * across * p.slots * p.height * p.width < kSmall;
  std::atomic<bool> valid{true};
  each(workers, alone, p.batch * across * chunks, [&](size_t task) {
    const size_t column = task / chunks, batch = column / across, a = column % across;
    const int64_t used = places.used(p, column);
    if (used < 0) {
      valid = false;
      return;
    }
    std::vector<int32_t> starts(used);
    for (size_t s = 0; s < starts.size(); ++s) {
      starts[s] = places.rows[column * p.slots + s] * static_cast<int32_t>(p.height);
    }
    const size_t row = task % chunks * kRows, count = std::min(kRows, p.m - row);
    const size_t width = std::min(p.width, p.n - a * p.width);
    Tile tile(path, p, codes, weights, starts, column, row, count);
    for (size_t c = 0; c < width; c += kColumns) {
      const size_t columns = std::min(kColumns, width - c), first = a * p.width + c;
      const size_t at = (batch * p.m + row) * p.n + first;
      tile.run(c, columns, weights.scale + batch * p.n + first, out + at);
      if (then.empty()) continue;
      path.epilogue(then.from(batch * p.n + first, at), count, columns, out + at, p.n);
    }
  });
  return valid;
}

}  // namespace jaxcompress
