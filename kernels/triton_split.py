"""Within a kernel in Triton: its part of a sum that programs along its last axis share."""

import triton
import triton.language as tl

__all__ = ["portion", "written"]


@triton.jit
def portion(K: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """The batch of a program, and where along `K` its part of the sums begins and ends."""
    own: tl.constexpr = (K + STEP * SPLITS - 1) // (STEP * SPLITS) * STEP
    begin = tl.program_id(2) % SPLITS * own
    # Whole arrays may pass 2^31 elements.
    return (tl.program_id(2) // SPLITS).to(tl.int64), begin, min(begin + own, K)


@triton.jit
def written(batch, SPLITS: tl.constexpr):
    """The batch that it writes to: parts of a sum lie behind each other."""
    if SPLITS > 1:
        batch += tl.program_id(2) % SPLITS * (tl.num_programs(2) // SPLITS)
    return batch
