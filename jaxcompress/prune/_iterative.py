"""Masks found in rounds: score, prune a little, score what is left again."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxcompress._paths import complete, rebuild, subtrees
from jaxcompress._rules import Patterns
from jaxcompress.prune._distributions import Distribution
from jaxcompress.prune._mask import magnitudes, mask, weight_of
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._zeroing import apply, is_nothing

__all__ = ["iterative", "lottery_ticket"]


def iterative(
    score: Callable[[Any, Any], Any],
    params: Any,
    pattern: Pattern,
    sparsity: float,
    *,
    rounds: int,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> Any:
    """Masks found in rounds, each of which prunes the same share of what is left.

    After round `r` the sparsity is `1 - (1 - sparsity)^(r / rounds)`; what one round drops
    stays dropped.

    Args:
      score: called as `score(params, masks)` with the original parameters, zero where the
        masks so far drop them; returns a tree of scores like `mask` takes.
      params: the parameters.
      pattern, sparsity, rules, distribution: as for `mask`, of the last round.
      rounds: how many; SynFlow takes 100.

    Returns:
      The masks of the last round.

    Raises:
      ValueError: fewer than one round; as `mask`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    >>> masks = jc.prune.iterative(
    ...     lambda p, m: jc.prune.synflow(fn, p, [jnp.ones((1, 4))]),
    ...     params, jc.prune.unstructured(), 0.75, rounds=5, distribution=jc.prune.global_(),
    ... )
    >>> {path: bool(m.any()) for path, m in masks.items()}
    {'a': True, 'b': True}

    Tanaka et al., 2020, Pruning neural networks without any data by iteratively conserving
    synaptic flow, arXiv:2006.05467; de Jorge et al., 2021, arXiv:2006.09081.
    """
    if rounds < 1:
        raise ValueError(f"pruning in rounds takes one or more; got {rounds}")
    masks = mask(magnitudes(params), pattern, 0.0, rules=rules)
    for r in range(1, rounds + 1):
        scores = score(apply(params, masks), masks)
        old = subtrees(complete(masks, params), params)
        left = [_left(s, m) for s, m in zip(subtrees(scores, params), old)]
        now = sparsity if r == rounds else 1 - (1 - sparsity) ** (r / rounds)
        masks = mask(rebuild(params, left), pattern, now, rules=rules, distribution=distribution)
    return masks


def _left(score: Any, mask: Any) -> Any:
    """The score of what the mask keeps; what it drops is below everything."""
    if is_nothing(score) or is_nothing(mask):
        return score
    return jnp.where(mask, weight_of(score), -jnp.inf)


def lottery_ticket(
    train: Callable[[Any, Any], Any],
    params: Any,
    pattern: Pattern,
    sparsity: float,
    *,
    rounds: int,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> tuple[Any, Any]:
    """Trains, prunes by magnitude, rewinds what is left to where it began, and repeats.

    Args:
      train: called as `train(params, masks)`; returns trained parameters in which what the
        masks drop is still zero (`jaxcompress.prune.keep(masks)` sees to it).
      params: the weights to rewind to: initial ones, or those of an early step.
      pattern, sparsity, rules, distribution: as for `mask`, of the ticket.
      rounds: how often it prunes.

    Returns:
      `(params, masks)`: the rewound parameters, zero where pruned, and the masks.

    Raises:
      ValueError: fewer than one round; as `mask`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> train = lambda params, masks: {"w": params["w"] * jnp.array([[5.0, 1.0], [1.0, 1.0]])}
    >>> start = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> ticket, masks = jc.prune.lottery_ticket(
    ...     train, start, jc.prune.unstructured(), 0.5, rounds=2
    ... )
    >>> ticket["w"]
    Array([[1., 0.],
           [0., 4.]], dtype=float32)

    Frankle and Carbin, 2019, The Lottery Ticket Hypothesis, arXiv:1803.03635.
    """

    def score(params: Any, masks: Any) -> Any:
        return magnitudes(train(params, masks))

    masks = iterative(
        score, params, pattern, sparsity, rounds=rounds, rules=rules, distribution=distribution
    )
    return apply(params, masks), masks
