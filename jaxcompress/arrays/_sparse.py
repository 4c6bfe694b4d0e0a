"""What the sparse containers share: kept values that may be the codes of a quantized array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._packing import pack
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._quantized import QuantizedArray, replace

__all__ = ["SparseArray", "codes_or_floats", "fields_of", "stored"]


class SparseArray(CompressedArray):
    """Base of the containers that store kept values only.

    A subclass has `dense()`, values or codes in the logical shape, and the fields of the
    `QuantizedArray` that the codes belong to: `scale`, `act_scale`, `act_offset`, and the
    static `qtype` (None for floats), `axis`, `group_size`, `act`, `float_dtype`.
    """

    @property
    def packed_axis(self) -> int:
        """The axis of `values` that bit planes lie along."""
        return -1

    def expanded(self) -> QuantizedArray | jax.Array:
        """The same array with its zeros put back, integers where it is quantized."""
        array: Any = self
        if array.qtype is None:
            return array.dense().astype(array.float_dtype)
        return QuantizedArray(
            array.dense(),
            array.scale,
            None,
            array.act_scale,
            array.act_offset,
            qtype=array.qtype,
            axis=array.axis,
            group_size=array.group_size,
            act=array.act,
            float_dtype=array.float_dtype,
            path=array.path,
        )

    def planes(self) -> dict[str, tuple[int, int]]:
        array: Any = self
        packed = array.qtype is not None and array.qtype.bits < 8
        return {"values": (array.qtype.bits, array.packed_axis)} if packed else {}

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        return _dense(replace(self, path=""))


@functools.partial(jax.jit, inline=True)  # as `QuantizedArray.materialise` is
def _dense(array: SparseArray) -> jax.Array:
    full = array.expanded()
    return full.materialise() if isinstance(full, QuantizedArray) else full


def codes_or_floats(array: jax.Array | QuantizedArray, path: str) -> np.ndarray:
    """What a sparse container may hold of `array`: its floats, or its integer codes."""
    if not isinstance(array, QuantizedArray):
        return np.asarray(array)
    if not isinstance(array.qtype, IntType):
        raise TypeError(f"sparse arrays hold integers; {path!r} is {array.qtype.name}")
    return np.asarray(array.codes())


def stored(kept: np.ndarray, array: jax.Array | QuantizedArray, axis: int) -> jax.Array:
    """Kept values as they are stored, codes below eight bits as bit planes along `axis`."""
    if isinstance(array, QuantizedArray) and array.qtype.bits < 8:
        return pack(jnp.asarray(kept), array.qtype.bits, axis)
    return jnp.asarray(kept)


def fields_of(array: jax.Array | QuantizedArray) -> dict[str, Any]:
    """The fields of a sparse container that come from the array it is made of."""
    if not isinstance(array, QuantizedArray):
        return {"float_dtype": np.dtype(array.dtype)}
    names = ("scale", "act_scale", "act_offset", "qtype", "axis", "group_size", "act")
    return {name: getattr(array, name) for name in (*names, "float_dtype")}
