"""Sparse forwards, dense backwards: training the weights that a mask hides."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._rules import Patterns
from jaxcompress.prune._distributions import Distribution
from jaxcompress.prune._mask import magnitudes, mask
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._zeroing import complete_checked, map_pruned

__all__ = ["straight_through"]


def straight_through(
    params: Any,
    pattern: Pattern,
    sparsity: float,
    *,
    decay: float = 0.0,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> Any:
    """Parameters pruned by magnitude, whose gradients reach the dense ones.

    Forwards `m w`, with `m` the mask of `|w|`; backwards the gradient to `w` is
    `g + decay (1 - m) w`. With `decay=0` this is the straight-through estimator, with
    2e-4 and `nm` SR-STE. The optimizer keeps the dense weights and never sees the masks;
    prune them at the end with `mask` and `apply`.

    Args:
      params: dense floating leaves, or `FakeQuantArray`s.
      pattern, sparsity, rules, distribution: as for `mask`; for `nm` a sparsity of 1.0
        constrains every group.
      decay: pulls hidden weights towards zero, so that masks settle.

    Returns:
      A tree like `params`, zero where pruned.

    Raises:
      ValueError, TypeError: as `mask`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> def loss(w):
    ...     return jc.prune.straight_through(w, jc.prune.nm(1, 2, axis=-1), 1.0, decay=0.1).sum()
    >>> w = jnp.array([[1.0, -2.0]])
    >>> loss(w), jax.grad(loss)(w)
    (Array(-2., dtype=float32), Array([[1.1, 1. ]], dtype=float32))

    Zhou et al., 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch, arXiv:2102.04010; Bengio et al., 2013, arXiv:1308.3432.
    """
    scores = jax.lax.stop_gradient(magnitudes(params))
    masks = mask(scores, pattern, sparsity, rules=rules, distribution=distribution)
    whole = complete_checked(masks, params)
    return map_pruned(lambda w, m: _hide(decay, w, m), params, params, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hide(decay: float, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros_like(w))


def _forward(decay: float, w: jax.Array, mask: jax.Array) -> Any:
    return _hide(decay, w, mask), (w, mask)


def _backward(decay: float, residuals: Any, g: jax.Array) -> Any:
    w, mask = residuals
    return g + decay * jnp.where(mask, jnp.zeros_like(w), w), None


_hide.defvjp(_forward, _backward)
