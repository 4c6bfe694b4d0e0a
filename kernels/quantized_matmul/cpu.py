"""Floats times a quantized weight by the native library, for CPUs.

The rows are quantized inside, to one int8 digit (a8: dynamic, one scale a row, or a given
one) or to four (a16: floats, exact to 2^-28 of the largest magnitude of a row); the products
are exact integers, scaled by group.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import (
    COLUMN_MAJOR,
    PANELS,
    ROW_MAJOR,
    DenseCall,
    Epilogue,
    native_matmul,
)

__all__ = ["quantized_matmul"]

FLOAT_DIGITS = 4


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    x_scale: jax.Array | None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    otherwise: Callable[..., Any],
    panels: int | None,
    transpose_w: bool,
    bits: int,
    group_size: int | None,
    high: int | None,
) -> jax.Array:
    """`[..., m, n]` in float32 from `x[..., m, k]`; everything else leads with the same axes.

    Args:
      x: floats, or int8 codes.
      w: `[..., rows, n]` bytes, codes or bit planes along `k`; `[..., n, rows]` with
        `transpose_w`; or panels, of this many columns if `panels` is not None.
      scale, zero_point: `[..., g, n]` (`[..., n, g]` with `transpose_w`), 1 where shared.
      x_scale: `[..., 1, 1]`, a static scale of the activations; None for one of each row. Of
        codes `[..., m, 1]`.
      bias, residual, activation: what follows, `activation(y + bias[..., 1, n]) + residual`.
      otherwise: what an exported program does instead, of the operands that there are, with
        scales `[b, g, n]`.
      high: the largest code of an activation; None multiplies floats.
    """
    k = x.shape[-1]
    groups = 1 if group_size is None or group_size >= k else -(-k // group_size)
    n = panels or (w.shape[-2] if transpose_w else w.shape[-1])

    lead, b = x.shape[:-2], math.prod(x.shape[:-2])

    def flat(a: jax.Array) -> jax.Array:
        return a.reshape(b, *a.shape[len(lead) :])

    def columns(s: jax.Array) -> jax.Array:
        s = jnp.swapaxes(s, -1, -2) if transpose_w else s
        return flat(jnp.broadcast_to(s, (*lead, groups, n)))

    codes = x.dtype == jnp.int8
    call = DenseCall(
        integers=False,
        layout=PANELS if panels is not None else COLUMN_MAJOR if transpose_w else ROW_MAJOR,
        path=cpu.path(),
        bits=8 if panels is None and w.dtype == jnp.int8 else bits,
        group_size=group_size,
        digits=FLOAT_DIGITS if high is None and not codes else 1,
        high=high or 127,
        has_zero=zero_point is not None,
        has_x_scale=x_scale is not None,
        codes=codes,
        then=Epilogue(
            activation=activation, has_bias=bias is not None, has_residual=residual is not None
        ),
    )
    x = x if codes else x.astype(jnp.float32)
    operands = [flat(x), flat(w), columns(scale.astype(jnp.float32))]
    if zero_point is not None:
        operands.append(columns(zero_point))
    if x_scale is not None:
        rows = x.shape[-2] if codes else 1
        operands.append(flat(jnp.broadcast_to(x_scale.astype(jnp.float32), (*lead, rows, 1))))
    if bias is not None:
        operands.append(flat(jnp.broadcast_to(bias.astype(jnp.float32), (*lead, 1, n))))
    if residual is not None:
        operands.append(flat(residual.astype(jnp.float32)))
    return native_matmul(call, otherwise, *operands).reshape(*lead, x.shape[-2], n)
