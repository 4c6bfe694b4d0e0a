"""`BlockSparseArray`: a matrix of which whole blocks are kept."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from jaxcompress.arrays._granularity import Axes
from jaxcompress.arrays._packing import pack, unpack
from jaxcompress.arrays._panels import from_panels, to_panels
from jaxcompress.arrays._qtype import Activation, QType
from jaxcompress.arrays._quantized import QuantizedArray, replace
from jaxcompress.arrays._sparse import SparseArray, codes_or_floats, fields_of, stored

__all__ = ["BlockSparseArray", "block_of"]


class BlockSparseArray(SparseArray):
    """Matrices, in the last two axes, of which whole blocks are kept.

    Invariants:

    - `values` is `[..., columns of blocks, slots, height * width]`: for each column of
      blocks its kept ones, row-major; floats; or with a `qtype` int8 codes, bit-packed
      below eight bits along the last axis.
    - `rows` is int32 `[..., columns of blocks, slots]`, the row of blocks that each lies in.
      Every column has as many slots as the fullest; what is left over is zero blocks.
    - `counts` is int32 `[..., columns of blocks]`, how many slots are used; None where all are.
    - `matrix` is the logical `(rows, columns)`; blocks reach beyond a far edge that they do
      not divide, with zeros. With `transposed` the array is the transpose of that.
    - With `panels` the values are codes as the CPU's kernels read them, made by `prepack`: each
      column of blocks is one matrix of its slots, uint8, `[width / 16, slots * height / 4, 16, 4]`.
    - `scale`, `act_scale`, `act_offset` are those of the `QuantizedArray` of the codes.

    In `jaxcompress.accelerate` a product that contracts the rows multiplies the kept blocks
    only (`jaxcompress.ops.block_sparse_matmul`); anything else gets the zeros put back.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w, blocks = jnp.eye(64), jc.prune.block(16, 16)
    >>> masks = jc.prune.mask({"w": w}, blocks, 0.75)
    >>> packed = jc.prune.pack({"w": w}, masks, pattern=blocks)["w"]
    >>> packed, packed.nbytes, w.nbytes
    (BlockSparseArray(float32[64,64], blocks 16x16, 75.0% dropped, path='w'), 4112, 16384)

    Gray et al., 2017, GPU Kernels for Block-Sparse Weights.
    """

    values: Any
    rows: Any
    scale: Any = None
    act_scale: Any = None
    act_offset: Any = None
    counts: Any = None
    block: tuple[int, int] = eqx.field(static=True, kw_only=True)
    matrix: tuple[int, int] = eqx.field(static=True, kw_only=True)
    transposed: bool = eqx.field(static=True, kw_only=True, default=False)
    panels: bool = eqx.field(static=True, kw_only=True, default=False)
    qtype: QType | None = eqx.field(static=True, kw_only=True, default=None)
    axis: Axes = eqx.field(static=True, kw_only=True, default=())
    group_size: Axes | None = eqx.field(static=True, kw_only=True, default=None)
    act: Activation | None = eqx.field(static=True, kw_only=True, default=None)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        matrix = self.matrix[::-1] if self.transposed else self.matrix
        return jax.core.ShapedArray((*self.rows.shape[:-2], *matrix), self.float_dtype)

    def blocks(self) -> jax.Array:
        """Values or codes, `[..., columns of blocks, slots, height, width]`."""
        values, (height, width) = self.values, self.block
        *lead, slots = self.rows.shape
        if self.panels:
            matrix = values.reshape(*lead, width // 16, slots * height // 4, 16, 4)
            values = from_panels(matrix, 8, slots * height, width)
        elif self.qtype is not None and self.qtype.bits < 8:
            values = unpack(values, self.qtype.bits, height * width, -1)
        return values.reshape(*self.rows.shape, height, width)

    def in_panels(self) -> "BlockSparseArray":
        """The same with its codes in panels, whole bytes each; see `panels`."""
        where, (height, width) = self.rows.shape, self.block
        matrix = self.blocks().reshape(*where[:-1], where[-1] * height, width)
        values = to_panels(matrix).reshape(*where, height * width)
        return replace(self, values=values, panels=True)

    def stored(self) -> "BlockSparseArray":
        if not self.panels:
            return self
        assert self.qtype is not None
        values = self.blocks().reshape(self.values.shape)
        if self.qtype.bits < 8:
            values = pack(values, self.qtype.bits, -1)
        return replace(self, values=values, panels=False)

    def planes(self) -> dict[str, tuple[int, int]]:
        return {} if self.panels else super().planes()

    def dense(self) -> jax.Array:
        """Values or codes in the logical shape, zeros put back."""
        (height, width), (rows, columns) = self.block, self.matrix
        down = -(-rows // height)

        def scatter(where: jax.Array, blocks: jax.Array) -> jax.Array:
            across = where.shape[0]
            empty = jnp.zeros((down, across, height, width), blocks.dtype)
            # Added, because the slots left over are zeros in the row of some kept block.
            full = empty.at[where, jnp.arange(across)[:, None]].add(blocks)
            full = full.transpose(0, 2, 1, 3).reshape(down * height, across * width)
            return full[:rows, :columns]

        for _ in self.rows.shape[:-2]:
            scatter = jax.vmap(scatter)
        full = scatter(self.rows, self.blocks())
        return jnp.swapaxes(full, -1, -2) if self.transposed else full

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> "BlockSparseArray | None":
        if primitive is lax.convert_element_type_p:
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return replace(self, float_dtype=np.dtype(params["new_dtype"]))
        elif primitive is lax.transpose_p:
            n = self.ndim
            if tuple(params["permutation"]) == (*range(n - 2), n - 1, n - 2):
                return self._swapped()
        return None

    def _swapped(self) -> "BlockSparseArray":
        """The transpose of the last two axes."""
        swap = lambda leaf: None if leaf is None else jnp.swapaxes(leaf, -1, -2)
        return replace(
            self,
            transposed=not self.transposed,
            axis=tuple({-1: -2, -2: -1}.get(a, a) for a in self.axis),
            scale=swap(self.scale),
            act_scale=swap(self.act_scale),
            act_offset=swap(self.act_offset),
        )

    def lowered(self) -> QuantizedArray | jax.Array:
        why = "zeros are put back: only a plain product takes blocks"
        self.note("expand", "block_sparse", "reference", why)
        return self.expanded()

    def __repr__(self) -> str:
        if not hasattr(self.rows, "shape"):  # a tree of labels or specs in its shape
            return f"BlockSparseArray(values={self.values}, rows={self.rows})"
        kind = self.qtype.name if self.qtype else self.float_dtype.name
        size = ",".join(map(str, self.shape))
        stored = self.rows.shape[-1] / max(1, -(-self.matrix[0] // self.block[0]))
        return (
            f"BlockSparseArray({kind}[{size}], blocks {self.block[0]}x{self.block[1]}, "
            f"{1 - stored:.1%} dropped, path={self.path!r})"
        )


def block_of(
    array: jax.Array | QuantizedArray,
    mask: jax.Array,
    block: tuple[int, int],
    path: str,
    transposed: bool = False,
) -> BlockSparseArray:
    """`array` where `mask` keeps it, as a `BlockSparseArray`; outside `jit`.

    With `transposed` the columns of `array` are contracted, and blocks lie in its rows.
    Raises `ValueError` if a block is neither kept nor dropped as a whole.
    """
    values = codes_or_floats(array, path)
    if values.ndim < 2:
        raise ValueError(f"{path!r} has the shape {values.shape}, and no rows and columns")
    kept = _blocks_of(np.asarray(mask), block)
    real = _blocks_of(np.ones(values.shape, bool), block)  # False beyond the edges
    some = np.asarray(kept.any((-1, -2)))
    every = (kept | ~real).all((-1, -2))
    if (some & ~every).any():
        where = tuple(int(i) for i in np.argwhere(some & ~every)[0])
        raise ValueError(
            f"the mask of {path!r} does not fit blocks of {block[0]}x{block[1]}: it keeps "
            f"{int(kept[where].sum())} of {int(real[where].sum())} weights of the block "
            f"{where[-2:]}" + (f" at {where[:-2]} of the leading axes" if where[:-2] else "")
        )
    blocks = _blocks_of(values, block)
    if transposed:
        blocks, some = blocks.swapaxes(-3, -4).swapaxes(-1, -2), some.swapaxes(-1, -2)
        block = block[::-1]
    lead, across = some.shape[:-2], some.shape[-1]
    slots = int(some.sum(-2).max(initial=0))
    # Kept rows of blocks first, in order; rows that are dropped fill up with zeros.
    order = np.argsort(~some, -2, kind="stable")[..., :slots, :].swapaxes(-1, -2)
    alive = np.take_along_axis(some.swapaxes(-1, -2), order, -1)
    by_column = np.moveaxis(blocks, -3, -4)  # [..., across, down, height, width]
    picked = np.take_along_axis(by_column, order[..., None, None], -3)
    picked = np.where(alive[..., None, None], picked, 0)
    picked = picked.reshape(*lead, across, slots, block[0] * block[1])
    matrix = values.shape[-2:][::-1] if transposed else values.shape[-2:]
    static: dict[str, Any] = dict(block=tuple(block), matrix=tuple(matrix), path=path)
    rows = jnp.asarray(order.astype(np.int32))
    counts = None if alive.all() else jnp.asarray(alive.sum(-1, dtype=np.int32))
    static |= dict(transposed=transposed, counts=counts)
    return BlockSparseArray(stored(picked, array, -1), rows, **static, **fields_of(array))


def _blocks_of(array: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """`[..., down, across, height, width]`, zeros beyond the edges."""
    (height, width), (rows, columns) = block, array.shape[-2:]
    down, across = -(-rows // height), -(-columns // width)
    padding = [(0, 0)] * (array.ndim - 2)
    padding += [(0, down * height - rows), (0, across * width - columns)]
    padded = np.pad(array, padding)
    apart = padded.reshape(*array.shape[:-2], down, height, across, width)
    return apart.swapaxes(-2, -3)
