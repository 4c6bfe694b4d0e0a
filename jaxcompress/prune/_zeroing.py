"""Exact zeros where pruned: in parameters, in updates, and in what an optimizer remembers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._paths import complete, leaves_with_paths, rebuild, subtrees
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._quantized import replace
from jaxcompress.prune._mask import weight_of

__all__ = [
    "apply",
    "clear",
    "complete_checked",
    "is_nothing",
    "map_pruned",
    "need_params",
    "to_zero",
]


def apply(params: Any, masks: Any) -> Any:
    """Parameters with zeros where the masks drop a weight.

    Args:
      params: dense leaves, or `FakeQuantArray`s, whose weights are masked.
      masks: a tree like them, from `mask` or `masks`: bool arrays, True keeps, and
        `optax.MaskedNode()` where nothing is pruned.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a mask of another shape than its parameter.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """
    whole = complete_checked(masks, params)
    return map_pruned(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, params, whole)


def complete_checked(masks: Any, params: Any) -> Any:
    """`masks` with a node for each leaf of `params`; raises if a shape is not its leaf's."""
    whole = complete(masks, params)
    for (path, leaf), m in zip(leaves_with_paths(params), subtrees(whole, params)):
        if not is_nothing(m) and m.shape != leaf.shape:
            raise ValueError(f"{path!r} has the shape {leaf.shape}, its mask {m.shape}")
    return whole


def is_nothing(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def need_params(params: Any) -> None:
    if params is None:
        raise ValueError("pruning needs the parameters: tx.update(grads, state, params)")


def to_zero(u: jax.Array, m: jax.Array, p: jax.Array) -> jax.Array:
    """The update that leaves exactly zero: `-p`, not rounded to a narrower dtype."""
    dtype = jnp.promote_types(u.dtype, p.dtype)
    return jnp.where(m, u.astype(dtype), -p.astype(dtype))


def map_pruned(fn: Any, params: Any, updates: Any, masks: Any, *rest: Any) -> Any:
    """`fn(update, mask, *rest)` of the weights that have a mask; other updates as they are."""
    out = []
    for u, m, *others in zip(*(subtrees(tree, params) for tree in (updates, masks, *rest))):
        if is_nothing(m):
            out.append(u)
            continue
        new = fn(weight_of(u), m, *map(weight_of, others))
        out.append(replace(u, weight=new) if is_compressed(u) else new)
    return rebuild(params, out)


def clear(state: Any, params: Any, keep: Any) -> Any:
    """Zeroes what an optimizer remembers of weights that are pruned, or were until now.

    A leaf of its state belongs to a parameter if its path ends with the parameter's and
    it has its shape: true of moments in any wrapper, without knowing the wrapper.
    """
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_compressed)
    # Those without a mask too: the longest path that fits is the owner's.
    by_path = {tuple(map(str, p)): None for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    for (path, leaf), mask in zip(flat, subtrees(keep, params)):
        if not is_nothing(mask):
            inside = (".weight",) if is_compressed(leaf) else ()
            by_path[(*map(str, path), *inside)] = mask

    def clear(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        keys = tuple(map(str, path))
        suffixes = (keys[start:] for start in range(len(keys) + 1))
        owner = next((suffix for suffix in suffixes if suffix in by_path), None)
        mask = None if owner is None else by_path[owner]
        if mask is None or mask.shape != leaf.shape:
            return leaf
        return jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(clear, state)
