"""int8 activations times int4 weights with scales by group, on the matrix unit of a TPU.

The weight travels from memory as it is stored, two codes a byte. A block of it becomes
int8 in fast memory, a strip at a time; then every part of it that lies in one group is a
product of integers, exact in int32, which is scaled and added in float32. Without groups
the sums stay integers until the end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.pallas_tpu_tiles import pad, spread, varying, weight_blocks

__all__ = ["BLOCKS", "blocks", "w4a8_matmul"]

# (block_m, block_n, block_k) by `device_kind`. block_k is a multiple of 256, whose packed
# rows fill tiles of 32, and 1024 at most: a TPU7x has no int8 product and makes bfloat16
# ones, which are summed in float32 within a part, and 1024 x 128 x 15 is well below 2^24.
# Chosen by what fits; no device has measured them.
BLOCKS = block_table("w4a8_matmul", "pallas_tpu")
# What the program spells out of a product, and of a weight to decode; a larger block is a
# loop over such tiles. Larger ones spill from the registers.
_ROWS, _COLUMNS = 64, 128
_TALL = 256
_RESIDENT = 2 * 2**20  # bytes of x that stay in fast memory whole: read once, not per column
_VMEM = 64 * 2**20  # what a kernel may take; the compiler refuses more than the chip has
_PACKED = 64  # codes in a block of bit planes


def blocks(
    m: int, n: int, k: int, group_size: int | None = None, chip: str | None = None
) -> tuple[int, int, int]:
    """The blocks for a product of this size: a function of shape and chip alone."""
    [largest] = row_of(BLOCKS, chip)
    return weight_blocks(largest, (_ROWS, _COLUMNS), m, n, k, group_size)


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
    block: tuple[int, int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`(x @ ((w - w_zero_point) * w_scale)) * x_scale`, exact in int32 within a group.

    `x[b, m, k]` is int8, `w[b, ., n]` the uint8 bit planes of int4 along `k`; `w_scale` and
    `w_zero_point`, int8 from -8 to 7, are `[b, g, n]`, `x_scale` is `[b, m, 1]`. A group is
    a power of two of at least 128.
    """
    b, m, k = x.shape
    n = w.shape[2]
    out = jax.ShapeDtypeStruct((b, m, n), dtype, manual_axis_type=varying(x, w))
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    group = group_size if group_size is not None and group_size < k else None
    block_m, block_n, block_k = block or blocks(m, n, k, group, chip)
    # Zeros in x beyond k: whatever stands in the weight there counts nothing.
    whole = -(-k // block_k) * block_k
    x = pad(x, 2, whole)
    w = pad(w, 1, whole // 2)
    # A strip of the weight is decoded at a time. The scales that it needs are a slice of
    # their own: rows in the middle of a tile cannot be addressed.
    tall = _TALL if block_k % _TALL == 0 else block_k
    per_strip = max(1, tall // group) if group else 1
    slices = -(-whole // (per_strip * group)) if group else 1
    sliced = lambda a, kind: pad(a.astype(kind), 1, slices * per_strip).reshape(
        b, slices, per_strip, n
    )
    column = pl.BlockSpec((None, slices, per_strip, block_n), lambda b, i, j, k: (b, 0, 0, j))
    is_resident = block_m * whole <= _RESIDENT
    operands = {"x": x, "w": w, "w_scale": sliced(w_scale, jnp.float32)}
    specs = [
        pl.BlockSpec((None, block_m, whole), lambda b, i, j, k: (b, i, 0))
        if is_resident
        else pl.BlockSpec((None, block_m, block_k), lambda b, i, j, k: (b, i, k)),
        pl.BlockSpec((None, block_k // 2, block_n), lambda b, i, j, k: (b, k, j)),
        column,
    ]
    if w_zero_point is not None:
        operands["zero"] = sliced(w_zero_point, jnp.int32)
        specs.append(column)
    if x_scale is not None:
        operands["x_scale"] = x_scale.astype(jnp.float32)
        specs.append(pl.BlockSpec((None, block_m, 1), lambda b, i, j, k: (b, i, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, tuple(operands), group, tall),
        grid=(b, pl.cdiv(m, block_m), pl.cdiv(n, block_n), whole // block_k),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, block_m, block_n), lambda b, i, j, k: (b, i, j)),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((block_k, block_n), jnp.int8),
            pltpu.VMEM((block_m, block_n), jnp.float32 if group else jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="w4a8_matmul",
    )(*operands.values())


def _kernel(names, group, tall, *refs):
    *inputs, out_ref, weight_ref, sums_ref = refs
    ref = dict(zip(names, inputs))
    step, steps = pl.program_id(3), pl.num_programs(3)
    block_m, (block_k, block_n) = ref["x"].shape[0], weight_ref.shape
    slice_of = lambda row: lax.div(step * block_k + row, max(tall, group)) if group else 0

    @pl.loop(0, block_k // tall)
    def _(i):
        codes = _unpack(ref["w"][_tile(i, tall // 2, block_k // 2), :])
        if "zero" in ref:
            codes = codes - spread(ref["zero"][slice_of(i * tall)], tall)
        weight_ref[_tile(i, tall, block_k), :] = codes.astype(jnp.int8)

    part = min(block_k, group or block_k)
    begin = step * block_k if ref["x"].shape[1] > block_k else 0
    tile_m = _ROWS if block_m % _ROWS == 0 else block_m
    tile_n = _COLUMNS if block_n % _COLUMNS == 0 else block_n
    tiles_n = block_n // tile_n

    @pl.loop(0, block_m // tile_m * tiles_n)
    def _(i):
        rows = _tile(lax.div(i, tiles_n), tile_m, block_m)
        columns = _tile(lax.rem(i, tiles_n), tile_n, block_n)

        @pl.when(step == 0)
        def _():
            sums_ref[rows, columns] = jnp.zeros((tile_m, tile_n), sums_ref.dtype)

        for row in range(0, block_k, part):
            product = jnp.dot(
                ref["x"][rows, _slice(begin + row, part, ref["x"].shape[1])],
                weight_ref[row : row + part, columns],
                preferred_element_type=jnp.int32,
            )
            if group:
                at = row % tall // group  # of this group in its strip
                scale = ref["w_scale"][slice_of(row - row % tall), at : at + 1, columns]
                product = product.astype(jnp.float32) * scale
            sums_ref[rows, columns] += product

        @pl.when(step == steps - 1)
        def _():
            result = sums_ref[rows, columns].astype(jnp.float32)
            if "x_scale" in ref:
                result = result * ref["x_scale"][rows, :]
            if not group:
                result = result * ref["w_scale"][0, :, columns]
            out_ref[rows, columns] = result.astype(out_ref.dtype)


def _tile(i, size, whole):
    """The tile number `i`, of a size that the compiler may rely on; all of it if that is one."""
    return _slice(i * size, size, whole)


def _slice(start, size, whole):
    """The same by where it starts, a multiple of its size."""
    if size == whole:
        return slice(None)
    if isinstance(start, int):
        return slice(start, start + size)
    return pl.ds(pl.multiple_of(start, size), size)


def _unpack(packed):
    """The int32 codes `[64 c, n]` of `[32 c, n]` bytes: 32 low halves, then 32 high ones."""
    words = packed.astype(jnp.int32).reshape(-1, _PACKED // 2, packed.shape[1])
    codes = jnp.concatenate([(words << 28) >> 28, (words << 24) >> 28], 1)
    return codes.reshape(-1, packed.shape[1])
