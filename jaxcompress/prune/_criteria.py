"""Criteria: how much each weight matters, as a score that is larger for what to keep."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Criterion", "fisher", "gradient", "magnitude", "movement", "random", "taylor"]


class Criterion(NamedTuple):
    """A score for every weight, and what has to be remembered to compute it.

    `init(w)` makes the memory of one weight array; `score(w, grad, memory)` returns
    `(score, memory)`, `score` a float32 array of the shape of `w`. `w` is the weight as it
    is after the update; `grad`, the raw gradient before it, is None for a criterion that
    does not need gradients. A random key in a memory is made different for each leaf.

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


def random(key: jax.Array | int) -> Criterion:
    """Keeps weights at random: `score ~ U(0, 1)`, drawn once for each weight.

    The scores are the same at every update, so that a mask that grows sparser only ever
    drops weights.

    Args:
      key: from `jax.random.key`, or a whole number to make one of.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> parts = jc.prune.random(0), jc.prune.unstructured(), jc.prune.constant(0.5)
    >>> params = {"w": jnp.ones((2, 8))}
    >>> tx = jc.prune.prune(*parts)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> int(jc.prune.masks(state)["w"].sum())
    8

    Liu et al., 2022, The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    return Criterion(
        "random",
        lambda w: key,
        lambda w, grad, memory: (jax.random.uniform(memory, w.shape), memory),
    )


def gradient() -> Criterion:
    """The size of the gradient now: `score = |g|`; what RigL grows by.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.gradient().score(jnp.zeros(2), jnp.array([-3.0, 1.0]), ())[0]
    Array([3., 1.], dtype=float32)

    Evci et al., 2020, Rigging the Lottery, arXiv:1911.11134.
    """
    return Criterion(
        "gradient",
        lambda w: (),
        lambda w, grad, memory: (jnp.abs(_float32(grad)), memory),
        needs_gradients=True,
    )


def movement() -> Criterion:
    """Keeps the weights that training moves away from zero: `score = -sum_t g_t w_t`.

    A weight that is pruned is zero and no longer moves its score; it comes back when the
    scores of others fall below it.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> criterion, w = jc.prune.movement(), jnp.array([1.0, 1.0])
    >>> criterion.score(w, jnp.array([-3.0, 2.0]), criterion.init(w))[0]
    Array([ 3., -2.], dtype=float32)

    Sanh et al., 2020, Movement Pruning, arXiv:2005.07683.
    """

    def score(w: jax.Array, grad: Any, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory = memory - _float32(grad) * _float32(w)
        return memory, memory

    return Criterion("movement", _zeros, score, needs_gradients=True)


def taylor(*, decay: float = 0.9) -> Criterion:
    """The change of the loss without a weight, to first order: `score = mean_t (g_t w_t)^2`.

    Args:
      decay: of the running mean over updates, in [0, 1); 0 looks at the last one only.

    Raises:
      ValueError: a decay out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> criterion, w = jc.prune.taylor(decay=0.5), jnp.array([1.0, 2.0])
    >>> criterion.score(w, jnp.array([2.0, 1.0]), criterion.init(w))[0]
    Array([2., 2.], dtype=float32)

    Molchanov et al., 2019, Importance Estimation for Neural Network Pruning,
    arXiv:1906.10771.
    """
    _check_decay(decay)

    def score(w: jax.Array, grad: Any, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory = decay * memory + (1 - decay) * (_float32(grad) * _float32(w)) ** 2
        return memory, memory

    return Criterion("taylor", _zeros, score, needs_gradients=True)


def fisher(*, decay: float = 0.9) -> Criterion:
    """The change of the loss without a weight, to second order: `score = w^2 mean_t g_t^2 / 2`.

    The diagonal of the empirical Fisher matrix stands for that of the Hessian.

    Args:
      decay: of the running mean over updates, in [0, 1).

    Raises:
      ValueError: a decay out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> criterion, w = jc.prune.fisher(decay=0.5), jnp.array([1.0, 2.0])
    >>> criterion.score(w, jnp.array([2.0, 1.0]), criterion.init(w))[0]
    Array([1., 1.], dtype=float32)

    LeCun et al., 1989, Optimal Brain Damage; Theis et al., 2018, Faster gaze prediction
    with dense networks and Fisher pruning, arXiv:1801.05787.
    """
    _check_decay(decay)

    def score(w: jax.Array, grad: Any, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory = decay * memory + (1 - decay) * _float32(grad) ** 2
        return memory * _float32(w) ** 2 / 2, memory

    return Criterion("fisher", _zeros, score, needs_gradients=True)


def _zeros(w: jax.Array) -> jax.Array:
    return jnp.zeros(w.shape, jnp.float32)


def _float32(x: Any) -> jax.Array:
    return x.astype(jnp.float32)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay is that of a running mean, 0 <= decay < 1; got {decay}")
