"""The product of dense activations and a `PrepackedSparseArray`: what is kept, nothing else."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._prepacked_sparse import PrepackedSparseArray, columns_of, scatter
from jaxcompress.arrays._qtype import Activation
from jaxcompress.ops._activations import encode_activations
from jaxcompress.ops._choice import Choice, Implementation, Problem, choose, dispatch
from jaxcompress.ops._cpu import cpu_refuses
from jaxcompress.ops._epilogue import finish, in_places
from jaxcompress.ops._quantized_matmul import float_dot

__all__ = ["plan", "sparse_linear"]


@dataclasses.dataclass(frozen=True)
class _Static:
    act: Activation | None
    part: int
    kept: float  # the share of what is kept, for `explain`
    activation: str | None = None


def sparse_linear(
    x: jax.Array,
    w: PrepackedSparseArray,
    dtype: Any,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`x[..., m, k]` times the matrices `[..., k, n]` that `w` is packed for, as `dtype`.

    Leading dimensions of both are the same. What follows is
    `activation(y + bias[..., 1, n]) + residual`.
    """
    lead = x.shape[:-2]
    scale = None
    if w.scale is not None:
        columns = w.scale[..., 0] if w.transpose_w else w.scale[..., 0, :]
        scale = jnp.broadcast_to(columns.astype(jnp.float32), (*lead, w.n))
    act_scale = w.act_scale
    if act_scale is not None:
        act_scale = jnp.broadcast_to(
            act_scale.reshape(*act_scale.shape[: len(lead)], 1, 1), (*lead, 1, 1)
        )
    static = _Static(w.act, w.part, w.density, activation)
    weight = (w.values, w.places, w.starts, w.columns, scale)
    return _matmul(static, x, *weight, act_scale, bias, residual).astype(dtype)


def plan(w: PrepackedSparseArray, m: int, dtype: str, platform: str) -> Choice:
    """The implementation that `sparse_linear` takes on `platform`."""
    problem = Problem(m=m, k=w.k, n=w.n, dtype=dtype)
    return choose(_table(_Static(w.act, w.part, w.density)), problem, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, values, places, starts, columns, scale, act_scale, bias, residual):
    n = columns_of(starts, x.shape[-1], static.part)
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=n, dtype=x.dtype.name)
    operands = (x, values, places, starts, columns, scale, act_scale, bias, residual)
    return dispatch(_table(static), problem, None, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, places, starts, columns, *others = operands

    def run(x, reals, *others):
        return _reference(static, x, reals, places, starts, columns, *others)

    reals = values.astype(jnp.float32)
    dx, dvalues, *dothers = jax.vjp(run, x, reals, *others)[1](g)
    floats = jnp.issubdtype(values.dtype, jnp.floating)
    return dx, dvalues if floats else None, None, None, None, *dothers


_matmul.defvjp(_forward, _backward)


def _reference(static, x, values, places, starts, columns, scale, act_scale, bias, residual):
    reals, x_scale = values.astype(jnp.float32), None
    w = scatter(reals, places, starts, columns, x.shape[-1], static.part)
    if static.act is not None:
        x, x_scale, _ = encode_activations(x, static.act, act_scale)
    # Codes are whole numbers whose sums floats hold exactly.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    out = float_dot(x.astype(wide), w.astype(wide), False)
    out = out if x_scale is None else out * x_scale
    out = out if scale is None else out * scale[..., None, :]
    return finish(out, bias, static.activation, residual)


def _cpu(static, x, values, places, starts, columns, scale, act_scale, bias, residual):
    from jaxcompress.kernels.sparse_matmul import cpu as kernel

    act, x_scale = static.act, act_scale
    if act is not None and not (act.static or act.per_token):
        x_scale = encode_activations(x, act, None)[1]
    return kernel.sparse_matmul(
        x,
        values,
        places,
        starts,
        columns,
        scale,
        x_scale,
        bias,
        residual,
        activation=static.activation,
        otherwise=_cpu_by_xla(static, *(a is not None for a in (scale, x_scale, bias, residual))),
        part=static.part,
        high=None if act is None else act.qtype.high,
    )


@functools.cache
def _cpu_by_xla(static, *has):
    """What an exported program does for the native call."""

    def run(x, values, places, starts, columns, *rest):
        scale, x_scale, bias, residual = in_places(has, rest)
        given = static
        if x_scale is not None:
            act = dataclasses.replace(static.act, per_token=False, static=True)
            given = dataclasses.replace(static, act=act)
        others = (scale, x_scale, bias, residual)
        return _reference(given, x, values, places, starts, columns, *others)

    return run


def _refuses(problem: Problem, platform: str) -> str | None:
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"it sums in float32, too little for {problem.dtype}"
    return cpu_refuses(problem, platform)


def _table(static: _Static) -> tuple[Implementation, ...]:
    does = f"native: multiplies the {static.kept:.1%} that are kept"
    return (
        Implementation("cpu", does, functools.partial(_cpu, static), _refuses),
        Implementation(
            "reference", "zeros put back, a dense product", functools.partial(_reference, static)
        ),
    )
