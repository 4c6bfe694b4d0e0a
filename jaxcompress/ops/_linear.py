"""The product of dense activations and a `QuantizedArray`, in canonical form.

`plan` decides, from shapes and formats alone, which op takes the product; `linear`
does it. Whole-float codes (a training step) go through the same formulas in floats, so
that training sees what inference will do; integer codes go to `jc.ops`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._prepacked import PrepackedArray
from jaxcompress.arrays._qtype import Activation
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._rounding import encode, scale_of
from jaxcompress.ops import _int8_matmul, _quantized_matmul
from jaxcompress.ops._choice import Choice, Implementation, Problem, choose, dispatch
from jaxcompress.ops._cpu import cpu_refuses, needs_packing
from jaxcompress.ops._int8_matmul import check_sums, int8_matmul, scaled_sums
from jaxcompress.ops._quantized_matmul import (
    batched,
    decode,
    float_dot,
    multiply_panels,
    quantized_matmul,
    scaled_dot,
)

__all__ = ["linear", "plan"]

Weight = QuantizedArray | PrepackedArray


def linear(x: jax.Array, w: Weight, transpose_w: bool, dtype: Any) -> jax.Array:
    """`x[..., m, k] @ w[..., k, n]` (`[..., n, k]` with `transpose_w`), as `dtype`.

    The scales of `w` are shared along `n` never, along `k` always or by groups; leading
    dimensions of both are the same.
    """
    panels = w.n if isinstance(w, PrepackedArray) else None
    static = _Static(w.act, _group_size(w, transpose_w), transpose_w, w.qtype.bits, panels)
    if jnp.issubdtype(w.values.dtype, jnp.floating):
        return _simulate(static, x, w.values, w.scale, w.zero_point, w.act_scale).astype(dtype)
    if w.act is not None:
        out = _int_linear(static, x, w.values, w.scale, w.zero_point, w.act_scale)
        return out.astype(dtype)
    if panels is None:
        multiply = functools.partial(quantized_matmul, transpose_w=transpose_w)
    else:
        multiply = functools.partial(multiply_panels, n=panels, transpose_w=transpose_w)
    return multiply(
        x,
        w.values,
        w.scale,
        w.zero_point,
        bits=w.qtype.bits,
        group_size=static.group_size,
        dtype=dtype,
    )


def plan(w: Weight, m: int, k: int, n: int, dtype: str, platform: str) -> tuple[str, Choice]:
    """The op that `linear` calls, and its implementation on `platform`."""
    if jnp.issubdtype(w.values.dtype, jnp.floating):
        how = Implementation("reference", "rounded floats, with gradients", _simulate)
        return "simulated", Choice(how, how.does)
    if isinstance(w, PrepackedArray):
        group = w.group_size
    else:
        group = max(w.group_size) if w.group_size else None
    problem = Problem(m=m, k=k, n=n, bits=w.qtype.bits, group_size=group, dtype=dtype)
    op = "quantized_matmul" if w.act is None else "int8_matmul"
    table = _quantized_matmul.table() if w.act is None else _table(None)
    choice = choose(table, problem, platform)
    if isinstance(w, PrepackedArray):
        if choice.implementation.name != "cpu":
            choice = choice._replace(why=f"{choice.why}; put back from the CPU kernels' order")
    elif choice.implementation.name == "cpu":
        choice = choice._replace(why=needs_packing(choice.why))
    return op, choice


@dataclasses.dataclass(frozen=True)
class _Static:
    act: Activation | None
    group_size: int | None
    transpose_w: bool
    bits: int
    panels: int | None = None


def _group_size(w: Weight, transpose_w: bool) -> int | None:
    if isinstance(w, PrepackedArray):
        size = w.group_size
        return None if size is None or size >= w.k else size
    along = -1 if transpose_w else -2
    if w.group_size is None or along not in w.axis:
        return None
    size = w.group_size[w.axis.index(along)]
    return None if size >= w.shape[along] else size


def encode_activations(
    x: jax.Array, act: Activation, act_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes of `x[..., m, k]` as whole floats, and scales that broadcast to `[..., m, 1]`."""
    if act.static:
        if act_scale is None:
            raise ValueError("static activations need an act_scale; the array has none")
        scale = act_scale.astype(jnp.float32)
    else:
        axis = -1 if act.per_token else None
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis, keepdims=True, initial=0.0)
        scale = jax.lax.stop_gradient(scale_of(largest, act.qtype.high))
    return encode(x, scale, None, act.qtype, (), None), scale


