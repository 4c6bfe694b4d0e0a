"""int8 x int8 -> int32 on the matrix unit of a TPU, scaled before it leaves fast memory.

A block of the result stays in VMEM while the blocks along `k` pass by; the last of them
brings zero points, scales and the cast. Blocks that reach over `m` or `n` are cut when
they are stored; beyond `k` there are zeros on the side of `x`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcompress.kernels.block_table import block_table, row_of
from jaxcompress.kernels.pallas_tpu_tiles import tile, varying, whole_tiles

__all__ = ["BLOCKS", "blocks", "int8_matmul"]

# (block_m, block_n, block_k) by `device_kind`. A block of int8 has at least 32 rows and
# 128 columns. The larger m and n, the fewer times an operand is read: the products per
# byte, block_m block_n / (block_m + block_n), are to pass the chip's ridge at m = n = k =
# 4096. block_k is 1024 at most: a TPU7x has no int8 product and makes bfloat16 ones, which
# are summed in float32 within a block, and 1024 x 128^2 = 2^24 is what that holds exactly.
# Chosen from published bandwidths and from what fits; no device has measured them.
BLOCKS = block_table("int8_matmul", "pallas_tpu")
# What the program spells out; a larger block is a loop over such tiles. Twice as large in
# either direction, sums spill from the registers.
_ROWS, _COLUMNS = 128, 256
_VMEM = 96 * 2**20  # what a kernel may take; the compiler refuses more than the chip has


def blocks(m: int, n: int, k: int, chip: str | None = None) -> tuple[int, int, int]:
    """The blocks for a product of this size: a function of shape and chip alone."""
    [(block_m, block_n, block_k)] = row_of(BLOCKS, chip)
    # A block may be the whole of a dimension, whatever its size; and one that divides `k`
    # needs no zeros.
    whole = [c for c in range(block_k, 127, -128) if k % c == 0]
    if k % 32:  # XLA stores w in tiles of eight rows: to repack more of them spills
        block_k = min(block_k, 256)
    return (
        min(whole_tiles(m, _ROWS), block_m),
        min(whole_tiles(n, _COLUMNS), block_n),
        min(k, whole[0] if whole else block_k),
    )


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
    block: tuple[int, int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`act((x @ (w - w_zero_point)) * x_scale * w_scale + bias)`, the product exact in int32.

    `x[b, m, k]`, `w[b, k, n]` (`[b, n, k]` with `transpose_w`), `x_scale[b, m, 1]`,
    `w_scale[b, 1, n]`, `w_zero_point[b, 1, n]`, `bias[b, 1, n]`; int32 if none of the
    others is given, else `dtype`. With `out_scale[b, 1, n]` that is divided by it and
    rounded to int8 codes, -127 to 127.
    """
    b, m, k = x.shape
    n = w.shape[1 if transpose_w else 2]
    real = any(a is not None for a in (x_scale, w_scale, bias, activation, out_scale))
    kind = jnp.int8 if out_scale is not None else dtype if real else jnp.int32
    out = jax.ShapeDtypeStruct((b, m, n), kind, manual_axis_type=varying(x, w))
    if 0 in (b, m, n, k):
        return jnp.zeros(out.shape, out.dtype)
    block_m, block_n, block_k = block or blocks(m, n, k, chip)
    row = pl.BlockSpec((None, block_m, 1), lambda b, i, j, k: (b, i, 0))
    column = pl.BlockSpec((None, 1, block_n), lambda b, i, j, k: (b, 0, j))
    # Zeros in x beyond k, so that whatever stands in a block of w there counts nothing. A
    # mask in the kernel takes the registers that the sums need.
    beyond = -k % block_k
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, beyond))) if beyond else x
    operands = {"x": padded, "w": w}
    specs = [
        pl.BlockSpec((None, block_m, block_k), lambda b, i, j, k: (b, i, k)),
        pl.BlockSpec((None, block_n, block_k), lambda b, i, j, k: (b, j, k))
        if transpose_w
        else pl.BlockSpec((None, block_k, block_n), lambda b, i, j, k: (b, k, j)),
    ]
    if w_zero_point is not None:
        # Every product is too large by the sum of its row of x, times the zero point.
        operands["sums"] = jnp.sum(x, -1, keepdims=True, dtype=jnp.int32)
        operands["zero"] = w_zero_point.astype(jnp.int32)
        specs += [row, column]
    if x_scale is not None:
        operands["x_scale"] = x_scale.astype(jnp.float32)
        specs.append(row)
    if w_scale is not None:
        operands["w_scale"] = w_scale.astype(jnp.float32)
        specs.append(column)
    for name, a in (("bias", bias), ("out_scale", out_scale)):
        if a is not None:
            operands[name] = a.astype(jnp.float32)
            specs.append(column)
    kernel = functools.partial(_kernel, tuple(operands), transpose_w, activation)
    return pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(m, block_m), pl.cdiv(n, block_n), pl.cdiv(k, block_k)),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, block_m, block_n), lambda b, i, j, k: (b, i, j)),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="int8_matmul",
    )(*operands.values())


