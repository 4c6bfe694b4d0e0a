"""int8 activations times int4 weights with scales by group, on the tensor cores of a GPU.

A byte of the weight holds two codes that lie 32 apart. It is loaded once; each half meets
the columns of `x` that it stands for, in a product of integers of its own, so that nothing
has to be moved between threads. The sums of a group are exact in int32; then they are
scaled and added in float32.
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

__all__ = ["BLOCKS", "Blocks", "blocks", "w4a8_matmul"]


# By compute capability, or the name of the architecture on AMD: a tile for few rows of
# activations, which is bound by the weight's bytes, and one for many. Measured on
# sm_90 alone.
BLOCKS = block_table("w4a8_matmul", "triton", Blocks)
_PACKED = 64  # codes in a block of bit planes


def blocks(
    m: int, n: int, k: int, group_size: int | None = None, chip: str | None = None
) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    few, many = row_of(BLOCKS, chip)
    best = by_rows(few, many, m)
    # A step lies within one group, or is one block of bit planes that holds two.
    block_k = max(_PACKED, min(best.k, group_size or best.k))
    return best._replace(n=min(best.n, max(16, triton.next_power_of_2(n))), k=block_k)


def w4a8_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    x_scale: jax.Array | None = None,
    w_zero_point: jax.Array | None = None,
    *,
    group_size: int | None = None,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`(x @ ((w - w_zero_point) * w_scale)) * x_scale`, exact in int32 within a group.

    `x[b, m, k]` is int8, `w[b, ., n]` the uint8 bit planes of int4 along `k`; `w_scale` and
    `w_zero_point`, int8 from -8 to 7, are `[b, g, n]`, `x_scale` is `[b, m, 1]`. A group is
    a power of two of at least 32. `interpret` is a function to call instead of
    `jax_triton.triton_call`.
    """
    b, m, k = x.shape
    n = w.shape[2]
    out = jax.ShapeDtypeStruct((b, m, n), dtype)
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    group = group_size if group_size is not None and group_size < k else None
    tile = block or blocks(m, n, k, group, chip)
    # Triton takes no None: what is absent is a single 1 or 0 that is never read.
    one, nothing = jnp.ones((1, 1, 1), jnp.float32), jnp.zeros((1, 1, 1), jnp.int8)
    parts = splits(tile, b, m, n, k)
    call = interpret or triton_call("w4a8_matmul", chip)
    found = call(
        x,
        w,
        w_scale.astype(jnp.float32),
        one if x_scale is None else x_scale.astype(jnp.float32),
        nothing if w_zero_point is None else w_zero_point,
        kernel=_kernel,
        out_shape=split(out, parts),
        grid=(triton.cdiv(n, tile.n), triton.cdiv(m, tile.m), b * parts),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=m,
        N=n,
        K=k,
        GROUP=group or 0,
        HAS_X_SCALE=x_scale is not None,
        HAS_ZERO=w_zero_point is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        SPLITS=parts,
    )
    return added(found, out)


@triton.jit
def _kernel(
    x,
    w,
    w_scale,
    x_scale,
    zero,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    groups: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    planes: tl.constexpr = (K + 63) // 64  # blocks of 64 codes, 32 bytes each
    # Where a step holds two groups, each half of its bytes lies in one.
    apart: tl.constexpr = GROUP != 0 and GROUP < BLOCK_K
    batch, begin, end = portion(K, BLOCK_K, SPLITS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    plane, code = byte // 32, byte % 32
    scale_at = w_scale + batch * groups * N + column
    zero_at = zero + batch * groups * N + column
    x_at = x + (batch * M + row[:, None]) * K + begin + (plane * 64 + code)[None, :]
    w_at = w + (batch * planes * 32 + begin // 2 + byte[:, None]) * N + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    scaled = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        w_mask = column[None, :] < N
        if K % BLOCK_K != 0:
            w_mask = w_mask & (start // 2 + byte[:, None] < planes * 32)
        both = tl.load(w_at, mask=w_mask, other=0).to(tl.int8, bitcast=True)
        for half in tl.static_range(2):
            codes = both >> 4 if half else (both << 4).to(tl.int8) >> 4
            # Beyond the last group x is zero, and any scale will do.
            group = min((start + half * 32) // GROUP, groups - 1) if GROUP else 0
            if HAS_ZERO:
                zeros = tl.load(zero_at + group * N, mask=column < N, other=0)
                codes = (codes - zeros[None, :]).to(tl.int8)
            x_mask = row[:, None] < M
            if K % BLOCK_K != 0:
                x_mask = x_mask & ((plane * 64 + code)[None, :] < K - start - half * 32)
            values = tl.load(x_at + half * 32, mask=x_mask, other=0)
            total = tl.dot(values, codes.to(tl.int8), total, out_dtype=tl.int32)
            if GROUP and (apart or half):
                scale = tl.load(scale_at + group * N, mask=column < N)
                scaled += total.to(tl.float32) * scale[None, :]
                total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        x_at += BLOCK_K
        w_at += BLOCK_K // 2 * N

    if not GROUP:
        scaled = total.to(tl.float32) * tl.load(scale_at, mask=column < N)[None, :]
    if HAS_X_SCALE:
        scales = tl.load(x_scale + batch * M + row, mask=row < M)
        scaled *= scales[:, None]
    inside = (row[:, None] < M) & (column[None, :] < N)
    out_at = out + (written(batch, SPLITS) * M + row[:, None]) * N + column[None, :]
    tl.store(out_at, scaled.to(out.dtype.element_ty), mask=inside)
