"""jaxpruner, the peer of the pruning experiments, where it is installed.

It calls `jax.tree_map`, a name that JAX no longer has. Where it is imported, and only there,
that name is restored with the meaning it had. Nothing else of the peer is changed.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import optax

__all__ = ["about", "jaxpruner", "moving", "old_tree_map"]

MISSING = "not installed: pip install git+https://github.com/google-research/jaxpruner"


def jaxpruner() -> Any:
    """The module, or None."""
    if importlib.util.find_spec("jaxpruner") is None:
        return None
    if not hasattr(jax, "tree_map"):
        setattr(jax, "tree_map", old_tree_map)  # noqa: B010, the name is not JAX's any more
    return importlib.import_module("jaxpruner")


def moving(
    name: str, sparsity: float, *, every: int, end: int, fraction: float, **options: Any
) -> Any:
    """Its "RigL" or "SET", where it is installed, with the settings that ours take.

    Both skip the optimizer's step where connections are exchanged, as it has it.
    """
    package = jaxpruner()
    share = package.sparsity_distributions.erk
    falling = optax.cosine_decay_schedule(fraction, end)
    return getattr(package, name)(
        scheduler=package.PeriodicSchedule(
            update_freq=every, update_start_step=every, update_end_step=end
        ),
        drop_fraction_fn=falling if name == "RigL" else lambda step: fraction,
        sparsity_distribution_fn=functools.partial(share, sparsity=sparsity),
        **options,
    )


def about() -> dict[str, str]:
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


def old_tree_map(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree_map` as it was: where the first tree has None, the others may have anything."""
    leaf = lambda x: x is None or (is_leaf is not None and is_leaf(x))
    skip = lambda x, *others: None if x is None else fn(x, *others)
    return jax.tree.map(skip, tree, *rest, is_leaf=leaf)
