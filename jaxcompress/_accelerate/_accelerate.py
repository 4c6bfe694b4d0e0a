"""`accelerate`: run an unmodified function on compressed parameters."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import quax

from jaxcompress import _quax
from jaxcompress._accelerate import (  # noqa: F401  (registers them)
    _fuse,
    _pruned_input,
    _rotated,
    _rules,
    _scaled,
)
from jaxcompress._paths import path_string

__all__ = ["accelerate"]

P = ParamSpec("P")
R = TypeVar("R")


def accelerate(fn: Callable[P, R]) -> Callable[P, R]:
    """Lets `fn` take compressed arrays wherever it takes dense ones.

    The function runs unmodified. Where it multiplies with a compressed weight, the
    product goes to the op of that weight's format; views keep it compressed; any other
    primitive gets the dense array (`jaxcompress.explain` says which, and why). Without
    compressed arguments it is `fn` itself.

    Compose it freely: `jax.jit(jc.accelerate(fn))`, `jax.vmap`, `jax.grad` of a loss
    that calls it, `shard_map`, `jax.export`. Differentiate outside, not inside: a
    gradient taken within `fn` with respect to a `FakeQuantArray` raises `TypeError`.

    Args:
      fn: any function of arrays: `model.apply` of Linen or Haiku, an Equinox module,
        `lambda model, x: model(x)` for NNX, a bare function.

    Returns:
      A function of the same arguments and results.

    Raises:
      TypeError: `fn` updates an argument in place (an NNX variable, say) and does not
        return it: it works on a copy, so the update would be lost.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> dense = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    >>> params = jc.quantize.quantize(dense, {"kernel": jc.quantize.int8()})
    >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
    >>> jax.jit(jc.accelerate(fn))(params, jnp.ones((1, 4)))
    Array([[2., 2., 2., 2.]], dtype=float32)
    """

    @functools.wraps(fn)
    def accelerated(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, treedef = jax.tree.flatten((fn, args, kwargs), is_leaf=_is_value)
        if not any(map(_is_value, leaves)):
            return fn(*args, **kwargs)
        out_treedef = None

        def call(leaves):
            nonlocal out_treedef
            call_fn, call_args, call_kwargs = jax.tree.unflatten(treedef, leaves)
            out = call_fn(*call_args, **call_kwargs)
            # Flattened and rebuilt within the trace: NNX variables refuse to be looked
            # at from another.
            out_leaves, out_treedef = jax.tree.flatten(out)
            _refuse_lost_updates(leaves, (call_fn, call_args, call_kwargs), out_leaves)
            return out_leaves

        out_leaves = _fuse.run(call, leaves)
        return jax.tree.unflatten(out_treedef, out_leaves)

    return accelerated


def _is_value(x: Any) -> bool:
    return isinstance(x, quax.Value)


def _refuse_lost_updates(leaves: list[Any], after: Any, out_leaves: list[Any]) -> None:
    """Raises if an argument was changed in place and the change is not in the result."""
    kept = {id(_quax.held_by(leaf)) for leaf in (*leaves, *out_leaves)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        if id(_quax.held_by(leaf)) not in kept:
            raise TypeError(
                f"{path_string(path[1:])} was updated in place inside accelerate, on a copy, and "
                "not returned, so the update would be lost. Return the updated module or "
                "state, e.g. (y, nnx.state(model)), or switch the update off."
            )
