"""Pruning inside an optimizer: the last link of a chain, or a wrapper around it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcompress._paths import leaves_with_paths, path_string, rebuild, subtrees
from jaxcompress._rules import Patterns
from jaxcompress.prune._criteria import Criterion
from jaxcompress.prune._distributions import Distribution, uniform
from jaxcompress.prune._mask import choose, prunable, weight_of
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._schedules import Schedule
from jaxcompress.prune._select import COLD
from jaxcompress.prune._zeroing import (
    clear,
    complete_checked,
    is_nothing,
    map_pruned,
    need_params,
    to_zero,
)

__all__ = ["PruneState", "SparsifyState", "keep", "masks", "own_keys", "prune", "sparsify"]


class PruneState(NamedTuple):
    """The number of updates, the masks, and where the next search for them starts.

    `masks` is a tree like the parameters: bool arrays, True where a weight is kept, and
    `optax.MaskedNode()` where nothing is pruned.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> parts = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)
    >>> jc.prune.prune(*parts).init({"w": jnp.ones((1, 2))}).masks
    {'w': Array([[ True,  True]], dtype=bool)}
    """

    count: jax.Array  # type: ignore[assignment]
    masks: Any
    thresholds: dict[str, jax.Array]
    memory: dict[str, Any]


class SparsifyState(NamedTuple):
    """The state of the wrapped optimizer, and that of the pruning around it.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> parts = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)
    >>> state = jc.prune.sparsify(optax.sgd(0.1), *parts).init({"w": jnp.ones((1, 2))})
    >>> state.pruning.count
    Array(0, dtype=int32)
    """

    inner: Any
    pruning: PruneState


def prune(
    criterion: Criterion,
    pattern: Pattern,
    schedule: Schedule,
    *,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes as the last link of `optax.chain`, after any optimizer.

    After every applied update the pruned weights are exactly 0.0. While the schedule
    lasts, masks are chosen anew from the updated weights, so that what was pruned can
    come back; it keeps no gradients, and the moments of the optimizer before it are not
    touched (`sparsify` clears them).

    Args:
      criterion: one that needs no gradients, as `magnitude()`; this link sees what the
        optimizer made of them.
      pattern: `unstructured()`, `nm(2, 4, axis=-2)`, ...
      schedule: `polynomial(0.9, begin=0, end=1000)`, `constant(0.9)`, ...
      rules: patterns of the paths to prune; every floating leaf of two dimensions and
        more if None. The weight of a `FakeQuantArray` is pruned like any other.
      distribution: `global_()`, `erk()`, `by_rule({...})`; `uniform()` if None, the same
        sparsity in each leaf.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds the masks.

    Raises:
      ValueError: a criterion that needs gradients; `params` missing; a rule that matches
        nothing.
      TypeError: a rule names a leaf that is not floating.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> tx = optax.chain(
    ...     optax.sgd(0.1),
    ...     jc.prune.prune(jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)),
    ... )
    >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
    >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[ 0. ,  0. ],
           [ 2.9, -4.1]], dtype=float32)

    Zhu and Gupta, 2017, arXiv:1710.01878.
    """
    if criterion.needs_gradients:
        raise ValueError(
            f"{criterion.name} needs gradients, and the last link of a chain sees updates: use "
            "jc.prune.sparsify(optimizer, criterion, pattern, schedule)"
        )
    parts = criterion, pattern, schedule, distribution or uniform()

    def init(params: Any) -> PruneState:
        return _init(params, criterion, rules)

    def update(
        updates: Any, state: PruneState, params: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del extra
        return _advance(updates, None, state, params, *parts)

    return optax.GradientTransformationExtraArgs(init, update)


def sparsify(
    inner: optax.GradientTransformation,
    criterion: Criterion,
    pattern: Pattern,
    schedule: Schedule,
    *,
    rules: Patterns | None = None,
    distribution: Distribution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes around an optimizer: dense gradients for the criterion, masked ones inside.

    After every applied update the pruned weights are exactly 0.0, and so is every moment
    of `inner` that belongs to a weight that is pruned, or was until now.

    Args:
      inner: any optimizer, `optax.adam(1e-3)` or a chain.
      criterion: any; it sees the raw gradients.
      pattern, schedule, rules, distribution: as for `prune`.

    Returns:
      A gradient transformation whose `update` needs `params`. `masks` finds the masks.

    Raises:
      ValueError, TypeError: as `prune`, but for the criterion.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> tx = jc.prune.sparsify(
    ...     optax.adam(0.1), jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)
    ... )
    >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
    >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> optax.tree.get(state, "mu")["w"]
    Array([[0. , 0. ],
           [0.1, 0.1]], dtype=float32)

    Evci et al., 2020, Rigging the Lottery, arXiv:1911.11134.
    """
    inner_tx = optax.with_extra_args_support(inner)
    parts = criterion, pattern, schedule, distribution or uniform()

    def init(params: Any) -> SparsifyState:
        return SparsifyState(inner_tx.init(params), _init(params, criterion, rules))

    def update(
        updates: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        need_params(params)
        before = state.pruning.masks
        masked = map_pruned(
            lambda g, m: jnp.where(m, g, jnp.zeros_like(g)), params, updates, before
        )
        new, inner_state = inner_tx.update(masked, state.inner, params, **extra)
        new, pruning = _advance(new, updates, state.pruning, params, *parts)
        keep = jax.tree.map(jnp.logical_and, before, pruning.masks)
        return new, SparsifyState(clear(inner_state, params, keep), pruning)

    return optax.GradientTransformationExtraArgs(init, update)


def keep(masks: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps what given masks keep, as the last link of a chain: fine-tuning, lottery tickets.

    After every applied update the weights that the masks drop are exactly 0.0.

    Args:
      masks: a tree like the parameters, from `masks` or `mask`: bool arrays, True keeps,
        and `optax.MaskedNode()` where nothing is pruned.

    Returns:
      A gradient transformation whose `update` needs `params`.

    Raises:
      ValueError: `params` missing, or a mask of another shape than its parameter.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> params = {"w": jnp.array([[1.0, -2.0]])}
    >>> tx = optax.chain(optax.sgd(0.1), jc.prune.keep({"w": jnp.array([[False, True]])}))
    >>> updates, _ = tx.update({"w": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[ 0. , -2.1]], dtype=float32)

    Frankle and Carbin, 2019, The Lottery Ticket Hypothesis, arXiv:1803.03635.
    """

    def init(params: Any) -> PruneState:
        whole = complete_checked(masks, params)
        # Copied: a training step that donates its state must not take the caller's masks.
        return PruneState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, whole), {}, {})

    def update(
        updates: Any, state: PruneState, params: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del extra
        need_params(params)
        zeroed = map_pruned(to_zero, params, updates, state.masks, params)
        return zeroed, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def masks(state: Any) -> Any:
    """The masks in an optimizer state, wherever in it the pruning is.

    Args:
      state: of any nesting of Optax transformations that has `prune` or `sparsify` in it.

    Returns:
      A tree like the parameters of bool arrays, True where a weight is kept, and
      `optax.MaskedNode()` where nothing is pruned: in place of a leaf, or of a subtree
      that `optax.masked` has hidden. Prunings of different parameters
      (`optax.multi_transform`) are merged.

    Raises:
      ValueError: there is no pruning in the state, or two of the same parameter.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> parts = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)
    >>> tx = optax.MultiSteps(jc.prune.sparsify(optax.sgd(0.1), *parts), every_k_schedule=2)
    >>> jc.prune.masks(tx.init({"w": jnp.ones((1, 2))}))
    {'w': Array([[ True,  True]], dtype=bool)}
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PruneState))
    found = [leaf.masks for leaf in leaves if isinstance(leaf, PruneState)]
    if not found:
        raise ValueError("there is no pruning in this state: prune and sparsify put it there")

    return _merge((), found)


def _merge(path: Any, options: list[Any]) -> Any:
    """One tree of those masks that are real; a node of nothing may stand for a subtree."""
    real = [o for o in options if not is_nothing(o)]
    if len(real) < 2:
        return real[0] if real else optax.MaskedNode()
    if jax.tree_util.all_leaves(real[:1]):
        raise ValueError(f"{path_string(path)!r} is pruned by {len(real)} transformations")
    one_level = [
        jax.tree_util.tree_flatten_with_path(o, is_leaf=lambda x, o=o: x is not o) for o in real
    ]
    treedef: Any = one_level[0][1]
    children = zip(*(flat for flat, _ in one_level))
    return treedef.unflatten(
        [_merge((*path, *kids[0][0]), [kid for _, kid in kids]) for kids in children]
    )


def _init(params: Any, criterion: Criterion, rules: Patterns | None) -> PruneState:
    chosen = prunable(params, rules)
    leaves = leaves_with_paths(params)
    weights = {path: weight_of(leaf) for path, leaf in leaves if path in chosen}
    return PruneState(
        jnp.zeros([], jnp.int32),
        rebuild(
            params,
            [
                jnp.ones_like(weights[path], bool) if path in chosen else optax.MaskedNode()
                for path, _ in leaves
            ],
        ),
        {path: jnp.asarray(COLD) for path in weights},
        {path: own_keys(criterion.init(w), i) for i, (path, w) in enumerate(weights.items())},
    )


def own_keys(memory: Any, index: int) -> Any:
    """A criterion's memory with random keys that no other leaf has."""

    def one(leaf: Any) -> Any:
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, index) if is_key else leaf

    return jax.tree.map(one, memory)


