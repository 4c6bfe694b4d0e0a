// The native code against textbook loops, on every path that this CPU has, without Python or
// XLA: what the sanitizers run. One line a path; the exit status says whether all agree.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "matmul.h"
#include "sparse.h"
#include "sparse_path.h"

namespace jaxcompress {
namespace {

std::mt19937 generator(1);

int any(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

void fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Exactly as large as it has to be, so that the sanitizer sees one byte too many.
template <class T>
std::vector<T> buffer(size_t size) {
  std::vector<T> out(size);
  out.shrink_to_fit();
  return out;
}

Workers workers() {
  return {2, [](size_t tasks, const std::function<void(size_t)>& fn) {
            std::thread other([&] {
              for (size_t i = 1; i < tasks; i += 2) fn(i);
            });
            for (size_t i = 0; i < tasks; i += 2) fn(i);
            other.join();
          }};
}

// Byte (r, c) of weight b's stored matrix, in whichever layout.
uint8_t* at(const Problem& p, std::vector<uint8_t>& w, size_t b, size_t r, size_t c) {
  uint8_t* data = w.data() + b * p.weight_bytes();
  switch (p.layout) {
    case Layout::kRowMajor: return data + r * p.n + c;
    case Layout::kColumnMajor: return data + c * p.byte_rows() + r;
    default: return data + c / 16 * p.panel_bytes() + r / 4 * 64 + c % 16 * 4 + r % 4;
  }
}

const std::vector<std::vector<int>> kPlanes = {{}, {}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}};

void store(const Problem& p, std::vector<uint8_t>& w, size_t b, size_t k, size_t n, int code) {
  if (p.bits == 8) {
    *at(p, w, b, k, n) = static_cast<uint8_t>(code) ^ (p.layout == Layout::kPanels ? 0x80 : 0);
    return;
  }
  size_t start = k / 64 * 8 * p.bits;
  int shift = 0;
  for (int width : kPlanes[p.bits]) {
    const size_t j = k % 64 % (8 * width), part = k % 64 / (8 * width);
    const int piece = (code >> shift) & ((1 << width) - 1);
    *at(p, w, b, start + j, n) |= static_cast<uint8_t>(piece << (part * width));
    start += 8 * width;
    shift += width;
  }
}

// What follows a product, one of every kind in turn.
struct Following {
  std::vector<float> bias, residual;
  Epilogue then;

  Following(size_t biases, size_t results) {
    static int turn = 0;
    const int kind = turn++ % 12;
    if (kind % 2) bias = buffer<float>(biases);
    if (kind % 3 == 1) residual = buffer<float>(results);
    for (auto* v : {&bias, &residual}) {
      for (auto& f : *v) f = static_cast<float>(any(-9, 9));
    }
    const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    then = {pointer(bias), pointer(residual), static_cast<Activation>(kind % 5)};
  }

