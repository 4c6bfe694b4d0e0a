"""int8 x int8 -> int32 on the tensor cores of a GPU, in Triton, scaled in registers.

A program makes one tile of the result and walks along `k`. Sizes are compile-time
constants, so masks are made only where a tile reaches over an edge. On NVIDIA's older
tensor cores int32 sums saturate; with `k` as bounded by the op none gets that far.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.triton_launch import Blocks, triton_call

__all__ = ["BLOCKS", "Blocks", "blocks", "int8_matmul"]


# By compute capability, or the name of the architecture on AMD. With four warps a tile of
# 128 x 128 spills on sm_80, with eight it does not. Measured on sm_90 alone.
BLOCKS = block_table("int8_matmul", "triton", Blocks)
_SMALLEST = 16  # rows and columns that the instruction takes
# Tensor cores take int8 that lies along k. From so many rows on a weight that does not is turned
# first, which costs its bytes twice; within the kernel every tile of it is turned for itself.
_FEW = 128


def blocks(m: int, n: int, k: int, chip: str | None = None) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    [best] = row_of(BLOCKS, chip)
    fit = lambda size, most: min(most, max(_SMALLEST, triton.next_power_of_2(size)))
    return best._replace(m=fit(m, best.m), n=fit(n, best.n))


def int8_matmul(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array | None = None,
    w_scale: jax.Array | None = None,
    w_zero_point: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_scale: jax.Array | None = None,
    *,
    transpose_w: bool = False,
    activation: str | None = None,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`act((x @ (w - w_zero_point)) * x_scale * w_scale + bias)`, the product exact in int32.

    `x[b, m, k]`, `w[b, k, n]` (`[b, n, k]` with `transpose_w`), `x_scale[b, m, 1]`,
    `w_scale[b, 1, n]`, `w_zero_point[b, 1, n]`, `bias[b, 1, n]`; int32 if none of the
    others is given, else `dtype`. With `out_scale[b, 1, n]` that is divided by it and
    rounded to int8 codes, -127 to 127.
    `interpret` is a function to call instead of `jax_triton.triton_call`.
    """
    b, m, k = x.shape
    if not transpose_w and m > _FEW:
        w, transpose_w = jnp.swapaxes(w, 1, 2), True
    n = w.shape[1 if transpose_w else 2]
    real = any(a is not None for a in (x_scale, w_scale, bias, activation, out_scale))
    kind = jnp.int8 if out_scale is not None else dtype if real else jnp.int32
    out = jax.ShapeDtypeStruct((b, m, n), kind)
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    tile = block or blocks(m, n, k, chip)
    # Triton takes no None: what is absent is a single 1 or 0 that is never read.
    one, nothing = jnp.ones((1, 1, 1), jnp.float32), jnp.zeros((1, 1, 1), jnp.int32)
    if w_zero_point is None:
        sums = zero = nothing
    else:
        sums = jnp.sum(x, -1, keepdims=True, dtype=jnp.int32)
        zero = w_zero_point.astype(jnp.int32)
    call = interpret or triton_call("int8_matmul", chip)
    return call(
        x,
        w,
        one if x_scale is None else x_scale.astype(jnp.float32),
        one if w_scale is None else w_scale.astype(jnp.float32),
        sums,
        zero,
        one if bias is None else bias.astype(jnp.float32),
        one if out_scale is None else out_scale.astype(jnp.float32),
        kernel=_kernel,
        out_shape=out,
        grid=(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), b),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=m,
        N=n,
        K=k,
        TRANSPOSE_W=transpose_w,
        HAS_X_SCALE=x_scale is not None,
        HAS_W_SCALE=w_scale is not None,
        HAS_ZERO=w_zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_OUT_SCALE=out_scale is not None,
        ACTIVATION=activation or "",
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )


@triton.jit
def _kernel(
    x,
    w,
    x_scale,
    w_scale,
    sums,
    zero,
    bias,
    out_scale,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSE_W: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles that run together lie below each other, eight at a time: they share columns
    # of w, and their rows of x stay in the cache.
    down: tl.constexpr = 8
    tiles_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)  # whole arrays may pass 2^31 elements
    band = tile // (down * tiles_n)
    height = min(tiles_m - band * down, down)
    tile_m = band * down + (tile % (down * tiles_n)) % height
    tile_n = (tile % (down * tiles_n)) // height

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    x_at = x + (batch * M + row[:, None]) * K + along[None, :]
    if TRANSPOSE_W:
        w_at = w + (batch * N + column[None, :]) * K + along[:, None]
    else:
        w_at = w + (batch * K + along[:, None]) * N + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        x_mask = row[:, None] < M
        w_mask = column[None, :] < N
        if K % BLOCK_K != 0:
            x_mask = x_mask & (along[None, :] < K - start)
            w_mask = w_mask & (along[:, None] < K - start)
        total = tl.dot(
            tl.load(x_at, mask=x_mask, other=0),
            tl.load(w_at, mask=w_mask, other=0),
            total,
            out_dtype=tl.int32,
        )
        x_at += BLOCK_K
        w_at += BLOCK_K if TRANSPOSE_W else BLOCK_K * N

    row_at, column_at = batch * M + row, batch * N + column
    if HAS_ZERO:  # every product is too large by the sum of its row, times the zero point
        rows = tl.load(sums + row_at, mask=row < M, other=0)
        zeros = tl.load(zero + column_at, mask=column < N, other=0)
        total -= rows[:, None] * zeros[None, :]
    if HAS_X_SCALE:
        total = total.to(tl.float32) * tl.load(x_scale + row_at, mask=row < M)[:, None]
    if HAS_W_SCALE:
        total = total.to(tl.float32) * tl.load(w_scale + column_at, mask=column < N)[None, :]
    if HAS_BIAS:
        total = total.to(tl.float32) + tl.load(bias + column_at, mask=column < N)[None, :]
    if ACTIVATION == "relu":
        total = tl.maximum(total.to(tl.float32), 0.0)
    if ACTIVATION == "gelu":  # with tanh, a logistic function of twice the argument
        total = total.to(tl.float32)
        total *= tl.sigmoid(1.5957691216 * (total + 0.044715 * total * total * total))
    if ACTIVATION == "silu":
        total = total.to(tl.float32)
        total *= tl.sigmoid(total)
    if HAS_OUT_SCALE:
        scales = tl.load(out_scale + column_at, mask=column < N, other=1.0)
        total = tl.minimum(tl.maximum(total.to(tl.float32) / scales[None, :], -127.0), 127.0)
        # To the nearest, ties to even: this constant leaves no bits for a fraction.
        total = ((total + 12582912.0) - 12582912.0).to(tl.int32)
    inside = (row[:, None] < M) & (column[None, :] < N)
    out_at = out + row_at[:, None] * N + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)
