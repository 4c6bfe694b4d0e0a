"""`NMSparseArray`: `n` values of every `m` neighbours, and where among them they are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._packing import pack, unpack
from jaxcompress.arrays._qtype import Activation, QType
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._sparse import SparseArray, codes_or_floats, fields_of, stored

__all__ = ["NMSparseArray", "fill", "index_bits", "nm_of"]


class NMSparseArray(SparseArray):
    """An array that keeps `n` of every `m` neighbours along one axis.

    Invariants:

    - `values` has the logical shape, but `size / m * n` along the negative axis `along`:
      floats; or with a `qtype` int8 codes, bit-packed below eight bits along `along`.
    - `indices` says which of the `m` places each value has, in `ceil(log2 m)` bits, as
      uint8 bit planes along `along`. Places of a group differ; a group that keeps fewer
      than `n` has zeros among its values.
    - `scale`, `act_scale`, `act_offset` are those of the `QuantizedArray` of the codes.
    - Leading axes (layers, experts) are axes of every leaf, so slices are valid arrays.

    In `jaxcompress.accelerate` a product over `along` is that of `jaxcompress.ops.nm_matmul`,
    where that has a kernel, if activations are quantized too; for anything else the zeros
    are put back, in integers where the values are quantized.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.arange(1.0, 257.0).reshape(64, 4)
    >>> half = jc.prune.nm(2, 4, axis=-2)
    >>> packed = jc.prune.pack({"w": w}, jc.prune.mask({"w": w}, half, 1.0), pattern=half)["w"]
    >>> packed, packed.nbytes, w.nbytes  # 32 floats and 32 pairs of bits a column, padded to 64
    (NMSparseArray(float32[64,4], 2:4 along -2, path='w'), 576, 1024)

    Mishra et al., 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378.
    """

    values: Any
    indices: Any
    scale: Any = None
    act_scale: Any = None
    act_offset: Any = None
    n: int = eqx.field(static=True, kw_only=True)
    m: int = eqx.field(static=True, kw_only=True)
    along: int = eqx.field(static=True, kw_only=True)
    length: int = eqx.field(static=True, kw_only=True)
    qtype: QType | None = eqx.field(static=True, kw_only=True, default=None)
    axis: Axes = eqx.field(static=True, kw_only=True, default=())
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        shape = list(self.values.shape)
        shape[self.along] = self.length
        return jax.core.ShapedArray(tuple(shape), self.float_dtype)

    def dense(self) -> jax.Array:
        """Values or codes in the logical shape, zeros put back."""
        values = self.values
        if self.qtype is not None and self.qtype.bits < 8:
            kept = self.length // self.m * self.n
            values = unpack(values, self.qtype.bits, kept, self.along)
        return fill(values, self.indices, self.n, self.m, self.length, self.along)

    @property
    def packed_axis(self) -> int:
        return self.along

    def planes(self) -> dict[str, tuple[int, int]]:
        return {**super().planes(), "indices": (index_bits(self.m), self.along)}

    def lowered(self) -> QuantizedArray | jax.Array:
        why = f"zeros are put back: only a plain product is one of {self.n}:{self.m}"
        self.note("expand", "nm", "reference", why)
        return self.expanded()

    def __repr__(self) -> str:
        if not hasattr(self.values, "shape"):  # a tree of labels or specs in its shape
            return f"NMSparseArray(values={self.values}, indices={self.indices})"
        kind = self.qtype.name if self.qtype else self.float_dtype.name
        size = ",".join(map(str, self.shape))
        return (
            f"NMSparseArray({kind}[{size}], {self.n}:{self.m} along {self.along}, "
            f"path={self.path!r})"
        )


def fill(
    values: jax.Array, indices: jax.Array, n: int, m: int, length: int, along: int
) -> jax.Array:
    """The array of `length` along `along`, zeros put back between the kept values."""
    groups, bits = length // m, index_bits(m)
    places = unpack(indices, bits, groups * n, along) & (2**bits - 1)  # no sign
    d = along % values.ndim
    lead, trail = values.shape[:d], values.shape[d + 1 :]
    apart = lambda x: x.reshape(*lead, groups, n, *trail)
    values, places = apart(values), apart(places)
    place = jnp.arange(m, dtype=places.dtype).reshape(-1, *(1 for _ in trail))
    out = jnp.zeros((*lead, groups, m, *trail), values.dtype)
    for j in range(n):
        one = lambda x, j=j: jax.lax.slice_in_dim(x, j, j + 1, axis=d + 1)
        out = jnp.where(one(places) == place, one(values), out)
    return out.reshape(*lead, length, *trail)


def index_bits(m: int) -> int:
    """Bits that a place among `m` takes."""
    return max(1, (m - 1).bit_length())


def nm_of(
    array: jax.Array | QuantizedArray, mask: jax.Array, n: int, m: int, along: int, path: str
) -> NMSparseArray:
    """`array` where `mask` keeps it, as an `NMSparseArray`; outside `jit`.

    Raises `ValueError` if a group keeps more than `n`, or `m` does not divide the axis.
    """
    if m > 128:
        raise ValueError(f"an NMSparseArray has groups of up to 128; got {n}:{m}")
    values = codes_or_floats(array, path)
    along = along % values.ndim - values.ndim
    length = values.shape[along]
    if length % m:
        raise ValueError(
            f"{path!r} has {length} weights along axis {along}; {m} does not divide it"
        )
    groups = lambda a: np.moveaxis(a, along, -1).reshape(*_without(a.shape, along), -1, m)
    keep, rows = groups(np.asarray(mask)), groups(values)
    if (keep.sum(-1) > n).any():
        where = tuple(int(i) for i in np.argwhere(keep.sum(-1) > n)[0])
        raise ValueError(
            f"the mask of {path!r} does not fit {n}:{m} along axis {along}: it keeps "
            f"{int(keep[where].sum())} of the {m} from index {where[-1] * m} on, at "
            f"{where[:-1]} of the other axes"
        )
    keep = keep & (rows != 0)
    # Kept places first, in order; places with zeros fill up.
    order = np.argsort(~keep, -1, kind="stable")[..., :n]
    rows = np.where(keep, rows, 0)
    back = lambda a: np.moveaxis(a.reshape(*a.shape[:-2], -1), -1, along)
    kept = back(np.take_along_axis(rows, order, -1))
    indices = pack(jnp.asarray(back(order).astype(np.int8)), index_bits(m), along)
    static: dict[str, Any] = dict(n=n, m=m, along=along, length=length, path=path)
    return NMSparseArray(stored(kept, array, along), indices, **static, **fields_of(array))


def _without(shape: tuple[int, ...], along: int) -> tuple[int, ...]:
    return shape[:along] + shape[along % len(shape) + 1 :]
