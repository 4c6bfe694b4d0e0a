"""Adam with pruning, ours and jaxpruner's, under names that say which belong together.

jaxpruner calls `jax.tree_map`, a name that JAX no longer has. Where it is imported, and only
there, that name is restored with the meaning it had. Nothing else of the peer is changed.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import jaxcompress as jc

__all__ = ["SPARSITY", "Method", "methods", "peer"]

SPARSITY, FRACTION = 0.9, 0.3
MISSING = "not installed: pip install git+https://github.com/google-research/jaxpruner"


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


def peer() -> dict[str, str]:
    """What is known of the jaxpruner that takes part, or how to install it."""
    if importlib.util.find_spec("jaxpruner") is None:
        return {"jaxpruner": MISSING}
    found = {"version": "unknown", "commit": "unknown"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # on the path only
        package = importlib.metadata.distribution("jaxpruner")
        found["version"] = package.version
        source = json.loads(package.read_text("direct_url.json") or "{}")
        found["commit"] = source.get("vcs_info", {}).get("commit_id", "unknown")
    return {
        "jaxpruner": "version {version}, commit {commit}; jax.tree_map restored".format(**found)
    }


def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def _ours(end: int, every: int) -> dict[str, Method]:
    each = jc.prune.unstructured()
    gradual = jc.prune.magnitude(), each, jc.prune.polynomial(SPARSITY, begin=0, end=end)
    moving = dict(key=0, end=end, every=every, fraction=FRACTION)
    link = functools.partial(jc.prune.prune, *gradual)
    hidden = lambda params, state: jc.prune.straight_through(params, each, SPARSITY)
    return {
        "ours, prune": Method(optax.chain(_adam(), link())),
        "ours, sparsify": Method(jc.prune.sparsify(_adam(), *gradual)),
        "ours, prune, global": Method(optax.chain(_adam(), link(distribution=jc.prune.global_()))),
        "ours, RigL": Method(jc.prune.rigl(_adam(), each, SPARSITY, **moving)),
        "ours, SET": Method(jc.prune.set_(_adam(), each, SPARSITY, **moving)),
        "ours, straight-through": Method(_adam(), before=hidden),
    }


def _peers(end: int, every: int) -> dict[str, Method]:
    """The same with jaxpruner: sparsities of leaves, ramp, fractions and intervals as ours.

    Its RigL and SET skip the optimizer's step where connections are exchanged, as it has it.
    """
    if importlib.util.find_spec("jaxpruner") is None:
        return {}
    if not hasattr(jax, "tree_map"):
        setattr(jax, "tree_map", old_tree_map)  # noqa: B010, the name is not JAX's any more
    import jaxpruner
    from jaxpruner import sparsity_distributions

    uniform, erk = (
        dict(sparsity_distribution_fn=functools.partial(share, sparsity=SPARSITY))
        for share in (sparsity_distributions.uniform, sparsity_distributions.erk)
    )
    ramp = jaxpruner.PolynomialSchedule(update_freq=1, update_start_step=0, update_end_step=end)
    some = jaxpruner.PeriodicSchedule(
        update_freq=every, update_start_step=every, update_end_step=end
    )
    falling = optax.cosine_decay_schedule(FRACTION, end)
    updaters = {
        "magnitude": jaxpruner.MagnitudePruning(scheduler=ramp, **uniform),
        # Without its normalisation, for ours has none.
        "global magnitude": jaxpruner.GlobalMagnitudePruning(
            scheduler=ramp, sparsity=SPARSITY, use_normalization=False
        ),
        "RigL": jaxpruner.RigL(scheduler=some, drop_fraction_fn=falling, **erk),
        "SET": jaxpruner.SET(scheduler=some, drop_fraction_fn=lambda step: FRACTION, **erk),
        "straight-through": jaxpruner.SteMagnitudePruning(**uniform),
    }
    return {
        f"jaxpruner, {name}": Method(
            updater.wrap_optax(_adam()), updater.pre_forward_update, updater.post_gradient_update
        )
        for name, updater in updaters.items()
    }


def old_tree_map(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree_map` as it was: where the first tree has None, the others may have anything."""
    leaf = lambda x: x is None or (is_leaf is not None and is_leaf(x))
    skip = lambda x, *others: None if x is None else fn(x, *others)
    return jax.tree.map(skip, tree, *rest, is_leaf=leaf)
