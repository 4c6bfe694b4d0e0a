"""Dynamic sparse training: sparse from the first update on, with connections that move."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcompress._paths import leaves_with_paths, rebuild, subtrees
from jaxcompress._rules import Patterns
from jaxcompress.prune._criteria import Criterion, gradient, magnitude, random
from jaxcompress.prune._distributions import Distribution, erk
from jaxcompress.prune._mask import choose, prunable, weight_of
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._schedules import constant
from jaxcompress.prune._select import COLD, keep_largest
from jaxcompress.prune._transform import PruneState, SparsifyState, own_keys
from jaxcompress.prune._zeroing import clear, is_nothing, map_pruned, need_params, to_zero

__all__ = ["regrow", "rigl", "set_"]


def regrow(
    inner: optax.GradientTransformation,
    grow: Criterion,
    pattern: Pattern,
    sparsity: float,
    *,
    key: jax.Array | int,
    every: int = 100,
    end: int | None = None,
    fraction: float | optax.Schedule = 0.3,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose connections move: the smallest go, others come.

    It starts from a random mask. After every `every`-th update, in each leaf, `fraction` of
    the kept units go, those of the smallest magnitude, and as many that are not kept
    come, those with the largest score; what has just gone may come back at once. New
    weights start from zero, with clean moments. The number kept in a leaf never changes.

    Start from `jaxcompress.prune.apply(params, jaxcompress.prune.masks(state))`; without it
    the first update, made with dense parameters, ends at the same zeros.

    Args:
      inner: any optimizer.
      grow: the criterion of what comes: `gradient()` is RigL, `random(key)` SET.
      pattern: `unstructured()`, `block(16, 16)`, `channel()`, ...
      sparsity: the fraction of zeros, 0 to 1.
      key: of the first masks: from `jax.random.key`, or a whole number to make one of.
      every: how many updates from one exchange to the next.
      end: the update from which on the mask stays; None for never.
      fraction: of the kept units, that go at each exchange; or a function of the number
        of updates.
      rules: patterns of the paths to prune; every floating leaf of two dimensions and
        more if None.
      distribution: how sparse each leaf is; `erk()` if None, as in the paper.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds the masks.

    Raises:
      ValueError: a pattern whose units are not dropped as a whole, as `nm`; a number out
        of its range; `params` missing; a rule that matches nothing.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> parts = jc.prune.gradient(), jc.prune.unstructured(), 0.75
    >>> tx = jc.prune.regrow(optax.sgd(0.1), *parts, key=0, every=1, fraction=1.0)
    >>> params = {"w": jnp.ones((2, 4))}
    >>> grads = {"w": jnp.arange(8.0).reshape(2, 4)}
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> jc.prune.masks(state)["w"].astype(int)
    Array([[0, 0, 0, 0],
           [0, 0, 1, 1]], dtype=int32)

    Mocanu et al., 2018, Scalable training of artificial neural networks with adaptive
    sparse connectivity, arXiv:1707.04780; Evci et al., 2020, arXiv:1911.11134.
    """
    if not pattern.whole:
        raise ValueError(f"regrow moves whole units, and {pattern.name} has none")
    if every < 1:
        raise ValueError(f"every is a number of updates, 1 or more; got {every}")
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction is that of the kept units, 0 to 1; got {fraction}")
    schedule = constant(sparsity)
    first, drop, share = random(key), magnitude(), distribution or erk()
    inner_tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> SparsifyState:
        chosen = prunable(params, rules)
        leaves = leaves_with_paths(params)
        weights = {path: weight_of(leaf) for path, leaf in leaves if path in chosen}
        scores = {
            path: first.score(w, None, own_keys(first.init(w), i))[0]
            for i, (path, w) in enumerate(weights.items())
        }
        kept = lambda size, share=1.0: schedule.kept(jnp.int32(0), size, share)
        starts = dict.fromkeys(scores, jnp.asarray(COLD))
        masks, _ = choose(scores, pattern, share, kept, starts)
        memory = {path: own_keys(grow.init(w), i) for i, (path, w) in enumerate(weights.items())}
        tree = rebuild(params, [masks.get(path, optax.MaskedNode()) for path, _ in leaves])
        pruning = PruneState(jnp.zeros([], jnp.int32), tree, {}, memory)
        return SparsifyState(inner_tx.init(params), pruning)

    def update(
        updates: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        need_params(params)
        before, count = state.pruning.masks, state.pruning.count
        mask_gradient = lambda g, m: jnp.where(m, g, jnp.zeros_like(g))
        masked = map_pruned(mask_gradient, params, updates, before)
        new, inner_state = inner_tx.update(masked, state.inner, params, **extra)
        paths = [path for path, _ in leaves_with_paths(params)]
        columns = (subtrees(tree, params) for tree in (params, new, before, updates))
        alive, smallest, largest, memory = {}, {}, {}, {}
        for path, p, u, m, g in zip(paths, *columns):
            if is_nothing(m):
                continue
            w = (weight_of(p) + weight_of(u)).astype(weight_of(p).dtype)
            old = state.pruning.memory[path]
            largest[path], memory[path] = grow.score(w, weight_of(g), old)
            smallest[path], _ = drop.score(w, None, ())
            alive[path] = m

        def moved(_: Any) -> dict[str, jax.Array]:
            part = fraction(count) if callable(fraction) else fraction
            return {
                path: _exchange(path, pattern, m, smallest[path], largest[path], part)
                for path, m in alive.items()
            }

        due = (count + 1) % every == 0
        due = due if end is None else due & (count < end)
        after = lax.cond(due, moved, lambda _: alive, None)
        masks = rebuild(params, [after.get(path, optax.MaskedNode()) for path in paths])
        # What has come starts from zero, as what is pruned ends there.
        both = jax.tree.map(jnp.logical_and, before, masks)
        zeroed = map_pruned(to_zero, params, new, both, params)
        pruning = PruneState(optax.safe_increment(count), masks, {}, memory)
        return zeroed, SparsifyState(clear(inner_state, params, both), pruning)

    return optax.GradientTransformationExtraArgs(init, update)


def rigl(
    inner: optax.GradientTransformation,
    pattern: Pattern,
    sparsity: float,
    *,
    key: jax.Array | int,
    end: int,
    every: int = 100,
    fraction: float = 0.3,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RigL: connections come where the gradient is largest.

    The fraction that moves falls to zero along half a cosine:
    `fraction (1 + cos(pi t / end)) / 2`.

    Args:
      end: the update from which on the mask stays; three quarters of them in the paper.
      inner, pattern, sparsity, key, every, fraction, rules, distribution: as for `regrow`.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds the masks.

    Raises:
      ValueError: as `regrow`.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> tx = jc.prune.rigl(optax.adam(1e-3), jc.prune.unstructured(), 0.9, key=0, end=1000)
    >>> int(jc.prune.masks(tx.init({"w": jnp.ones((20, 10))}))["w"].sum())
    20

    Evci et al., 2020, Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134.
    """
    if end < 1 or not 0 <= fraction <= 1:
        raise ValueError(
            f"rigl takes end of 1 or more and a fraction from 0 to 1; got {end}, {fraction}"
        )
    falling = optax.cosine_decay_schedule(fraction, end)
    options: dict[str, Any] = dict(key=key, every=every, end=end, fraction=falling)
    return regrow(
        inner, gradient(), pattern, sparsity, rules=rules, distribution=distribution, **options
    )


def set_(
    inner: optax.GradientTransformation,
    pattern: Pattern,
    sparsity: float,
    *,
    key: jax.Array | int,
    end: int | None = None,
    every: int = 100,
    fraction: float = 0.3,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SET, sparse evolutionary training: connections come at random.

    Args:
      inner, pattern, sparsity, key, end, every, fraction, rules, distribution: as for
        `regrow`; the key also decides what comes.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds the masks.

    Raises:
      ValueError: as `regrow`.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> tx = jc.prune.set_(optax.adam(1e-3), jc.prune.unstructured(), 0.9, key=0)
    >>> int(jc.prune.masks(tx.init({"w": jnp.ones((20, 10))}))["w"].sum())
    20

    Mocanu et al., 2018, Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science, arXiv:1707.04780.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    first, then = jax.random.split(key)
    options: dict[str, Any] = dict(key=first, every=every, end=end, fraction=fraction)
    return regrow(
        inner, _anew(then), pattern, sparsity, rules=rules, distribution=distribution, **options
    )


def _anew(key: jax.Array) -> Criterion:
    """Random scores, others at every update."""

    def score(w: jax.Array, grad: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        now, later = jax.random.split(key)
        return jax.random.uniform(now, w.shape), later

    return Criterion("anew", lambda w: key, score)


def _exchange(
    path: str,
    pattern: Pattern,
    mask: jax.Array,
    smallest: jax.Array,
    largest: jax.Array,
    part: jax.typing.ArrayLike,
) -> jax.Array:
    """The mask after `part` of its units have gone and as many have come."""

    def one(alive: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.sum(alive, dtype=jnp.int32)
        going = jnp.clip(jnp.floor(part * kept).astype(jnp.int32), 0, kept)
        [stay], _ = keep_largest([jnp.where(alive, old, -jnp.inf)], kept - going)
        [come], _ = keep_largest([jnp.where(stay, -jnp.inf, new)], going)
        return stay | come

    alive = pattern.units(path, mask.astype(jnp.float32)) > 0.5
    one = jax.vmap(one) if pattern.separate else one
    kept = one(alive, pattern.units(path, smallest), pattern.units(path, largest))
    return pattern.spread(path, kept, mask)
