"""Criteria: how much each weight matters, as a score that is larger for what to keep."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Criterion", "magnitude"]


class Criterion(NamedTuple):
    """A score for every weight, and what has to be remembered to compute it.

    `init(w)` makes the memory of one weight array; `score(w, grad, memory)` returns
    `(score, memory)`, `score` a float32 array of the shape of `w`. `grad` is None for a
    criterion that does not need gradients.

    Your own criterion is one of these, small weights are kept here:

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> small = jc.prune.Criterion("small", lambda w: (), lambda w, grad, memory: (-abs(w), memory))
    >>> small.score(jnp.array([-2.0, 1.0]), None, ())[0]
    Array([-2., -1.], dtype=float32)
    """

    name: str
    init: Callable[[jax.Array], Any]
    score: Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]
    needs_gradients: bool = False


def magnitude() -> Criterion:
    """Keeps the weights that are largest in absolute value: `score = |w|`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> score, _ = jc.prune.magnitude().score(jnp.array([-2.0, 1.0]), None, ())
    >>> score
    Array([2., 1.], dtype=float32)

    Han et al., 2015, Learning both Weights and Connections for Efficient Neural
    Networks, arXiv:1506.02626.
    """
    return Criterion(
        "magnitude", lambda w: (), lambda w, grad, memory: (jnp.abs(w.astype(jnp.float32)), memory)
    )
