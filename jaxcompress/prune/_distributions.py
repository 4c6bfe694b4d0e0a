"""Distributions: how many units each leaf keeps, of those that are kept in all."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._rules import assign

__all__ = ["Distribution", "Leaf", "by_rule", "erk", "global_", "uniform"]


class Leaf(NamedTuple):
    """A leaf that is pruned: its shape, and the number of its units.

    >>> import jaxcompress as jc
    >>> jc.prune.Leaf((4, 8), 32).units
    32
    """

    shape: tuple[int, ...]
    units: int


class Distribution(NamedTuple):
    """Which leaves compete for being kept, and how many units each competition keeps.

    `allot(leaves, kept)` returns `[(paths, number), ...]`, where every path occurs once.
    `kept(size, share=1.0)` is what the schedule keeps of `size` units now, its sparsity
    times `share`; it may be traced. `across` says that one leaf's number depends on others.

    Your own distribution is one of these, the first leaf kept dense here:

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> but_first = jc.prune.Distribution(
    ...     "but_first",
    ...     lambda leaves, kept: [
    ...         ([path], kept(leaf.units, float(i > 0)))
    ...         for i, (path, leaf) in enumerate(leaves.items())
    ...     ],
    ... )
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5, distribution=but_first)
    >>> {path: int(m.sum()) for path, m in masks.items()}
    {'a': 4, 'b': 2}
    """

    name: str
    allot: Callable[
        [Mapping[str, Leaf], Callable[..., jax.Array]],
        Sequence[tuple[Sequence[str], jax.Array]],
    ]
    across: bool = False


def uniform() -> Distribution:
    """The same sparsity in each leaf.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((2, 2)), "b": 9 * jnp.ones((2, 2))}
    >>> uniform = jc.prune.uniform()
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5, distribution=uniform)
    >>> {path: int(m.sum()) for path, m in masks.items()}
    {'a': 2, 'b': 2}
    """
    return Distribution(
        "uniform",
        lambda leaves, kept: [([path], kept(leaf.units)) for path, leaf in leaves.items()],
    )


def global_() -> Distribution:
    """All leaves compete: the largest scores of all are kept, wherever they are.

    One search runs over all leaves together. The sparsity is that of the whole; a leaf
    may lose all its weights.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((2, 2)), "b": 9 * jnp.ones((2, 2))}
    >>> together = jc.prune.global_()
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5, distribution=together)
    >>> {path: int(m.sum()) for path, m in masks.items()}
    {'a': 0, 'b': 4}

    Frankle and Carbin, 2019, The Lottery Ticket Hypothesis, arXiv:1803.03635.
    """
    return Distribution(
        "global",
        lambda leaves, kept: [(list(leaves), kept(sum(leaf.units for leaf in leaves.values())))],
        across=True,
    )


def erk() -> Distribution:
    """Small leaves stay denser: `density ~ sum(shape) / prod(shape)`, 1 at most.

    The constant is such that the whole has the sparsity of the schedule, exactly.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 4))}
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 0.9, distribution=jc.prune.erk())
    >>> {path: int(m.sum()) for path, m in masks.items()}
    {'a': 284, 'b': 151}

    Mocanu et al., 2018, Scalable training of artificial neural networks with adaptive
    sparse connectivity, arXiv:1707.04780; Evci et al., 2020, arXiv:1911.11134.
    """

    def allot(
        leaves: Mapping[str, Leaf], kept: Callable[..., jax.Array]
    ) -> Sequence[tuple[Sequence[str], jax.Array]]:
        sizes = [leaf.units for leaf in leaves.values()]
        total = kept(sum(sizes))
        raw = [sum(leaf.shape) / max(1, math.prod(leaf.shape)) for leaf in leaves.values()]
        numbers = _proportional(total, jnp.array(raw, jnp.float32), jnp.array(sizes, jnp.int32))
        return [([path], numbers[i]) for i, path in enumerate(leaves)]

    return Distribution("erk", allot, across=True)


def by_rule(shares: Mapping[str, float]) -> Distribution:
    """For each leaf its own share of the schedule's sparsity: `s_leaf(t) = share s(t)`.

    With a schedule that ends at 1.0 a share is the sparsity of its leaves at the end.

    Args:
      shares: patterns (regular expressions that match a whole path) to numbers from 0 to
        1; the first that matches counts, and 1 where none does.

    Raises:
      ValueError: a share out of its range; later, a pattern that matches no pruned leaf.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((2, 5)), "b": jnp.ones((2, 5))}
    >>> shares = jc.prune.by_rule({"a": 0.9, "b": 0.2})
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 1.0, distribution=shares)
    >>> {path: int(m.sum()) for path, m in masks.items()}
    {'a': 1, 'b': 8}
    """
    for pattern, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {pattern!r} is a fraction, 0 to 1; got {share}")

    def allot(
        leaves: Mapping[str, Leaf], kept: Callable[..., jax.Array]
    ) -> Sequence[tuple[Sequence[str], jax.Array]]:
        found = assign(dict.fromkeys(leaves, 0), shares)
        return [([path], kept(leaf.units, found.get(path, 1.0))) for path, leaf in leaves.items()]

    return Distribution("by_rule", allot)


@jax.jit
def _proportional(total: jax.Array, raw: jax.Array, sizes: jax.Array) -> jax.Array:
    """Whole numbers that add up to `total`, near `c raw sizes`, and no larger than `sizes`.

    What is full is set aside and `c` found anew for the others, until no leaf overflows.
    """
    weights = raw * sizes

    def constant(full: jax.Array) -> jax.Array:
        room = total - jnp.sum(jnp.where(full, sizes, 0))
        return room / jnp.maximum(jnp.sum(jnp.where(full, 0.0, weights)), 1e-30)

    def fill(_: int, full: jax.Array) -> jax.Array:
        return full | (constant(full) * raw >= 1 + 2.0**-20)  # in truth above 1, however rounded

    full = lax.fori_loop(0, sizes.size, fill, jnp.zeros(sizes.shape, bool))
    exact = constant(full) * weights
    # A little less, rounded down, so that something is left whatever float32 does.
    base = jnp.clip(jnp.floor(exact * (1 - 2.0**-20)).astype(jnp.int32), 0, sizes)
    base = jnp.where(full, sizes, base)
    # One more where the most was cut off; and if float32 could not count that far, the
    # first leaves with room take the rest.
    rest = jnp.where(base < sizes, exact - base, -1.0)
    index = jnp.arange(sizes.size)
    ahead = (rest > rest[:, None]) | ((rest == rest[:, None]) & (index < index[:, None]))
    base = base + ((jnp.sum(ahead, -1) < total - jnp.sum(base)) & (base < sizes))
    room = sizes - base
    before = jnp.cumsum(room) - room
    return base + jnp.clip(total - jnp.sum(base) - before, 0, room)
