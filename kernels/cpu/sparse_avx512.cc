// AVX-512.

#include "sparse_loops.h"

namespace jaxcompress {

extern const SparsePath kSparseAvx512 = JAXCOMPRESS_SPARSE(64);

}  // namespace jaxcompress
