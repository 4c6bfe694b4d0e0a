"""`QuantizedArray`: codes of a few bits and their scales, standing for floats."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._fit import Fit, fit
from jaxcompress.arrays._formats import TernaryType
from jaxcompress.arrays._granularity import Axes, expand
from jaxcompress.arrays._packing import pack, unpack
from jaxcompress.arrays._qtype import Activation, QType
from jaxcompress.arrays._rounding import encode, encode_through

__all__ = ["QuantizedArray", "encode_with", "quantize_array", "replace", "store"]


class QuantizedArray(CompressedArray):
    """An array of `x ~ (decode(values) - zero_point) * scale`.

    `qtype` says what a code stands for; integers stand for themselves.

    Invariants, which every view and slice keeps:

    - `values` are int8 codes of the logical shape; or, if `packed` is set, uint8 bit
      planes along `packed_axis`, whose logical size is `packed`; or, inside a training
      step, the decoded float32 numbers, which carry a straight-through gradient.
    - `scale` (and `zero_point`, int8, or None) has the rank of `values`: size 1 along
      the axes in `axis`, one entry a group with `group_size`, and the full size along
      every other axis, so that leading layer and expert axes slice all leaves alike.
    - `scale` is float32, or of eight bits in block formats, and then `outer_scale`, float32
      and without groups, may be a factor of it.
    - `axis` is negative; shapes are read from the leaves, so `x[i]` under `lax.scan`
      or `jax.vmap` is again a valid array.
    - `act` says how the activations that meet the array are quantized, None leaves
      them in floats; `act_scale` is their static scale, of the rank of `values` with
      size 1 (leading axes apart), or None where the scale is dynamic. `act_offset`, of
      the same shape, is what code 0 stands for where they are asymmetric.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> q = jc.quantize.quantize({"w": jnp.ones((128, 64))}, {"w": jc.quantize.int4()})["w"]
    >>> q.shape, q.values.shape, q.nbytes
    ((128, 64), (64, 64), 4352)
    """

    values: Any
    scale: Any
    zero_point: Any = None
    act_scale: Any = None
    act_offset: Any = None
    outer_scale: Any = None
    qtype: QType = eqx.field(static=True, kw_only=True)
    axis: Axes = eqx.field(static=True, kw_only=True)
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    packed: int | None = eqx.field(static=True, kw_only=True, default=None)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    @property
    def packed_axis(self) -> int:
        """The axis that bit planes and groups run along: the last of `axis`."""
        return self.axis[-1]

    def aval(self) -> jax.core.ShapedArray:
        shape = list(self.values.shape)
        if self.packed is not None:
            shape[self.packed_axis] = self.packed
        return jax.core.ShapedArray(tuple(shape), self.float_dtype)

    def codes(self) -> jax.Array:
        """The codes in the logical shape, unpacked."""
        if self.packed is None:
            return self.values
        return unpack(self.values, self.qtype.bits, self.packed, self.packed_axis)

    def numbers(self) -> jax.Array:
        """What the codes stand for in units of the scale: int8 for integers, else float32."""
        codes = self.codes()
        return codes if jnp.issubdtype(codes.dtype, jnp.floating) else self.qtype.decode(codes)

    def widened(self) -> "QuantizedArray":
        """The same array with all of its scale in `scale`, in float32."""
        scale = Fit(self.scale, outer_scale=self.outer_scale).full()
        return replace(self, scale=scale, outer_scale=None)

    def unpacked(self) -> "QuantizedArray":
        """The same array with one code an element."""
        return replace(self, values=self.codes(), packed=None)

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        return _dense(replace(self, path=""))

    def planes(self) -> dict[str, tuple[int, int]]:
        return {} if self.packed is None else {"values": (self.qtype.bits, self.packed_axis)}

    def __repr__(self) -> str:
        shape = getattr(self.values, "shape", None)
        if shape is None:  # a tree of labels or specs in the shape of this array
            return f"QuantizedArray(values={self.values}, scale={self.scale})"
        size = ",".join(map(str, self.shape))
        group = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"QuantizedArray({self.qtype.name}[{size}] as {self.float_dtype.name}, "
            f"axis={self.axis}{group}, path={self.path!r})"
        )


# Under jit, so that outside of it a new shape is one compilation, and not one an operation;
# without the path, so that layers of one shape share it.
@functools.partial(jax.jit, inline=True)
def _dense(array: QuantizedArray) -> jax.Array:
    codes = array.numbers().astype(jnp.float32)
    if array.zero_point is not None:
        zero = array.zero_point.astype(jnp.float32)
        codes = codes - expand(zero, codes.shape, array.axis, array.group_size)
    scale = expand(array.widened().scale, codes.shape, array.axis, array.group_size)
    return (codes * scale).astype(array.float_dtype)


def replace(array: Any, /, **changes: Any) -> Any:
    """`array` with some fields changed, the others kept."""
    fields = {k: getattr(array, k) for k in array.__dataclass_fields__}
    return type(array)(**{**fields, **changes})


def quantize_array(
    w: jax.Array,
    *,
    qtype: QType,
    axis: Axes,
    group_size: Axes | None = None,
    act: Activation | None = None,
    act_scale: jax.Array | None = None,
    act_offset: jax.Array | None = None,
    path: str = "",
) -> QuantizedArray:
    """Rounds `w` to nearest with the scales that its format takes."""
    found = _nearest(w, act_scale, act_offset, qtype, axis, group_size, act)
    return replace(found, path=path)


@functools.partial(jax.jit, inline=True, static_argnums=(3, 4, 5, 6))
def _nearest(
    w: jax.Array,
    act_scale: jax.Array | None,
    act_offset: jax.Array | None,
    qtype: QType,
    axis: Axes,
    group_size: Axes | None,
    act: Activation | None,
) -> QuantizedArray:
    found = fit(w, axis, group_size, qtype)
    return store(
        encode_with(found, w, qtype, axis, group_size),
        found,
        act_scale,
        act_offset,
        qtype=qtype,
        axis=axis,
        group_size=group_size,
        act=act,
        float_dtype=np.dtype(w.dtype),
    )


def encode_with(
    found: Fit,
    w: jax.Array,
    qtype: QType,
    axis: Axes,
    group_size: Axes | None,
    covered: bool = False,
) -> jax.Array:
    """Numbers of `w` with these scales, and the gradient that the format has in training.

    `covered` says that the scales are constants which no weight exceeds.
    """
    scale = found.full()
    if isinstance(qtype, TernaryType) or qtype.bits == 1:
        divisor = scale if found.divisor is None else found.divisor
        return encode_through(w, divisor, scale, qtype, axis, group_size)
    if covered:
        return encode_through(w, scale, scale, qtype, axis, group_size)
    return encode(w, scale, found.zero_point, qtype, axis, group_size)


def store(
    numbers: jax.Array,
    found: Fit,
    act_scale: jax.Array | None,
    act_offset: jax.Array | None,
    **static: Any,
) -> QuantizedArray:
    """A `QuantizedArray` of `numbers` of its format, bit-packed below eight bits."""
    values, packed = static["qtype"].encode(numbers), None
    bits, axis = static["qtype"].bits, static["axis"]
    if bits < 8 and axis:
        packed = values.shape[axis[-1]]
        values = pack(values, bits, axis[-1])
    return QuantizedArray(
        values,
        found.scale,
        found.zero_point,
        act_scale,
        act_offset,
        found.outer_scale,
        packed=packed,
        **static,
    )
