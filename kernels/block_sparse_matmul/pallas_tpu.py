"""Products with a block-sparse weight on the matrix unit of a TPU, and its gradient.

The kept blocks are a list, sorted by the line of the result that they add to. One step of
the grid multiplies one of them; the sums of a line stay in VMEM until its last block.
Lines of many blocks take as many steps as they have, and those that have none write
zeros: no step waits for the fullest line.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.pallas_tpu_tiles import pad, tile, varying, whole_tiles

__all__ = ["BLOCKS", "block_sparse_matmul", "blocks", "sampled_matmul", "steps"]

# block_m by `device_kind`: rows of the dense operand for which one block of the weight is
# read once. The larger it is, the more products a step makes. Chosen by what fits; no
# device has measured them.
BLOCKS = block_table("block_sparse_matmul", "pallas_tpu")
# What the program spells out of a product, in rows, along what is summed, and in columns;
# a larger block is a loop over such tiles. A product in float32 takes more registers.
_TILES = {2: (128, 512, 256), 4: (16, 128, 128)}  # by the bytes of a number
_LANES = 128  # what a tile of rows is a multiple of, once they are columns
_RESIDENT = 8 * 2**20  # bytes of x that stay in fast memory whole: read once, not per block
_VMEM = 60 * 2**20  # what a kernel may take; the compiler refuses more than the chip has


def blocks(m: int, itemsize: int, chip: str | None = None) -> int:
    """The rows of a block of the dense operand: a function of shape and chip alone."""
    [[largest]] = row_of(BLOCKS, chip)
    return min(whole_tiles(m, _TILES[itemsize][0]), largest)


def steps(
    lines: jax.Array, sources: jax.Array, places: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lists of `block_sparse_matmul`, with a step for each line that has no block.

    They are `[b, e + count]`. A source of -1 is nothing to multiply: such a step has the
    block of the one before it, so that it fetches nothing, and those that are left over
    belong to the last line.
    """
    lines, sources, places = (a[:, 0] for a in (lines, sources, places))
    sources = jnp.where(lines < count, sources, -1)
    every = jnp.arange(count, dtype=jnp.int32)
    has = jax.vmap(lambda at: jnp.zeros(count, bool).at[at].set(True, mode="drop"))(lines)
    lines = jnp.concatenate([lines, jnp.where(has, count, every)], 1)
    order = jnp.argsort(lines, axis=1, stable=True)
    widen = lambda a, fill: jnp.pad(a, ((0, 0), (0, count)), constant_values=fill)
    sort = lambda a: jnp.take_along_axis(a, order, 1)
    lines, sources, places = sort(lines), sort(widen(sources, -1)), sort(widen(places, 0))
    known = jnp.where(sources >= 0, jnp.arange(lines.shape[1]), 0)
    places = jnp.take_along_axis(places, lax.cummax(known, axis=1), 1)
    return jnp.minimum(lines, count - 1), sources, places


