"""Products with a weight that keeps `n` of every `m` neighbours, on a GPU, in Triton.

The kept values, floats or integers of eight bits or fewer, and their places are loaded as
they are stored; zeros are put back in registers, so what is saved is bytes, not products.
The order of what is summed is free: a program multiplies the first rows of some groups,
then their second ones, and so on, and the columns of x come in that order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.triton_launch import (
    Blocks,
    added,
    by_rows,
    split,
    splits,
    triton_call,
)
from jaxcompress.kernels.triton_split import portion, written

__all__ = ["BLOCKS", "Blocks", "blocks", "nm_matmul"]

# By compute capability, or the name of the architecture on AMD: a tile for few rows of
# activations, which is bound by the weight's bytes, and one for many. k counts groups.
# Measured on sm_90 alone.
BLOCKS = block_table("nm_matmul", "triton", Blocks)


def blocks(m: int, n: int, chip: str | None = None) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    few, many = row_of(BLOCKS, chip)
    best = by_rows(few, many, m)
    return best._replace(n=min(best.n, max(16, triton.next_power_of_2(n))))


def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    *,
    pattern: tuple[int, int],
    bits: int = 8,
    group_size: int | None = None,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ (w * scale)`, summed in float32; for int8 `x` `(x @ w) * x_scale * scale`.

    `x[b, m, k]` is float32, bfloat16, float16 or int8. With the pattern `(n, m)`,
    `values[b, k / m * n, columns]` are floats or int8, or uint8 bit planes of integers of
    `bits`, and `indices[b, ., columns]` uint8 bit planes of their places in each group of
    `m`. `n` and `m` are powers of two, at most 4 and 16. `scale[b, g, columns]` is for
    integers; where `x` is of floats, `group_size` neighbours along `k` share one, a power of
    two of at least `m`. The product of an int8 `x` is exact in int32, and so is the result
    without `scale` and `x_scale[b, m, 1]`.
    `interpret` is a function to call instead of `jax_triton.triton_call`.
    """
    b, rows, k = x.shape
    columns = values.shape[2]
    n, m = pattern
    integers = x.dtype == jnp.int8
    kind = jnp.int32 if integers and scale is None and x_scale is None else dtype
    out = jax.ShapeDtypeStruct((b, rows, columns), kind)
    if 0 in (b, rows, columns, k):
        return jnp.zeros(out.shape, out.dtype)
    tile = block or blocks(rows, columns, chip)
    x = jnp.swapaxes(x.reshape(b, rows, k // m, m), 2, 3)
    group = group_size // m if group_size is not None and group_size < k else None
    # Triton takes no None: what is absent is a single 1 that is never read.
    one = jnp.ones((1, 1, 1), jnp.float32)
    parts = splits(tile._replace(k=tile.k * m), b, rows, columns, k)
    later = parts > 1 and integers  # scales are for the whole sum, which is exact
    call = interpret or triton_call("nm_matmul", chip)
    found = call(
        x,
        values,
        indices,
        one if scale is None else scale.astype(jnp.float32),
        one if x_scale is None else x_scale.astype(jnp.float32),
        kernel=_kernel,
        out_shape=split(out, parts, jnp.int32 if integers else jnp.float32),
        grid=(triton.cdiv(columns, tile.n), triton.cdiv(rows, tile.m), b * parts),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        ROWS=rows,
        COLUMNS=columns,
        GROUPS=k // m,
        N=n,
        M=m,
        BITS=max(1, (m - 1).bit_length()),
        VALUE_BITS=bits if values.dtype == jnp.uint8 else 8,
        HAS_SCALE=scale is not None and not later,
        HAS_X_SCALE=x_scale is not None and not later,
        SHARED=group or 0,
        INTEGERS=integers,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        SPLITS=parts,
    )
    return added(found, out, *((x_scale, scale) if later else ()))


@triton.jit
def _plane(at, index, mask, COLUMNS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """The bits from START on that a plane of WIDTH bits has of places, at their index in 64."""
    byte = tl.load(at + (8 * START + index % (8 * WIDTH)) * COLUMNS, mask=mask, other=0)
    return ((byte.to(tl.int32) >> (index // (8 * WIDTH) * WIDTH)) & ((1 << WIDTH) - 1)) << START


@triton.jit
def _codes(planes_at, row, mask, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """The codes of BITS, without a sign, of rows of bit planes."""
    at, index = planes_at + row // 64 * (8 * BITS * COLUMNS), row % 64
    wide: tl.constexpr = 4 if BITS >= 4 else 2 if BITS >= 2 else 1
    code = _plane(at, index, mask, COLUMNS, 0, wide)
    if BITS >= 6:
        code |= _plane(at, index, mask, COLUMNS, 4, 2)
    if BITS % 2 == 1 and BITS > 1:
        code |= _plane(at, index, mask, COLUMNS, BITS - 1, 1)
    return code


@triton.jit
def _kept(
    values_at,
    places_at,
    stored,
    mask,
    scales,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SHARED: tl.constexpr,
    kind: tl.constexpr,
):
    """The places of the rows `stored` of what is stored, and their values as `kind`."""
    row = stored[:, None]
    place = _codes(places_at, row, mask, COLUMNS, BITS)
    if VALUE_BITS == 8:
        value = tl.load(values_at + row * COLUMNS, mask=mask, other=0)
    else:
        code = _codes(values_at, row, mask, COLUMNS, VALUE_BITS)
        value = ((code << (32 - VALUE_BITS)) >> (32 - VALUE_BITS)).to(tl.int8)
    if kind != tl.int8:
        if value.dtype == tl.int8:  # the interpreter has no other way to bfloat16
            value = value.to(tl.float32)
        if SHARED:
            value = value * scales
        value = value.to(kind)
    return place, value


@triton.jit
def _kernel(
    x,
    values,
    indices,
    scale,
    x_scale,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    SHARED: tl.constexpr,  # groups of M that share a scale, 0 for all
    INTEGERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    planes: tl.constexpr = (GROUPS * N + 63) // 64  # blocks of 64 places, 8 BITS bytes each
    batch, begin, end = portion(GROUPS, BLOCK_K, SPLITS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    x_at = x + (batch * ROWS + row[:, None]) * (GROUPS * M) + along[None, :]
    if VALUE_BITS == 8:
        values_at = values + batch * GROUPS * N * COLUMNS + column[None, :]
    else:
        values_at = values + batch * planes * (8 * VALUE_BITS * COLUMNS) + column[None, :]
    shares: tl.constexpr = (GROUPS + SHARED - 1) // SHARED if SHARED else 1
    scale_at = scale + batch * shares * COLUMNS + column
    places_at = indices + batch * planes * (8 * BITS * COLUMNS) + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGERS else tl.float32)
    kind: tl.constexpr = x.dtype.element_ty
    zeros = tl.zeros((BLOCK_K, BLOCK_N), dtype=kind)
    for start in range(begin, end, BLOCK_K):
        inside = (start + along < GROUPS)[:, None] & (column[None, :] < COLUMNS)
        x_mask = (row[:, None] < ROWS) & (start + along < GROUPS)[None, :]
        first = (start + along) * N  # of what is stored
        # Beyond the last group x is zero, and any scale will do.
        if SHARED >= BLOCK_K:  # one for all of a step
            share = min(start // SHARED, shares - 1)
            scales = tl.load(scale_at + share * COLUMNS, mask=column < COLUMNS)[None, :]
        elif SHARED:
            share = tl.minimum((start + along) // SHARED, shares - 1)[:, None]
            scale_mask = column[None, :] < COLUMNS
            scales = tl.load(scale_at[None, :] + share * COLUMNS, mask=scale_mask)
        else:
            scales = 1.0
        place0, value0 = _kept(
            values_at, places_at, first, inside, scales, COLUMNS, BITS, VALUE_BITS, SHARED, kind
        )
        if N >= 2:
            place1, value1 = _kept(
                values_at,
                places_at,
                first + 1,
                inside,
                scales,
                COLUMNS,
                BITS,
                VALUE_BITS,
                SHARED,
                kind,
            )
        if N == 4:
            place2, value2 = _kept(
                values_at,
                places_at,
                first + 2,
                inside,
                scales,
                COLUMNS,
                BITS,
                VALUE_BITS,
                SHARED,
                kind,
            )
            place3, value3 = _kept(
                values_at,
                places_at,
                first + 3,
                inside,
                scales,
                COLUMNS,
                BITS,
                VALUE_BITS,
                SHARED,
                kind,
            )
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
                total = tl.dot(piece, weight, total, input_precision="ieee")
    if HAS_X_SCALE:
        total = (
            total.to(tl.float32) * tl.load(x_scale + batch * ROWS + row, mask=row < ROWS)[:, None]
        )
    if HAS_SCALE and not SHARED:
        total = total.to(tl.float32) * tl.load(scale_at, mask=column < COLUMNS)[None, :]
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    out_at = out + (written(batch, SPLITS) * ROWS + row[:, None]) * COLUMNS + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=mask)
