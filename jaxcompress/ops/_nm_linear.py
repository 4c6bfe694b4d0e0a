"""Quantized activations times an N:M sparse weight of codes, as integers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._nm import NMSparseArray, fill
from jaxcompress.arrays._packing import unpack
from jaxcompress.ops import _nm_matmul
from jaxcompress.ops._choice import Choice, Implementation, Problem, dispatch, explained
from jaxcompress.ops._epilogue import finish
from jaxcompress.ops._linear import Linear, int_linear, over_rows
from jaxcompress.ops._nm_matmul import nm_matmul

__all__ = ["nm_linear", "plan"]


@dataclasses.dataclass(frozen=True)
class _Static:
    linear: Linear  # of the dense codes
    n: int
    m: int
    bits: int


def nm_linear(
    x: jax.Array,
    w: NMSparseArray,
    group_size: int | None,
    dtype: Any,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`x[..., m, k]` times the matrices `[..., k, n]` of `w`, as `dtype`; leading axes alike.

    `w` has integers, whose groups lie along `k`, and activations of integers; `group_size`
    of the `k`, or all, share a scale. What follows is `activation(y + bias[..., 1, n]) + residual`.
    """
    lead, n = x.shape[:-2], w.values.shape[-1]
    scale = w.scale.astype(jnp.float32)
    scale = jnp.broadcast_to(scale, (*lead, scale.shape[-2], n))
    operands = (w.values, w.indices, scale, w.act_scale, w.act_offset, bias, residual)
    return _matmul(_static(w, group_size, activation), x, *operands).astype(dtype)


def plan(w: NMSparseArray, group_size: int | None, m: int, platform: str) -> Choice:
    """The implementation that `nm_linear` of `m` rows takes on `platform`."""
    problem = Problem(m=m, k=w.shape[-2], n=w.shape[-1], dtype="int8")
    return explained(_table(_static(w, group_size, None)), problem, platform)


def _static(w: NMSparseArray, group_size: int | None, activation: str | None) -> _Static:
    assert w.qtype is not None
    group = group_size if group_size is not None and group_size < w.shape[-2] else None
    return _Static(Linear(w.act, group, False, 8, None, activation), w.n, w.m, w.qtype.bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, values, *operands):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=values.shape[-1], dtype="int8")
    return dispatch(_table(static), problem, None, x, values, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, indices, *others = operands
    run = lambda x, *others: _reference(static, x, values, indices, *others)
    dx, *dothers = jax.vjp(run, x, *others)[1](g)
    return dx, None, None, *dothers


_matmul.defvjp(_forward, _backward)


def _reference(static, x, values, indices, scale, act_scale, act_offset, bias, residual):
    if static.bits < 8:
        values = unpack(values, static.bits, x.shape[-1] // static.m * static.n, -2)
    codes = fill(values, indices, static.n, static.m, x.shape[-1], -2)
    operands = (codes, scale, None, act_scale, act_offset, bias, residual)
    return int_linear(static.linear, x, *operands)


def _in_steps(static, x, values, indices, scale, act_scale, act_offset, bias, residual):
    product = lambda codes, x_scale: nm_matmul(
        codes.astype(jnp.int8),
        values,
        indices,
        scale,
        n=static.n,
        m=static.m,
        x_scale=x_scale,
        bits=static.bits,
        group_size=static.linear.group_size,
    )
    out = over_rows(product, static.linear, x, act_scale, act_offset)
    return finish(out, bias, static.linear.activation, residual)


def _table(static: _Static) -> tuple[Implementation, ...]:
    """The kernels of `nm_matmul`, rows quantized before; and what there is without one."""
    steps = functools.partial(_in_steps, static)
    *kernels, _ = _nm_matmul.table(static.n, static.m, static.bits, static.linear.group_size)
    dense = functools.partial(_reference, static)
    return (
        *(dataclasses.replace(kernel, run=steps) for kernel in kernels),
        Implementation("reference", "zeros are put back, then a dense product of integers", dense),
    )
