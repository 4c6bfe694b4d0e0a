#include "matmul.h"

#include <algorithm>
#include <cstring>

namespace jaxcompress {
namespace {

// Codes along k that are decoded at once: 16 KB for a panel, half of a small L1 cache.
constexpr size_t kStrip = 256;
// Rows that pass a strip before the next is decoded; a multiple of 3, 4 and 6, so that
// tiles are full and the digits of a row stay together.
constexpr size_t kRowBlock = 96;
// Up to this many rows, decoding in registers, for every tile, costs less than a trip through
// the cache.
constexpr size_t kFewRows = 24;
// `fn(row)` of all batches' rows of floats, several a task.
void each_row(const Workers& workers, const Problem& p, const std::function<void(size_t)>& fn) {
  constexpr size_t kChunk = 8;
  const size_t rows = p.batch * p.m;
  const bool alone = rows * p.k < (size_t{1} << 15);
  each(workers, alone, (rows + kChunk - 1) / kChunk, [&](size_t task) {
    const size_t end = std::min(rows, (task + 1) * kChunk);
    for (size_t row = task * kChunk; row < end; ++row) fn(row);
  });
}

void finish_row(const Path& path, const Problem& p, size_t row, Activations to) {
  for (size_t d = row * p.digits; d < (row + 1) * p.digits; ++d) {
    int8_t* codes = to.codes + d * p.stride();
    std::memset(codes + p.k, 0, p.stride() - p.k);
    path.sum(codes, p.k, p.group, to.sums + d * p.groups());
  }
}

struct Output {
  int32_t* integers;  // or, if null,
  float* floats;
  Scales scales;
  Epilogue then;
};

// Up to four panels of columns times one block of rows.
class Block {
 public:
  Block(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
        const Output& out, size_t batch, size_t first_row, size_t rows, size_t column)
      : path_(path), p_(p), out_(out), batch_(batch), first_row_(first_row), rows_(rows),
        column_(column), columns_(std::min(kColumns, p.n - column)),
        panels_((columns_ + kPanel - 1) / kPanel),
        x_{x.codes + (batch * p.rows() + first_row) * p.stride(), p.stride()},
        sums_(x.sums + (batch * p.rows() + first_row) * p.groups()),
        row_scales_(x.scales + batch * p.m + first_row / p.digits),
        weights_(weights + batch * p.weight_bytes()) {}

  void run() {
    if (p_.k == 0) return empty();
    if (p_.bits == 8 && p_.layout == Layout::kPanels) {  // multiplied where they lie
      return multiply_strip(panel(0), p_.panel_bytes(), 0, p_.k);
    }
    const bool whole_blocks = p_.group == p_.k || p_.group % kBlock == 0;
    const bool few = p_.layout == Layout::kPanels && rows_ <= kFewRows;
    if (p_.bits == 4 && few && whole_blocks && path_.tile4) return multiply_planes();
    for (size_t k = 0; k < p_.k; k += kStrip) {
      const size_t end = std::min(p_.k, k + kStrip);
      fetch(k, end);
      multiply_strip(p_.bits == 8 ? gathered_ : decoded_, kStrip * kPanel, k, end);
    }
  }

 private:
  const uint8_t* panel(size_t i) const {
    return weights_ + (column_ / kPanel + i) * p_.panel_bytes();
  }

  // Codes k .. end of all panels as unsigned quads, into `decoded_`, or `gathered_` if they are
  // whole bytes.
  void fetch(size_t k, size_t end) {
    const bool whole = p_.bits == 8, by_rows = p_.layout == Layout::kRowMajor;
    const size_t blocks = (end - k + kBlock - 1) / kBlock, block_rows = 8 * p_.bits;
    const size_t row = k / kBlock * block_rows, rows = whole ? end - k : blocks * block_rows;
    const size_t row_step = by_rows ? p_.n : 1, column_step = by_rows ? 1 : p_.byte_rows();
    for (size_t i = 0; i < panels_; ++i) {
      const uint8_t* bytes = gathered_ + i * kStrip * kPanel;
      if (p_.layout == Layout::kPanels) {
        bytes = panel(i) + row * kPanel;
      } else {
        const size_t column = column_ + i * kPanel;
        path_.gather(weights_ + row * row_step + column * column_step, row_step, column_step, rows,
                     std::min(kPanel, p_.n - column), whole ? 0x80 : 0, (rows + kQuad - 1) / kQuad,
                     gathered_ + i * kStrip * kPanel);
      }
      for (size_t b = 0; !whole && b < blocks; ++b) {
        path_.decode(bytes + b * block_rows * kPanel, p_.bits,
                     decoded_ + (i * kStrip + b * kBlock) * kPanel);
      }
    }
  }

