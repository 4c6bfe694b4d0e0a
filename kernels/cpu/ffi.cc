// The entry points: XLA's buffers in, shapes checked, XLA's own threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <string_view>

#include "matmul.h"
#include "sparse.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxcompress {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The caller takes tasks like every other thread, and at the end waits only for tasks that
// somebody has begun. A thread of the pool that comes too late finds nothing left, so a pool
// whose threads are all busy, with this very call perhaps, cannot block it.
struct Shared {
  std::function<void(size_t)> fn;
  size_t tasks;
  std::atomic<size_t> next{0}, done{0};

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      fn(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

Workers workers_of(ffi::ThreadPool& pool) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  return {static_cast<size_t>(threads),
          [&pool, threads](size_t tasks, const std::function<void(size_t)>& fn) {
            auto shared = std::make_shared<Shared>();
            shared->fn = fn;
            shared->tasks = tasks;
            for (int64_t i = 1; i < threads && i < static_cast<int64_t>(tasks); ++i) {
              pool.Schedule([shared] { shared->work(); });
            }
            shared->work();
            while (shared->done.load(std::memory_order_acquire) < tasks) relax();
          }};
}

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jaxcompress: " + message);
}

// Everything that would make the loops read or write what is not theirs.
ffi::Error check(const Problem& p, size_t x_elements, size_t weight_bytes, size_t out_elements,
                 size_t scratch_bytes) {
  if (p.bits < 2 || p.bits > 8) return invalid("codes have 2 to 8 bits");
  if (p.digits != 1 && p.digits != 3 && p.digits != 4) return invalid("1, 3 or 4 digits");
  if (p.k > 0 && (p.group == 0 || p.group > p.k || (p.group % 4 != 0 && p.group != p.k))) {
    return invalid("a group is a multiple of 4 codes, or all of them");
  }
  if (x_elements != p.batch * p.m * p.k) return invalid("the activations do not have m x k elements");
  if (out_elements != p.batch * p.m * p.n) return invalid("the result does not have m x n elements");
  if (weight_bytes != p.batch * p.weight_bytes()) {
    return invalid("the weights take " + std::to_string(weight_bytes) + " bytes, not " +
                   std::to_string(p.batch * p.weight_bytes()));
  }
  if (scratch_bytes < p.scratch_bytes()) return invalid("the scratch buffer is too small");
  return ffi::Error::Success();
}

bool is_byte(ffi::DataType type) { return type == ffi::DataType::S8 || type == ffi::DataType::U8; }

ffi::Error describe(ffi::Span<const int64_t> x, ffi::Span<const int64_t> out, int64_t layout,
                    Problem* p) {
  if (x.size() != 3 || out.size() != 3) return invalid("expected x[b, m, k] and a result [b, m, n]");
  if (layout < 0 || layout > 2) return invalid("there is no such layout");
  if (x[0] != out[0] || x[1] != out[1]) return invalid("x and the result differ in b or m");
  p->batch = x[0];
  p->m = x[1];
  p->k = x[2];
  p->n = out[2];
  p->layout = static_cast<Layout>(layout);
  return ffi::Error::Success();
}

// What follows a product with `biases` biases and `results` results; both may be missing.
ffi::Error check_epilogue(ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> residual,
                          int64_t activation, size_t biases, size_t results, Epilogue* then) {
  const size_t given = bias.element_count(), added = residual.element_count();
  if (given != 0 && given != biases) return invalid("expected a bias a column");
  if (added != 0 && added != results) return invalid("the residual is not of the result's shape");
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kSilu)) {
    return invalid("there is no such activation");
  }
  *then = {given ? bias.typed_data() : nullptr, added ? residual.typed_data() : nullptr,
           static_cast<Activation>(activation)};
  return ffi::Error::Success();
}

