"""Float activations times integer weights that are unpacked in the registers of a TPU.

The weight travels from memory as it is stored, eight bits or fewer a code. A block of it
is cut into codes by shifts and masks, becomes floats, and goes to the matrix unit. Bit
planes are stored in runs of 8, 16 or 32 rows, which is what makes this cheap: put behind
each other, they fill whole vector registers of 8 rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.pallas_tpu_tiles import pad, spread, tile, varying, weight_blocks

__all__ = ["BLOCKS", "blocks", "quantized_matmul"]

# (block_m, block_n, block_k) by `device_kind`. block_k is a multiple of 256, so that the
# packed rows of any width fill tiles of 32. Few rows of activations read every weight
# once, whatever the block; many want block_m large, as each block of rows decodes the
# weight again. Chosen by what fits; no device has measured them.
BLOCKS = block_table("quantized_matmul", "pallas_tpu")
# What the program spells out of a product, and of a weight to decode; a larger block is a
# loop over such tiles. Larger ones spill from the registers.
_ROWS, _COLUMNS = 64, 256
_TALL, _TURNED = 256, 128  # rows; and columns at a time, of a weight that comes as [n, k]
_RESIDENT = 2 * 2**20  # bytes of x that stay in fast memory whole: read once, not per column
_VMEM = 64 * 2**20  # what a kernel may take; the compiler refuses more than the chip has
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
_PACKED = 64  # codes in a block of bit planes


def blocks(
    m: int, n: int, k: int, group_size: int | None = None, chip: str | None = None
) -> tuple[int, int, int]:
    """The blocks for a product of this size: a function of shape and chip alone."""
    [largest] = row_of(BLOCKS, chip)
    return weight_blocks(largest, (_ROWS, _COLUMNS), m, n, k, group_size)


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
    block: tuple[int, int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ ((w - zero_point) * scale)`, summed in float32.

    `x[b, m, k]` is float32 or bfloat16. `w` is int8 `[b, k, n]` (`[b, n, k]` with
    `transpose_w`), or uint8 bit planes along `k`; `scale` and `zero_point` are
    `[b, g, n]`. A group is a power of two of at least 32.
    """
    b, m, k = x.shape
    n = w.shape[1 if transpose_w else 2]
    out = jax.ShapeDtypeStruct((b, m, n), dtype or x.dtype, manual_axis_type=varying(x, w))
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    group = group_size if group_size is not None and group_size < k else None
    stored = 8 if w.dtype == jnp.int8 else bits
    block_m, block_n, block_k = block or blocks(m, n, k, group, chip)
    # Zeros in x beyond k: whatever stands in the weight there counts nothing.
    whole = -(-k // block_k) * block_k
    along = 2 if transpose_w else 1
    x = pad(x, 2, whole)
    w = pad(w, along, whole * stored // 8)
    # A strip of the weight is decoded at a time. The scales that it needs are a slice of
    # their own: rows in the middle of a tile cannot be addressed.
    tall = _TALL if block_k % _TALL == 0 else block_k
    per_strip = max(1, tall // group) if group else 1
    slices = -(-whole // (per_strip * group)) if group else 1
    sliced = lambda a: pad(a.astype(jnp.float32), 1, slices * per_strip).reshape(
        b, slices, per_strip, n
    )
    operands = [x, w, sliced(scale)]
    column = pl.BlockSpec((None, slices, per_strip, block_n), lambda b, i, j, k: (b, 0, 0, j))
    rows = block_k * stored // 8
    is_resident = block_m * whole * x.dtype.itemsize <= _RESIDENT
    specs = [
        pl.BlockSpec((None, block_m, whole), lambda b, i, j, k: (b, i, 0))
        if is_resident
        else pl.BlockSpec((None, block_m, block_k), lambda b, i, j, k: (b, i, k)),
        pl.BlockSpec((None, block_n, block_k), lambda b, i, j, k: (b, j, k))
        if transpose_w
        else pl.BlockSpec((None, rows, block_n), lambda b, i, j, k: (b, k, j)),
        column,
    ]
    if zero_point is not None:
        operands.append(sliced(zero_point))
        specs.append(column)
    return pl.pallas_call(
        functools.partial(_kernel, stored, group, transpose_w, tall),
        grid=(b, pl.cdiv(m, block_m), pl.cdiv(n, block_n), whole // block_k),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, block_m, block_n), lambda b, i, j, k: (b, i, j)),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((block_k, block_n), x.dtype),
            pltpu.VMEM((block_m, block_n), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(*operands)


def _kernel(bits, group, transpose_w, tall, x_ref, w_ref, scale_ref, *refs):
    *zero_ref, out_ref, weight_ref, sums_ref = refs
    step, steps = pl.program_id(3), pl.num_programs(3)
    block_m, (block_k, block_n) = x_ref.shape[0], weight_ref.shape
    turned = _TURNED if transpose_w and block_n % _TURNED == 0 else block_n
    tiles = block_n // turned

    @pl.loop(0, block_k // tall * tiles)
    def _(i):
        strip = lax.div(i, tiles)
        rows, columns = tile(strip, tall, block_k), tile(lax.rem(i, tiles), turned, block_n)
        if transpose_w:
            codes = w_ref[columns, rows].astype(jnp.int32)
        elif bits == 8:
            codes = w_ref[rows, :].astype(jnp.int32)
        else:
            codes = _unpack(w_ref[tile(strip, tall * bits // 8), :], bits)
        weight = codes.astype(jnp.float32)
        weight = weight.T if transpose_w else weight
        at = lax.div(step * block_k + strip * tall, max(tall, group)) if group else 0
        if zero_ref:
            weight = weight - spread(zero_ref[0][at, :, columns], tall)
        if group:
            weight = weight * spread(scale_ref[at, :, columns], tall)
        weight_ref[rows, columns] = weight.astype(x_ref.dtype)

    here = tile(step, block_k, x_ref.shape[1])
    tile_m = _ROWS if block_m % _ROWS == 0 else block_m
    tile_n = _COLUMNS if block_n % _COLUMNS == 0 else block_n
    tiles_n = block_n // tile_n

    @pl.loop(0, block_m // tile_m * tiles_n)
    def _(i):
        rows = tile(lax.div(i, tiles_n), tile_m, block_m)
        columns = tile(lax.rem(i, tiles_n), tile_n, block_n)

        @pl.when(step == 0)
        def _():
            sums_ref[rows, columns] = jnp.zeros((tile_m, tile_n), sums_ref.dtype)

        # A float32 product is made of bfloat16 ones; HIGHEST makes as many as it takes.
        is_float32 = x_ref.dtype == jnp.float32
        sums_ref[rows, columns] += jnp.dot(
            x_ref[rows, here],
            weight_ref[:, columns],
            precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )

        @pl.when(step == steps - 1)
        def _():
            sums = sums_ref[rows, columns]
            sums = sums if group else sums * scale_ref[0, :, columns]
            out_ref[rows, columns] = sums.astype(out_ref.dtype)


def _unpack(packed, bits):
    """The int32 codes `[64 c, n]` of the bit planes `[8 bits c, n]`."""
    words = packed.astype(jnp.int32)
    words = words.reshape(-1, 8 * bits, words.shape[1])
    codes, start = None, 0
    for width in _PLANES[bits]:
        plane = words[:, 8 * start : 8 * (start + width), :]
        parts = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
        part = jnp.concatenate(parts, 1) << start
        codes, start = part if codes is None else codes | part, start + width
    signed = (codes << (32 - bits)) >> (32 - bits)
    return signed.reshape(-1, signed.shape[2])