  // Codes k .. end, group by group; `quads` are panels that are `pitch` bytes apart.
  void multiply_strip(const uint8_t* quads, size_t pitch, size_t k, size_t end) {
    for (size_t at = k; at < end;) {
      const size_t group = at / p_.group, group_end = std::min((group + 1) * p_.group, p_.k);
      const size_t stop = std::min(end, group_end), steps = (stop - at + kQuad - 1) / kQuad;
      const bool whole = at == group * p_.group && stop == group_end && groups_in_tiles();
      if (at == group * p_.group && !whole) start(group);
      for (size_t row = 0; row < rows_; row += path_.rows) {
        const Rows x = {x_.codes + row * x_.stride + at, x_.stride};
        const size_t count = std::min(path_.rows, rows_ - row);
        const uint8_t* from = quads + (at - k) * kPanel;
        if (whole) {
          path_.tile_group(x, count, from, panels_, pitch, steps, group_of(group, row));
        } else {
          path_.tile(x, count, from, panels_, pitch, steps, acc_ + row * kColumns);
        }
      }
      if (stop == group_end) finish(group, whole);
      at = stop;
    }
  }

  // All groups of a few rows, decoded on the way; strip by strip, so that the second tile
  // finds the bytes in the cache.
  void multiply_planes() {
    for (size_t at = 0; at < p_.k;) {
      const size_t group = at / p_.group, group_end = std::min((group + 1) * p_.group, p_.k);
      const size_t stop = std::min(at + kStrip, group_end), steps = (stop - at + kBlock - 1) / kBlock;
      const bool whole = at == group * p_.group && stop == group_end && groups_in_tiles();
      if (at == group * p_.group && !whole) start(group);
      for (size_t row = 0; row < rows_; row += path_.rows) {
        const Rows x = {x_.codes + row * x_.stride + at, x_.stride};
        const size_t count = std::min(path_.rows, rows_ - row), pitch = p_.panel_bytes();
        const uint8_t* from = panel(0) + at / 2 * kPanel;
        if (whole) {
          path_.tile4_group(x, count, from, panels_, pitch, steps, group_of(group, row));
        } else {
          path_.tile4(x, count, from, panels_, pitch, steps, acc_ + row * kColumns);
        }
      }
      if (stop == group_end) finish(group, whole);
      at = stop;
    }
  }

  void start(size_t group) {
    const Scales& s = out_.scales;
    const size_t at = (batch_ * p_.groups() + group) * p_.n + column_;
    const int8_t* zero = s.zero ? s.zero + at : nullptr;
    path_.start(rows_, columns_, 1 << (p_.bits - 1), zero, sums_ + group, p_.groups(), acc_);
  }

  // One group of one digit: its scaled sums are the result.
  bool direct() const { return p_.groups() == 1 && p_.digits == 1; }

  // Whether a tile may take a group from its start to its scales.
  bool groups_in_tiles() const {
    const bool plain = !out_.integers && !out_.scales.zero && columns_ == panels_ * kPanel;
    return path_.tile_group && plain;
  }

  Group group_of(size_t group, size_t row) {
    if (row == 0 && p_.groups() > 2) read_ahead(group + 2);
    Group g = {sums_ + row * p_.groups() + group, p_.groups(), 1u << (p_.bits - 1), nullptr,
               scales_of(group), group > 0, scaled_ + row * kColumns, kColumns};
    if (direct()) {
      g.row_scale = row_scales_ + row;
      g.out = result() + row * p_.n;
      g.out_pitch = p_.n;
    }
    return g;
  }

  // The scales of a group, or of the next columns after the last: each lies in a page of its own,
  // which nothing else reads ahead.
  void read_ahead(size_t group) const {
    const bool here = group < p_.groups();
    const size_t column = column_ + (here ? 0 : kColumns);
    if (column + kColumns > p_.n) return;
    const size_t row = batch_ * p_.groups() + group - (here ? 0 : p_.groups());
    for (size_t c = 0; c < kColumns; c += kPanel) {
      __builtin_prefetch(out_.scales.scale + row * p_.n + column + c);
    }
  }

  float* result() const {
    return out_.floats + (batch_ * p_.m + first_row_ / p_.digits) * p_.n + column_;
  }

  const float* scales_of(size_t group) const {
    return out_.scales.scale + (batch_ * p_.groups() + group) * p_.n + column_;
  }