  // Element i of the results, of column c, that is `x` before.
  double apply(double x, size_t i, size_t c) const {
    if (!bias.empty()) x += bias[c];
    switch (then.activation) {
      case Activation::kRelu: x = std::max(x, 0.0); break;
      case Activation::kGelu:
        x *= 0.5 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        break;
      case Activation::kGeluExact: x *= 0.5 * std::erfc(-x / std::sqrt(2.0)); break;
      case Activation::kSilu: x /= 1 + std::exp(-x); break;
      default: break;
    }
    return residual.empty() ? x : x + residual[i];
  }
};

// Every activation from -12 to 12, and at the ends: near float64, and the same on every path.
void check_activations(const Path& path) {
  const size_t n = 4801;
  for (int kind = 0; kind < 5; ++kind) {
    Following following(0, 0);
    following.bias.clear();
    following.residual.clear();
    following.then = {nullptr, nullptr, static_cast<Activation>(kind)};
    auto x = buffer<float>(n);
    for (size_t i = 0; i < n; ++i) x[i] = (static_cast<float>(i) - 2400.0f) / 200.0f;
    x[0] = -3e38f;
    x[n - 1] = 3e38f;
    auto got = x, same = x;
    path.epilogue(following.then, 1, n, got.data(), n);
    find_path("portable")->epilogue(following.then, 1, n, same.data(), n);
    if (std::memcmp(got.data(), same.data(), n * sizeof(float))) fail("the floats of an activation");
    for (size_t i = 0; i < n; ++i) {
      const double want = i ? following.apply(x[i], i, 0) : kind ? 0.0 : x[i];
      // A few roundings of x, however small the share of it that is left.
      const double within = 4e-7 * (std::min(12.0f, std::fabs(x[i])) + std::fabs(want));
      if (!(std::fabs(got[i] - want) <= within)) fail("an activation");
    }
    float nan = NAN;
    path.epilogue(following.then, 1, 1, &nan, 1);
    if (!std::isnan(nan)) fail("an activation of what is no number");
  }
}

void check_case(const Path& path, Problem p, bool has_zero) {
  const int low = -(1 << (p.bits - 1)), high = -low - 1;
  auto codes = buffer<int>(p.batch * p.k * p.n);
  auto weights = buffer<uint8_t>(p.batch * p.weight_bytes());
  for (size_t b = 0; b < p.batch; ++b) {
    for (size_t k = 0; k < p.k; ++k) {
      for (size_t n = 0; n < p.n; ++n) {
        const int code = any(low, high);
        codes[(b * p.k + k) * p.n + n] = code;
        store(p, weights, b, k, n, code);
      }
    }
  }
  auto scratch = buffer<uint8_t>(p.scratch_bytes() + 64);
  uint8_t* start = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  const Activations to = lay_out(p, start);
  const size_t outputs = p.batch * p.m * p.n;

  if (p.bits == 8 && p.digits == 1 && p.group == p.k) {  // integers in, integers out
    auto x = buffer<int8_t>(p.batch * p.m * p.k);
    for (auto& v : x) v = static_cast<int8_t>(any(-128, 127));
    auto out = buffer<int32_t>(outputs);
    copy_rows(path, p, x.data(), workers(), to);
    multiply(path, p, to, weights.data(), workers(), out.data());
    for (size_t i = 0; i < outputs; ++i) {
      const size_t b = i / p.n / p.m, row = i / p.n, n = i % p.n;
      int64_t want = 0;
      for (size_t k = 0; k < p.k; ++k) {
        want += int64_t{x[row * p.k + k]} * codes[(b * p.k + k) * p.n + n];
      }
      if (out[i] != want) fail("an integer sum");
    }
  }

  // Whole floats and scales that are powers of two: float sums without a rounding.
  const size_t scales = p.batch * p.groups() * p.n;
  auto scale = buffer<float>(scales);
  auto zero = buffer<int8_t>(has_zero ? scales : 0);
  for (auto& s : scale) s = std::ldexp(1.0f, any(-2, 2));
  for (auto& z : zero) z = static_cast<int8_t>(any(low, high));
  auto x = buffer<float>(p.batch * p.m * p.k);
  for (auto& v : x) v = static_cast<float>(any(-126, 126));
  for (size_t row = 0; p.k > 0 && row < p.batch * p.m; ++row) x[row * p.k] = 127.0f;
  auto out = buffer<float>(outputs);
  quantize_rows(path, p, x.data(), 127.0f, nullptr, workers(), to);
  const Following following(p.batch * p.n, outputs);
  multiply(path, p, to, weights.data(), Scales{scale.data(), has_zero ? zero.data() : nullptr},
           following.then, workers(), out.data());
  for (size_t i = 0; i < outputs; ++i) {
    const size_t b = i / p.n / p.m, row = i / p.n, n = i % p.n;
    double want = 0;
    for (size_t k = 0; k < p.k; ++k) {
      const size_t s = (b * p.groups() + k / p.group) * p.n + n;
      const int code = codes[(b * p.k + k) * p.n + n] - (has_zero ? zero[s] : 0);
      want += static_cast<double>(x[row * p.k + k]) * code * scale[s];
    }
    // 127 * float(1 / 127) may miss 1 by a rounding.
    const double within = 1e-6 * (10 + std::fabs(want));
    want = following.apply(want, i, b * p.n + n);
    if (!(std::fabs(out[i] - want) <= within)) fail("a scaled sum");
  }
}

void check_path(const Path& path) {
  const size_t sizes[][4] = {// batch, m, k, n
                             {1, 1, 1, 1},    {1, 7, 4, 16},   {2, 5, 63, 17},  {1, 13, 64, 64},
                             {1, 1, 260, 80}, {3, 2, 129, 33}, {1, 101, 70, 5}, {1, 6, 520, 130},
                             {1, 3, 0, 4},    {1, 0, 8, 8},    {1, 64, 256, 96}};
  size_t cases = 0;
  for (const auto& size : sizes) {
    for (int bits = 2; bits <= 8; ++bits) {
      for (int layout = 0; layout < 3; ++layout) {
        for (int digits : {1, 3, 4}) {
          for (size_t group : {size[2], size_t{4}, size_t{32}, size_t{100}}) {
            if (group > size[2] || (size[3] > 90 && group == 4)) continue;
            const Problem p = {size[0], size[1], size[2], size[3], bits, group, digits,
                               static_cast<Layout>(layout)};
            check_case(path, p, any(0, 1));
            ++cases;
          }
        }
      }
    }
  }
  std::printf("%-14s %zu products agree\n", path.name, cases);
}

void check_quantize(const Path& path) {
  const float inf = INFINITY, values[] = {0.5f, -1.5f, 2.5f, -3.5f, 127.0f};
  int8_t codes[4 * 64] = {};
  if (path.quantize(values, 5, 1, 127.0f, nullptr, codes, 64) != 127.0f * (1.0f / 127.0f)) fail("scale");
  const int8_t even[] = {0, -2, 2, -4, 127};
  if (std::memcmp(codes, even, 5)) fail("half to even");
  for (float bad : {inf, -inf, static_cast<float>(NAN)}) {
    const float row[] = {1.0f, bad, 2.0f};
    for (int digits : {1, 4}) {
      if (!std::isnan(path.quantize(row, 3, digits, 127.0f, nullptr, codes, 64))) fail("not finite");
      if (codes[0] || codes[1] || codes[2]) fail("codes of what is not finite");
    }
  }
  const float none[] = {0.0f, -0.0f, 1e-42f};
  if (path.quantize(none, 3, 1, 127.0f, nullptr, codes, 64) != 1.0f) fail("scale of zeros");
}

// The weight of a sparse product, whole numbers: float sums without a rounding.
struct Sparse {
  std::vector<float> dense;  // [batch][n][k]
  std::vector<int32_t> starts;
  std::vector<uint8_t> columns;
  std::vector<uint16_t> places;
  std::vector<float> values;
  std::vector<int8_t> codes;
};

Sparse make_sparse(const SparseProblem& p, int every) {
  Sparse s;
  s.dense = buffer<float>(p.batch * p.n * p.k);
  s.starts = buffer<int32_t>(p.batch * p.starts());
  s.columns = buffer<uint8_t>(p.batch * (p.starts() - 1));
  s.places = buffer<uint16_t>(p.batch * p.kept);
  s.values = buffer<float>(p.batch * p.kept);
  s.codes = buffer<int8_t>(p.batch * p.kept);
  for (size_t b = 0; b < p.batch; ++b) {
    size_t next = 0;
    int32_t* start = s.starts.data() + b * p.starts();
    uint8_t* column = s.columns.data() + b * (p.starts() - 1);
    auto put = [&](size_t n, size_t k, int code) {
      s.dense[(b * p.n + n) * p.k + k] += static_cast<float>(code);
      s.places[b * p.kept + next] = static_cast<uint16_t>(k);
      s.values[b * p.kept + next] = static_cast<float>(code);
      s.codes[b * p.kept + next++] = static_cast<int8_t>(code);
    };
    for (size_t group = 0; group < p.n; group += kGroup) {
      const size_t end = std::min(p.n, group + kGroup);
      for (size_t first = 0; first < p.k; first += p.part) {
        for (size_t n = end; n-- > group;) {  // any order of a group's columns
          *start++ = static_cast<int32_t>(next);
          *column++ = static_cast<uint8_t>(n - group);
          for (size_t k = first; k < std::min(p.k, first + p.part); ++k) {
            if (next + kFill <= p.kept && !any(0, every)) put(n, k, any(-128, 127));
          }
          while (next % kFill) put(n, first, 0);
        }
      }
    }
    *start = static_cast<int32_t>(next);
  }
  return s;
}

void check_sparse_case(const Path& path, SparseProblem p, bool floats) {
  const Sparse s = make_sparse(p, any(0, 8));
  auto scale = buffer<float>(p.batch * p.n);
  for (auto& v : scale) v = std::ldexp(1.0f, any(-2, 2));
  auto x = buffer<float>(p.batch * p.m * p.k);
  for (auto& v : x) v = static_cast<float>(any(-126, 126));
  for (size_t row = 0; p.k > 0 && row < p.batch * p.m; ++row) x[row * p.k] = 127.0f;
  auto out = buffer<float>(p.batch * p.m * p.n);
  auto scratch = buffer<uint8_t>(p.scratch_bytes() + 64);
  uint8_t* start = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  const SparseRows rows = {x.data(), 127.0f, nullptr};
  SparseWeights weights = {s.starts.data(), s.columns.data(), s.places.data(), floats ? s.values.data() : nullptr,
                           floats ? nullptr : s.codes.data(), floats ? nullptr : scale.data()};
  const Following following(p.batch * p.n, out.size());
  if (!multiply(path, p, rows, weights, following.then, workers(), start, out.data())) {
    fail("valid runs");
  }
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t b = i / p.n / p.m, row = i / p.n, n = i % p.n;
    double want = 0;
    for (size_t k = 0; k < p.k; ++k) {
      want += static_cast<double>(x[row * p.k + k]) * s.dense[(b * p.n + n) * p.k + k];
    }
    if (!floats) want *= scale[b * p.n + n];
    const double within = 1e-6 * (10 + std::fabs(want));
    want = following.apply(want, i, b * p.n + n);
    if (!(std::fabs(out[i] - want) <= within)) fail("a sparse sum");
  }
  if (out.empty() || p.k == 0) return;
  auto starts = s.starts;
  for (const int32_t wrong : {-4, static_cast<int32_t>(p.kept) / 4 * 4 + 4, 2}) {
    starts[p.starts() - 1] = wrong;
    weights.starts = starts.data();
    if (multiply(path, p, rows, weights, {}, workers(), start, out.data())) fail("runs that leave");
  }
  auto columns = s.columns;
  columns[0] = static_cast<uint8_t>(std::min(p.n, kGroup));
  weights.starts = s.starts.data();
  weights.columns = columns.data();
  if (multiply(path, p, rows, weights, {}, workers(), start, out.data())) fail("columns that leave");
  weights.columns = s.columns.data();
  auto places = s.places;
  if (s.starts[p.starts() - 1] == 0) return;
  places[0] = static_cast<uint16_t>(p.k);
  weights.places = places.data();
  if (multiply(path, p, rows, weights, {}, workers(), start, out.data())) fail("places that leave");
}

void check_blocks(const Path& path) {
  const size_t sizes[][7] = {// batch, m, k, n, height, width, slots
                             {1, 1, 8, 16, 8, 16, 1},    {1, 7, 20, 33, 8, 16, 2},
                             {2, 13, 64, 100, 16, 48, 3}, {1, 100, 30, 130, 7, 64, 2},
                             {1, 3, 40, 300, 4, 144, 5},  {1, 5, 8, 20, 4, 16, 0},
                             {1, 0, 8, 16, 8, 16, 1}};
  for (const auto& size : sizes) {
    const BlockProblem p = {size[0], size[1], size[2], size[3], size[4], size[5], size[6]};
    const size_t columns = p.batch * p.across();
    auto x = buffer<float>(p.batch * p.m * p.k);
    auto values = buffer<float>(columns * p.slots * p.height * p.width);
    auto rows = buffer<int32_t>(columns * p.slots);
    auto out = buffer<float>(p.batch * p.m * p.n);
    for (auto& v : x) v = static_cast<float>(any(-99, 99));
    for (auto& v : values) v = static_cast<float>(any(-99, 99));
    for (auto& r : rows) r = any(0, static_cast<int>((p.k + p.height - 1) / p.height) - 1);
    auto counts = buffer<int32_t>(columns);
    for (auto& c : counts) c = any(0, static_cast<int>(p.slots));
    const bool counted = any(0, 1);
    const BlockPlaces places = {rows.data(), counted ? counts.data() : nullptr};
    const Following following(p.batch * p.n, out.size());
    if (!multiply(path, p, x.data(), values.data(), places, following.then, workers(),
                  out.data())) {
      fail("valid blocks");
    }
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t b = i / p.n / p.m, row = i / p.n, n = i % p.n;
      double want = 0;
      const size_t used = counted ? counts[b * p.across() + n / p.width] : p.slots;
      for (size_t s = 0; s < used; ++s) {
        const size_t block = (b * p.across() + n / p.width) * p.slots + s;
        for (size_t h = 0; h < p.height; ++h) {
          const size_t k = static_cast<size_t>(rows[block]) * p.height + h;
          if (k >= p.k) continue;
          want += static_cast<double>(x[row * p.k + k]) *
                  values[(block * p.height + h) * p.width + n % p.width];
        }
      }
      const double within = 1e-6 * (10 + std::fabs(want));
      want = following.apply(want, i, b * p.n + n);
      if (!(std::fabs(out[i] - want) <= within)) fail("a sum of blocks");
    }
    if (rows.empty() || out.empty()) continue;
    for (const int32_t wrong : {-1, static_cast<int32_t>((p.k + p.height - 1) / p.height)}) {
      rows[0] = wrong;
      if (multiply(path, p, x.data(), values.data(), {rows.data(), nullptr}, {}, workers(), out.data())) {
        fail("blocks that leave");
      }
    }
  }
  std::printf("%-14s %zu products of blocks agree\n", path.name, std::size(sizes));
}

