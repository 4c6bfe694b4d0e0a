"""`PrepackedArray`: a quantized weight whose bytes lie as this platform's kernels want them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._matrix import Form, MatrixArray, form
from jaxcompress.arrays._packing import pack
from jaxcompress.arrays._panels import from_panels, to_panels
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray, replace
from jaxcompress.arrays._reshape import reshape

__all__ = ["PrepackedArray", "matrix_of", "prepack_array", "reshaped"]


class PrepackedArray(MatrixArray):
    """A `QuantizedArray` with the same values in another order; `jaxcompress.prepack` makes it.

    It is the matrix of one product: the contracted axes of the original are one `k`, those
    with scales of their own one `n`, and axes before both (layers, experts) lead, as in the
    original, so that a slice of every leaf under `lax.scan` or `jax.vmap` is again valid.

    - `values` are uint8 panels `[..., n / 16, rows / 4, 16, 4]`.
    - `scale`, `zero_point` and `act_scale` are those of the matrix: `[..., g, n]`, or
      `[..., n, g]` with `transpose_w`.
    - `dims` is the logical shape without what leads, `contracted` the number of its axes
      that are `k`: the last ones with `transpose_w`, else the first.

    A product over exactly `k` runs as it is. For anything else the array is put back into
    the order of a `QuantizedArray` first, each time; `jaxcompress.explain` shows where.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> q = jc.quantize.quantize({"w": jnp.ones((128, 64))}, {"w": jc.quantize.int4()})["w"]
    >>> p = jc.prepack({"w": q})["w"]
    >>> p.shape, bool((p.materialise() == q.materialise()).all())
    ((128, 64), True)
    """

    values: Any
    scale: Any
    zero_point: Any = None
    act_scale: Any = None
    qtype: IntType = eqx.field(static=True, kw_only=True)
    axis: Axes = eqx.field(static=True, kw_only=True)
    group_size: int | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    dims: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    contracted: int = eqx.field(static=True, kw_only=True)
    transpose_w: bool = eqx.field(static=True, kw_only=True)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-4])

    def canonical(self) -> QuantizedArray:
        """The same array in the order that files have."""
        matrix = self._matrix()
        whole = reshaped(matrix, (*self.lead, *self.dims))
        assert whole is not None, "prepack_array has seen that it can be taken apart"
        if self.qtype.bits < 8 and whole.packed is None:
            axis = whole.axis[-1]
            packed = pack(whole.values, self.qtype.bits, axis)
            whole = replace(whole, values=packed, packed=whole.shape[axis])
        return whole

    def _matrix(self) -> QuantizedArray:
        values = from_panels(
            self.values, self.qtype.bits, self.k, self.n, transpose_w=self.transpose_w
        )
        return QuantizedArray(
            values,
            self.scale,
            self.zero_point,
            self.act_scale,
            qtype=self.qtype,
            axis=self.axis,
            group_size=self._group_sizes(),
            act=self.act,
            packed=None if self.qtype.bits == 8 else self.k,
            float_dtype=self.float_dtype,
            path=self.path,
        )

    def _group_sizes(self) -> Axes | None:
        """As a `QuantizedArray` has them, one for each of `axis`."""
        along = -1 if self.transpose_w else -2
        if self.group_size is None:
            return None
        return tuple(self.group_size if a == along else 1 for a in self.axis)

    def transposed(self) -> "PrepackedArray":
        """The bytes stay where they are."""
        turn = lambda s: None if s is None else jnp.swapaxes(s, -1, -2)
        return replace(
            self,
            scale=turn(self.scale),
            zero_point=turn(self.zero_point),
            act_scale=turn(self.act_scale),
            axis=tuple(-3 - a for a in self.axis),
            dims=self.dims[::-1],
            transpose_w=not self.transpose_w,
        )

    def stored(self) -> QuantizedArray:
        return self.canonical()

    def lowered(self) -> QuantizedArray:
        why = "no form of it in the kernels' order: put back at every call"
        self.note("prepacked", "-", "unpacked", why)
        return self.canonical()

    def materialise(self) -> jax.Array:
        return self.canonical().materialise()

    def __repr__(self) -> str:
        shape = getattr(self.values, "shape", None)
        if shape is None:  # a tree of labels or specs in the shape of this array
            return f"PrepackedArray(values={self.values}, scale={self.scale})"
        size = ",".join(map(str, self.shape))
        return (
            f"PrepackedArray({self.qtype.name}[{size}] as {self.float_dtype.name}, "
            f"path={self.path!r})"
        )


def prepack_array(q: QuantizedArray) -> "PrepackedArray | str":
    """`q` in panels, or why it stays as it is."""
    if not isinstance(q.qtype, IntType):
        return f"{q.qtype.name} has no native product"
    if not np.issubdtype(q.values.dtype, np.integer):
        return "a training step's codes are floats"
    if q.act is not None and not (q.act.qtype.integer and q.act.qtype.symmetric):
        return "the native product takes symmetric integers as activations"
    found = matrix_of(q)
    if isinstance(found, str):
        return found
    matrix, (lead, contracted, k, _, transpose_w) = found
    along = -1 if transpose_w else -2
    sizes = dict(zip(matrix.axis, matrix.group_size or ()))
    if any(size > 1 and a != along for a, size in sizes.items()):
        return "columns share scales by groups"
    if q.qtype.bits < 8 and matrix.axis[-1] != along:
        return "its bit planes do not run along what is contracted"
    if q.qtype.bits < 8 and matrix.packed is None:
        values = pack(matrix.values, q.qtype.bits, along)
        matrix = replace(matrix, values=values, packed=k)
    return PrepackedArray(
        to_panels(matrix.values, transpose_w=transpose_w),
        matrix.scale,
        matrix.zero_point,
        matrix.act_scale,
        qtype=q.qtype,
        axis=matrix.axis,
        group_size=sizes.get(along),
        act=q.act,
        dims=q.shape[lead:],
        contracted=contracted,
        transpose_w=transpose_w,
        float_dtype=q.float_dtype,
        path=q.path,
    )


def matrix_of(q: QuantizedArray) -> tuple[QuantizedArray, Form] | str:
    """`q` as the matrices `[..., k, n]` or `[..., n, k]` of its product, or why it has none."""
    if not q.axis or q.size == 0:
        return "no axis shares a scale, so none is known to be contracted"
    contract = _contracted(q)
    if isinstance(contract, str):
        return contract
    found = form(q.shape, contract)
    if isinstance(found, str):
        return found
    why = "its scales do not follow the axes that a product merges"
    matrix = reshaped(q, (*q.shape[: found.lead], *found.matrix))
    if matrix is None:
        return why
    back = jax.eval_shape(lambda m: reshaped(m, q.shape), matrix)
    if back is None or (back.axis, back.group_size) != (q.axis, q.group_size):
        return why
    return matrix, found


def reshaped(q: QuantizedArray, shape: tuple[int, ...]) -> QuantizedArray | None:
    """`q` in a shape that most often is its own; axes of size one then keep their meaning."""
    return q if q.shape == shape else reshape(q, shape)


def _contracted(q: QuantizedArray) -> list[int] | str:
    """The axes that a product will contract.

    They are the axes that share scales; where these are all the axes of a matrix, the first
    of the two, as `jaxcompress.quantize.quantize` assumes without a layout.
    """
    if q.ndim == 1:
        return "it has no columns: every axis is contracted"
    axes = sorted(a % q.ndim for a in q.axis)
    if len(axes) < q.ndim:
        return axes
    if q.ndim != 2:
        return "all its axes share scales, so none is known to be contracted"
    return [0]
