"""Products with a weight that keeps `n` of every `m` neighbours, on the matrix unit of a TPU.

The weight travels from memory as it is stored: the kept values, floats or integers of eight
bits or fewer, and their places in a few bits each. Zeros are put back in fast memory, so
what is saved is bytes, not products. The order of what is summed is free: a block of the
weight becomes `m` pieces, the first rows of all groups, then the second ones, and so on,
and the columns of x come in that order.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.pallas_tpu_tiles import pad, spread, tile, varying, whole_tiles

__all__ = ["BLOCKS", "blocks", "nm_matmul"]

# (block_m, block_n, kept rows of a block) by `device_kind`. Few rows of activations read
# every weight once, whatever the block; many want block_m large, as each block of rows puts
# the zeros back again. Chosen by what fits; no device has measured them.
BLOCKS = block_table("nm_matmul", "pallas_tpu")
# What the program spells out of a product, and of a weight to fill in; a larger block is a
# loop over such tiles. Larger ones spill from the registers.
_ROWS, _COLUMNS = 64, 256
_FLOAT32 = (16, 128, 128)  # rows, along k, and columns of a product in float32
# A strip of kept rows, whose places in one bit each fill a tile of 32 rows; it is taken
# apart some groups at a time.
_WIDE, _STRIP, _GROUPS = 128, 256, 32
_RESIDENT = 2 * 2**20  # bytes of x that stay in fast memory whole: read once, not per column
_VMEM = 64 * 2**20  # what a kernel may take; the compiler refuses more than the chip has
_PACKED = 64  # places in a block of bit planes
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def blocks(
    m: int, n: int, kept: int, pattern: tuple[int, int], chip: str | None = None
) -> tuple[int, int, int]:
    """The blocks for `kept` stored rows: a function of shape and chip alone."""
    [(block_m, block_n, block_k)] = row_of(BLOCKS, chip)
    block_k = min(block_k, block_k * 4 * pattern[0] // (2 * pattern[1]))  # of sparser ones less
    block_k = max(_STRIP, block_k // _STRIP * _STRIP)
    return (
        min(whole_tiles(m, _ROWS), block_m),
        min(whole_tiles(n, _COLUMNS), block_n),
        min(block_k, -(-kept // _STRIP) * _STRIP),
    )


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
    block: tuple[int, int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ (w * scale)`, summed in float32; for int8 `x` `(x @ w) * x_scale * scale`.

    `x[b, m, k]` is float32, bfloat16 or int8. With the pattern `(n, m)`, `values[b, k / m *
    n, columns]` are floats or int8, or uint8 bit planes of integers of `bits`, and
    `indices[b, ., columns]` uint8 bit planes of their places in each group of `m`. `n` and
    `m` are powers of two, at most 4 and 16. `scale[b, g, columns]` is for integers; where `x`
    is of floats, `group_size` neighbours along `k` share one, a power of two of which at
    least 16 are kept. The product of an int8 `x` is exact in int32, and so is the result
    without `scale` and `x_scale[b, m, 1]`.
    """
    b, rows, k = x.shape
    columns = values.shape[2]
    n, m = pattern
    kept = k // m * n
    integers = x.dtype == jnp.int8
    kind = jnp.int32 if integers and scale is None and x_scale is None else dtype
    out = jax.ShapeDtypeStruct((b, rows, columns), kind, manual_axis_type=varying(x, values))
    if 0 in (b, rows, columns, k):
        return jnp.zeros(out.shape, out.dtype)
    block_m, block_n, block_k = block or blocks(rows, columns, kept, pattern, chip)
    place_bits = max(1, (m - 1).bit_length())
    value_bits = bits if values.dtype == jnp.uint8 else 8
    whole = -(-kept // block_k) * block_k
    values = pad(values, 1, whole // 8 * value_bits)
    indices = pad(indices, 1, whole // 8 * place_bits)
    group = group_size // m * n if group_size is not None and group_size < k else None
    # Zeros in x beyond k; within a block the first columns of all groups, then the second.
    wide = block_k // n * m
    x = pad(x, 2, whole // n * m).reshape(b, rows, -1, wide // m, m)
    x = jnp.swapaxes(x, 3, 4).reshape(b, rows, -1)
    is_resident = block_m * x.shape[2] * x.dtype.itemsize <= _RESIDENT
    across = _WIDE if block_n % _WIDE == 0 else block_n
    operands, scales = {}, []
    if scale is not None:
        # The scales that a strip needs are a slice of their own: rows in the middle of a
        # tile cannot be addressed.
        per_strip = max(1, _STRIP // group) if group else 1
        slices = -(-whole // (per_strip * group)) if group else 1
        scale = pad(scale.astype(jnp.float32), 1, slices * per_strip)
        operands["scale"] = scale.reshape(b, slices, per_strip, columns)
        shape = (None, slices, per_strip, block_n)
        scales.append(pl.BlockSpec(shape, lambda b, i, j, k: (b, 0, 0, j)))
    if x_scale is not None:
        operands["x_scale"] = x_scale.astype(jnp.float32)
        scales.append(pl.BlockSpec((None, block_m, 1), lambda b, i, j, k: (b, i, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, n, m, place_bits, value_bits, group, tuple(operands)),
        grid=(b, pl.cdiv(rows, block_m), pl.cdiv(columns, block_n), whole // block_k),
        in_specs=[
            pl.BlockSpec((None, block_m, x.shape[2]), lambda b, i, j, k: (b, i, 0))
            if is_resident
            else pl.BlockSpec((None, block_m, wide), lambda b, i, j, k: (b, i, k)),
            *(
                pl.BlockSpec((None, block_k // 8 * bits, block_n), lambda b, i, j, k: (b, k, j))
                for bits in (value_bits, place_bits)
            ),
            *scales,
        ],
        out_specs=pl.BlockSpec((None, block_m, block_n), lambda b, i, j, k: (b, i, j)),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((_STRIP, across), jnp.float32),
            pltpu.VMEM((_STRIP, across), jnp.int32),
            pltpu.VMEM((wide, block_n), x.dtype),
            pltpu.VMEM((block_m, block_n), jnp.int32 if integers else jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="nm_matmul",
    )(x, values, indices, *operands.values())


def _kernel(n, m, place_bits, value_bits, group, names, x_ref, values_ref, indices_ref, *refs):
    *scales, out_ref, strip_ref, place_ref, weight_ref, sums_ref = refs
    scale = dict(zip(names, scales))
    step, steps = pl.program_id(3), pl.num_programs(3)
    block_m, (wide, block_n) = x_ref.shape[0], weight_ref.shape
    groups = wide // m
    some, across = _STRIP // n, strip_ref.shape[1]
    tiles = block_n // across

    strips = wide // m * n // _STRIP

    @pl.loop(0, strips * tiles)
    def _(i):
        strip, columns = lax.div(i, tiles), tile(lax.rem(i, tiles), across, block_n)
        # Only rows of 32 bits can be taken apart, every n-th one.
        here = tile(strip, _STRIP // 8 * value_bits, values_ref.shape[0])
        values = values_ref[here, columns]
        if value_bits < 8:
            values = _signed(_unpack(values, value_bits), value_bits)
        values = values.astype(jnp.float32)
        if group:
            at = lax.div((step * strips + strip) * _STRIP, max(_STRIP, group))
            values = values * spread(scale["scale"][at, :, columns], _STRIP)
        strip_ref[...] = values
        here = tile(strip, _STRIP // 8 * place_bits, indices_ref.shape[0])
        place_ref[...] = _unpack(indices_ref[here, columns], place_bits)

        @pl.loop(0, some // _GROUPS)
        def _(part):
            at = pl.multiple_of(part * (_GROUPS * n), _GROUPS * n)
            every = lambda ref, slot: ref[pl.ds(at + slot, _GROUPS, stride=n), :]
            kept = [(every(strip_ref, slot), every(place_ref, slot)) for slot in range(n)]
            for j in range(m):
                piece = jnp.zeros((_GROUPS, across), jnp.float32)
                for value, place in kept:
                    piece = jnp.where(place == j, value, piece)
                first = j * groups + strip * some + part * _GROUPS
                into = pl.ds(pl.multiple_of(first, _GROUPS), _GROUPS)
                weight_ref[into, columns] = _cast(piece, weight_ref.dtype)

    most = _FLOAT32 if x_ref.dtype == jnp.float32 else (_ROWS, wide, _COLUMNS)
    tile_m, tile_k, tile_n = (
        most if size % most == 0 else size for size, most in zip((block_m, wide, block_n), most)
    )
    tiles_n, first = block_n // tile_n, step * (wide // tile_k) if x_ref.shape[1] > wide else 0

    @pl.loop(0, block_m // tile_m * tiles_n)
    def _(i):
        rows = tile(lax.div(i, tiles_n), tile_m, block_m)
        columns = tile(lax.rem(i, tiles_n), tile_n, block_n)

        @pl.when(step == 0)
        def _():
            sums_ref[rows, columns] = jnp.zeros((tile_m, tile_n), sums_ref.dtype)

        # A float32 product is made of bfloat16 ones; HIGHEST makes as many as it takes.
        is_float32 = x_ref.dtype == jnp.float32

        @pl.loop(0, wide // tile_k)
        def _(part):
            sums_ref[rows, columns] += jnp.dot(
                x_ref[rows, tile(first + part, tile_k, x_ref.shape[1])],
                weight_ref[tile(part, tile_k, wide), columns],
                precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
                preferred_element_type=sums_ref.dtype,
            )

        @pl.when(step == steps - 1)
        def _():
            sums = sums_ref[rows, columns]
            if "x_scale" in scale:
                sums = sums.astype(jnp.float32) * scale["x_scale"][rows, :]
            if "scale" in scale and not group:
                sums = sums.astype(jnp.float32) * scale["scale"][0, :, columns]
            out_ref[rows, columns] = sums.astype(out_ref.dtype)


def _cast(piece, dtype):
    """Floats as `dtype`; a TPU makes int8 of int32 only."""
    return piece.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else piece.astype(dtype)


def _signed(codes, bits):
    """Codes of few bits with their sign."""
    return (codes << (32 - bits)) >> (32 - bits)


def _unpack(packed, bits):
    """The int32 places `[64 c, n]` of the bit planes `[8 bits c, n]`."""
    words = packed.astype(jnp.int32).reshape(-1, 8 * bits, packed.shape[1])
    planes, start = [], 0
    for width in _PLANES[bits]:
        plane = words[:, 8 * start : 8 * (start + width), :]
        parts = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
        planes.append(jnp.concatenate(parts, 1) << start)
        start += width
    return functools.reduce(operator.or_, planes).reshape(-1, packed.shape[1])
