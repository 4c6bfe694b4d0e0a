"""Patterns: which weights go together."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._layout import Layout
from jaxcompress._paths import path_string
from jaxcompress.arrays import CompressedArray
from jaxcompress.arrays._block import block_of
from jaxcompress.arrays._nm import nm_of
from jaxcompress.prune._select import order_key

__all__ = ["Pattern", "block", "channel", "column", "heads", "nm", "row", "unstructured"]


class Pattern(NamedTuple):
    """What is kept or dropped as a unit.

    `units(path, score)` gives a score to each unit of a leaf, the largest of which are
    kept; `spread(path, kept, score)` makes a mask of the leaf from the mask of its units.
    With `separate`, the first axis of the units numbers competitions that keep the same
    number each. `whole` says that a unit is kept or dropped as a whole, and that its score
    is the mean of its weights' scores. `store(path, array, mask, layout)`, if there is one,
    packs a leaf for `pack`; `ratio` is the `(n, m)` of N:M.

    Your own pattern is one of these, whole rows here:

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> rows = jc.prune.Pattern(
    ...     "rows",
    ...     lambda path, score: score.sum(-1),
    ...     lambda path, kept, score: jnp.broadcast_to(kept[:, None], score.shape),
    ... )
    >>> jc.prune.mask(jnp.array([[1.0, 5.0], [3.0, 2.0]]), rows, 0.5)
    Array([[ True,  True],
           [False, False]], dtype=bool)
    """

    name: str
    units: Callable[[str, jax.Array], jax.Array]
    spread: Callable[[str, jax.Array, jax.Array], jax.Array]
    separate: bool = False
    whole: bool = False
    store: Callable[[str, Any, jax.Array, Layout | None], CompressedArray] | None = None
    ratio: tuple[int, int] | None = None


def unstructured(*, axis: int | Sequence[int] | None = None, layout: Any = None) -> Pattern:
    """Every weight for itself.

    With `axis` or `layout` each output keeps the same number of the weights that it
    contracts, as Wanda does; without, a leaf is one competition.

    Args:
      axis: the axes that the product contracts, for every leaf: -2 for Flax's `Dense`.
      layout: what `jaxcompress.layout` found, instead.

    Raises:
      ValueError: both axis and layout; later, with the leaf's path, an axis that is not
        there.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[3.0, 1.0], [5.0, 4.0]])
    >>> jc.prune.mask(scores, jc.prune.unstructured(), 0.5).astype(int).tolist()
    [[0, 0], [1, 1]]
    >>> jc.prune.mask(scores, jc.prune.unstructured(axis=-1), 0.5).astype(int).tolist()
    [[1, 0], [1, 0]]
    """
    if axis is None and layout is None:
        same = lambda path, score: score
        return Pattern("unstructured", same, lambda path, kept, score: kept, whole=True)
    along = _axes_of("unstructured", axis, layout, "contract")

    def order(path: str, score: jax.Array) -> list[int]:
        contract = along(path, score.shape)
        return [d for d in range(score.ndim) if d not in contract] + contract

    def units(path: str, score: jax.Array) -> jax.Array:
        length = math.prod(score.shape[d] for d in along(path, score.shape))
        return jnp.transpose(score, order(path, score)).reshape(-1, length)

    def spread(path: str, kept: jax.Array, score: jax.Array) -> jax.Array:
        permutation = order(path, score)
        turned = kept.reshape([score.shape[d] for d in permutation])
        return jnp.transpose(turned, [permutation.index(d) for d in range(score.ndim)])

    return Pattern("unstructured", units, spread, separate=True, whole=True)


def block(height: int, width: int) -> Pattern:
    """Blocks of `height x width` in the last two axes, kept or dropped as a whole.

    A block's score is the mean of its weights' scores; at the far edges of a matrix that
    they do not divide, blocks are smaller.

    Args:
      height: rows of a block, along axis -2.
      width: its columns, along axis -1.

    Raises:
      ValueError: a size below 1; later, with its path, a leaf of fewer than two axes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]])
    >>> jc.prune.mask(scores, jc.prune.block(2, 2), 0.5).astype(int)
    Array([[0, 0, 1],
           [0, 0, 1]], dtype=int32)

    Gray et al., 2017, GPU Kernels for Block-Sparse Weights; Narang et al., 2017,
    Block-Sparse Recurrent Neural Networks, arXiv:1711.02782.
    """
    if height < 1 or width < 1:
        raise ValueError(f"block(height, width) takes sizes of 1 or more; got {height}, {width}")

    def units(path: str, score: jax.Array) -> jax.Array:
        rows, columns = _matrix(path, score.shape)
        down, across = -(-rows // height), -(-columns // width)
        padding = [(0, 0)] * (score.ndim - 2)
        padding += [(0, down * height - rows), (0, across * width - columns)]
        padded = jnp.pad(score.astype(jnp.float32), padding)
        blocks = padded.reshape(*score.shape[:-2], down, height, across, width)
        sizes = np.minimum(height, rows - height * np.arange(down))[:, None] * np.minimum(
            width, columns - width * np.arange(across)
        )
        return jnp.sum(blocks, (-3, -1)) / sizes.astype(np.float32)

    def spread(path: str, kept: jax.Array, score: jax.Array) -> jax.Array:
        rows, columns = _matrix(path, score.shape)
        mask = jnp.repeat(jnp.repeat(kept, height, -2), width, -1)
        return mask[..., :rows, :columns]

    def store(path: str, array: Any, mask: jax.Array, found: Layout | None) -> CompressedArray:
        by_rows = found is not None and found.contract == (-1,)
        return block_of(array, mask, (height, width), path, transposed=by_rows)

    return Pattern(f"block({height}, {width})", units, spread, whole=True, store=store)


def channel(*, axis: int | Sequence[int] | None = None, layout: Any = None) -> Pattern:
    """Output channels: all weights that lead to one output, the filters of a convolution.

    A channel's score is the mean of its weights' scores. `shrink` is what makes arrays
    smaller by them.

    Args:
      axis: the axes that number the channels, -1 if None, as in Flax; the weights along
        all the other axes are one unit.
      layout: what `jaxcompress.layout` found, instead: its output axes, and those of
        stacked layers and experts, each of which has channels of its own.

    Raises:
      ValueError: both axis and layout; later, with the leaf's path, an axis that is not
        there.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[3.0, 1.0], [1.0, 4.0]])
    >>> jc.prune.mask(scores, jc.prune.channel(), 0.5).astype(int)
    Array([[0, 1],
           [0, 1]], dtype=int32)

    Li et al., 2017, Pruning Filters for Efficient ConvNets, arXiv:1608.08710.
    """
    along = _axes_of("channel", -1 if axis is None and layout is None else axis, layout, "kept")

    def others(path: str, shape: tuple[int, ...]) -> list[int]:
        numbered = along(path, shape)
        return [d for d in range(len(shape)) if d not in numbered]

    return _slices("channel", others)


def heads(count: int, *, axis: int = -1) -> Pattern:
    """Whole attention heads of projections that have them side by side in one axis.

    The `count d` indices of `axis` are `count` heads of `d` neighbours each; a head's score
    is the mean of its weights' scores. `shrink` takes the rest of a head along: it is enough
    to prune the output projection, which contracts its heads. Where heads have an axis of
    their own, as in Flax's attention, use `channel(axis=...)` with that axis.

    Args:
      count: the number of heads.
      axis: that of the heads: -2 for an output projection of Flax's `Dense`.

    Raises:
      ValueError: a count below 1; later, with its path, an axis that is not there or that
        `count` does not divide.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[3.0], [1.0], [1.0], [4.0]])
    >>> jc.prune.mask(scores, jc.prune.heads(2, axis=-2), 0.5).astype(int).tolist()
    [[0], [0], [1], [1]]

    Michel et al., 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650.
    """
    if count < 1:
        raise ValueError(f"heads(count) takes a count of 1 or more; got {count}")
    along = _axes_of("heads", axis, None, "kept")

    def dim(path: str, shape: tuple[int, ...]) -> int:
        [d] = along(path, shape)
        if shape[d] % count:
            raise ValueError(
                f"heads({count}) along axis {d - len(shape)}: {path!r} has the shape {shape}, "
                f"which {count} does not divide there"
            )
        return d

    def units(path: str, score: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(score.astype(jnp.float32), dim(path, score.shape), 0)
        return jnp.mean(rows.reshape(count, -1), -1)

    def spread(path: str, kept: jax.Array, score: jax.Array) -> jax.Array:
        d = dim(path, score.shape)
        each = jnp.repeat(kept, score.shape[d] // count)
        shape = [-1 if i == d else 1 for i in range(score.ndim)]
        return jnp.broadcast_to(each.reshape(shape), score.shape)

    return Pattern(f"heads({count})", units, spread, whole=True)


def row() -> Pattern:
    """Rows: all weights along the last axis, those of one input of Flax's `Dense`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[3.0, 1.0], [1.0, 4.0]])
    >>> jc.prune.mask(scores, jc.prune.row(), 0.5).astype(int)
    Array([[0, 0],
           [1, 1]], dtype=int32)
    """
    return _slices("row", lambda path, shape: [len(shape) + _last_two(path, shape)[1]])


def column() -> Pattern:
    """Columns: all weights along the last axis but one, those of one output of `Dense`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[3.0, 1.0], [1.0, 4.0]])
    >>> jc.prune.mask(scores, jc.prune.column(), 0.5).astype(int)
    Array([[0, 1],
           [0, 1]], dtype=int32)
    """
    return _slices("column", lambda path, shape: [len(shape) + _last_two(path, shape)[0]])


def nm(n: int, m: int, *, axis: int | None = None, layout: Any = None) -> Pattern:
    """Exactly `n` weights are kept in each group of `m` along the contracting axis.

    The sparsity of a constrained leaf is `1 - n / m`; the schedule says what share of
    the groups is constrained yet, those first that lose the least. Use
    `constant(1.0)` for all of them at once.

    Args:
      n, m: 2 and 4 for the sparse tensor cores of NVIDIA.
      axis: the axis that the product contracts, for every leaf: -2 for Flax's `Dense`.
      layout: what `jaxcompress.layout` found, instead; of several contracted axes the
        last is taken.

    Raises:
      ValueError: not `0 < n < m`; neither or both of axis and layout; later, with the
        leaf's path, an axis that `m` does not divide.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> scores = jnp.array([[4.0, 3.0, 2.0, 1.0, 0.0, 5.0, 0.0, 0.0]])
    >>> jc.prune.mask(scores, jc.prune.nm(2, 4, axis=-1), 1.0).astype(int)
    Array([[1, 1, 0, 0, 1, 1, 0, 0]], dtype=int32)

    Mishra et al., 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378.
    """
    if not 0 < n < m:
        raise ValueError(f"nm(n, m) keeps n of m with 0 < n < m; got n={n}, m={m}")
    if axis is None and layout is None:
        raise ValueError(
            "nm needs the contracting axis, which no shape tells: give axis=-2 (Flax's Dense), "
            "axis=-1 (Equinox's Linear), or layout=jc.layout(fn, params, x); one of them"
        )
    axes = _axes_of("nm", axis, layout, "contract")

    def along(path: str, score: jax.Array) -> int:
        chosen = axes(path, score.shape)[-1]
        if score.shape[chosen] % m:
            raise ValueError(
                f"nm({n}, {m}) along axis {chosen - score.ndim}: {path!r} has the shape "
                f"{score.shape}, which {m} does not divide there; leave it out by rules="
            )
        return chosen

    def best(path: str, score: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores in groups, `m` as a last axis, and which are among the best `n`."""
        a = along(path, score)
        groups = jnp.moveaxis(score.astype(jnp.float32), a, -1)
        groups = groups.reshape(*groups.shape[:-1], -1, m)
        key = order_key(groups)
        members = [key[..., i] for i in range(m)]
        # A weight's rank is the number of those before it; m is small, so all are compared.
        ranks = [
            sum(
                (other >= mine if j < i else other > mine).astype(jnp.int32)
                for j, other in enumerate(members)
                if j != i
            )
            for i, mine in enumerate(members)
        ]
        return groups, jnp.stack([rank < n for rank in ranks], -1)

    def units(path: str, score: jax.Array) -> jax.Array:
        groups, among = best(path, score)
        return jnp.sum(jnp.where(among, 0.0, groups), -1)  # what constraining a group loses

    def spread(path: str, kept: jax.Array, score: jax.Array) -> jax.Array:
        mask = best(path, score)[1] | kept[..., None]
        mask = mask.reshape(*mask.shape[:-2], -1)
        return jnp.moveaxis(mask, -1, along(path, score))

    def store(path: str, array: Any, mask: jax.Array, found: Layout | None) -> CompressedArray:
        return nm_of(array, mask, n, m, axes(path, array.shape)[-1], path)

    return Pattern(f"{n}:{m}", units, spread, store=store, ratio=(n, m))


