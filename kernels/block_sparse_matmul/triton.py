"""Products with a block-sparse weight on the tensor cores of a GPU, and its gradient, in Triton.

A program makes a tile of one line of the result, and walks along the kept blocks of that
line. Lines of many blocks begin first, so that the short ones fill up the end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.triton_launch import (
    FEW,
    Blocks,
    added,
    by_rows,
    split,
    splits,
    triton_call,
)
from jaxcompress.kernels.triton_split import written

__all__ = ["BLOCKS", "Blocks", "block_sparse_matmul", "blocks", "sampled_matmul"]

# By compute capability, or the name of the architecture on AMD: a tile for few rows of
# activations, one for many, and one for the gradient of the weight, whose n and k are at
# most the sides of a block. Measured on sm_90 alone.
BLOCKS = block_table("block_sparse_matmul", "triton", Blocks)


def blocks(m: int, side: int, piece: int, chip: str | None = None, sampled: bool = False) -> Blocks:
    """The tile for lines of `side` and pieces of `piece`: a function of shape and chip alone."""
    few, many, gradient = row_of(BLOCKS, chip)
    best = gradient if sampled else by_rows(few, many, m)
    # A tile lies within a block: the largest power of two that divides its side.
    return best._replace(n=min(best.n, side & -side), k=min(best.k, piece & -piece))


def block_sparse_matmul(
    x: jax.Array,
    w: jax.Array,
    lines: jax.Array,
    sources: jax.Array,
    places: jax.Array,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    *,
    height: int,
    count: int,
    transpose_w: bool = False,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[b, m, count * width]`: line `lines[e]` gets `x[:, source] @ block`, for all `e`.

    `x[b, m, k]` is float32, bfloat16 or float16 and cut along `k` into pieces of `height`,
    of which `sources[b, 1, e]` names one; the blocks `w[b, e * height, width]`, floats or
    int8, are named by `places[b, 1, e]`. `lines[b, 1, e]` do not fall; an entry of line
    `count` is unused. Who knows where in the lists a line begins and ends says so with
    `starts` and `ends[b, 1, count]`, and `lines` are not read. With `transpose_w` each block
    is turned: pieces are of `width`, lines of `height`. Sides of blocks are multiples of 16.
    `interpret` is a function to call instead of `jax_triton.triton_call`.
    """
    b, m, k = x.shape
    e, width = w.shape[1] // height, w.shape[2]
    piece, side = (width, height) if transpose_w else (height, width)
    out = jax.ShapeDtypeStruct((b, m, count * side), dtype)
    if 0 in (b, m, count, e):
        return jnp.zeros(out.shape, out.dtype)
    tile = block or blocks(m, side, piece, chip)
    parts = splits(tile, b, m, count * side, k)
    if starts is None or ends is None:
        # By comparing all with all: a binary search is a loop of launches, and takes ten times
        # as long as the product.
        every = jnp.arange(count + 1, dtype=jnp.int32)
        search = functools.partial(jnp.searchsorted, v=every, method="compare_all")
        bounds = jax.vmap(search)(lines[:, 0]).astype(jnp.int32)[:, None]
        starts, ends = bounds[..., :-1], bounds[..., 1:]
    if m <= FEW:  # all programs run at once
        order = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (b, 1, count))
    else:
        order = jnp.argsort(starts - ends, axis=-1).astype(jnp.int32)  # the longest first
    call = interpret or triton_call("block_sparse_matmul", chip)
    found = call(
        x,
        w,
        starts,
        ends,
        order,
        sources,
        places,
        kernel=_kernel,
        out_shape=split(out, parts),
        grid=(count * (side // tile.n), triton.cdiv(m, tile.m), b * parts),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=m,
        K=k,
        ENTRIES=e,
        COUNT=count,
        PIECE=piece,
        SIDE=side,
        TRANSPOSE_W=transpose_w,
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
    starts,
    ends,
    order,
    sources,
    places,
    out,
    M: tl.constexpr,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
    TRANSPOSE_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tiles: tl.constexpr = SIDE // BLOCK_N  # of a line
    steps: tl.constexpr = PIECE // BLOCK_K  # of a block
    batch = (tl.program_id(2) // SPLITS).to(tl.int64)  # whole arrays may pass 2^31 elements
    line = tl.load(order + batch * COUNT + tl.program_id(0) // tiles)
    begin, end = tl.load(starts + batch * COUNT + line), tl.load(ends + batch * COUNT + line)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    x_at = x + (batch * M + row[:, None]) * K + along[None, :]
    w_at = w + batch * ENTRIES * PIECE * SIDE
    if TRANSPOSE_W:
        w_at += column[None, :] * PIECE + along[:, None]
    else:
        w_at += along[:, None] * SIDE + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    own = ((end - begin) * steps + SPLITS - 1) // SPLITS  # steps of this program
    mine = begin * steps + tl.program_id(2) % SPLITS * own
    for step in range(mine, min(mine + own, end * steps)):
        entry = batch * ENTRIES + step // steps
        part = step % steps * BLOCK_K  # where in the piece
        first = tl.load(sources + entry) * PIECE + part
        place = tl.load(places + entry).to(tl.int64)
        x_mask = row[:, None] < M
        if K % PIECE != 0:
            x_mask = x_mask & (along[None, :] < K - first)
        values = tl.load(x_at + first, mask=x_mask, other=0.0)
        weight = tl.load(w_at + place * (PIECE * SIDE) + part * (1 if TRANSPOSE_W else SIDE))
        if weight.dtype == tl.int8:  # by float32: the interpreter has no other way to bfloat16
            weight = weight.to(tl.float32)
        total = tl.dot(values, weight.to(values.dtype), total, input_precision="ieee")
    out_at = (
        out
        + (written(batch, SPLITS) * M + row[:, None]) * (COUNT * SIDE)
        + line * SIDE
        + column[None, :]
    )
    tl.store(out_at, total.to(out.dtype.element_ty), mask=row[:, None] < M)


def sampled_matmul(
    x: jax.Array,
    g: jax.Array,
    lines: jax.Array,
    sources: jax.Array,
    *,
    height: int,
    width: int,
    chip: str | None = None,
    block: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[b, e * height, width]` in float32: `x[:, source]^T @ g[:, line]` for each entry.

    `x[b, m, k]` is cut along `k` into pieces of `height`, `g[b, m, n]` along `n` into
    pieces of `width`; `sources[b, 1, e]` and `lines[b, 1, e]` name one of each. An entry
    with a line of -1 is unused, and zeros.
    """
    b, m, k = x.shape
    n, e = g.shape[2], lines.shape[2]
    out = jax.ShapeDtypeStruct((b, e * height, width), jnp.float32)
    if 0 in (b, m, k, n, e):
        return jnp.zeros(out.shape, out.dtype)
    tile = block or blocks(m, width, height, chip, sampled=True)
    call = interpret or triton_call("sampled_matmul", chip)
    return call(
        x,
        g,
        lines,
        sources,
        kernel=_sampled_kernel,
        out_shape=out,
        grid=(e, (height // tile.k) * (width // tile.n), b),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=m,
        N=n,
        K=k,
        ENTRIES=e,
        HEIGHT=height,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )


@triton.jit
def _sampled_kernel(
    x,
    g,
    lines,
    sources,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across: tl.constexpr = WIDTH // BLOCK_N  # tiles of a block
    batch = tl.program_id(2).to(tl.int64)  # whole arrays may pass 2^31 elements
    entry = batch * ENTRIES + tl.program_id(0)
    line = tl.load(lines + entry)
    down = tl.program_id(1) // across * BLOCK_K + tl.arange(0, BLOCK_K)
    along = tl.program_id(1) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.load(sources + entry) * HEIGHT + down
    n = line * WIDTH + along
    row = tl.arange(0, BLOCK_M)
    x_at = x + (batch * M + row[None, :]) * K + k[:, None]  # turned as it is loaded
    g_at = g + (batch * M + row[:, None]) * N + n[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(0, tl.where(line < 0, 0, M), BLOCK_M):
        x_mask, g_mask = row[None, :] < M - start, row[:, None] < M - start
        if K % HEIGHT != 0:
            x_mask = x_mask & (k[:, None] < K)
        if N % WIDTH != 0:
            g_mask = g_mask & (n[None, :] < N)
        values = tl.load(x_at, mask=x_mask, other=0.0)
        gradients = tl.load(g_at, mask=g_mask, other=0.0)
        total = tl.dot(values, gradients, total, input_precision="ieee")
        x_at += BLOCK_M * K
        g_at += BLOCK_M * N
    tl.store(out + (entry * HEIGHT + down[:, None]) * WIDTH + along[None, :], total)