  // `scaled` says whether the group was one of those above.
  void finish(size_t group, bool scaled = false) {
    const size_t row = batch_ * p_.m + first_row_ / p_.digits, pitch = p_.n;
    if (out_.integers) {
      int32_t* out = out_.integers + row * pitch + column_;
      for (size_t i = 0; i < rows_; ++i) std::memcpy(out + i * pitch, acc_ + i * kColumns, 4 * columns_);
      return;
    }
    const float* scale = scales_of(group);
    float* out = result();
    if (direct()) {
      if (!scaled) path_.finish(acc_, rows_, columns_, row_scales_, scale, out, pitch);
    } else {
      if (!scaled) path_.scale(acc_, rows_, columns_, scale, group > 0, scaled_);
      if (group + 1 < p_.groups()) return;
      path_.join(scaled_, rows_ / p_.digits, columns_, p_.digits, row_scales_, out, pitch);
    }
    if (out_.then.empty()) return;
    const Epilogue then = out_.then.from(batch_ * pitch + column_, row * pitch + column_);
    path_.epilogue(then, rows_ / p_.digits, columns_, out, pitch);
  }

  // Sums of nothing.
  void empty() {
    std::memset(acc_, 0, sizeof acc_);
    finish(0);
  }

  const Path& path_;
  const Problem& p_;
  const Output& out_;
  const size_t batch_, first_row_, rows_, column_, columns_, panels_;
  const Rows x_;
  const int32_t* const sums_;
  const float* const row_scales_;
  const uint8_t* const weights_;
  alignas(64) uint8_t gathered_[kStrip * kColumns];
  alignas(64) uint8_t decoded_[kStrip * kColumns];
  alignas(64) uint32_t acc_[kRowBlock * kColumns];
  alignas(64) float scaled_[kRowBlock * kColumns];
};

void multiply(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
              const Output& out, const Workers& workers) {
  const size_t rows = p.rows();
  if (p.batch == 0 || rows == 0 || p.n == 0) return;
  // Blocks of about equal size, in whole tiles.
  const size_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const size_t block = std::min(kRowBlock, ((rows + blocks - 1) / blocks + 11) / 12 * 12);
  const size_t row_blocks = (rows + block - 1) / block;
  const size_t column_blocks = (p.n + kColumns - 1) / kColumns;
  const size_t items = p.batch * row_blocks * column_blocks;
  // Neighbouring panels are neighbours in memory, which a task reads from end to end; enough
  // tasks to even out threads that run at different speeds.
  const size_t chunk = std::max<size_t>(1, std::min(column_blocks, items / (8 * workers.threads)));
  const size_t chunks = (column_blocks + chunk - 1) / chunk;
  const bool alone = rows * p.k * p.n * p.batch < kSmall;
  each(workers, alone, p.batch * row_blocks * chunks, [&](size_t task) {
    const size_t batch = task / chunks / row_blocks, row = task / chunks % row_blocks * block;
    const size_t first = task % chunks * chunk;
    for (size_t i = first; i < std::min(column_blocks, first + chunk); ++i) {
      Block(path, p, x, weights, out, batch, row, std::min(block, rows - row), i * kColumns).run();
    }
  });
}

}  // namespace

size_t Problem::scratch_bytes() const {
  const size_t count = batch * rows();
  return aligned(count * stride()) + aligned(count * groups() * sizeof(int32_t)) +
         aligned(batch * m * sizeof(float));
}

Activations lay_out(const Problem& p, uint8_t* scratch) {
  const size_t count = p.batch * p.rows();
  Activations x;
  x.codes = reinterpret_cast<int8_t*>(scratch);
  scratch += aligned(count * p.stride());
  x.sums = reinterpret_cast<int32_t*>(scratch);
  scratch += aligned(count * p.groups() * sizeof(int32_t));
  x.scales = reinterpret_cast<float*>(scratch);
  return x;
}

void quantize_rows(const Path& path, const Problem& p, const float* x, float high,
                   const float* given, const Workers& workers, Activations to) {
  each_row(workers, p, [&](size_t row) {
    const float* scale = given ? given + row / p.m : nullptr;
    int8_t* codes = to.codes + row * p.digits * p.stride();
    to.scales[row] = path.quantize(x + row * p.k, p.k, p.digits, high, scale, codes, p.stride());
    finish_row(path, p, row, to);
  });
}

void copy_rows(const Path& path, const Problem& p, const int8_t* x, const Workers& workers,
               Activations to) {
  each_row(workers, p, [&](size_t row) {
    std::copy_n(x + row * p.k, p.k, to.codes + row * p.stride());
    finish_row(path, p, row, to);
  });
}

void multiply(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
              const Workers& workers, int32_t* out) {
  multiply(path, p, x, weights, Output{out, nullptr, {}, {}}, workers);
}

void multiply(const Path& path, const Problem& p, Activations x, const uint8_t* weights,
              Scales scales, const Epilogue& then, const Workers& workers, float* out) {
  multiply(path, p, x, weights, Output{nullptr, out, scales, then}, workers);
}

}  // namespace jaxcompress