void check_block_codes(const Path& path) {
  const size_t sizes[][7] = {// batch, m, k, n, height, width, slots
                             {1, 1, 8, 16, 8, 16, 1},     {1, 7, 20, 33, 8, 16, 2},
                             {2, 13, 64, 100, 16, 48, 3}, {1, 100, 30, 130, 4, 64, 2},
                             {1, 3, 150, 300, 140, 144, 2}, {1, 5, 8, 20, 4, 16, 0},
                             {1, 0, 8, 16, 8, 16, 1},     {1, 50, 96, 80, 32, 80, 2}};
  size_t cases = 0;
  for (const auto& size : sizes) {
    for (const bool by_rows : {false, true}) {
      const BlockProblem p = {size[0], size[1], size[2], size[3], size[4], size[5], size[6]};
      const size_t columns = p.batch * p.across(), bytes = p.slots * p.height * p.width;
      auto x = buffer<float>(p.batch * p.m * p.k);
      auto codes = buffer<int8_t>(columns * bytes);  // [columns][slots][height][width]
      auto values = buffer<uint8_t>(codes.size());
      auto rows = buffer<int32_t>(columns * p.slots);
      auto scale = buffer<float>(p.batch * p.n);
      auto out = buffer<float>(p.batch * p.m * p.n);
      for (auto& v : x) v = static_cast<float>(any(-126, 126));
      for (size_t row = 0; row < p.batch * p.m; ++row) x[row * p.k] = 127.0f;
      for (auto& s : scale) s = std::ldexp(1.0f, any(-2, 2));
      for (auto& r : rows) r = any(0, static_cast<int>(p.down()) - 1);
      auto counts = buffer<int32_t>(columns);
      for (auto& c : counts) c = any(0, static_cast<int>(p.slots));
      const bool counted = any(0, 1);
      const BlockPlaces places = {rows.data(), counted ? counts.data() : nullptr};
      for (size_t i = 0; i < codes.size(); ++i) {
        const uint8_t code = static_cast<uint8_t>(any(-128, 127));
        codes[i] = static_cast<int8_t>(code);
        const size_t column = i / std::max<size_t>(1, bytes), w = i % p.width, h = i / p.width % p.height;
        const size_t slot = i % std::max<size_t>(1, bytes) / (p.width * p.height);
        const size_t at = ((w / 16 * p.slots + slot) * p.height + h / 4 * 4) * 16 + w % 16 * 4 + h % 4;
        values[by_rows ? i : column * bytes + at] = by_rows ? code : code ^ 0x80;
      }
      auto scratch = buffer<uint8_t>(BlockCodes::scratch_bytes(p) + 64);
      uint8_t* start = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
      const SparseRows from = {x.data(), 127.0f, nullptr};
      const BlockCodes weights = {values.data(), by_rows, scale.data()};
      const Following following(p.batch * p.n, out.size());
      if (!multiply(path, p, from, weights, places, following.then, workers(), start, out.data())) {
        fail("valid blocks of codes");
      }
      for (size_t i = 0; i < out.size(); ++i) {
        const size_t b = i / p.n / p.m, row = i / p.n, n = i % p.n;
        double want = 0;
        const size_t used = counted ? counts[b * p.across() + n / p.width] : p.slots;
        for (size_t s = 0; s < used; ++s) {
          const size_t block = (b * p.across() + n / p.width) * p.slots + s;
          for (size_t h = 0; h < p.height; ++h) {
            const size_t k = static_cast<size_t>(rows[block]) * p.height + h;
            if (k >= p.k) continue;
            want += static_cast<double>(x[row * p.k + k]) * codes[(block * p.height + h) * p.width + n % p.width];
          }
        }
        want *= scale[b * p.n + n];
        const double within = 1e-6 * (10 + std::fabs(want));
        want = following.apply(want, i, b * p.n + n);
        if (!(std::fabs(out[i] - want) <= within)) fail("a sum of blocks of codes");
      }
      ++cases;
      if (rows.empty() || out.empty()) continue;
      rows[0] = static_cast<int32_t>(p.down());
      if (multiply(path, p, from, weights, {rows.data(), nullptr}, {}, workers(), start, out.data())) {
        fail("blocks of codes that leave");
      }
      rows[0] = 0;
      counts[0] = static_cast<int32_t>(p.slots) + 1;
      if (multiply(path, p, from, weights, {rows.data(), counts.data()}, {}, workers(), start, out.data())) {
        fail("more blocks than there are");
      }
    }
  }
  std::printf("%-14s %zu products of blocks of codes agree\n", path.name, cases);
}

