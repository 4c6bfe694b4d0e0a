"""Float activations times integer weights that are unpacked in the registers of a GPU.

A byte of the widest bit plane holds codes that lie 8, 16 or 32 apart. It is loaded once;
each of its parts meets the columns of `x` that it stands for, in a small product of its
own, so that nothing has to be moved between threads.
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

__all__ = ["BLOCKS", "Blocks", "blocks", "quantized_matmul"]


# By compute capability, or the name of the architecture on AMD: a tile for few rows of
# activations, which is bound by the weight's bytes, and one for many. Measured on
# sm_90 alone.
BLOCKS = block_table("quantized_matmul", "triton", Blocks)
_PACKED = 64  # codes in a block of bit planes


def blocks(
    m: int, n: int, k: int, group_size: int | None = None, chip: str | None = None
) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    few, many = row_of(BLOCKS, chip)
    best = by_rows(few, many, m)
    # A step lies within one group, or is one block of bit planes that holds whole groups.
    block_k = min(best.k, group_size or best.k)
    return best._replace(n=min(best.n, max(16, triton.next_power_of_2(n))), k=block_k)


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    bits: int = 8,
    group_size: int | None = None,
    transpose_w: bool = False,
    dtype: Any = None,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ ((w - zero_point) * scale)`, summed in float32.

    `x[b, m, k]` is float32, bfloat16 or float16. `w` is int8 `[b, k, n]` (`[b, n, k]`
    with `transpose_w`), or uint8 bit planes along `k`; `scale` and `zero_point` are
    `[b, g, n]`. A group is a power of two of at least 32. `interpret` is a function to
    call instead of `jax_triton.triton_call`.
    """
    b, m, k = x.shape
    n = w.shape[1 if transpose_w else 2]
    out = jax.ShapeDtypeStruct((b, m, n), dtype or x.dtype)
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    group = group_size if group_size is not None and group_size < k else None
    stored = 8 if w.dtype == jnp.int8 else bits
    tile = block or blocks(m, n, k, group, chip)
    block_k = tile.k if stored == 8 else max(tile.k, _PACKED)
    # Triton takes no None: what is absent is a single 0 that is never read.
    zero = jnp.zeros((1, 1, 1), jnp.int8) if zero_point is None else zero_point
    parts = splits(tile, b, m, n, k)
    call = interpret or triton_call("quantized_matmul", chip)
    found = call(
        x,
        w,
        scale.astype(jnp.float32),
        zero,
        kernel=_kernel if stored == 8 else _packed_kernel,
        out_shape=split(out, parts),
        grid=(triton.cdiv(n, tile.n), triton.cdiv(m, tile.m), b * parts),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=m,
        N=n,
        K=k,
        GROUP=group or 0,
        HAS_ZERO=zero_point is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=block_k,
        SPLITS=parts,
        **({"TRANSPOSE_W": transpose_w} if stored == 8 else {"BITS": stored}),
    )
    return added(found, out)


@triton.jit
def _scaled(codes, group, scale, zero, column, N: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Codes of one group as floats."""
    weight = codes.to(tl.float32)
    if HAS_ZERO:
        weight -= tl.load(zero + group * N + column, mask=column < N).to(tl.float32)[None, :]
    return weight * tl.load(scale + group * N + column, mask=column < N)[None, :]


@triton.jit
def _kernel(
    x,
    w,
    scale,
    zero,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    TRANSPOSE_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    groups: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    batch, begin, end = portion(K, BLOCK_K, SPLITS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    scale += batch * groups * N
    zero += batch * groups * N
    x_at = x + (batch * M + row[:, None]) * K + begin + along[None, :]
    if TRANSPOSE_W:
        w_at = w + (batch * N + column[None, :]) * K + begin + along[:, None]
    else:
        w_at = w + (batch * K + begin + along[:, None]) * N + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        x_mask = row[:, None] < M
        w_mask = column[None, :] < N
        if K % BLOCK_K != 0:
            x_mask = x_mask & (along[None, :] < K - start)
            w_mask = w_mask & (along[:, None] < K - start)
        weight = tl.load(w_at, mask=w_mask, other=0)
        if GROUP:
            weight = _scaled(weight, start // GROUP, scale, zero, column, N, HAS_ZERO)
        else:
            weight = weight.to(tl.float32)
            if HAS_ZERO:
                weight -= tl.load(zero + column, mask=column < N).to(tl.float32)[None, :]
        values = tl.load(x_at, mask=x_mask, other=0.0)
        weight = weight.to(values.dtype)
        total = tl.dot(values, weight, total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K if TRANSPOSE_W else BLOCK_K * N
    if not GROUP:
        total *= tl.load(scale + column, mask=column < N)[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    out_at = out + (written(batch, SPLITS) * M + row[:, None]) * N + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _narrow(w_at, code, mask, N: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """The bits that a plane narrower than the widest adds to codes; it starts at bit START."""
    byte = tl.load(w_at + (8 * START + code % (8 * WIDTH)) * N, mask=mask, other=0)
    return ((byte.to(tl.int32) >> (code // (8 * WIDTH) * WIDTH)) & ((1 << WIDTH) - 1)) << START


@triton.jit
def _packed_kernel(
    x,
    w,
    scale,
    zero,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    wide: tl.constexpr = 4 if BITS >= 4 else 2  # bits of the widest plane
    parts: tl.constexpr = 8 // wide  # codes in a byte of it
    span: tl.constexpr = 8 * wide  # how far apart they lie
    groups: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    planes: tl.constexpr = (K + 63) // 64  # blocks of 64 codes, 8 BITS bytes each
    batch, begin, end = portion(K, BLOCK_K, SPLITS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // parts)
    plane, code = byte // span, byte % span
    scale += batch * groups * N
    zero += batch * groups * N
    x_at = x + (batch * M + row[:, None]) * K + begin + (plane * 64 + code)[None, :]
    w_at = w + (batch * planes + begin // 64 + plane[:, None]) * (8 * BITS * N) + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        w_mask = column[None, :] < N
        if K % BLOCK_K != 0:
            w_mask = w_mask & (start // 64 + plane[:, None] < planes)
        bits = tl.load(w_at + code[:, None] * N, mask=w_mask, other=0).to(tl.int32)
        for part in tl.static_range(parts):
            index = code + part * span  # of a code in its block of 64
            codes = (bits >> (part * wide)) & ((1 << wide) - 1)
            if BITS >= 6:
                codes |= _narrow(w_at, index[:, None], w_mask, N, 4, 2)
            if BITS % 2 == 1:
                codes |= _narrow(w_at, index[:, None], w_mask, N, BITS - 1, 1)
            codes = (codes << (32 - BITS)) >> (32 - BITS)
            if GROUP:
                # Beyond the last group x is zero, and any scale will do.
                group = min((start + part * span) // GROUP, groups - 1)
                weight = _scaled(codes, group, scale, zero, column, N, HAS_ZERO)
            else:
                weight = codes.to(tl.float32)
                if HAS_ZERO:
                    weight -= tl.load(zero + column, mask=column < N).to(tl.float32)[None, :]
            x_mask = row[:, None] < M
            if K % BLOCK_K != 0:
                x_mask = x_mask & ((plane * 64 + index)[None, :] < K - start)
            values = tl.load(x_at + part * span, mask=x_mask, other=0.0)
            total = tl.dot(values, weight.to(values.dtype), total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K // 64 * (8 * BITS * N)
    if not GROUP:
        total *= tl.load(scale + column, mask=column < N)[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    out_at = out + (written(batch, SPLITS) * M + row[:, None]) * N + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)
