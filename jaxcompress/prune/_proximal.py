"""Proximal steps: penalties that make exact zeros, for weights one by one or in groups."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._paths import leaves_with_paths, rebuild, subtrees
from jaxcompress._rules import Patterns
from jaxcompress.prune._mask import prunable, weight_of
from jaxcompress.prune._patterns import Pattern, unstructured
from jaxcompress.prune._transform import PruneState
from jaxcompress.prune._zeroing import is_nothing, map_pruned, need_params, to_zero

__all__ = ["proximal"]


def proximal(
    strength: float | optax.Schedule,
    pattern: Pattern | None = None,
    *,
    rules: Patterns | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of an L1 or group lasso penalty, as the last link of a chain.

    With `w` as the optimizer has just made it, and the group `G` that it is in,

        w <- w max(0, 1 - strength sqrt(|G|) / ||w_G||)

    which for groups of one weight is soft thresholding. After `optax.sgd(rate)` a
    `strength` of `rate * penalty` descends on `loss + penalty sum_G sqrt(|G|) ||w_G||`.
    What it has made zero may come back.

    Args:
      strength: how far towards zero in one update; or a function of the number of updates.
      pattern: the groups: `unstructured()` (L1) if None, `channel()`, `row()`,
        `block(8, 8)`, ...
      rules: patterns of the paths; every floating leaf of two dimensions and more if None.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds which weights
      are not zero.

    Raises:
      ValueError: a pattern without groups, as `nm`; `params` missing; a rule that matches
        nothing.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> tx = optax.chain(optax.sgd(1.0), jc.prune.proximal(0.5))
    >>> params = {"w": jnp.array([[2.0, -0.25]])}
    >>> updates, state = tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[1.5, 0. ]], dtype=float32)

    Beck and Teboulle, 2009, A Fast Iterative Shrinkage-Thresholding Algorithm; Yuan and
    Lin, 2006, Model selection and estimation in regression with grouped variables.
    """
    groups = unstructured() if pattern is None else pattern
    if not groups.whole or groups.separate:
        raise ValueError(f"a penalty needs groups of weights, and {groups.name} has none")

    def init(params: Any) -> PruneState:
        chosen = prunable(params, rules)
        alive = [
            weight_of(leaf) != 0 if path in chosen else optax.MaskedNode()
            for path, leaf in leaves_with_paths(params)
        ]
        return PruneState(jnp.zeros([], jnp.int32), rebuild(params, alive), {}, {})

    def update(
        updates: Any, state: PruneState, params: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del extra
        need_params(params)
        by = strength(state.count) if callable(strength) else strength
        paths = [path for path, _ in leaves_with_paths(params)]
        columns = (subtrees(tree, params) for tree in (params, updates, state.masks))
        factors = [
            m if is_nothing(m) else _factor(path, weight_of(p), weight_of(u), by)
            for path, p, u, m in zip(paths, *columns)
        ]
        shrunk = map_pruned(_shrunk, params, updates, rebuild(params, factors), params)
        alive = [f if is_nothing(f) else f > 0 for f in factors]
        masks = rebuild(params, alive)
        new = map_pruned(to_zero, params, shrunk, masks, params)
        return new, PruneState(optax.safe_increment(state.count), masks, {}, {})

    def _factor(path: str, p: jax.Array, u: jax.Array, by: Any) -> jax.Array:
        """What each weight is multiplied with."""
        w = (p + u).astype(p.dtype).astype(jnp.float32)
        # The mean square of a group is ||w_G||^2 / |G|, which takes care of sqrt(|G|).
        size = jnp.sqrt(groups.units(path, w**2))
        factor = jnp.maximum(0.0, 1 - by / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
        return groups.spread(path, factor, w)

    return optax.GradientTransformationExtraArgs(init, update)


def _shrunk(u: jax.Array, factor: jax.Array, p: jax.Array) -> jax.Array:
    """The update that leads to `(p + u) factor`."""
    dtype = jnp.promote_types(u.dtype, p.dtype)
    w = (p + u).astype(p.dtype).astype(jnp.float32)
    return (w * factor - p.astype(jnp.float32)).astype(dtype)
