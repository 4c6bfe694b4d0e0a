// What this machine can do at most: int8 and float32 products in registers, bytes from memory.
//
// Prints JSON; for CPUs with AVX-512 VNNI. Compiled and run by _bench_peak.py.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 24;  // independent sums, more than latency times throughput
constexpr size_t kBuffer = size_t{1} << 28;  // bytes a thread, far more than any cache

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

__attribute__((target("avx512f,avx512vnni"))) void int8_products(long steps) {
  __m512i sums[kChains], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#pragma GCC unroll 24
  for (int j = 0; j < kChains; ++j) sums[j] = _mm512_setzero_si512();
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[j]) : "v"(a), "v"(b));
  }
}

__attribute__((target("avx512f"))) void float_products(long steps) {
  __m512 sums[kChains], a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
#pragma GCC unroll 24
  for (int j = 0; j < kChains; ++j) sums[j] = _mm512_setzero_ps();
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sums[j]) : "v"(a), "v"(b));
  }
}

__attribute__((target("avx512f"))) void read(const char* from) {
  __m512i sums[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sums[j] = _mm512_setzero_si512();
  for (size_t i = 0; i < kBuffer; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      asm volatile("vpxord %1, %0, %0" : "+v"(sums[j]) : "m"(*reinterpret_cast<const __m512i*>(from + i + 64 * j)));
    }
  }
}

// The shortest of several times that all threads take.
template <class Fn>
double shortest(unsigned threads, int rounds, Fn fn) {
  double best = 1e9;
  for (int round = 0; round < rounds; ++round) {
    const double begin = seconds();
    std::vector<std::thread> all;
    for (unsigned t = 0; t < threads; ++t) all.emplace_back(fn, t);
    for (auto& thread : all) thread.join();
    best = std::min(best, seconds() - begin);
  }
  return best;
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512vnni")) return 1;
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  constexpr long kSteps = 4000000;
  // A product and a sum for each of 64 bytes, or of 16 floats.
  const double products = 2.0 * kSteps * kChains * threads;
  const double bytes = static_cast<double>(kBuffer) * threads;
  std::vector<std::vector<char>> buffers(threads, std::vector<char>(kBuffer + 64, 1));
  auto at = [&](unsigned t) { return buffers[t].data() + (64 - reinterpret_cast<size_t>(buffers[t].data()) % 64); };
  const double int8 = shortest(threads, 5, [](unsigned) { int8_products(kSteps); });
  const double floats = shortest(threads, 5, [](unsigned) { float_products(kSteps); });
  const double memory = shortest(threads, 20, [&](unsigned t) { read(at(t)); });
  std::printf("{\"int8_gops\": %.1f, \"float32_gflops\": %.1f, \"read_gb_s\": %.1f}\n",
              64e-9 * products / int8, 16e-9 * products / floats, 1e-9 * bytes / memory);
}
