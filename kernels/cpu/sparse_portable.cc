// Vectors of 16 bytes, which every CPU has or the compiler makes of smaller ones.

#include "sparse_loops.h"

namespace jaxcompress {

extern const SparsePath kSparsePortable = JAXCOMPRESS_SPARSE(16);

}  // namespace jaxcompress
