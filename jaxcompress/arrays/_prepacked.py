"""`PrepackedArray`: a quantized weight whose bytes lie as this platform's kernels want them."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._quax import stop_gradient_p
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._packing import pack
from jaxcompress.arrays._panels import from_panels, to_panels
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray, replace
from jaxcompress.arrays._reshape import reshape

__all__ = ["PrepackedArray", "prepack_array"]


class PrepackedArray(CompressedArray):
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
        """The layer and expert axes."""
        return tuple(self.values.shape[:-4])

    @property
    def contracted_dims(self) -> tuple[int, ...]:
        """The axes of the logical shape that are `k`."""
        first = len(self.lead)
        if self.transpose_w:
            first += len(self.dims) - self.contracted
        return tuple(range(first, first + self.contracted))

    @property
    def k(self) -> int:
        """The length of the sums."""
        return math.prod((*self.lead, *self.dims)[d] for d in self.contracted_dims)

    @property
    def n(self) -> int:
        """The number of columns."""
        return math.prod(self.dims) // self.k

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray((*self.lead, *self.dims), self.float_dtype)

    def canonical(self) -> QuantizedArray:
        """The same array in the order that files have."""
        matrix = self._matrix()
        whole = _reshaped(matrix, (*self.lead, *self.dims))
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
        """A matrix the other way round: the bytes stay where they are."""
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

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> "PrepackedArray | None":
        if primitive is lax.convert_element_type_p:
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return replace(self, float_dtype=np.dtype(params["new_dtype"]))
        elif primitive is lax.transpose_p:
            if tuple(params["permutation"]) == (1, 0):
                return self.transposed()
        elif primitive is lax.copy_p:
            return self
        elif primitive is stop_gradient_p:
            floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
            return jax.tree.map(lambda a: lax.stop_gradient(a) if floating(a) else a, self)
        return None

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
    if not q.axis or q.size == 0:
        return "no axis shares a scale, so none is known to be contracted"
    contract = _contracted(q)
    if isinstance(contract, str):
        return contract
    first, last = contract
    transpose_w = last == q.ndim - 1
    free = range(first - 1, first) if transpose_w else range(last + 1, q.ndim)
    if free.start < 0:
        return "it has no columns: every axis is contracted"
    start = min(first, free.start)
    k = math.prod(q.shape[first : last + 1])
    n = math.prod(q.shape[d] for d in free)
    matrix = _reshaped(q, (*q.shape[:start], *((n, k) if transpose_w else (k, n))))
    if matrix is None:
        return "its scales do not follow the axes that a product merges"
    back = jax.eval_shape(lambda m: _reshaped(m, q.shape), matrix)
    if back is None or (back.axis, back.group_size) != (q.axis, q.group_size):
        return "its scales do not follow the axes that a product merges"
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
        dims=q.shape[start:],
        contracted=last + 1 - first,
        transpose_w=transpose_w,
        float_dtype=q.float_dtype,
        path=q.path,
    )


def _reshaped(q: QuantizedArray, shape: tuple[int, ...]) -> QuantizedArray | None:
    """`q` in a shape that most often is its own; axes of size one then keep their meaning."""
    return q if q.shape == shape else reshape(q, shape)


def _contracted(q: QuantizedArray) -> tuple[int, int] | str:
    """The first and the last of the axes that a product will contract.

    They are the axes that share scales; where these are all the axes of a matrix, the first
    of the two, as `jaxcompress.quantize.quantize` assumes without a layout.
    """
    if q.ndim == 1:
        return "it has no columns: every axis is contracted"
    axes = sorted(a % q.ndim for a in q.axis)
    if len(axes) == q.ndim:
        if q.ndim != 2:
            return "all its axes share scales, so none is known to be contracted"
        axes = [0]
    if axes != list(range(axes[0], axes[-1] + 1)):
        return "the axes that share scales are not neighbours"
    return axes[0], axes[-1]
