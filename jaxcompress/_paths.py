"""The path of a leaf as text: what rules match and errors name."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey, KeyPath

from jaxcompress.arrays import is_compressed

__all__ = [
    "complete",
    "leaves_with_paths",
    "map_with_paths",
    "path_string",
    "rebuild",
    "subtrees",
    "without_value",
]


def path_string(path: KeyPath) -> str:
    """`params/Dense_0/kernel`; the `.value` of an NNX variable is left out."""
    return jax.tree_util.keystr(without_value(path), simple=True, separator="/")


def without_value(path: KeyPath) -> KeyPath:
    """The path of an NNX variable rather than of its `.value`; any other as it is."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        return path[:-1]
    return path


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf; a compressed array is one leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    return [(path_string(path), leaf) for path, leaf in flat]


def map_with_paths(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of `fn(path, leaf, *rest)`; a compressed array is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_string(path), *leaves), tree, *rest, is_leaf=is_compressed
    )


def complete(masks: Any, params: Any) -> Any:
    """`masks` with a node for each leaf of `params` where one stands for a whole subtree."""

    def one(mask: Any, subtree: Any) -> Any:
        if not isinstance(mask, optax.MaskedNode):
            return mask
        return jax.tree.map(lambda _: mask, subtree, is_leaf=is_compressed)

    return jax.tree.map(one, masks, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def subtrees(tree: Any, like: Any) -> list[Any]:
    """What `tree` has at the place of each leaf of `like`; a compressed array is a leaf."""
    treedef: Any = jax.tree.structure(like, is_leaf=is_compressed)
    return treedef.flatten_up_to(tree)


def rebuild(like: Any, leaves: list[Any]) -> Any:
    """A tree like `like` with other leaves; a compressed array is a leaf."""
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_compressed), leaves)
