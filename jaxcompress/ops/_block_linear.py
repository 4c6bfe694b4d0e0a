"""Quantized activations times a block-sparse weight of codes, as integers."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._block import BlockSparseArray
from jaxcompress.arrays._panels import from_panels
from jaxcompress.arrays._qtype import Activation
from jaxcompress.ops._activations import encode_activations
from jaxcompress.ops._block_sparse import block_sparse_matmul
from jaxcompress.ops._block_sparse import plan as plan_floats
from jaxcompress.ops._choice import Choice, Implementation, Problem, choose, dispatch
from jaxcompress.ops._cpu import cpu_refuses, needs_packing
from jaxcompress.ops._epilogue import finish, in_places

__all__ = ["block_linear", "fits_panels", "plan"]


@dataclasses.dataclass(frozen=True)
class _Static:
    act: Activation
    columns: int
    height: int
    width: int
    panels: bool
    activation: str | None = None


def block_linear(
    x: jax.Array,
    w: BlockSparseArray,
    dtype: Any,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`x[..., m, k]` times the matrices `[..., k, n]` of `w`, as `dtype`; leading axes alike.

    `w` has integers, a scale for each column and symmetric activations. What follows is
    `activation(y + bias[..., 1, n]) + residual`.
    """
    lead, b = x.shape[:-2], math.prod(x.shape[:-2])
    static = _static(w, activation)
    flat = lambda a, core: None if a is None else a.reshape(b, *a.shape[a.ndim - core :])
    values = w.values if w.panels else w.blocks()
    across = w.rows.shape[-2]
    if w.panels:
        values = values.reshape(b, across, math.prod(values.shape[-2:]))
    scale = jnp.swapaxes(w.scale, -1, -2) if w.transposed else w.scale
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (*lead, 1, w.matrix[1]))
    act_scale = None if w.act_scale is None else w.act_scale.reshape(b, 1, 1)
    out = _matmul(
        static,
        flat(x, 2),
        flat(values, 2 if w.panels else 4),
        flat(w.rows, 2),
        flat(w.counts, 1),
        flat(scale, 2),
        act_scale,
        flat(bias, 2),
        flat(residual, 2),
    )
    return out.reshape(*lead, *out.shape[-2:]).astype(dtype)


def fits_panels(w: BlockSparseArray) -> bool:
    """Whether the native kernels multiply its codes as integers."""
    height, width = w.block
    if w.act is None or w.qtype is None or height % 4 or width % 16:
        return False
    if not w.act.qtype.integer:
        return False
    return w.act.qtype.symmetric and w.scale.shape[-1 if w.transposed else -2] == 1


def plan(w: BlockSparseArray, m: int, dtype: str, platform: str) -> Choice:
    """The implementation that `block_linear` takes on `platform`."""
    k, n = w.matrix
    choice = choose(_table(_static(w, None)), Problem(m=m, k=k, n=n, dtype=dtype), platform)
    if choice.implementation.name != "cpu":
        floats = plan_floats(m, k, n, w.block, "int8", "float32", platform)  # codes
        return floats._replace(why=f"rows quantized, then {floats.why}")
    return choice if w.panels else choice._replace(why=needs_packing(choice.why))


def _static(w: BlockSparseArray, activation: str | None) -> _Static:
    assert w.act is not None
    return _Static(w.act, w.matrix[1], *w.block, w.panels, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, *operands):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=static.columns, dtype=x.dtype.name)
    return dispatch(_table(static), problem, None, x, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, rows, counts, *others = operands
    run = lambda x, *others: _in_steps(static, x, values, rows, counts, *others)
    dx, *dothers = jax.vjp(run, x, *others)[1](g)
    return dx, None, None, None, *dothers


_matmul.defvjp(_forward, _backward)


def _in_steps(static, x, values, rows, counts, scale, act_scale, bias, residual):
    blocks = values
    if static.panels:
        slots, height, width = rows.shape[-1], static.height, static.width
        matrix = values.reshape(*rows.shape[:-1], width // 16, slots * height // 4, 16, 4)
        blocks = from_panels(matrix, 8, slots * height, width)
        blocks = blocks.reshape(*rows.shape, height, width)
    codes, x_scale, _ = encode_activations(x, static.act, act_scale)
    out = block_sparse_matmul(codes, blocks, rows, columns=static.columns, counts=counts)
    return finish(out * x_scale * scale, bias, static.activation, residual)


def _cpu(static, x, values, rows, counts, scale, act_scale, bias, residual):
    from jaxcompress.kernels.block_sparse_matmul import cpu as kernel

    act, x_scale = static.act, act_scale
    if not (act.static or act.per_token):
        x_scale = encode_activations(x, act, None)[1]
    has = tuple(a is not None for a in (counts, x_scale, bias, residual))
    return kernel.quantized_block_matmul(
        x,
        values,
        rows,
        counts,
        scale,
        x_scale,
        bias,
        residual,
        activation=static.activation,
        otherwise=_by_xla(static, *has),
        height=static.height,
        width=static.width,
        panels=static.panels,
        high=act.qtype.high,
    )


@functools.cache
def _by_xla(static, *has):
    """What an exported program does for the native call."""

    def run(x, values, rows, *rest):
        has_counts, *has_more = has
        counts, scale, x_scale, bias, residual = in_places((has_counts, True, *has_more), rest)
        given = static
        if x_scale is not None:
            act = dataclasses.replace(static.act, per_token=False, static=True)
            given = dataclasses.replace(static, act=act)
        return _in_steps(given, x, values, rows, counts, scale, x_scale, bias, residual)

    return run


def _table(static: _Static) -> tuple[Implementation, ...]:
    def refuses(problem: Problem, platform: str) -> str | None:
        if platform == "cpu" and (static.height % 4 or static.width % 16):
            sides = f"{static.height}x{static.width}"
            return f"blocks of codes are multiples of 4 high and of 16 wide, not {sides}"
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            return f"its rows are quantized in float32, too little for {problem.dtype}"
        return cpu_refuses(problem, platform)

    does = "native: rows quantized inside, the kept blocks uint8 x int8 -> int32"
    steps = functools.partial(_in_steps, static)
    return (
        Implementation("cpu", does, functools.partial(_cpu, static), refuses),
        Implementation("reference", "rows quantized, then block_sparse_matmul", steps),
    )