def _kernel(names, transpose_w, activation, *refs):
    *inputs, out, sums = refs
    ref = dict(zip(names, inputs))
    step, steps = pl.program_id(3), pl.num_programs(3)
    block_m, block_n = sums.shape
    tile_m = _ROWS if block_m % _ROWS == 0 else block_m
    tile_n = _COLUMNS if block_n % _COLUMNS == 0 else block_n
    tiles_n = block_n // tile_n

    @pl.loop(0, block_m // tile_m * tiles_n)
    def _(i):
        rows = tile(lax.div(i, tiles_n), tile_m, block_m)
        columns = tile(lax.rem(i, tiles_n), tile_n, block_n)

        @pl.when(step == 0)
        def _():
            sums[rows, columns] = jnp.zeros((tile_m, tile_n), sums.dtype)

        x = ref["x"][rows, :]
        w = ref["w"][columns, :] if transpose_w else ref["w"][:, columns]
        contract = ((1,), (1 if transpose_w else 0,))
        sums[rows, columns] += lax.dot_general(
            x, w, (contract, ((), ())), preferred_element_type=jnp.int32
        )

        @pl.when(step == steps - 1)
        def _():
            finish = functools.partial(_finish, ref, out, sums, activation, columns)
            if activation is None or tile_m != _ROWS:
                finish(rows)
            else:  # it takes registers: a quarter of the rows at a time
                pl.loop(0, 4)(lambda j: finish(tile(lax.div(i, tiles_n) * 4 + j, tile_m // 4)))


def _finish(ref, out, sums, activation, columns, rows):
    """What follows the sums, for a tile of them."""
    result = sums[rows, columns]
    if "zero" in ref:
        result = result - ref["sums"][rows, :] * ref["zero"][:, columns]
    if "x_scale" in ref:
        result = result.astype(jnp.float32) * ref["x_scale"][rows, :]
    if "w_scale" in ref:
        result = result.astype(jnp.float32) * ref["w_scale"][:, columns]
    if "bias" in ref:
        result = result.astype(jnp.float32) + ref["bias"][:, columns]
    if activation:
        result = _ACTIVATIONS[activation](result.astype(jnp.float32))
    if "out_scale" in ref:
        result = result.astype(jnp.float32) / ref["out_scale"][:, columns]
        result = jnp.clip(jnp.round(result), -127, 127).astype(jnp.int32)
    out[rows, columns] = result.astype(out.dtype)


def _gelu(x):
    """In its form with tanh, which is a logistic function of twice the argument."""
    return x * jax.nn.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))


_ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0),
    "gelu": _gelu,
    "silu": lambda x: x * jax.nn.sigmoid(x),
}