def _slices(name: str, reduced: Callable[[str, tuple[int, ...]], list[int]]) -> Pattern:
    """Units that extend over the `reduced` dimensions, which they keep with size 1."""

    def units(path: str, score: jax.Array) -> jax.Array:
        dims = tuple(reduced(path, score.shape))
        return jnp.mean(score.astype(jnp.float32), dims, keepdims=True)

    def spread(path: str, kept: jax.Array, score: jax.Array) -> jax.Array:
        return jnp.broadcast_to(kept, score.shape)

    return Pattern(name, units, spread, whole=True)


def _last_two(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    _matrix(path, shape)
    return -2, -1


def _matrix(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of the last two axes."""
    if len(shape) < 2:
        raise ValueError(f"{path!r} has the shape {shape}, and no rows and columns")
    return shape[-2], shape[-1]


def _axes_of(
    name: str, axis: int | Sequence[int] | None, layout: Any, kind: str
) -> Callable[[str, tuple[int, ...]], list[int]]:
    """`axes(path, shape)`: the dimensions that `axis` or the layout names.

    Of a layout those of `kind`: "contract", or "kept", the output and batch axes.
    """
    if axis is not None and layout is not None:
        raise ValueError(f"{name} takes axis= or layout=, one of them")
    by_path = {} if layout is None else _by_path(layout, kind)

    def axes(path: str, shape: tuple[int, ...]) -> list[int]:
        found = by_path.get(path) if axis is None else axis
        if found is None:
            raise ValueError(f"the layout has no contracting axis for {path!r}")
        found = (found,) if isinstance(found, int) else tuple(found)
        for a in found:
            if not -len(shape) <= a < len(shape):
                raise ValueError(f"{name} along axis {a}: {path!r} has the shape {shape}")
        return [a % len(shape) for a in found]

    return axes


def _by_path(layout: Any, kind: str) -> Mapping[str, tuple[int, ...] | None]:
    """`{path: axes}`, None where the layout found no product."""
    flat = jax.tree_util.tree_leaves_with_path(layout, is_leaf=lambda x: isinstance(x, Layout))
    return {
        path_string(path): None
        if not found.contract
        else found.contract
        if kind == "contract"
        else (*found.batch, *found.output)
        for path, found in flat
        if isinstance(found, Layout)
    }
