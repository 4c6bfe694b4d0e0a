"""`PrepackedSparseArray`: what an unstructured sparse weight keeps, column by column."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._bitmap import BitmapSparseArray, bitmap_of
from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._matrix import Form, MatrixArray, form
from jaxcompress.arrays._prepacked import matrix_of, reshaped
from jaxcompress.arrays._qtype import Activation, IntType, QType
from jaxcompress.arrays._quantized import QuantizedArray, replace

__all__ = ["PrepackedSparseArray", "columns_of", "prepack_sparse", "scatter"]

# Columns of a group, as in sparse.h, and the least part of k: 32 rows of 256 fit the first cache.
GROUP, PART = 64, 256
# The length of a run is a multiple of this.
FILL = 4
# The average length of a run, below which parts are made longer.
RUN = 16
# Places are two bytes.
MAX_K = 65_536
# Sums of codes are floats, and whole numbers below this are exact.
EXACT = 2**24
# The largest share of kept values with which the product of what is kept is the faster one:
# of float weights, of integers with quantized and with float activations (docs/cpu.md).
FLOATS, INTEGERS, INTEGERS_A16 = 0.4, 0.08, 0.2


class PrepackedSparseArray(MatrixArray):
    """A `BitmapSparseArray` with the same values in another order; `jaxcompress.prepack` makes it.

    It is the matrix of one product, as a `PrepackedArray` is, in runs: what one column keeps in
    one part of `k`. The parts of 64 columns follow each other, in each of them the columns, those
    that keep least first.

    - `values` is `[..., size]`, the runs one after another: float32, or int8 codes. Each is
      filled up to a multiple of four, with zeros.
    - `places` is uint16 `[..., size]`, the index along `k` of each.
    - `columns` is uint8 `[..., n * parts]`, which column of its 64 a run is of.
    - `starts` is int32 `[..., n * parts + 1]`, where each run begins, and the end. What lies
      behind that is padding, where leading indices keep different numbers.
    - `part` is the number of indices along `k` of a part, `kept` that of values without filling.
    - `scale` and `act_scale` are those of the matrix, as in a `PrepackedArray`.
    - `core` is the number of axes of the logical shape that the bitmap had as one.

    A product over exactly `k` multiplies what is kept and nothing else, so an activation that
    is not finite spoils only the sums that it is in. For anything else the zeros are put back,
    each time; `jaxcompress.explain` shows where.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.eye(64)
    >>> sparse = jc.prune.pack({"w": w}, {"w": w != 0})
    >>> bool((jc.prepack(sparse)["w"].materialise() == w).all())
    True

    Gray et al., 2020, Sparse GPU Kernels for Deep Learning, arXiv:2006.10901.
    """

    values: Any
    places: Any
    starts: Any
    columns: Any
    scale: Any = None
    act_scale: Any = None
    qtype: QType | None = eqx.field(static=True, kw_only=True, default=None)
    axis: Axes = eqx.field(static=True, kw_only=True, default=())
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    dims: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    contracted: int = eqx.field(static=True, kw_only=True)
    transpose_w: bool = eqx.field(static=True, kw_only=True)
    kept: int = eqx.field(static=True, kw_only=True)
    part: int = eqx.field(static=True, kw_only=True)
    core: int = eqx.field(static=True, kw_only=True)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.starts.shape[:-1])

    @property
    def density(self) -> float:
        """The share of what is stored."""
        return self.kept / max(1, math.prod(self.dims))

    def expanded(self) -> QuantizedArray | jax.Array:
        """The same array with its zeros put back, integers where it is quantized."""
        dense = scatter(self.values, self.places, self.starts, self.columns, self.k, self.part)
        dense = jnp.swapaxes(dense, -1, -2) if self.transpose_w else dense
        shape = (*self.lead, *self.dims)
        if self.qtype is None:
            return dense.reshape(shape).astype(self.float_dtype)
        matrix = QuantizedArray(
            dense,
            self.scale,
            None,
            self.act_scale,
            qtype=self.qtype,
            axis=self.axis,
            act=self.act,
            float_dtype=self.float_dtype,
            path=self.path,
        )
        whole = reshaped(matrix, shape)
        assert whole is not None, "prepack_sparse has seen that it can be taken apart"
        return whole

    def transposed(self) -> "PrepackedSparseArray":
        """The runs stay where they are."""
        turn = lambda s: None if s is None else jnp.swapaxes(s, -1, -2)
        return replace(
            self,
            scale=turn(self.scale),
            act_scale=turn(self.act_scale),
            axis=tuple(-3 - a for a in self.axis),
            dims=self.dims[::-1],
            transpose_w=not self.transpose_w,
        )

    def stored(self) -> BitmapSparseArray:
        whole = self.expanded()
        kept = (whole.codes() if isinstance(whole, QuantizedArray) else whole) != 0
        return bitmap_of(whole, kept, len(self.lead) + len(self.dims) - self.core, self.path)

    def lowered(self) -> QuantizedArray | jax.Array:
        why = "only a product over the axes that it is packed for: zeros are put back at every call"
        self.note("prepacked", "-", "unpacked", why)
        return self.expanded()

    def materialise(self) -> jax.Array:
        full = self.expanded()
        return full.materialise() if isinstance(full, QuantizedArray) else full

    def __repr__(self) -> str:
        if not hasattr(self.starts, "shape"):  # a tree of labels or specs in its shape
            return f"PrepackedSparseArray(values={self.values}, starts={self.starts})"
        kind = self.qtype.name if self.qtype else self.float_dtype.name
        size = ",".join(map(str, self.shape))
        return (
            f"PrepackedSparseArray({kind}[{size}], {1 - self.density:.1%} zeros, "
            f"path={self.path!r})"
        )


def scatter(
    values: jax.Array,
    places: jax.Array,
    starts: jax.Array,
    columns: jax.Array,
    k: int,
    part: int,
) -> jax.Array:
    """The matrix `[..., k, n]` of runs."""
    if starts.ndim > 1:
        one = functools.partial(scatter, k=k, part=part)
        return jax.vmap(one)(values, places, starts, columns)
    n = columns_of(starts, k, part)
    parts = -(-k // part)
    sizes = [min(GROUP, n - first) for first in range(0, n, GROUP)]
    first = np.repeat(np.arange(len(sizes)) * GROUP, np.array(sizes) * parts)
    # Behind the last run there is padding: in column n, which there is not.
    column = jnp.append(columns.astype(jnp.int32) + first, n)
    run = jnp.searchsorted(starts[1:], jnp.arange(values.shape[0]), side="right")
    return jnp.zeros((k, n), values.dtype).at[places, column[run]].add(values, mode="drop")


def columns_of(starts: jax.Array, k: int, part: int) -> int:
    """`n`, of which `starts` has one for each part of each column, and one more."""
    return (starts.shape[-1] - 1) // -(-k // part)


def prepack_sparse(
    sparse: BitmapSparseArray, contract: Sequence[int] | None = None
) -> "PrepackedSparseArray | str":
    """`sparse` as runs of columns, or why its zeros had better be put back; outside `jit`.

    `contract` are the axes that a product contracts; None takes those that share scales, or
    of floats in two axes the first.
    """
    whole = sparse.expanded()
    if isinstance(whole, QuantizedArray):
        matrix = _codes(whole)
    else:
        matrix = _floats(sparse, whole, contract)
    if isinstance(matrix, str):
        return matrix
    dense, found, fields = matrix
    if found.k > MAX_K:
        return f"its places along k are two bytes, and k is {found.k}"
    limit = FLOATS if sparse.qtype is None else INTEGERS_A16 if sparse.act is None else INTEGERS
    columns = dense if found.transpose_w else np.swapaxes(dense, -1, -2)  # [..., n, k]
    counts = np.count_nonzero(columns, -1)
    share = int(counts.sum()) / dense.size
    if share > limit:
        return f"it keeps {share:.1%}: above {limit:.0%} the dense product is the faster one"
    longest = int(counts.max(initial=0))
    if sparse.act is not None and sparse.qtype is not None:
        largest = sparse.act.qtype.high * -sparse.qtype.low
        if longest * largest >= EXACT:
            return f"a column keeps {longest} codes, whose sum floats may not hold"
    part = PART
    while part < found.k and share * part < RUN:
        part *= 2
    runs = _runs(columns, part)
    return PrepackedSparseArray(
        *map(jnp.asarray, runs),
        **fields,
        qtype=sparse.qtype,
        act=sparse.act,
        dims=whole.shape[found.lead :],
        contracted=found.contracted,
        transpose_w=found.transpose_w,
        kept=int(counts.sum(-1).max(initial=0)),
        part=part,
        core=len(sparse.core),
        float_dtype=sparse.float_dtype,
        path=sparse.path,
    )


def _runs(matrices: np.ndarray, part: int) -> tuple[np.ndarray, ...]:
    """Values, places, starts and columns of matrices `[..., n, k]`."""
    *lead, n, k = matrices.shape
    made = [_runs_of(matrix, part) for matrix in matrices.reshape(-1, n, k)]
    size = max((values.size for values, *_ in made), default=0)
    pad = lambda a: np.pad(a, (0, size - a.size))
    rows = [(pad(values), pad(places), *rest) for values, places, *rest in made]
    return tuple(np.stack(a).reshape(*lead, -1) for a in zip(*rows))


def _runs_of(matrix: np.ndarray, part: int) -> tuple[np.ndarray, ...]:
    """The same of one `[n, k]`."""
    n, k = matrix.shape
    values, places, columns, sizes = [], [], [], []
    for group in range(0, n, GROUP):
        for first in range(0, k, part):
            piece = matrix[group : group + GROUP, first : first + part]
            count = (piece != 0).sum(-1)
            order = np.argsort(-(-count // FILL), kind="stable")
            count = count[order][:, None]
            size = -(-count // FILL) * FILL
            # What is kept goes first in each run; zeros at the first of these places fill it up.
            place = np.argsort(piece[order] == 0, -1, kind="stable")
            width = int(size.max())
            place = np.pad(place, ((0, 0), (0, max(0, width - place.shape[-1]))))[:, :width]
            filling = np.arange(width) >= count
            place = np.where(filling, place[:, :1], place)
            value = np.where(filling, 0, np.take_along_axis(piece[order], place, -1))
            taken = np.arange(width) < size
            values.append(value[taken])
            places.append((place[taken] + first).astype(np.uint16))
            columns.append(order.astype(np.uint8))
            sizes.append(size[:, 0])
    starts = np.zeros(sum(map(len, sizes)) + 1, np.int32)
    starts[1:] = np.cumsum(np.concatenate(sizes))
    return np.concatenate(values), np.concatenate(places), starts, np.concatenate(columns)


def _codes(q: QuantizedArray) -> tuple[np.ndarray, Form, dict[str, Any]] | str:
    if not isinstance(q.qtype, IntType):
        return f"{q.qtype.name} has no native product"
    if q.act is not None and not (q.act.qtype.integer and q.act.qtype.symmetric):
        return "the native product takes symmetric integers as activations"
    found = matrix_of(q)
    if isinstance(found, str):
        return found
    matrix, how = found
    if any(size > 1 for size in matrix.group_size or ()):
        return "it has scales by groups"
    fields = dict(scale=matrix.scale, act_scale=matrix.act_scale, axis=matrix.axis)
    return np.asarray(matrix.codes()), how, fields


def _floats(
    sparse: BitmapSparseArray, whole: jax.Array, contract: Sequence[int] | None
) -> tuple[np.ndarray, Form, dict[str, Any]] | str:
    if sparse.float_dtype.itemsize > 4:
        return f"the native product is in float32, not {sparse.float_dtype.name}"
    if whole.size == 0:
        return "it is empty"
    if contract is None and len(sparse.core) != 2:
        return "which of its axes are contracted is not known without a layout"
    found = form(whole.shape, (-2,) if contract is None else contract)
    if isinstance(found, str):
        return found
    dense = np.asarray(whole).astype(np.float32)
    return dense.reshape(*whole.shape[: found.lead], *found.matrix), found, {}