ffi::Error Int8Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::AnyBuffer w,
                      ffi::ResultBuffer<ffi::S32> out, ffi::ResultBuffer<ffi::U8> scratch,
                      int64_t layout, std::string_view path_name) {
  Problem p{};
  ffi::Error error = describe(x.dimensions(), out->dimensions(), layout, &p);
  if (error.failure()) return error;
  p.bits = 8;
  p.digits = 1;
  p.group = p.k;
  if (!is_byte(w.element_type())) return invalid("the weights are no bytes");
  error = check(p, x.element_count(), w.element_count(), out->element_count(),
                scratch->element_count());
  if (error.failure()) return error;
  const Path* path = find_path(std::string(path_name).c_str());
  if (!path) return invalid("this CPU has no path " + std::string(path_name));
  const Workers workers = workers_of(pool);
  const Activations codes = lay_out(p, scratch->typed_data());
  copy_rows(*path, p, x.typed_data(), workers, codes);
  multiply(*path, p, codes, static_cast<const uint8_t*>(w.untyped_data()), workers,
           out->typed_data());
  return ffi::Error::Success();
}

// Rows of floats, which become codes first, with a scale a batch if there are given ones; or
// rows of codes, with a scale a row.
ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                           ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S8> zero,
                           ffi::Buffer<ffi::F32> x_scale, ffi::Buffer<ffi::F32> bias,
                           ffi::Buffer<ffi::F32> residual, ffi::ResultBuffer<ffi::F32> out,
                           ffi::ResultBuffer<ffi::U8> scratch, int64_t layout, int64_t bits,
                           int64_t group_size, int64_t digits, int64_t high, int64_t activation,
                           std::string_view path_name) {
  Problem p{};
  ffi::Error error = describe(x.dimensions(), out->dimensions(), layout, &p);
  if (error.failure()) return error;
  p.bits = static_cast<int>(bits);
  p.digits = static_cast<int>(digits);
  p.group = static_cast<size_t>(group_size);
  if (!is_byte(w.element_type())) return invalid("the weights are no bytes");
  error = check(p, x.element_count(), w.element_count(), out->element_count(),
                scratch->element_count());
  if (error.failure()) return error;
  const size_t scales = p.batch * p.groups() * p.n;
  if (scale.element_count() != scales) return invalid("expected a scale a group and column");
  const bool has_zero = zero.element_count() > 0, given = x_scale.element_count() > 0;
  if (has_zero && zero.element_count() != scales) return invalid("expected a zero point a scale");
  const bool codes_in = x.element_type() == ffi::DataType::S8;
  if (!codes_in && x.element_type() != ffi::DataType::F32) {
    return invalid("the activations are float32, or int8 codes");
  }
  if (codes_in && digits != 1) return invalid("codes of activations are one digit");
  if (codes_in && x_scale.element_count() != p.batch * p.m) {
    return invalid("expected a scale a row of codes");
  }
  if (!codes_in && given && x_scale.element_count() != p.batch) {
    return invalid("expected an activation scale a batch");
  }
  Epilogue then{};
  error = check_epilogue(bias, residual, activation, p.batch * p.n, out->element_count(), &then);
  if (error.failure()) return error;
  if (high < 1 || high > 127) return invalid("the largest code of an activation is 1 to 127");
  const Path* path = find_path(std::string(path_name).c_str());
  if (!path) return invalid("this CPU has no path " + std::string(path_name));
  const Workers workers = workers_of(pool);
  const Activations codes = lay_out(p, scratch->typed_data());
  if (codes_in) {
    copy_rows(*path, p, static_cast<const int8_t*>(x.untyped_data()), workers, codes);
    std::copy_n(x_scale.typed_data(), p.batch * p.m, codes.scales);
  } else {
    quantize_rows(*path, p, static_cast<const float*>(x.untyped_data()), static_cast<float>(high),
                  given ? x_scale.typed_data() : nullptr, workers, codes);
  }
  multiply(*path, p, codes, static_cast<const uint8_t*>(w.untyped_data()),
           Scales{scale.typed_data(), has_zero ? zero.typed_data() : nullptr}, then, workers,
           out->typed_data());
  return ffi::Error::Success();
}

