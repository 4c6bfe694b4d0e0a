"""int8 x int8 -> int32 on Hopper and Blackwell, in Pallas for NVIDIA (Mosaic GPU).

The tensor cores of both multiply tiles in shared memory as they lie there, asynchronously. One
warpgroup of a program fetches tiles into a ring of slots, the others have them multiplied and
finish the columns that are theirs: two on Hopper (`wgmma`), whose sums are in registers; one
on Blackwell (`tcgen05`), whose sums are in a memory of their own. Both operands lie along `k`,
which is all that `wgmma` takes of int8. No device has run it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcompress.kernels.block_table import block_table, row_of

__all__ = ["BLOCKS", "Blocks", "blocks", "int8_matmul"]


class Blocks(NamedTuple):
    """The tile of a program, and the slots that are fetched ahead."""

    m: int
    n: int
    k: int
    slots: int


# By compute capability: what fits shared memory beside the results, and registers without a
# spill. No device has measured them.
BLOCKS = block_table("int8_matmul", "pallas_gpu", Blocks)
_OF_ROWS = ("x_scale", "sums")
_LINE = 128  # bytes of a row of a tile in shared memory, which the instruction reads swizzled
_REGISTERS = (40, 232)  # on Hopper, of a thread that fetches, and one that multiplies


def blocks(m: int, n: int, k: int, chip: str | None = None) -> Blocks:
    """The tile for a product of this size: a function of shape and chip alone."""
    [best] = row_of(BLOCKS, chip)
    least = 128 if chip == "10.0" else 64  # rows that the instruction takes
    return best._replace(m=max(least, 64 if m <= 64 else best.m), n=128 if n <= 128 else best.n)


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
    interpret: Any = None,
) -> jax.Array:
    """`act((x @ (w - w_zero_point)) * x_scale * w_scale + bias)`, the product exact in int32.

    `x[b, m, k]`, `w[b, k, n]` (`[b, n, k]` with `transpose_w`; without, it is turned first),
    `x_scale[b, m, 1]`, `w_scale[b, 1, n]`, `w_zero_point[b, 1, n]`, `bias[b, 1, n]`; int32 if
    none of the others is given, else `dtype`. With `out_scale[b, 1, n]` that is divided by it
    and rounded to int8 codes, -127 to 127. What is no multiple of a tile is padded.
    """
    b, m, k = x.shape
    w = w if transpose_w else jnp.swapaxes(w, 1, 2)
    n = w.shape[1]
    real = any(a is not None for a in (x_scale, w_scale, bias, activation, out_scale))
    kind = jnp.int8 if out_scale is not None else dtype if real else jnp.int32
    if 0 in (b, m, n, k):
        return jnp.zeros((b, m, n), kind)
    tile = block or blocks(m, n, k, chip)
    sums = None if w_zero_point is None else jnp.sum(x, -1, dtype=jnp.int32)
    rows = {"x_scale": x_scale, "sums": sums}
    columns = {"w_scale": w_scale, "zero": w_zero_point, "bias": bias, "out_scale": out_scale}
    operands = {
        "x": _pad(x, 0, (1, tile.m), (2, tile.k)),
        "w": _pad(w, 0, (1, tile.n), (2, tile.k)),
    }
    for size, vectors, least in ((m, rows, tile.m), (n, columns, tile.n)):
        for name, vector in vectors.items():
            if vector is not None:
                number = jnp.int32 if name in ("sums", "zero") else jnp.float32
                vector = vector.reshape(b, size).astype(number)
                operands[name] = _pad(vector, 1, (1, least))  # a scale of 0 would divide
    groups = 1 if chip == "10.0" else 2
    out = _call(operands, tile, activation, jnp.dtype(kind), groups, interpret)
    return out[:, :m, :n]


def _pad(a: jax.Array, value: int, *multiples: tuple[int, int]) -> jax.Array:
    """`a` with so many more at the end of each of these axes that the sizes are multiples."""
    widths = [(0, 0)] * a.ndim
    for axis, multiple in multiples:
        widths[axis] = (0, -a.shape[axis] % multiple)
    return jnp.pad(a, widths, constant_values=value) if any(map(any, widths)) else a


def _call(
    operands: dict[str, jax.Array],
    tile: Blocks,
    activation: str | None,
    kind: jnp.dtype,
    groups: int,
    interpret: Any,
) -> jax.Array:
    b, m, _ = operands["x"].shape
    n = operands["w"].shape[1]
    vectors = list(operands)[2:]
    # Columns that are finished at a time: a line of them, and on Blackwell no more than do not
    # spill on their way out of the memory of sums.
    part = min(tile.n // groups, _LINE // kind.itemsize, 128 if groups == 2 else 64)
    scratch: dict[str, Any] = {
        "xs": _tile((tile.slots, tile.m, tile.k), jnp.int8),
        "ws": _tile((tile.slots, tile.n, tile.k), jnp.int8),
        "results": _tile((groups, 2, tile.m, part), kind),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tile.slots),
        "here": {
            name: plgpu.SMEM((tile.m if name in _OF_ROWS else tile.n,), operands[name].dtype)
            for name in vectors
        },
    }
    if vectors:
        scratch["all_here"] = plgpu.Barrier(num_arrivals=len(vectors))
    if groups == 2:
        scratch["empty"] = plgpu.Barrier(num_arrivals=groups, num_barriers=tile.slots)
    else:
        of_tensor_cores = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        scratch["empty"] = of_tensor_cores(num_barriers=tile.slots)
        scratch["total"] = plgpu.TMEM((tile.m, tile.n), jnp.int32)
        scratch["done"] = of_tensor_cores()
    run = plgpu.kernel(
        functools.partial(_hopper if groups == 2 else _blackwell, list(operands), tile, activation),
        out_type=jax.ShapeDtypeStruct((b, m, n), kind),
        scratch_types=scratch,
        grid=(b, m // tile.m * (n // tile.n)),
        grid_names=("batch", "tile"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="int8_matmul",
        interpret=interpret,
    )
    return run(*operands.values())


def _tile(shape: tuple[int, ...], kind: Any) -> Any:
    """Shared memory for tiles, in the order that copies and the instruction want."""
    line = min(_LINE, shape[-1] * jnp.dtype(kind).itemsize)
    tiling = plgpu.TilingTransform((8, line // jnp.dtype(kind).itemsize))
    return plgpu.SMEM(shape, kind, transforms=(tiling, plgpu.SwizzleTransform(line)))


class _Program(NamedTuple):
    """The tile of a program: its place, its steps along k, and the memories of it."""

    ref: dict
    out: Any
    tile: Blocks
    batch: Any
    rows: Any
    column: Any  # the first
    steps: int


def _program(names, tile, refs):
    *inputs, out = refs
    ref = dict(zip(names, inputs))
    tiles = ref["x"].shape[1] // tile.m, ref["w"].shape[1] // tile.n
    # Tiles that run together lie below each other, eight at a time: they share columns of w.
    i, j = plgpu.planar_snake(lax.axis_index("tile"), tiles, 0, 8)
    rows, steps = pl.ds(i * tile.m, tile.m), ref["x"].shape[2] // tile.k
    return _Program(ref, out, tile, lax.axis_index("batch"), rows, j * tile.n, steps)


def _hopper(names, tile, activation, *refs, xs, ws, results, full, empty, here, all_here=None):
    program = _program(names, tile, refs)
    group = lax.axis_index("warpgroup")
    width = tile.n // 2

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(_REGISTERS[0], action="decrease")
        _fetch(program, xs, ws, full, empty, here, all_here)

    @pl.when(group < 2)
    def _():
        plgpu.set_max_registers(_REGISTERS[1], action="increase")
        mine = pl.ds(group * width, width)

        @functools.partial(
            pl.run_scoped, total=plgpu.WGMMAAccumulatorRef((tile.m, width), jnp.int32)
        )
        def _(total):
            @pl.loop(0, program.steps)
            def _(step):
                slot = lax.rem(step, tile.slots)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(total, xs.at[slot], plgpu.transpose_ref(ws.at[slot, mine], (1, 0)))
                plgpu.wgmma_wait(1)  # the product before this one has been made

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(step - 1, tile.slots)])

            sums = total[...]
            plgpu.barrier_arrive(empty.at[(program.steps - 1) % tile.slots])
            part = lambda first, size: sums[:, first : first + size]
            begin = group * width
            _store(program, part, begin, width, activation, results.at[group], here, all_here)


def _blackwell(
    names, tile, activation, *refs, xs, ws, results, full, empty, here, total, done, all_here=None
):
    program = _program(names, tile, refs)
    group = lax.axis_index("warpgroup")

    @pl.when(group == 1)
    def _():
        _fetch(program, xs, ws, full, empty, here, all_here)

    @pl.when(group == 0)
    def _():
        @pl.loop(0, program.steps)
        def _(step):
            slot = lax.rem(step, tile.slots)
            plgpu.barrier_wait(full.at[slot])
            w = plgpu.transpose_ref(ws.at[slot], (1, 0))
            # The tensor core itself says when the slot is free.
            plgpu.tcgen05_mma(total, xs.at[slot], w, empty.at[slot], accumulate=step > 0)

        plgpu.tcgen05_commit_arrive(done)
        plgpu.barrier_wait(done)
        part = lambda first, size: plgpu.async_load_tmem(total.at[:, pl.ds(first, size)])
        _store(program, part, 0, tile.n, activation, results.at[0], here, all_here)


def _fetch(program, xs, ws, full, empty, here, all_here):
    """Tiles of both operands, one after the other, into slots that are free."""
    ref, tile = program.ref, program.tile
    columns = pl.ds(program.column, tile.n)
    for name in here:
        at = program.rows if name in _OF_ROWS else columns
        plgpu.copy_gmem_to_smem(ref[name].at[program.batch, at], here[name], all_here)

    @pl.loop(0, program.steps)
    def _(step):
        slot = lax.rem(step, tile.slots)

        @pl.when(step >= tile.slots)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        along = pl.ds(step * tile.k, tile.k)
        for name, where, to in (("x", program.rows, xs), ("w", columns, ws)):
            source = ref[name].at[program.batch, where, along]
            plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])

    for step in range(max(0, program.steps - tile.slots), program.steps):
        plgpu.barrier_wait(empty.at[step % tile.slots])  # nobody leaves while one is awaited


def _store(program, sums, begin, width, activation, results, here, all_here):
    """Finishes `width` columns of the tile from `begin` on, a part at a time."""
    if here:
        plgpu.barrier_wait(all_here)
    part = results.shape[-1]
    for first in range(0, width, part):
        own = pl.ds(begin + first, part)
        result = _finish(sums(first, part), here, own, activation)
        slot = first // part % 2
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        results[slot] = result.astype(program.out.dtype)
        plgpu.commit_smem()
        to = pl.ds(program.column + begin + first, part)
        plgpu.copy_smem_to_gmem(results.at[slot], program.out.at[program.batch, program.rows, to])
    plgpu.wait_smem_to_gmem(0)


def _finish(result, here, columns, activation):
    """What follows the sums, for some of the columns."""
    row = lambda name: lax.broadcast_in_dim(here[name][...], result.shape, (0,))
    column = lambda name: lax.broadcast_in_dim(here[name][columns], result.shape, (1,))
    if "zero" in here:  # every product is too large by the sum of its row, times this
        result = result - row("sums") * column("zero")
    if "x_scale" in here:
        result = result.astype(jnp.float32) * row("x_scale")
    if "w_scale" in here:
        result = result.astype(jnp.float32) * column("w_scale")
    if "bias" in here:
        result = result.astype(jnp.float32) + column("bias")
    if activation:
        result = _ACTIVATIONS[activation](result.astype(jnp.float32))
    if "out_scale" in here:
        result = result.astype(jnp.float32) / column("out_scale")
        result = jnp.minimum(jnp.maximum(result, -127.0), 127.0)
        result = lax.round(result, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
    return result


def _logistic(x):
    return 1.0 / (1.0 + jnp.exp(-x))


_ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0.0),
    # In its form with tanh, which is a logistic function of twice the argument.
    "gelu": lambda x: x * _logistic(1.5957691216 * (x + 0.044715 * x * x * x)),
    "silu": lambda x: x * _logistic(x),
}
