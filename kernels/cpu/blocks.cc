#include <algorithm>
#include <atomic>

#include "sparse.h"
#include "sparse_path.h"

namespace jaxcompress {

bool multiply(const Path& path, const BlockProblem& p, const float* x, const float* values,
              BlockPlaces places, const Epilogue& then, const Workers& workers, float* out) {
  if (p.batch == 0 || p.m == 0 || p.n == 0) return true;
  const size_t across = p.across();
  // 48 rows pass the blocks of 64 columns, which then are in the second cache.
  constexpr size_t kRows = 48, kColumns = 64;
  const size_t chunks = (p.m + kRows - 1) / kRows;
  const size_t size = p.height * p.width * p.slots;
  const bool alone = p.m * p.batch * across * size < kSmall;
  std::atomic<bool> valid{true};
  each(workers, alone, p.batch * across * chunks, [&](size_t task) {
    const size_t column = task / chunks, batch = column / across, a = column % across;
    const int64_t used = places.used(p, column);
    if (used < 0) {
      valid = false;
      return;
    }
    const SparseBlocks blocks = {values + column * size, places.rows + column * p.slots,
                                 static_cast<size_t>(used), p.height, p.width};
    const size_t row = task % chunks * kRows, count = std::min(kRows, p.m - row);
    const size_t width = std::min(p.width, p.n - a * p.width);
    float* to = out + (batch * p.m + row) * p.n + a * p.width;
    for (size_t c = 0; c < width; c += kColumns) {
      path.sparse->blocks(x + (batch * p.m + row) * p.k, count, p.k, p.k, blocks, c,
                          std::min(kColumns, width - c), to + c, p.n);
      if (then.empty()) continue;
      const size_t first = a * p.width + c;
      path.epilogue(then.from(batch * p.n + first, (batch * p.m + row) * p.n + first), count,
                    std::min(kColumns, width - c), to + c, p.n);
    }
  });
  return valid;
}

}  // namespace jaxcompress
