// AVX2 with FMA.

#include "sparse_loops.h"

namespace jaxcompress {

extern const SparsePath kSparseAvx2 = JAXCOMPRESS_SPARSE(32);

}  // namespace jaxcompress
