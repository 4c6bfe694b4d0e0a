"""Products with a weight that keeps two of every four, on NVIDIA's sparse tensor cores.

`mma.sp` takes the kept values and their places and makes half the products. Triton has no
word for it: it is inline PTX, which every thread of a warp gives its own registers. So all
tensors here have one number a thread, and what a thread holds follows the tables of the PTX
manual (9.7.14.6, matrix fragments for sparse mma): the sparse operand is the weight, turned,
16 columns of it for a warp; the dense one is x, eight rows at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax

from jaxcompress.kernels.triton_launch import Blocks, added, split, splits, triton_call
from jaxcompress.kernels.triton_split import portion, written

__all__ = ["nm_matmul"]

_TILE = Blocks(m=8, n=64, k=32, num_warps=4, num_stages=2, programs=1024)
_KINDS = {"bfloat16": "bf16", "float16": "f16"}


def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ w`, summed in float32; of int8 `(x @ w) * x_scale * scale`, the product exact.

    `x[b, m, k]` and `values[b, k / 2, n]` are both bfloat16, float16 or int8, and
    `indices[b, ., n]` uint8 bit planes of the places of two values in each group of four.
    `scale[b, 1, n]` and `x_scale[b, m, 1]` are for int8, whose result is int32 without them.
    `interpret` is a function to call instead of `jax_triton.triton_call`.
    """
    b, rows, k = x.shape
    columns = values.shape[2]
    integers = x.dtype == jnp.int8
    kind = jnp.int32 if integers and scale is None and x_scale is None else dtype
    out = jax.ShapeDtypeStruct((b, rows, columns), kind)
    if 0 in (b, rows, columns, k):
        return jnp.zeros(out.shape, out.dtype)
    # Bits as they are: a register of 32 has two numbers, or four of int8.
    per = 4 if integers else 2
    words = lax.bitcast_convert_type(x.reshape(b, rows, k // per, per), jnp.int32)
    bits = values if integers else lax.bitcast_convert_type(values, jnp.int16)
    shape, kinds = ("m16n8k64", "s32.s8.s8.s32") if integers else ("m16n8k32", "f32.{0}.{0}.f32")
    kinds = kinds.format(_KINDS.get(x.dtype.name))
    # Triton takes no None: what is absent is a single 1 that is never read.
    one = jnp.ones((1, 1, 1), jnp.float32)
    parts = splits(_TILE._replace(k=16 * per), b, rows, columns, k)  # of one instruction
    later = parts > 1  # scales are for the whole sum, which is exact
    call = interpret or triton_call("nm_matmul_sparse", chip)
    found = call(
        words,
        bits,
        indices,
        one if scale is None else scale.astype(jnp.float32),
        one if x_scale is None else x_scale.astype(jnp.float32),
        kernel=_kernel,
        out_shape=split(out, parts, jnp.int32 if integers else jnp.float32),
        grid=(triton.cdiv(columns, _TILE.n), triton.cdiv(rows, _TILE.m), b * parts),
        num_warps=_TILE.num_warps,
        num_stages=_TILE.num_stages,
        ROWS=rows,
        COLUMNS=columns,
        KEPT=k // 2,
        PER=per,
        HAS_SCALE=scale is not None and not later,
        HAS_X_SCALE=x_scale is not None and not later,
        ASM=f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.{kinds} "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x0;",
        WARPS=_TILE.num_warps,
        SPLITS=parts,
    )
    return added(found, out, x_scale, scale)


@triton.jit
def _places(at, row, mask, COLUMNS: tl.constexpr):
    """The places of two kept rows, `row` and the next, the lower one first; and if they were so."""
    first = at + row // 64 * (16 * COLUMNS) + row % 16 * COLUMNS
    shift = row % 64 // 16 * 2
    a = (tl.load(first, mask=mask, other=0).to(tl.int32) >> shift) & 3
    # Beyond the end the second is one more: two places of a group differ.
    b = (tl.load(first + COLUMNS, mask=mask, other=255).to(tl.int32) >> shift) & 3
    return tl.minimum(a, b), tl.maximum(a, b), a < b


@triton.jit
def _values(values_at, places_at, row, inside, KEPT: tl.constexpr, COLUMNS: tl.constexpr):
    """Two kept rows, from `row` on, in the order of their places."""
    mask = inside & (row < KEPT)
    _, _, ordered = _places(places_at, row, mask, COLUMNS)
    a = tl.load(values_at + row * COLUMNS, mask=mask, other=0).to(tl.int32)
    b = tl.load(values_at + (row + 1) * COLUMNS, mask=mask, other=0).to(tl.int32)
    return tl.where(ordered, a, b), tl.where(ordered, b, a)


@triton.jit
def _register(
    values_at, places_at, row, inside, KEPT: tl.constexpr, COLUMNS: tl.constexpr, PER: tl.constexpr
):
    """The kept rows from `row` on, as many as a register holds, lowest bits first."""
    a, b = _values(values_at, places_at, row, inside, KEPT, COLUMNS)
    if PER == 2:
        return (a & 0xFFFF) | (b << 16)
    else:
        c, d = _values(values_at, places_at, row + 2, inside, KEPT, COLUMNS)
        return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)


@triton.jit
def _metadata(
    places_at, row, inside, PAIRS: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr
):
    """Four bits for each pair of kept rows from `row` on: its lower place, and its higher one."""
    bits = row * 0
    for pair in tl.static_range(PAIRS):
        here = row + 2 * pair
        low, high, _ = _places(places_at, here, inside & (here < KEPT), COLUMNS)
        bits |= (low | (high << 2)) << (4 * pair)
    return bits


@triton.jit
def _kernel(
    x,
    values,
    indices,
    scale,
    x_scale,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    PER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    ASM: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    integers: tl.constexpr = PER == 4
    words: tl.constexpr = 2 * KEPT // PER  # of a row of x
    planes: tl.constexpr = (KEPT + 63) // 64  # blocks of 64 places, 16 bytes each
    step: tl.constexpr = 8 * PER  # kept rows of one instruction
    batch, head, end = portion(KEPT, step, SPLITS)
    thread = tl.arange(0, 32 * WARPS)
    group, member = thread % 32 // 4, thread % 4  # of four threads, and which of them
    column = (tl.program_id(0) * WARPS + thread // 32) * 16 + group  # and the one 8 further
    row = tl.program_id(1) * 8 + group
    x_at = x + (batch * ROWS + row) * words + member
    low, high = column < COLUMNS, column + 8 < COLUMNS
    values_at = values + batch * KEPT * COLUMNS + column
    places_at = indices + batch * planes * (16 * COLUMNS) + column
    if integers:
        c0 = tl.zeros((32 * WARPS,), dtype=tl.int32)
    else:
        c0 = tl.zeros((32 * WARPS,), dtype=tl.float32)
    c1, c2, c3 = c0, c0, c0
    for start in range(head, end, step):
        first = start + member * PER
        next = first + 4 * PER
        a0 = _register(values_at, places_at, first, low, KEPT, COLUMNS, PER)
        a1 = _register(values_at + 8, places_at + 8, first, high, KEPT, COLUMNS, PER)
        a2 = _register(values_at, places_at, next, low, KEPT, COLUMNS, PER)
        a3 = _register(values_at + 8, places_at + 8, next, high, KEPT, COLUMNS, PER)
        if integers:  # two threads have the columns, two others those 8 further
            far = member % 2 * 8
            begin = start + member // 2 * 16
            e = _metadata(places_at + far, begin, column + far < COLUMNS, 8, KEPT, COLUMNS)
        else:  # two threads have both, 16 bits each; the two others are not asked
            begin = start + member % 2 * 8
            e = _metadata(places_at, begin, low, 4, KEPT, COLUMNS)
            e |= _metadata(places_at + 8, begin, high, 4, KEPT, COLUMNS) << 16
        at = start * 2 // PER  # words of x before this step
        b0 = tl.load(x_at + at, mask=(row < ROWS) & (member < words - at), other=0)
        b1 = tl.load(x_at + at + 4, mask=(row < ROWS) & (member + 4 < words - at), other=0)
        b2 = tl.load(x_at + at + 8, mask=(row < ROWS) & (member + 8 < words - at), other=0)
        b3 = tl.load(x_at + at + 12, mask=(row < ROWS) & (member + 12 < words - at), other=0)
        if integers:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                ASM,
                "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                ASM,
                "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
                [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
    down = tl.program_id(1) * 8 + member * 2  # rows of the result
    if HAS_X_SCALE:
        at_scale = x_scale + batch * ROWS + down
        upper = tl.load(at_scale, mask=down < ROWS)
        lower = tl.load(at_scale + 1, mask=down + 1 < ROWS)
        c0, c2 = c0.to(tl.float32) * upper, c2.to(tl.float32) * upper
        c1, c3 = c1.to(tl.float32) * lower, c3.to(tl.float32) * lower
    if HAS_SCALE:
        at_scale = scale + batch * COLUMNS + column
        left = tl.load(at_scale, mask=low)
        right = tl.load(at_scale + 8, mask=high)
        c0, c1 = c0.to(tl.float32) * left, c1.to(tl.float32) * left
        c2, c3 = c2.to(tl.float32) * right, c3.to(tl.float32) * right
    out_at = out + (written(batch, SPLITS) * ROWS + down) * COLUMNS + column
    kind = out.dtype.element_ty
    tl.store(out_at, c0.to(kind), mask=low & (down < ROWS))
    tl.store(out_at + COLUMNS, c1.to(kind), mask=low & (down + 1 < ROWS))
    tl.store(out_at + 8, c2.to(kind), mask=high & (down < ROWS))
    tl.store(out_at + COLUMNS + 8, c3.to(kind), mask=high & (down + 1 < ROWS))
