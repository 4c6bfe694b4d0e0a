"""Products whose backward products see gradients that were stochastically rounded."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._rounding import scale_of
from jaxcompress.ops._int8_matmul import int8_matmul
from jaxcompress.ops._operands import MAX_K
from jaxcompress.ops._quantized_matmul import float_dot

__all__ = ["quantized_gradient_convolution", "quantized_gradient_dot", "stochastic_round"]


def stochastic_round(x: jax.Array) -> jax.Array:
    """Rounds up with the probability of the fraction, down otherwise: right on average.

    The random bits are a hash of each number and its place, so that the function stays
    pure and needs no key; two steps of training have other numbers, and so other bits.
    """
    x = x.astype(jnp.float32)
    place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    h = jax.lax.bitcast_convert_type(x, jnp.uint32) + place * jnp.uint32(0x9E3779B9)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # the finalizer of MurmurHash3
        h = (h ^ (h >> 16)) * jnp.uint32(multiplier)
    h = h ^ (h >> 16)
    uniform = (h >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    whole = jnp.floor(x)
    return whole + (x - whole > uniform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def quantized_gradient_dot(
    bits: int, x: jax.Array, w: jax.Array, transpose_w: bool = False
) -> jax.Array:
    """`x[..., m, k] @ w[..., k, n]` of whole floats that are int8; see `_backward`."""
    return float_dot(x, w, transpose_w)


def _forward(bits, x, w, transpose_w):
    return float_dot(x, w, transpose_w), (x, w)


def _backward(bits, transpose_w, residuals, g):
    """`dx = g w^T` with a scale for each row of g, `dw = x^T g` with one for each column."""
    x, w = residuals
    columns = jnp.swapaxes(w, -1, -2) if transpose_w else w
    dx = _times(bits, g, jnp.swapaxes(columns, -1, -2))
    turned = _times(bits, jnp.swapaxes(g, -1, -2), x)  # [..., n, k]
    return dx.astype(x.dtype), (turned if transpose_w else jnp.swapaxes(turned, -1, -2)).astype(
        w.dtype
    )


quantized_gradient_dot.defvjp(_forward, _backward)


def _times(bits: int, g: jax.Array, codes: jax.Array) -> jax.Array:
    """`g[..., a, b] @ codes[..., b, c]`, each row of `g` rounded with its own scale."""
    k = g.shape[-1]
    if k > MAX_K:
        raise ValueError(f"gradients in {bits} bits are summed over at most {MAX_K}; got {k}")
    rounded, scale = _rounded(bits, g, (-1,))
    product = int8_matmul(rounded.astype(jnp.int8), codes.astype(jnp.int8))
    return product.astype(jnp.float32) * scale


def _rounded(bits: int, g: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Whole floats of `bits` bits and their scale, one for all along `axes`."""
    high = 2 ** (bits - 1) - 1
    g = g.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(g), axes, keepdims=True, initial=0.0), high)
    rounded = jnp.clip(stochastic_round(g / scale), -high, high)
    return jnp.where(jnp.isfinite(rounded), rounded, 0.0), scale


def quantized_gradient_convolution(
    bits: int,
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    batch: int,
    feature: int,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """`convolve(x, w)`; its gradients are convolved as whole floats.

    XLA's convolutions of integers are several times slower on a CPU. The gradient to `x`
    has a scale for each example, that to `w` one for each feature; `batch` and `feature` are
    their dimensions in the result.
    """

    @jax.custom_vjp
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return convolve(x, w)

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return convolve(x, w), (x, w)

    def backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
        back = jax.vjp(convolve, *residuals)[1]

        def rounded(kept: int) -> jax.Array:
            codes, scale = _rounded(bits, g, [d for d in range(g.ndim) if d != kept])
            return (codes * scale).astype(g.dtype)

        return back(rounded(batch))[0], back(rounded(feature))[1]

    run.defvjp(forward, backward)
    return run(x, w)
