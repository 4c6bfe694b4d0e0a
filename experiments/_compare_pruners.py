"""Adam with pruning, ours and jaxpruner's, under names that say which belong together."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import jaxcompress as jc
from _jaxpruner import jaxpruner, moving

__all__ = ["SPARSITY", "Method", "methods"]

SPARSITY, FRACTION = 0.9, 0.3


def _as_is(params: Any, state: Any) -> Any:
    return params


class Method(NamedTuple):
    """An optimizer, and what else is done to the parameters in a step.

    `before(params, state)` is what the forward pass sees, and what gradients are taken at;
    `after(params, state)` is what is left of the updated ones.
    """

    tx: optax.GradientTransformation
    before: Callable[[Any, Any], Any] = _as_is
    after: Callable[[Any, Any], Any] = _as_is


def methods(end: int, every: int) -> dict[str, Method]:
    """Those that prune gradually, with masks chosen after each of `end` updates, and others.

    RigL and SET exchange connections after each `every`-th of them; the straight-through
    masks are of the final sparsity from the start.
    """
    return {"dense": Method(_adam())} | _ours(end, every) | _peers(end, every)


def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def _ours(end: int, every: int) -> dict[str, Method]:
    each = jc.prune.unstructured()
    gradual = jc.prune.magnitude(), each, jc.prune.polynomial(SPARSITY, begin=0, end=end)
    exchange = dict(key=0, end=end, every=every, fraction=FRACTION)
    link = functools.partial(jc.prune.prune, *gradual)
    hidden = lambda params, state: jc.prune.straight_through(params, each, SPARSITY)
    return {
        "ours, prune": Method(optax.chain(_adam(), link())),
        "ours, sparsify": Method(jc.prune.sparsify(_adam(), *gradual)),
        "ours, prune, global": Method(optax.chain(_adam(), link(distribution=jc.prune.global_()))),
        "ours, RigL": Method(jc.prune.rigl(_adam(), each, SPARSITY, **exchange)),
        "ours, SET": Method(jc.prune.set_(_adam(), each, SPARSITY, **exchange)),
        "ours, straight-through": Method(_adam(), before=hidden),
    }


def _peers(end: int, every: int) -> dict[str, Method]:
    """The same with jaxpruner: sparsities of leaves, ramp, fractions and intervals as ours."""
    package = jaxpruner()
    if package is None:
        return {}
    share = functools.partial(package.sparsity_distributions.uniform, sparsity=SPARSITY)
    uniform = dict(sparsity_distribution_fn=share)
    ramp = package.PolynomialSchedule(update_freq=1, update_start_step=0, update_end_step=end)
    exchange = dict(every=every, end=end, fraction=FRACTION)
    updaters = {
        "magnitude": package.MagnitudePruning(scheduler=ramp, **uniform),
        # Without its normalisation, for ours has none.
        "global magnitude": package.GlobalMagnitudePruning(
            scheduler=ramp, sparsity=SPARSITY, use_normalization=False
        ),
        "RigL": moving("RigL", SPARSITY, **exchange),
        "SET": moving("SET", SPARSITY, **exchange),
        "straight-through": package.SteMagnitudePruning(**uniform),
    }
    return {
        f"jaxpruner, {name}": Method(
            updater.wrap_optax(_adam()), updater.pre_forward_update, updater.post_gradient_update
        )
        for name, updater in updaters.items()
    }