ffi::Error SparseMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                        ffi::Buffer<ffi::U16> places, ffi::Buffer<ffi::S32> starts,
                        ffi::Buffer<ffi::U8> columns, ffi::Buffer<ffi::F32> scale,
                        ffi::Buffer<ffi::F32> x_scale, ffi::Buffer<ffi::F32> bias,
                        ffi::Buffer<ffi::F32> residual, ffi::ResultBuffer<ffi::F32> out,
                        ffi::ResultBuffer<ffi::U8> scratch, int64_t high, int64_t part,
                        int64_t activation, std::string_view path_name) {
  Problem shape{};
  ffi::Error error = describe(x.dimensions(), out->dimensions(), 0, &shape);
  if (error.failure()) return error;
  SparseProblem p{};
  p.batch = shape.batch;
  p.m = shape.m;
  p.k = shape.k;
  p.n = shape.n;
  p.quantized = high > 0;
  if (part < 1) return invalid("a part has one entry along k or more");
  p.part = static_cast<size_t>(part);
  const bool floats = values.element_type() == ffi::DataType::F32;
  if (!floats && values.element_type() != ffi::DataType::S8) {
    return invalid("the values of a sparse matrix are float32 or int8");
  }
  if (p.batch > 0) p.kept = values.element_count() / p.batch;
  const bool given = x_scale.element_count() > 0;
  if (p.k > 65536) return invalid("a sparse matrix has 65536 rows at most");
  if (values.element_count() != p.batch * p.kept || places.element_count() != p.batch * p.kept) {
    return invalid("the values and the places of a sparse matrix differ in number");
  }
  if (starts.element_count() != p.batch * p.starts()) {
    return invalid("expected a start for each column and part, and one more");
  }
  if (columns.element_count() != p.batch * (p.starts() - 1)) {
    return invalid("expected a column for each run");
  }
  if (scale.element_count() != (floats ? 0 : p.batch * p.n)) {
    return invalid("expected a scale a column of codes, and none of floats");
  }
  if (given && x_scale.element_count() != p.batch) return invalid("expected an activation scale a batch");
  if (high < 0 || high > 127) return invalid("the largest code of an activation is 1 to 127");
  Epilogue then{};
  error = check_epilogue(bias, residual, activation, p.batch * p.n, out->element_count(), &then);
  if (error.failure()) return error;
  if (p.quantized && floats) return invalid("codes of activations are multiplied by codes");
  if (scratch->element_count() < p.scratch_bytes()) return invalid("the scratch buffer is too small");
  const Path* path = find_path(std::string(path_name).c_str());
  if (!path) return invalid("this CPU has no path " + std::string(path_name));
  const SparseWeights weights = {starts.typed_data(), columns.typed_data(), places.typed_data(),
                                 floats ? static_cast<const float*>(values.untyped_data()) : nullptr,
                                 floats ? nullptr : static_cast<const int8_t*>(values.untyped_data()),
                                 floats ? nullptr : scale.typed_data()};
  const SparseRows rows = {x.typed_data(), static_cast<float>(high),
                           given ? x_scale.typed_data() : nullptr};
  if (!multiply(*path, p, rows, weights, then, workers_of(pool), scratch->typed_data(),
                out->typed_data())) {
    return invalid("the runs of a sparse matrix leave its values, columns or rows");
  }
  return ffi::Error::Success();
}

ffi::Error BlockMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> values,
                       ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> counts,
                       ffi::Buffer<ffi::F32> bias,
                       ffi::Buffer<ffi::F32> residual, ffi::ResultBuffer<ffi::F32> out,
                       int64_t height, int64_t width, int64_t activation,
                       std::string_view path_name) {
  Problem shape{};
  ffi::Error error = describe(x.dimensions(), out->dimensions(), 0, &shape);
  if (error.failure()) return error;
  if (height < 1 || width < 16 || width % 16) return invalid("blocks are multiples of 16 wide");
  BlockProblem p{shape.batch, shape.m, shape.k, shape.n, static_cast<size_t>(height),
                 static_cast<size_t>(width), 0};
  const size_t columns = p.batch * p.across();
  if (columns > 0) p.slots = rows.element_count() / columns;
  if (rows.element_count() != columns * p.slots) return invalid("expected rows of every column");
  const bool counted = counts.element_count() > 0;
  if (counted && counts.element_count() != columns) return invalid("expected a count a column");
  const BlockPlaces places = {rows.typed_data(), counted ? counts.typed_data() : nullptr};
  if (values.element_count() != columns * p.slots * p.height * p.width) {
    return invalid("the values are not those of the blocks");
  }
  Epilogue then{};
  error = check_epilogue(bias, residual, activation, p.batch * p.n, out->element_count(), &then);
  if (error.failure()) return error;
  const Path* path = find_path(std::string(path_name).c_str());
  if (!path) return invalid("this CPU has no path " + std::string(path_name));
  if (!multiply(*path, p, x.typed_data(), values.typed_data(), places, then,
                workers_of(pool), out->typed_data())) {
    return invalid("a row of blocks, or a count of them, is not in the matrix");
  }
  return ffi::Error::Success();
}

