"""`RotatedArray`: a compressed array whose input features were rotated before rounding."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._granularity import Axes

__all__ = ["RotatedArray", "mix", "rotation"]

_LARGEST = 32  # of the factors that a power of two is cut into


class RotatedArray(CompressedArray):
    """An array of `x ~ diag(signs) Q array`, along the axes that a product contracts.

    `Q` is the orthogonal matrix of `mix`, `array` is another compressed array, and `signs`
    has its rank, size 1 along the axes of the outputs. A product rotates the activations,
    `((x signs) Q) @ array`, so that the weight stays small and the activations, whose
    outliers the rotation spreads over all features, are quantized after it. `axes` are the
    contracted ones, negative, in the order in which their features are merged.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
    >>> jc.quantize.rotate(lambda p, x: x @ p["w"], params, [x], {"w": jc.quantize.w4a4()})["w"]
    RotatedArray(QuantizedArray(int4[8,4] as float32, axis=(-2,), path='w'))
    """

    array: Any
    signs: Any
    axes: Axes = eqx.field(static=True, kw_only=True)
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.array.shape, self.array.dtype)

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        dense = self.array.materialise()
        back = mix(dense.astype(jnp.float32), self.axes) * self.signs
        return back.astype(dense.dtype)

    def lowered(self) -> jax.Array:
        self.note("expand", "-", "materialised", "no rule for rotated input features")
        return self.materialise()

    def __repr__(self) -> str:
        return f"RotatedArray({self.array!r})"


def mix(x: jax.Array, axes: Axes) -> jax.Array:
    """`x Q` along `axes`, whose features are merged in this order.

    With `k = m 2^a` features, `m` odd, `Q = hartley(m) (x) hadamard(2^a)`: a Kronecker
    product, symmetric and its own inverse. Small factors go one after the other, which
    costs `k (m + 32 ceil(a / 5))` multiplications a row at most, not `k^2`.
    """
    dims = [a % x.ndim for a in axes]
    order = [d for d in range(x.ndim) if d not in dims] + dims
    turned = lax.transpose(x, order)
    k = math.prod(x.shape[d] for d in dims)
    rows = turned.reshape(-1, k).astype(jnp.promote_types(x.dtype, jnp.float32))
    done = 1
    for size in _factors(k):
        parts = rows.reshape(-1, done, size, k // (done * size))
        q = jnp.asarray(_block(size), rows.dtype)
        parts = jnp.einsum("rdsk,st->rdtk", parts, q, precision=lax.Precision.HIGHEST)
        rows, done = parts.reshape(-1, k), done * size
    back = rows.reshape(turned.shape).astype(x.dtype)
    return lax.transpose(back, [order.index(d) for d in range(x.ndim)])


def rotation(k: int) -> np.ndarray:
    """The matrix `Q[k, k]` of `mix`, in float64."""
    q = np.ones((1, 1))
    for size in _factors(k):
        q = np.kron(q, _block(size))
    return q


def _factors(k: int) -> list[int]:
    power = k & -k
    sizes = [k // power] if k > power else []
    while power > 1:
        sizes.append(min(power, _LARGEST))
        power //= sizes[-1]
    return sizes


def _block(size: int) -> np.ndarray:
    """Hadamard's matrix of Sylvester for powers of two, else Hartley's; orthogonal."""
    i = np.arange(size)
    if size & (size - 1):
        angle = 2 * np.pi * (np.outer(i, i) % size) / size
        return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)
    odd = np.array([[bin(a & b).count("1") % 2 for a in i] for b in i])
    return (1.0 - 2.0 * odd) / np.sqrt(size)
