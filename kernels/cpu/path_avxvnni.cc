// AVX-VNNI: the dot product of CPUs that have AVX2 but not AVX-512.

#include "tile256.h"

namespace jaxcompress {
namespace {

JAXCOMPRESS_VPDPBUSD(Vex, "%{vex%} ", "x");

}  // namespace

extern const Path kAvxVnni = JAXCOMPRESS_PATH("avxvnni", 6, tile256<Vex>, runs_by<tile256<Vex>>, nullptr, nullptr, nullptr, kSparseAvx2);

}  // namespace jaxcompress
