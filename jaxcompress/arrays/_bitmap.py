"""`BitmapSparseArray`: one bit for each weight, and the values of those that are kept."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._codebook import CodebookArray, codebook_array
from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._packing import unpack
from jaxcompress.arrays._qtype import Activation, QType
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._sparse import SparseArray, codes_or_floats, fields_of, stored

__all__ = ["BitmapSparseArray", "bitmap_of"]


class BitmapSparseArray(SparseArray):
    """A sparse array of any pattern: a bitmap, and the kept values in row-major order.

    Invariants:

    - `bitmap` is uint8 `[..., ceil(size / 8)]`, one bit for each element of `core`, the
      trailing shape that is flattened, lowest bit first; leading axes (layers, experts)
      stay axes of every leaf, so slices are valid arrays.
    - `values` is `[..., kept]`: floats; or a `CodebookArray` of them; or with a `qtype` int8
      codes, bit-packed below eight bits. Where leading indices keep different numbers, the
      rest is padding.
    - `scale`, `act_scale`, `act_offset` are those of the `QuantizedArray` of the codes;
      a dropped element is exactly 0.

    `jaxcompress.accelerate` puts the zeros back, in integers where the values are quantized,
    and multiplies that. `jaxcompress.prepack` orders the values by columns, once, for a
    product of what is kept.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.diag(jnp.arange(1.0, 9.0))
    >>> jc.prune.pack({"w": w}, {"w": w != 0})["w"].nbytes
    40
    """

    bitmap: Any
    values: Any
    scale: Any = None
    act_scale: Any = None
    act_offset: Any = None
    core: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    kept: int = eqx.field(static=True, kw_only=True)
    qtype: QType | None = eqx.field(static=True, kw_only=True, default=None)
    axis: Axes = eqx.field(static=True, kw_only=True, default=())
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray((*self.bitmap.shape[:-1], *self.core), self.float_dtype)

    def mask(self) -> jax.Array:
        """True where an element is kept."""
        bits = jnp.unpackbits(self.bitmap, axis=-1, bitorder="little")
        return bits[..., : math.prod(self.core)].reshape(self.shape).astype(bool)

    def dense(self) -> jax.Array:
        """Values or codes in the logical shape, zeros put back."""
        values = self.values
        if isinstance(values, CodebookArray):
            values = values.materialise()
        elif self.qtype is not None and self.qtype.bits < 8:
            values = unpack(values, self.qtype.bits, self.kept, -1)
        scatter = _scatter
        for _ in self.bitmap.shape[:-1]:
            scatter = jax.vmap(scatter)
        return scatter(self.bitmap, values)[..., : math.prod(self.core)].reshape(self.shape)

    def planes(self) -> dict[str, tuple[int, int]]:
        return {**super().planes(), "bitmap": (1, -1)}

    def lowered(self) -> QuantizedArray | jax.Array:
        why = "zeros are put back at every call (jc.prepack does it once, or needs none)"
        self.note("expand", "bitmap", "reference", why)
        return self.expanded()

    def __repr__(self) -> str:
        if not hasattr(self.bitmap, "shape"):  # a tree of labels or specs in its shape
            return f"BitmapSparseArray(bitmap={self.bitmap}, values={self.values})"
        kind = self.qtype.name if self.qtype else self.float_dtype.name
        if isinstance(self.values, CodebookArray):
            kind = f"{self.values.codebook.shape[-1]} x {kind}"
        density = self.kept / max(1, math.prod(self.core))
        return (
            f"BitmapSparseArray({kind}[{','.join(map(str, self.shape))}], "
            f"{1 - density:.1%} zeros, path={self.path!r})"
        )


def _scatter(bitmap: jax.Array, values: jax.Array) -> jax.Array:
    """`values` to where the bits of `bitmap` are set, 0 elsewhere."""
    if values.size == 0:
        return jnp.zeros(bitmap.size * 8, values.dtype)
    ones = jax.lax.population_count(bitmap).astype(jnp.int32)
    before = jnp.cumsum(ones) - ones  # kept in earlier bytes
    places = jnp.arange(8, dtype=jnp.uint8)
    below = (jnp.uint8(1) << places) - jnp.uint8(1)
    rank = before[:, None] + jax.lax.population_count(bitmap[:, None] & below).astype(jnp.int32)
    bit = (bitmap[:, None] >> places) & 1
    found = jnp.take(values, rank, mode="clip")
    return jnp.where(bit == 1, found, jnp.zeros((), values.dtype)).reshape(-1)


def bitmap_of(
    array: jax.Array | QuantizedArray | CodebookArray, mask: jax.Array, leading: int, path: str
) -> BitmapSparseArray:
    """`array` where `mask` keeps it, as a `BitmapSparseArray`; outside `jit`.

    Codes that are zero anyway are dropped too. The first `leading` axes stay axes, or those
    that have a codebook of their own.
    """
    keep = np.asarray(mask)
    if isinstance(array, CodebookArray):
        leading, first = array.indices.ndim - 1, int(array.zero)
        values = np.asarray(array.codes()).reshape(array.shape)
        keep = keep & (values >= first)
    else:
        values = codes_or_floats(array, path)
        keep = keep & (values != 0)
    lead, core = values.shape[:leading], values.shape[leading:]
    size, rows = math.prod(core), math.prod(lead)
    values, keep = values.reshape(rows, size), keep.reshape(rows, size)
    bitmap = np.packbits(keep, axis=-1, bitorder="little")
    kept = int(keep.sum(-1).max(initial=0))
    packed = np.zeros((rows, kept), values.dtype)
    for row in range(rows):
        found = values[row, keep[row]]
        packed[row, : found.size] = found
    bits = jnp.asarray(bitmap.reshape(*lead, bitmap.shape[-1]))
    packed = packed.reshape(*lead, kept)
    if isinstance(array, CodebookArray):
        # Index 0 was that of the zeros, which the bitmap has now.
        codes = np.maximum(packed, first) - first
        shared = codebook_array(array.codebook, codes, (kept,), array.bits, path=path)
        return BitmapSparseArray(
            bits, shared, core=core, kept=kept, float_dtype=array.float_dtype, path=path
        )
    return BitmapSparseArray(
        bits, stored(packed, array, -1), core=core, kept=kept, path=path, **fields_of(array)
    )
