"""Masks of any scores: the core that every form of pruning shares."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._rules import Patterns, matched
from jaxcompress.arrays import FakeQuantArray, is_compressed
from jaxcompress.prune._distributions import Distribution, Leaf, uniform
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._schedules import constant
from jaxcompress.prune._select import COLD, keep_largest

__all__ = ["choose", "magnitudes", "mask", "prunable", "select", "weight_of"]


def mask(
    scores: Any,
    pattern: Pattern,
    sparsity: float,
    *,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> Any:
    """Masks that keep the largest of any scores, True where a weight is kept.

    `size - floor(sparsity * size + 1/2)` units are kept exactly, in each leaf or, as the
    distribution has it, in all together; ties in favour of the lower index.

    Args:
      scores: a tree of floating arrays, `jax.tree.map(jnp.abs, params)` for instance.
      pattern: `unstructured()`, `nm(2, 4, axis=-2)`, ...
      sparsity: the fraction of zeros; for `nm` the share of constrained groups.
      rules: patterns of the paths to prune; floating leaves of two dimensions and more
        if None.
      distribution: `global_()`, `erk()`, `by_rule({...})`; `uniform()` if None, the same
        sparsity in each leaf.

    Returns:
      A tree like `scores` of bool arrays, `optax.MaskedNode()` where nothing is pruned.

    Raises:
      ValueError: a sparsity outside 0 to 1, a rule that matches nothing, or nothing to
        prune.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.mask({"w": jnp.arange(4.0).reshape(2, 2)}, jc.prune.unstructured(), 0.75)
    {'w': Array([[False, False],
           [False,  True]], dtype=bool)}
    """
    schedule = constant(sparsity)
    chosen = prunable(scores, rules)
    paths = [path for path, _ in leaves_with_paths(scores)]
    wanted = {path: weight_of(leaf) for path, leaf in leaves_with_paths(scores) if path in chosen}
    starts = {path: jnp.asarray(COLD) for path in wanted}
    kept = lambda size, share=1.0: schedule.kept(jnp.int32(0), size, share)
    masks, _ = choose(wanted, pattern, distribution or uniform(), kept, starts)
    return rebuild(scores, [masks.get(path, optax.MaskedNode()) for path in paths])


def choose(
    scores: Mapping[str, jax.Array],
    pattern: Pattern,
    distribution: Distribution,
    kept: Callable[..., jax.Array],
    starts: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Masks by path, and the thresholds from which the next search starts."""
    units = {path: pattern.units(path, score) for path, score in scores.items()}
    chosen, thresholds = select(units, pattern, distribution, kept, starts, scores)
    masks = {path: pattern.spread(path, chosen[path], score) for path, score in scores.items()}
    return masks, thresholds


def select(
    units: Mapping[str, jax.Array],
    pattern: Pattern,
    distribution: Distribution,
    kept: Callable[..., jax.Array],
    starts: Mapping[str, jax.Array],
    leaves: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Which units are kept, and thresholds; one search for each competition."""
    if pattern.separate and distribution.across:
        raise ValueError(
            f"the distribution {distribution.name!r} lets leaves compete, and the pattern keeps "
            "the same number in each output: use uniform() or by_rule(), or unstructured() "
            "without axes"
        )
    sizes = {
        path: Leaf(leaves[path].shape, u.shape[-1] if pattern.separate else u.size)
        for path, u in units.items()
    }
    chosen, thresholds = {}, {}
    for paths, number in distribution.allot(sizes, kept):
        start = starts[paths[0]]
        if pattern.separate:
            [path] = paths
            search = lambda u, number=number, start=start: keep_largest([u], number, start)
            [keep], found = jax.vmap(search)(units[path])
            keeps, threshold = [keep], jnp.max(found, initial=0)
        else:
            keeps, threshold = keep_largest([units[path] for path in paths], number, start)
        for path, keep in zip(paths, keeps):
            chosen[path], thresholds[path] = keep, threshold
    return chosen, thresholds


def weight_of(leaf: Any) -> Any:
    """The array of a leaf that is pruned: the float weight of a `FakeQuantArray`."""
    return leaf.weight if isinstance(leaf, FakeQuantArray) else leaf


def magnitudes(params: Any) -> Any:
    """The absolute values of floating leaves; the others as they are."""

    def one(leaf: Any) -> Any:
        return jnp.abs(weight_of(leaf)) if _floating(leaf) else leaf

    return jax.tree.map(one, params, is_leaf=is_compressed)


def prunable(params: Any, rules: Patterns | None) -> set[str]:
    """The paths that are pruned: what `rules` name, or every floating matrix and more."""
    leaves = leaves_with_paths(params)
    if len({path for path, _ in leaves}) < len(leaves):
        raise ValueError(
            "two leaves have the same path, so that no rule or mask can tell them apart"
        )
    if rules is not None:
        chosen = matched(params, rules)
        for path, leaf in leaves:
            if path in chosen and not _floating(leaf):
                raise TypeError(
                    f"{path!r} cannot be pruned: it is {_describe(leaf)}, and pruning needs a "
                    "floating array or a FakeQuantArray"
                )
    else:
        chosen = {path for path, leaf in leaves if _floating(leaf) and leaf.ndim >= 2}
    if not chosen:
        found = ", ".join(f"{path!r} {_describe(leaf)}" for path, leaf in leaves) or "no leaf"
        raise ValueError(f"there is no floating leaf of two dimensions to prune; there is {found}")
    return chosen


def _floating(leaf: Any) -> bool:
    if is_compressed(leaf) and not isinstance(leaf, FakeQuantArray):
        return False
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _describe(leaf: Any) -> str:
    if is_compressed(leaf):
        return f"a {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
