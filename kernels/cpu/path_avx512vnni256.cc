// The 256-bit form of AVX-512 VNNI: for CPUs that slow down for 512-bit vectors, and the way
// to run the tiles of AVX-VNNI on a CPU that has the other encoding only.

#include "tile256.h"

namespace jaxcompress {
namespace {

JAXCOMPRESS_VPDPBUSD(Evex, "", "v");

}  // namespace

extern const Path kAvx512Vnni256 = JAXCOMPRESS_PATH("avx512vnni256", 6, tile256<Evex>, runs_by<tile256<Evex>>, nullptr, nullptr, nullptr, kSparseAvx2);

}  // namespace jaxcompress
