"""`FakeQuantArray`: the float twin of `QuantizedArray`, for training."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxcompress._quax import differentiated_inside
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray, store
from jaxcompress.arrays._rounding import absmax_scale, encode, minmax_scale

__all__ = ["FakeQuantArray"]


class FakeQuantArray(CompressedArray):
    """A float weight that acts as if it were quantized, and trains.

    The forward pass sees the codes and scales that `jaxcompress.quantize.convert`
    will store; the gradient passes straight through the rounding. `weight` is the
    trained parameter. `scale` is a trained leaf (LSQ), or None: then it follows the
    weight's absolute maximum, as a constant to the gradient. `act_scale` is the static
    scale of the activations, trained too, or None where it is dynamic or there is none;
    `act_offset` goes with it where they are asymmetric.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.ones((4, 2))}, {"w": jc.quantize.w8a8()})
    >>> params["w"]
    FakeQuantArray(int8[4,2] as float32, axis=(-2,), path='w')
    """

    weight: Any
    scale: Any = None
    act_scale: Any = None
    act_offset: Any = None
    qtype: IntType = eqx.field(static=True, kw_only=True)
    axis: Axes = eqx.field(static=True, kw_only=True)
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.weight.shape, self.weight.dtype)

    def _codes(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Float codes, scales and zero points, as training sees them."""
        scale, zero = self.scale, None
        if scale is None and self.qtype.symmetric:
            scale = absmax_scale(self.weight, self.axis, self.group_size, self.qtype)
        elif scale is None:
            scale, zero = minmax_scale(self.weight, self.axis, self.group_size, self.qtype)
        if self.scale is None:  # a statistic of the weight, not something to descend on
            scale = jax.lax.stop_gradient(scale)
        codes = encode(self.weight, scale, zero, self.qtype, self.axis, self.group_size)
        return codes, scale, zero

    def simulate(self) -> QuantizedArray:
        """The array that `convert` would store, its codes as floats with a gradient."""
        if differentiated_inside(self):
            raise TypeError(
                f"{self.path or 'a FakeQuantArray'} is differentiated inside accelerate, where "
                "the gradients of its scales would be lost. Differentiate outside: "
                "jax.grad(loss) with jc.accelerate(model) inside the loss."
            )
        codes, scale, zero = self._codes()
        return QuantizedArray(codes, scale, zero, self.act_scale, self.act_offset, **self._static())

    def lowered(self) -> QuantizedArray:
        return self.simulate()

    def convert(self) -> QuantizedArray:
        """The `QuantizedArray` that training has simulated."""
        codes, scale, zero = self._codes()
        return store(codes, scale, zero, self.act_scale, self.act_offset, **self._static())

    def _static(self) -> dict[str, Any]:
        return dict(
            qtype=self.qtype,
            axis=self.axis,
            group_size=self.group_size,
            act=self.act,
            float_dtype=np.dtype(self.weight.dtype),
            path=self.path,
        )

    def materialise(self) -> jax.Array:
        """The dense weight after rounding, with the straight-through gradient."""
        return self.simulate().materialise()

    def __repr__(self) -> str:
        shape = getattr(self.weight, "shape", None)
        if shape is None:  # a tree of labels or specs in the shape of this array
            return f"FakeQuantArray(weight={self.weight}, scale={self.scale})"
        group = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"FakeQuantArray({self.qtype.name}[{','.join(map(str, shape))}] as "
            f"{np.dtype(self.weight.dtype).name}, axis={self.axis}{group}, path={self.path!r})"
        )