def block_sparse_matmul(
    x: jax.Array,
    w: jax.Array,
    lines: jax.Array,
    sources: jax.Array,
    places: jax.Array,
    *,
    height: int,
    count: int,
    transpose_w: bool = False,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[b, m, count * width]`: line `lines[e]` gets `x[:, source] @ block`, for all `e`.

    `x[b, m, k]` is float32 or bfloat16 and cut along `k` into pieces of `height`, of which
    `sources[b, 1, e]` names one; the blocks `w[b, e * height, width]`, floats or int8, are
    named by `places[b, 1, e]`. `lines[b, 1, e]` do not fall; an entry of line `count` is
    unused. With `transpose_w` each block is turned: pieces are of `width`, lines of `height`.
    """
    b, m, k = x.shape
    width = w.shape[2]
    piece, side = (width, height) if transpose_w else (height, width)
    out = jax.ShapeDtypeStruct((b, m, count * side), dtype, manual_axis_type=varying(x, w))
    if 0 in (b, m, count, w.shape[1]):
        return jnp.zeros(out.shape, out.dtype)
    x = pad(x, 2, -(-k // piece) * piece)
    block_m = block or blocks(m, x.dtype.itemsize, chip)
    lists = steps(lines, sources, places, count)
    length = lists[0].shape[1]
    is_resident = block_m * x.shape[2] * x.dtype.itemsize <= _RESIDENT
    here = lambda b, t: b * length + t
    specs = [
        pl.BlockSpec((None, block_m, x.shape[2]), lambda b, i, t, lines, sources, places: (b, i, 0))
        if is_resident
        else pl.BlockSpec(
            (None, block_m, piece),
            lambda b, i, t, lines, sources, places: (b, i, jnp.maximum(sources[here(b, t)], 0)),
        ),
        pl.BlockSpec(
            (None, height, width),
            lambda b, i, t, lines, sources, places: (b, places[here(b, t)], 0),
        ),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, length, piece, transpose_w),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, pl.cdiv(m, block_m), length),
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (None, block_m, side),
                lambda b, i, t, lines, sources, places: (b, i, lines[here(b, t)]),
            ),
            scratch_shapes=[pltpu.VMEM((block_m, side), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="block_sparse_matmul",
    )(*(a.reshape(-1) for a in lists), x, w)


def _kernel(
    length, piece, transpose_w, lines_ref, sources_ref, places_ref, x_ref, w_ref, out_ref, sums_ref
):
    step = pl.program_id(2)
    begin = pl.program_id(0) * length
    line, source = lines_ref[begin + step], sources_ref[begin + step]
    before = lines_ref[begin + lax.max(step - 1, 0)]
    after = lines_ref[begin + lax.min(step + 1, length - 1)]
    block_m, side = sums_ref.shape
    tile_m, tile_k, tile_n = _tiles(x_ref, block_m, piece, side)
    tiles_n = side // tile_n

    @pl.loop(0, block_m // tile_m * tiles_n)
    def _(i):
        rows = tile(lax.div(i, tiles_n), tile_m, block_m)
        columns = tile(lax.rem(i, tiles_n), tile_n, side)

        @pl.when((step == 0) | (before != line))
        def _():
            sums_ref[rows, columns] = jnp.zeros((tile_m, tile_n), jnp.float32)

        @pl.when(source >= 0)
        def _():
            first = source * (piece // tile_k) if x_ref.shape[1] > piece else 0

            @pl.loop(0, piece // tile_k)
            def _(j):
                part = tile(j, tile_k, piece)
                x = x_ref[rows, tile(first + j, tile_k, x_ref.shape[1])]
                w = w_ref[columns, part] if transpose_w else w_ref[part, columns]
                sums_ref[rows, columns] += _dot(x, w.astype(x.dtype), 1 if transpose_w else 0)

        @pl.when((step == length - 1) | (after != line))
        def _():
            out_ref[rows, columns] = sums_ref[rows, columns].astype(out_ref.dtype)


def sampled_matmul(
    x: jax.Array,
    g: jax.Array,
    lines: jax.Array,
    sources: jax.Array,
    *,
    height: int,
    width: int,
    chip: str | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[b, e * height, width]` in float32: `x[:, source]^T @ g[:, line]` for each entry.

    `x[b, m, k]` is cut along `k` into pieces of `height`, `g[b, m, n]` along `n` into
    pieces of `width`; `sources[b, 1, e]` and `lines[b, 1, e]` name one of each. An entry
    with a line of -1 is unused, and zeros.
    """
    b, m, k = x.shape
    e = lines.shape[2]
    out = jax.ShapeDtypeStruct((b, e * height, width), jnp.float32, manual_axis_type=varying(x, g))
    if 0 in (b, m, k, e, g.shape[2]):
        return jnp.zeros(out.shape, out.dtype)
    [[largest]] = row_of(BLOCKS, chip)
    block_m = block or min(whole_tiles(m, _LANES), largest)
    # Zeros below the last row: what stands there in memory would count. And x is turned
    # once, not for each block that it meets.
    rows = -(-m // block_m) * block_m
    x = jnp.swapaxes(pad(pad(x, 2, -(-k // height) * height), 1, rows), 1, 2)
    g = pad(pad(g, 2, -(-g.shape[2] // width) * width), 1, rows)
    piece = lambda names, at: lax.max(names[at], 0)
    return pl.pallas_call(
        functools.partial(_sampled_kernel, e),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, e, rows // block_m),
            in_specs=[
                pl.BlockSpec(
                    (None, height, block_m),
                    lambda b, t, i, lines, sources: (b, piece(sources, b * e + t), i),
                ),
                pl.BlockSpec(
                    (None, block_m, width),
                    lambda b, t, i, lines, sources: (b, i, piece(lines, b * e + t)),
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, height, width), lambda b, t, i, lines, sources: (b, t, 0)
            ),
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="sampled_matmul",
    )(lines.reshape(-1), sources.reshape(-1), x, g)


def _sampled_kernel(entries, lines_ref, sources_ref, x_ref, g_ref, out_ref):
    is_used = lines_ref[pl.program_id(0) * entries + pl.program_id(1)] >= 0
    height, (block_m, width) = x_ref.shape[0], g_ref.shape
    tile_k, tile_m, tile_n = _tiles(x_ref, height, block_m, width)
    tiles_n = width // tile_n

    @pl.loop(0, height // tile_k * tiles_n)
    def _(i):
        here = tile(lax.div(i, tiles_n), tile_k, height)
        columns = tile(lax.rem(i, tiles_n), tile_n, width)

        @pl.when(pl.program_id(2) == 0)
        def _():
            out_ref[here, columns] = jnp.zeros((tile_k, tile_n), jnp.float32)

        @pl.when(is_used)
        def _():
            @pl.loop(0, block_m // tile_m)
            def _(j):
                rows = tile(j, tile_m, block_m)
                out_ref[here, columns] += _dot(x_ref[here, rows], g_ref[rows, columns], 0)


def _tiles(ref, *sizes):
    """The tile of a product of these sizes, of numbers as `ref` has them."""
    fit = lambda size, most: size if size <= most else math.gcd(size, most)
    return tuple(map(fit, sizes, _TILES[ref.dtype.itemsize]))


def _dot(a, b, b_axis):
    # A float32 product is made of bfloat16 ones; HIGHEST makes as many as it takes.
    is_float32 = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
