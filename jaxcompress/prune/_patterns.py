"""Patterns: which weights go together."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._layout import Layout
from jaxcompress._paths import path_string
from jaxcompress.prune._select import order_key

__all__ = ["Pattern", "nm", "unstructured"]


class Pattern(NamedTuple):
    """What is kept or dropped as a unit.

    `units(path, score)` gives a score to each unit of a leaf, the largest of which are
    kept; `spread(path, kept, score)` makes a mask of the leaf from the mask of its units.

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


def unstructured() -> Pattern:
    """Every weight for itself.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.mask(jnp.array([[3.0, 1.0], [2.0, 4.0]]), jc.prune.unstructured(), 0.5)
    Array([[ True, False],
           [False,  True]], dtype=bool)
    """
    return Pattern("unstructured", lambda path, score: score, lambda path, kept, score: kept)


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
    if (axis is None) == (layout is None):
        raise ValueError(
            "nm needs the contracting axis, which no shape tells: give axis=-2 (Flax's Dense), "
            "axis=-1 (Equinox's Linear), or layout=jc.layout(fn, params, x); one of them"
        )
    axes = {} if layout is None else _contracting(layout)

    def along(path: str, score: jax.Array) -> int:
        chosen = axis if layout is None else axes.get(path)
        if chosen is None:
            raise ValueError(f"the layout has no contracting axis for {path!r}")
        if not -score.ndim <= chosen < score.ndim:
            raise ValueError(f"nm along axis {chosen}: {path!r} has the shape {score.shape}")
        if score.shape[chosen] % m:
            raise ValueError(
                f"nm({n}, {m}) along axis {chosen}: {path!r} has the shape {score.shape}, which "
                f"{m} does not divide there; leave it out by rules="
            )
        return chosen % score.ndim

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

    return Pattern(f"{n}:{m}", units, spread)


def _contracting(layout: Any) -> Mapping[str, int | None]:
    """`{path: the last contracting axis}`, None where there is none."""
    flat = jax.tree_util.tree_leaves_with_path(layout, is_leaf=lambda x: isinstance(x, Layout))
    return {
        path_string(path): found.contract[-1] if found.contract else None
        for path, found in flat
        if isinstance(found, Layout)
    }
