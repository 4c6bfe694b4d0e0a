"""`FakeQuantArray`: the float twin of `QuantizedArray`, for training."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._quax import differentiated_inside
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._fit import Fit, covers, fit
from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._qtype import Activation, QType
from jaxcompress.arrays._quantized import QuantizedArray, encode_with, store
from jaxcompress.arrays._rounding import scale_gradient

__all__ = ["FakeQuantArray"]


class FakeQuantArray(CompressedArray):
    """A float weight that acts as if it were quantized, and trains.

    The forward pass sees the codes and scales that `jaxcompress.quantize.convert`
    will store; the gradient passes straight through the rounding. `weight` is the
    trained parameter. `scale` is a trained leaf (LSQ), or None: then it follows the
    weight's absolute maximum, as a constant to the gradient. `act_scale` is the static
    scale of the activations, trained too, or None where it is dynamic or there is none;
    `act_offset` goes with it where they are asymmetric. `act_clip` stands for both where
    clipping is learned: activations go from 0 to it (PACT). So they do, up to the largest
    code, where they are asymmetric without an `act_offset` (LSQ).

    With `gradient_scale` the gradients of the scales are multiplied by `1 / sqrt(N Q)`
    (LSQ); with `through_tanh` it is the weight's tanh that is quantized (DoReFa).

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.ones((4, 2))}, {"w": jc.quantize.w8a8()})
    >>> params["w"]
    FakeQuantArray(int8[4,2] as float32, axis=(-2,), path='w')
    """

    weight: Any
    scale: Any = None
    act_scale: Any = None
    act_offset: Any = None
    act_clip: Any = None
    qtype: QType = eqx.field(static=True, kw_only=True)
    axis: Axes = eqx.field(static=True, kw_only=True)
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    gradient_scale: bool = eqx.field(static=True, kw_only=True, default=False)
    through_tanh: bool = eqx.field(static=True, kw_only=True, default=False)
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.weight.shape, self.weight.dtype)

    def _numbers(self) -> tuple[jax.Array, Fit]:
        """Numbers of the format, and their scales, as training sees them."""
        weight = self.weight
        if self.through_tanh:
            weight = jnp.tanh(weight.astype(jnp.float32))
        if self.scale is not None:
            found = Fit(self._damped(self.scale, self.weight.size / self.scale.size, self.qtype))
        else:  # a statistic of the weight, not something to descend on
            found = fit(weight, self.axis, self.group_size, self.qtype)
            found = jax.lax.stop_gradient(found)
        covered = self.scale is None and covers(self.qtype)
        numbers = encode_with(found, weight, self.qtype, self.axis, self.group_size, covered)
        return numbers, found

    def _act(self) -> tuple[jax.Array | None, jax.Array | None]:
        """The static scale and offset of the activations."""
        if self.act is None:
            return None, None
        if self.act_clip is not None:
            steps = self.act.qtype.high - self.act.qtype.low
            scale = self.act_clip * jnp.float32(1 / steps)
            return scale, -self.act.qtype.low * scale
        features = math.prod(self.weight.shape[a] for a in self.axis)
        damp = lambda x: None if x is None else self._damped(x, features, self.act.qtype)
        scale, offset = damp(self.act_scale), damp(self.act_offset)
        if scale is not None and offset is None and not self.act.qtype.symmetric:
            offset = -self.act.qtype.low * scale  # the lowest code stands for zero
        return scale, offset

    def _damped(self, x: jax.Array, count: float, qtype: QType) -> jax.Array:
        if not self.gradient_scale:
            return x
        largest = qtype.high if qtype.symmetric else qtype.high - qtype.low
        return scale_gradient(x, 1 / math.sqrt(max(count, 1) * largest))

    def simulate(self) -> QuantizedArray:
        """The array that `convert` would store, its codes as floats with a gradient."""
        if differentiated_inside(self):
            raise TypeError(
                f"{self.path or 'a FakeQuantArray'} is differentiated inside accelerate, where "
                "the gradients of its scales would be lost. Differentiate outside: "
                "jax.grad(loss) with jc.accelerate(model) inside the loss."
            )
        numbers, found = self._numbers()
        return QuantizedArray(
            numbers, found.full(), found.zero_point, *self._act(), **self._static()
        )

    def lowered(self) -> QuantizedArray:
        return self.simulate()

    def convert(self) -> QuantizedArray:
        """The `QuantizedArray` that training has simulated."""
        numbers, found = self._numbers()
        return store(numbers, found, *self._act(), **self._static())

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