ffi::Error QuantizedBlockMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                ffi::AnyBuffer values, ffi::Buffer<ffi::S32> rows,
                                ffi::Buffer<ffi::S32> counts, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> x_scale,
                                ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> residual,
                                ffi::ResultBuffer<ffi::F32> out,
                                ffi::ResultBuffer<ffi::U8> scratch, int64_t height, int64_t width,
                                int64_t by_rows, int64_t high, int64_t activation,
                                std::string_view path_name) {
  Problem shape{};
  ffi::Error error = describe(x.dimensions(), out->dimensions(), 0, &shape);
  if (error.failure()) return error;
  if (height < 4 || height % 4 || width < 16 || width % 16) {
    return invalid("blocks of codes are multiples of 4 high and of 16 wide");
  }
  BlockProblem p{shape.batch, shape.m, shape.k, shape.n, static_cast<size_t>(height),
                 static_cast<size_t>(width), 0};
  if (p.k > (size_t{1} << 30)) return invalid("a block-sparse matrix has 2^30 rows at most");
  const size_t columns = p.batch * p.across();
  if (columns > 0) p.slots = rows.element_count() / columns;
  if (rows.element_count() != columns * p.slots) return invalid("expected rows of every column");
  const bool counted = counts.element_count() > 0;
  if (counted && counts.element_count() != columns) return invalid("expected a count a column");
  const BlockPlaces places = {rows.typed_data(), counted ? counts.typed_data() : nullptr};
  if (!is_byte(values.element_type())) return invalid("the codes are no bytes");
  if (values.element_count() != columns * p.slots * p.height * p.width) {
    return invalid("the values are not those of the blocks");
  }
  const bool given = x_scale.element_count() > 0;
  if (scale.element_count() != p.batch * p.n) return invalid("expected a scale a column");
  if (given && x_scale.element_count() != p.batch) return invalid("expected an activation scale a batch");
  if (high < 1 || high > 127) return invalid("the largest code of an activation is 1 to 127");
  if (scratch->element_count() < BlockCodes::scratch_bytes(p)) {
    return invalid("the scratch buffer is too small");
  }
  Epilogue then{};
  error = check_epilogue(bias, residual, activation, p.batch * p.n, out->element_count(), &then);
  if (error.failure()) return error;
  const Path* path = find_path(std::string(path_name).c_str());
  if (!path) return invalid("this CPU has no path " + std::string(path_name));
  const BlockCodes weights = {static_cast<const uint8_t*>(values.untyped_data()), by_rows != 0,
                              scale.typed_data()};
  const SparseRows from = {x.typed_data(), static_cast<float>(high),
                           given ? x_scale.typed_data() : nullptr};
  if (!multiply(*path, p, from, weights, places, then, workers_of(pool),
                scratch->typed_data(), out->typed_data())) {
    return invalid("a row of blocks, or a count of them, is not in the matrix");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxcompress

// Everything else of the library is hidden.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcompress_int8_matmul, jaxcompress::Int8Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("layout")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcompress_quantized_matmul, jaxcompress::QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("layout")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("digits")
                                  .Attr<int64_t>("high")
                                  .Attr<int64_t>("activation")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcompress_sparse_matmul, jaxcompress::SparseMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("high")
                                  .Attr<int64_t>("part")
                                  .Attr<int64_t>("activation")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcompress_block_matmul, jaxcompress::BlockMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("activation")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcompress_quantized_block_matmul,
                              jaxcompress::QuantizedBlockMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("by_rows")
                                  .Attr<int64_t>("high")
                                  .Attr<int64_t>("activation")
                                  .Attr<std::string_view>("path"));

// The name of the path that runs for `name` ("" for the best), or "" if this CPU lacks it.
extern "C" const char* jaxcompress_path(const char* name) {
  const jaxcompress::Path* path = jaxcompress::find_path(name);
  return path ? path->name : "";
}

#pragma GCC visibility pop