def _advance(
    updates: Any,
    grads: Any | None,
    state: PruneState,
    params: Any,
    criterion: Criterion,
    pattern: Pattern,
    schedule: Schedule,
    distribution: Distribution,
) -> tuple[Any, PruneState]:
    """One update: scores, masks if they are due, and exact zeros where pruned."""
    need_params(params)
    paths = [path for path, _ in leaves_with_paths(params)]
    columns = [subtrees(tree, params) for tree in (params, updates, state.masks)]
    columns.append([None] * len(paths) if grads is None else subtrees(grads, params))
    rows = [row for row in zip(paths, *columns) if not is_nothing(row[3])]
    old = {path: m for path, _, _, m, _ in rows}

    def score(path: str, p: Any, u: Any, grad: Any) -> tuple[jax.Array, Any]:
        # The weight as optax.apply_updates will make it.
        w = (weight_of(p) + weight_of(u)).astype(weight_of(p).dtype)
        return criterion.score(w, None if grad is None else weight_of(grad), state.memory[path])

    memory = {path: score(path, p, u, g)[1] for path, p, u, _, g in rows}

    def anew(_: Any) -> tuple[Any, Any]:
        # Scored here, where it fuses with the search, and only when masks are due.
        scores = {path: score(path, p, u, g)[0] for path, p, u, _, g in rows}
        kept = lambda size, share=1.0: schedule.kept(state.count, size, share)
        return choose(scores, pattern, distribution, kept, state.thresholds)

    def as_before(_: Any) -> tuple[Any, Any]:
        return old, dict(state.thresholds)

    if schedule.begin == 0 and schedule.end is None and schedule.every == 1:
        new, thresholds = anew(None)
    else:
        new, thresholds = lax.cond(schedule.due(state.count), anew, as_before, None)
    new_masks = rebuild(params, [new.get(path, optax.MaskedNode()) for path in paths])
    zeroed = map_pruned(to_zero, params, updates, new_masks, params)
    return zeroed, PruneState(optax.safe_increment(state.count), new_masks, thresholds, memory)
