// AVX2: bytes widened to 16 bits and multiplied in pairs.
//
// Not vpmaddubsw, which multiplies the bytes as they are: it saturates, two products of
// 255 * 127 pass 16 bits.

#include "tile256.h"

namespace jaxcompress {
namespace {

struct Avx2 {
  struct Pairs {
    __m256i even, odd;  // 16-bit: codes 0 and 2 of each quad, codes 1 and 3
  };
  using Weights = Pairs;
  using Codes = Pairs;
  static Pairs weights(__m256i w) {
    return {_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srli_epi16(w, 8)};
  }
  static Pairs codes(__m256i x) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
  }
  static void dot(__m256i& acc, Pairs w, Pairs x) {
    const __m256i even = _mm256_madd_epi16(w.even, x.even), odd = _mm256_madd_epi16(w.odd, x.odd);
    acc = _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
};

}  // namespace

extern const Path kAvx2 = JAXCOMPRESS_PATH("avx2", 4, tile256<Avx2>, runs_by<tile256<Avx2>>, nullptr, nullptr, nullptr, kSparseAvx2);

}  // namespace jaxcompress
