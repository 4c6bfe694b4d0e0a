// Plain C++, for any CPU; the compiler vectorizes it for the least one of the architecture.

#include "loops.h"

namespace jaxcompress {
namespace {

void tile(Rows x, size_t count, const uint8_t* weights, size_t panels, size_t pitch, size_t quads,
          uint32_t* acc) {
  for (size_t i = 0; i < count; ++i) {
    for (size_t p = 0; p < panels; ++p) {
      const int8_t* codes = x.codes + i * x.stride;
      const uint8_t* w = weights + p * pitch;
      uint32_t* sums = acc + i * kColumns + p * kPanel;
      for (size_t q = 0; q < quads; ++q, w += kLine, codes += kQuad) {
        const int32_t a = codes[0], b = codes[1], c = codes[2], d = codes[3];
        for (size_t n = 0; n < kPanel; ++n) {
          const uint8_t* quad = w + n * kQuad;
          const int32_t product = quad[0] * a + quad[1] * b + quad[2] * c + quad[3] * d;
          sums[n] += static_cast<uint32_t>(product);  // unsigned: passing 2^31 is no error
        }
      }
    }
  }
}

}  // namespace

extern const Path kPortable = JAXCOMPRESS_PATH("portable", 4, tile, runs_by<tile>, nullptr, nullptr, nullptr, kSparsePortable);

}  // namespace jaxcompress
