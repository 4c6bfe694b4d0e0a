"""NVIDIA's `mma.sp` on numpy: what the manual says that 32 threads make of their registers.

The fragments are those of PTX 9.7.14.6, written down apart from the kernel. Nothing here
has been compared with a device.
"""

import re

import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

GROUP, MEMBER = np.divmod(np.arange(32), 4)
BYTES = {"bf16": jnp.bfloat16, "f16": np.float16, "s8": np.int8}


class Results:
    def __init__(self, arrays, dtypes):
        self.handles = [interpreter.TensorHandle(a, t) for a, t in zip(arrays, dtypes)]

    def get_result(self, i):
        return self.handles[i]


def sparse_product(kept, metadata, b, c):
    """`A b + c` of one warp: A has four columns for every two kept ones."""
    low, high = metadata[..., 0], metadata[..., 1]
    assert np.all(low < high), "places of a group have to ascend"
    full = np.zeros((16, 2 * kept.shape[1]), b.dtype)
    row, pair = np.indices(low.shape)
    full[row, 4 * pair + low] = kept[:, ::2]
    full[row, 4 * pair + high] = kept[:, 1::2]
    wide = np.int64 if c.dtype == np.int32 else np.float64
    return (full.astype(wide) @ b.astype(wide) + c).astype(c.dtype)


def warp(kind, a, b, c, e):
    """The four results of each thread of a warp; `a`, `b`, `c` are `[4, 32]`, `e` is `[32]`."""
    numbers = lambda words: (
        np.ascontiguousarray(words.astype(np.int32)).view(BYTES[kind]).reshape(4, 32, -1)
    )
    per = 4 if kind == "s8" else 2
    kept, dense = np.zeros((16, 8 * per), BYTES[kind]), np.zeros((16 * per, 8), BYTES[kind])
    sums, metadata = np.zeros((16, 8), c.dtype), np.zeros((16, 4 * per, 2), int)
    i, part = np.arange(4)[:, None, None], np.arange(per)
    group, member = GROUP[:, None], MEMBER[:, None]
    kept[group + i % 2 * 8, member * per + i // 2 * 4 * per + part] = numbers(a)
    dense[member * per + i * 4 * per + part, group] = numbers(b)
    i = i[..., 0]
    at = GROUP + i // 2 * 8, MEMBER * 2 + i % 2
    sums[at] = c
    nibble = np.arange(8)
    bits = (e.astype(np.int64) & 0xFFFFFFFF)[:, None] >> 4 * nibble
    places = np.stack([bits & 3, bits >> 2 & 3], -1)
    if kind == "s8":
        metadata[group + member % 2 * 8, member // 2 * 8 + nibble] = places
    else:  # the selector 0 asks the first two of four threads
        asked = MEMBER < 2
        where = group + nibble // 4 * 8, member * 4 + nibble % 4
        metadata[where[0][asked], where[1][asked]] = places[asked]
    result = sparse_product(kept, metadata, dense, sums)
    return list(result[at])


def inline_asm(asm, constraints, values, types, is_pure, pack):
    """As the interpreter's builder would, for this one instruction."""
    assert pack == 1
    [kind] = re.findall(r"mma\.sp::ordered_metadata\S*\.row\.col\.\w+\.(\w+)\.", asm)
    arrays = np.array([v.data for v in values[:8]]), np.array([v.data for v in values[8:12]])
    e, out = values[12].data, []
    for first in range(0, e.size, 32):
        here = np.s_[..., first : first + 32]
        out.append(warp(kind, arrays[0][:4][here], arrays[0][4:][here], arrays[1][here], e[here]))
    results = [np.concatenate(parts) for parts in zip(*out)]
    return Results(results, [v.dtype.scalar for v in values[8:12]])
