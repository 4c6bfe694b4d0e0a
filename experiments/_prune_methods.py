"""The ways to prune that prune_fashion.py compares, each a few lines of the library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from _jaxpruner import moving

EVERY, FRACTION = 100, 0.3  # updates from one exchange of connections to the next, and its share
UNSTRUCTURED = jc.prune.unstructured()
TOGETHER = jc.prune.global_()
HALF = jc.prune.nm(2, 4, axis=-2)
KERNELS = [r".*/kernel"]


class Method(NamedTuple):
    """How a network is pruned.

    `masks(loss, apply, params, batch, sparsity, key)` chooses before training, for one seed;
    `optimizer(inner, sparsity, steps, masks, key)` makes the optimizer of one seed;
    `seen(params)` is what the forward pass sees; `shipped(params)` what is left in the end.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    masks: Callable[..., Any] | None = None
    seen: Callable[[Any], Any] = lambda params: params
    shipped: Callable[[Any], Any] = lambda params: params


def _kept(inner: Any, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
    return optax.chain(inner, jc.prune.keep(masks))


def _by_magnitude(schedule: Callable[[float, int], Any], distribution: Any = TOGETHER) -> Method:
    def optimizer(inner: Any, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
        parts = jc.prune.magnitude(), UNSTRUCTURED, schedule(sparsity, steps)
        return jc.prune.sparsify(inner, *parts, rules=KERNELS, distribution=distribution)

    return Method(optimizer)


def _at_start(scores: Callable[..., Any], distribution: Any = TOGETHER) -> Method:
    def masks(loss: Any, apply: Any, params: Any, batch: Any, sparsity: float, key: Any) -> Any:
        found = scores(loss, apply, params, batch, key)
        return jc.prune.mask(found, UNSTRUCTURED, sparsity, distribution=distribution)

    return Method(_kept, masks)


def _synflow(loss: Any, apply: Any, params: Any, batch: Any, sparsity: float, key: Any) -> Any:
    score = lambda p, m: jc.prune.synflow(apply, p, [batch[0][:1]], rules=KERNELS)
    return jc.prune.iterative(
        score, params, UNSTRUCTURED, sparsity, rounds=100, rules=KERNELS, distribution=TOGETHER
    )


def _random(loss: Any, apply: Any, params: Any, batch: Any, key: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, p: jax.random.uniform(k, p.shape) if p.ndim > 1 else optax.MaskedNode()
    return jax.tree.unflatten(treedef, [draw(k, p) for k, p in zip(keys, leaves)])


def _movement(inner: Any, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
    parts = jc.prune.movement(), UNSTRUCTURED, _gradual(sparsity, steps)
    return jc.prune.sparsify(inner, *parts, rules=KERNELS, distribution=TOGETHER)


def _moving(make: Callable[..., Any]) -> Method:
    def optimizer(inner: Any, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
        options: dict[str, Any] = dict(key=key, every=EVERY, fraction=FRACTION, rules=KERNELS)
        return make(inner, UNSTRUCTURED, sparsity, end=3 * steps // 4, **options)

    return Method(optimizer)


def _moving_by_peer(name: str) -> Method:
    """The same of jaxpruner, another implementation: its class of this `name`."""

    def optimizer(inner: Any, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
        options: dict[str, Any] = dict(every=EVERY, fraction=FRACTION, end=3 * steps // 4)
        updater = moving(name, sparsity, rng_seed=key, **options)
        tx = updater.wrap_optax(inner)

        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            after = updater.post_gradient_update(optax.apply_updates(params, updates), state)
            return jax.tree.map(jnp.subtract, after, params), state

        return optax.GradientTransformation(tx.init, update)

    return Method(optimizer)


def _gradual(sparsity: float, steps: int) -> Any:
    return jc.prune.polynomial(sparsity, begin=steps // 10, end=3 * steps // 4, every=20)


def _once(sparsity: float, steps: int) -> Any:
    return jc.prune.one_shot(sparsity, at=steps // 2)


def _repeatedly(sparsity: float, steps: int) -> Any:
    return jc.prune.geometric(sparsity, begin=steps // 10, end=3 * steps // 4, every=steps // 20)


def _in_turns(sparsity: float, steps: int) -> Any:
    begin, end = steps // 10, 3 * steps // 4
    return jc.prune.periodic(sparsity, begin=begin, end=end, every=max(1, (end - begin) // 7))


METHODS = {
    "magnitude": _by_magnitude(_gradual, jc.prune.erk()),
    "global": _by_magnitude(_gradual),
    "one_shot": _by_magnitude(_once),
    "iterative": _by_magnitude(_repeatedly),
    "ac_dc": _by_magnitude(_in_turns),
    "movement": Method(_movement),
    "rigl": _moving(jc.prune.rigl),
    "set": _moving(jc.prune.set_),
    "snip": _at_start(
        lambda loss, apply, p, batch, key: jc.prune.snip(loss, p, [batch], rules=KERNELS)
    ),
    "grasp": _at_start(
        lambda loss, apply, p, batch, key: jc.prune.grasp(loss, p, [batch], rules=KERNELS)
    ),
    "synflow": Method(_kept, _synflow),
    "random": _at_start(_random, jc.prune.erk()),
}
PEERS = {
    "rigl, jaxpruner": _moving_by_peer("RigL"),
    "set, jaxpruner": _moving_by_peer("SET"),
}
DENSE = Method(lambda inner, sparsity, steps, masks, key: inner)
SR_STE = Method(
    lambda inner, sparsity, steps, masks, key: inner,
    seen=lambda p: jc.prune.straight_through(p, HALF, 1.0, decay=2e-4, rules=KERNELS),
    shipped=lambda p: jc.prune.straight_through(p, HALF, 1.0, rules=KERNELS),
)
TICKET = Method(_kept)  # its masks come from the trainings before


def rung(trained: Any, before: Any, sparsity: float) -> Any:
    """The masks of the next lottery ticket: by magnitude, among what the last one kept."""
    trained = trained if before is None else jc.prune.apply(trained, before)
    size = jax.tree.map(jnp.abs, trained)
    return jc.prune.mask(size, UNSTRUCTURED, sparsity, rules=KERNELS, distribution=TOGETHER)


def zeros(params: Any) -> float:
    """The share of zeros in all kernels."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return 1 - sum(int(jnp.count_nonzero(k)) for k in kernels) / sum(k.size for k in kernels)
