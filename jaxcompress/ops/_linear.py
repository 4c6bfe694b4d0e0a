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

from jaxcompress.arrays._qtype import Activation
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._rounding import encode, scale_of
from jaxcompress.ops import _int8_matmul, _quantized_matmul
from jaxcompress.ops._choice import Choice, Implementation, Problem, choose
from jaxcompress.ops._int8_matmul import int8_matmul, scaled_sums
from jaxcompress.ops._quantized_matmul import float_dot, quantized_matmul, scaled_dot

__all__ = ["linear", "plan"]


def linear(x: jax.Array, w: QuantizedArray, transpose_w: bool, dtype: Any) -> jax.Array:
    """`x[..., m, k] @ w[..., k, n]` (`[..., n, k]` with `transpose_w`), as `dtype`.

    The scales of `w` are shared along `n` never, along `k` always or by groups; leading
    dimensions of both are the same.
    """
    static = _Static(w.act, _group_size(w, transpose_w), transpose_w, w.qtype.bits)
    if jnp.issubdtype(w.values.dtype, jnp.floating):
        return _simulate(static, x, w.values, w.scale, w.zero_point, w.act_scale).astype(dtype)
    if w.act is not None:
        return _int_linear(static, x, w.codes(), w.scale, w.zero_point, w.act_scale).astype(dtype)
    return quantized_matmul(
        x,
        w.values,
        w.scale,
        w.zero_point,
        bits=w.qtype.bits,
        group_size=static.group_size,
        transpose_w=transpose_w,
        dtype=dtype,
    )


def plan(
    w: QuantizedArray, transpose_w: bool, m: int, k: int, n: int, dtype: str, platform: str
) -> tuple[str, Choice]:
    """The op that `linear` calls, and its implementation on `platform`."""
    group = max(w.group_size) if w.group_size else None
    if jnp.issubdtype(w.values.dtype, jnp.floating):
        how = Implementation("reference", "rounded floats, with gradients", _simulate)
        return "simulated", Choice(how, how.does)
    problem = Problem(
        m=m,
        k=k,
        n=n,
        bits=w.qtype.bits,
        group_size=group,
        dtype=dtype,
        packed=w.packed is not None,
        transpose_w=transpose_w,
    )
    if w.act is None:
        return "quantized_matmul", choose(_quantized_matmul.table(), problem, platform)
    return "int8_matmul", choose(_int8_matmul.table(), problem, platform)


@dataclasses.dataclass(frozen=True)
class _Static:
    act: Activation | None
    group_size: int | None
    transpose_w: bool
    bits: int


def _group_size(w: QuantizedArray, transpose_w: bool) -> int | None:
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
def _int_linear(static, x, codes, scale, zero, act_scale):
    x_codes, x_scale = encode_activations(x, static.act, act_scale)
    columns = jnp.swapaxes(scale, -1, -2) if static.transpose_w else scale
    zeros = jnp.swapaxes(zero, -1, -2) if static.transpose_w and zero is not None else zero
    return int8_matmul(
        x_codes.astype(jnp.int8),
        codes,
        x_scale=jnp.broadcast_to(x_scale, (*x.shape[:-1], 1)),
        w_scale=columns,
        w_zero_point=zeros,
        group_size=static.group_size,
        transpose_w=static.transpose_w,
    )


def _int_forward(static, *args):
    return _int_linear(static, *args), args


def _int_backward(static, residuals, g):
    """Straight through the rounding of the activations, as in training."""
    x, codes, scale, zero, act_scale = residuals
    run = lambda x, scale, act_scale: _simulate(
        static, x, codes.astype(jnp.float32), scale, zero, act_scale
    )
    dx, dscale, dact = jax.vjp(run, x, scale, act_scale)[1](g)
    return dx, None, dscale, None, dact


_int_linear.defvjp(_int_forward, _int_backward)