def _simulate(static, x, codes, scale, zero, act_scale):
    """`linear` in floats: the same numbers while the sums of codes stay below 2^24."""
    if static.act is None:
        return scaled_dot(x, codes, scale, zero, static.group_size, static.transpose_w)
    x_codes, x_scale = encode_activations(x, static.act, act_scale)
    columns = jnp.swapaxes(scale, -1, -2) if static.transpose_w else scale
    zeros = jnp.swapaxes(zero, -1, -2) if static.transpose_w and zero is not None else zero
    return scaled_sums(
        float_dot, x_codes, codes, x_scale, columns, zeros, static.group_size, static.transpose_w
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int_linear(static, x, values, scale, zero, act_scale):
    k = x.shape[-1]
    check_sums(min(k, static.group_size or k), zero is not None)
    problem = Problem(
        m=x.shape[-2],
        k=k,
        n=static.panels or values.shape[-2 if static.transpose_w else -1],
        bits=static.bits,
        group_size=static.group_size,
        dtype=x.dtype.name,
    )
    return dispatch(_table(static), problem, None, x, values, scale, zero, act_scale)


def _table(static: _Static | None) -> tuple[Implementation, ...]:
    """Rows quantized and multiplied in one native call, else in two steps by `int8_matmul`."""
    does = "native: rows quantized inside, uint8 x int8 -> int32"
    steps = [
        Implementation(i.name, i.does, functools.partial(_in_steps, static, i.name), i.refuses)
        for i in _int8_matmul.table()
        if i.name != "cpu"
    ]
    return (Implementation("cpu", does, functools.partial(_cpu, static), cpu_refuses), *steps)


def _in_steps(static, implementation, x, values, scale, zero, act_scale):
    x_codes, x_scale = encode_activations(x, static.act, act_scale)
    columns = jnp.swapaxes(scale, -1, -2) if static.transpose_w else scale
    zeros = jnp.swapaxes(zero, -1, -2) if static.transpose_w and zero is not None else zero
    return int8_matmul(
        x_codes.astype(jnp.int8),
        decode(values, static.bits, x.shape[-1], static.transpose_w, static.panels),
        x_scale=jnp.broadcast_to(x_scale, (*x.shape[:-1], 1)),
        w_scale=columns,
        w_zero_point=zeros,
        group_size=static.group_size,
        transpose_w=static.transpose_w,
        implementation=implementation,
    )


def _cpu(static, x, values, scale, zero, act_scale):
    from jaxcompress.kernels.quantized_matmul import cpu as kernel

    x_scale = act_scale
    if not (static.act.static or static.act.per_token):
        x_scale = encode_activations(x, static.act, None)[1]
    lead = x.shape[:-1]
    if x.ndim == 2:
        x, values, scale, zero = batched(x, values, scale, zero)
    if x_scale is not None and x_scale.size == 1:
        x_scale = x_scale.reshape((1,) * x.ndim)
    out = kernel.quantized_matmul(
        x,
        values,
        scale,
        zero,
        x_scale,
        otherwise=_cpu_by_xla(static, zero is not None),
        panels=static.panels,
        transpose_w=static.transpose_w,
        bits=static.bits,
        group_size=static.group_size,
        high=static.act.qtype.high,
    )
    return out.reshape(*lead, out.shape[-1])


@functools.cache
def _cpu_by_xla(static, has_zero):
    """What an exported program does for the native call, with scales `[b, g, n]`."""
    turn = lambda s: jnp.swapaxes(s, -1, -2) if static.transpose_w else s

    def run(x, values, scale, *rest):
        zero = turn(rest[0]) if has_zero else None
        x_scale = rest[-1] if len(rest) > has_zero else None
        given = static
        if x_scale is not None:
            act = dataclasses.replace(static.act, per_token=False, static=True)
            given = dataclasses.replace(static, act=act)
        return _in_steps(given, None, x, values, turn(scale), zero, x_scale)

    return run


def _int_forward(static, *args):
    return _int_linear(static, *args), args


def _int_backward(static, residuals, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, scale, zero, act_scale = residuals
    codes = decode(values, static.bits, x.shape[-1], static.transpose_w, static.panels)
    run = lambda x, scale, act_scale: _simulate(
        static, x, codes.astype(jnp.float32), scale, zero, act_scale
    )
    dx, dscale, dact = jax.vjp(run, x, scale, act_scale)[1](g)
    return dx, None, dscale, None, dact


_int_linear.defvjp(_int_forward, _int_backward)