void check_sparse(const Path& path) {
  const size_t sizes[][5] = {// batch, m, k, n, kept
                             {1, 1, 1, 1, 1},      {1, 1, 260, 33, 900}, {2, 2, 63, 17, 200},
                             {1, 7, 20, 16, 99},   {3, 13, 64, 5, 40},   {1, 33, 70, 18, 700},
                             {1, 64, 16, 64, 300}, {1, 70, 31, 9, 80},   {1, 129, 19, 40, 500},
                             {2, 3, 0, 4, 0},      {1, 0, 8, 8, 3},      {1, 20, 2100, 7, 900},
                             {1, 18, 4100, 3, 800}, {1, 50, 40, 6, 90},  {1, 100, 30, 7, 60}};
  size_t cases = 0;
  for (const auto& size : sizes) {
    for (int kind = 0; kind < 3; ++kind, ++cases) {
      const SparseProblem p = {size[0], size[1], size[2], size[3], kind == 1 ? size_t{32} : size_t{256}, size[4], kind == 2};
      check_sparse_case(path, p, kind == 0);
    }
  }
  std::printf("%-14s %zu sparse products agree\n", path.name, cases);
}

}  // namespace
}  // namespace jaxcompress

int main() {
  for (const char* name : {"portable", "avx2", "avxvnni", "avx512vnni256", "avx512vnni", "neondot"}) {
    const jaxcompress::Path* path = jaxcompress::find_path(name);
    if (!path) {
      std::printf("%-14s is not on this CPU\n", name);
      continue;
    }
    jaxcompress::check_quantize(*path);
    jaxcompress::check_activations(*path);
    jaxcompress::check_path(*path);
    jaxcompress::check_sparse(*path);
    jaxcompress::check_blocks(*path);
    jaxcompress::check_block_codes(*path);
  }
}
