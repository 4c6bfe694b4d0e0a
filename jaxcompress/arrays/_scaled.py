"""`ScaledArray`: a compressed array whose input features were scaled before rounding."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxcompress.arrays._base import CompressedArray

__all__ = ["ScaledArray"]


class ScaledArray(CompressedArray):
    """An array of `x ~ array * scale`, with a scale for each index that a product contracts.

    `array` is another compressed array and `scale` has its rank, size 1 along the axes of
    the outputs. A product multiplies the activations by `scale`, `(x * scale) @ array`,
    so that the weight stays small and the activations are quantized after it.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8)).at[:, 3].set(100.0)
    >>> rules = {"w": jc.quantize.w8a8()}
    >>> jc.quantize.smoothquant(lambda p, x: x @ p["w"], params, [x], rules)["w"]
    ScaledArray(QuantizedArray(int8[8,4] as float32, axis=(-2,), path='w'))
    """

    array: Any
    scale: Any
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.array.shape, self.array.dtype)

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        dense = self.array.materialise()
        return (dense.astype(jnp.float32) * self.scale).astype(dense.dtype)

    def lowered(self) -> jax.Array:
        self.note("expand", "-", "materialised", "no rule for scaled input features")
        return self.materialise()

    def __repr__(self) -> str:
        return f"ScaledArray({self.array!r})"
