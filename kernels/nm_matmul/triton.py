"""Products with a weight that keeps `n` of every `m` neighbours, on a GPU, in Triton.

The kept values and their places are loaded as they are stored; zeros are put back in
registers, so what is saved is bytes, not products. The order of what is summed is free: a
program multiplies the first rows of some groups, then their second ones, and so on, and
the columns of x come in that order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.triton_launch import Blocks, triton_call

__all__ = ["BLOCKS", "Blocks", "blocks", "nm_matmul"]

# By compute capability, or the name of the architecture on AMD: a tile for few rows of
# activations, which is bound by the weight's bytes, and one for many. k counts groups. No
# device has measured them.
BLOCKS = block_table("nm_matmul", "triton", Blocks)
_FEW = 16  # rows that one instruction takes


def blocks(m: int, n: int, chip: str | None = None) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    few, many = row_of(BLOCKS, chip)
    best = few if m <= _FEW else many
    return best._replace(n=min(best.n, max(16, triton.next_power_of_2(n))))


def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    *,
    pattern: tuple[int, int],
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ w`, summed in float32, or exactly in int32 where both are int8.

    `x[b, m, k]` is float32, bfloat16, float16 or int8. With the pattern `(n, m)`,
    `values[b, k / m * n, columns]` are floats or int8, and `indices[b, ., columns]` uint8
    bit planes of their places in each group of `m`. `n` and `m` are powers of two, at most
    4 and 16. `interpret` is a function to call instead of `jax_triton.triton_call`.
    """
    b, rows, k = x.shape
    columns = values.shape[2]
    n, m = pattern
    integers = x.dtype == jnp.int8
    out = jax.ShapeDtypeStruct((b, rows, columns), jnp.int32 if integers else dtype)
    if 0 in (b, rows, columns, k):
        return jnp.zeros(out.shape, out.dtype)
    tile = block or blocks(rows, columns, chip)
    x = jnp.swapaxes(x.reshape(b, rows, k // m, m), 2, 3)
    call = interpret or triton_call("nm_matmul", chip)
    return call(
        x,
        values,
        indices,
        kernel=_kernel,
        out_shape=out,
        grid=(triton.cdiv(columns, tile.n), triton.cdiv(rows, tile.m), b),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        ROWS=rows,
        COLUMNS=columns,
        GROUPS=k // m,
        N=n,
        M=m,
        BITS=max(1, (m - 1).bit_length()),
        INTEGERS=integers,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )


@triton.jit
def _plane(at, index, mask, COLUMNS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """The bits from START on that a plane of WIDTH bits has of places, at their index in 64."""
    byte = tl.load(at + (8 * START + index % (8 * WIDTH)) * COLUMNS, mask=mask, other=0)
    return ((byte.to(tl.int32) >> (index // (8 * WIDTH) * WIDTH)) & ((1 << WIDTH) - 1)) << START


@triton.jit
def _kept(values_at, places_at, stored, mask, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """The places and values of the rows `stored` of what is stored."""
    row = stored[:, None]
    at, index = places_at + row // 64 * (8 * BITS * COLUMNS), row % 64
    place = _plane(at, index, mask, COLUMNS, 0, 2 if BITS == 3 else BITS)
    if BITS == 3:
        place |= _plane(at, index, mask, COLUMNS, 2, 1)
    return place, tl.load(values_at + row * COLUMNS, mask=mask, other=0)


@triton.jit
def _kernel(
    x,
    values,
    indices,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    INTEGERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    planes: tl.constexpr = (GROUPS * N + 63) // 64  # blocks of 64 places, 8 BITS bytes each
    batch = tl.program_id(2).to(tl.int64)  # whole arrays may pass 2^31 elements
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    x_at = x + (batch * ROWS + row[:, None]) * (GROUPS * M) + along[None, :]
    values_at = values + batch * GROUPS * N * COLUMNS + column[None, :]
    places_at = indices + batch * planes * (8 * BITS * COLUMNS) + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGERS else tl.float32)
    zeros = tl.zeros((BLOCK_K, BLOCK_N), dtype=values.dtype.element_ty)
    for start in range(0, GROUPS, BLOCK_K):
        inside = (start + along < GROUPS)[:, None] & (column[None, :] < COLUMNS)
        x_mask = (row[:, None] < ROWS) & (start + along < GROUPS)[None, :]
        first = (start + along) * N  # of what is stored
        place0, value0 = _kept(values_at, places_at, first, inside, COLUMNS, BITS)
        if N >= 2:
            place1, value1 = _kept(values_at, places_at, first + 1, inside, COLUMNS, BITS)
        if N == 4:
            place2, value2 = _kept(values_at, places_at, first + 2, inside, COLUMNS, BITS)
            place3, value3 = _kept(values_at, places_at, first + 3, inside, COLUMNS, BITS)
        for j in tl.static_range(M):
            weight = tl.where(place0 == j, value0, zeros)
            if N >= 2:
                weight = tl.where(place1 == j, value1, weight)
            if N == 4:
                weight = tl.where(place2 == j, value2, weight)
                weight = tl.where(place3 == j, value3, weight)
            piece = tl.load(x_at + (j * GROUPS + start), mask=x_mask, other=0)
            if INTEGERS:
                total = tl.dot(piece, weight, total, out_dtype=tl.int32)
            else:
                if weight.dtype == tl.int8:  # the interpreter has no other way to bfloat16
                    weight = weight.to(tl.float32)
                total = tl.dot(piece, weight.to(piece.dtype), total, input_precision="ieee")
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    out_at = out + (batch * ROWS + row[:, None]) * COLUMNS + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=mask)
