"""Paths of leaves as text, the same for every kind of tree."""

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

from checks import made
from jaxcompress._paths import leaves_with_paths, map_with_paths, rebuild, subtrees


def names(tree):
    return [path for path, _ in leaves_with_paths(tree)]


def test_dicts_lists_and_modules():
    assert names({"a": [1.0, {"b": 2.0}]}) == ["a/0", "a/1/b"]
    assert names(eqx.nn.Linear(2, 3, key=jax.random.key(0))) == ["weight", "bias"]


def test_nnx_variables_have_the_name_of_the_variable():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert set(names(model)) == set(names(nnx.state(model))) == {"kernel", "bias"}


def test_a_compressed_array_is_one_leaf_and_none_is_none():
    tree = {"w": made((4, 2)), "b": None, "c": np.ones(2)}
    assert names(tree) == ["c", "w"]
    seen = {}
    out = map_with_paths(lambda path, leaf: seen.setdefault(path, leaf), tree)
    assert seen["w"] is tree["w"]
    assert out["b"] is None


def test_map_over_several_trees():
    a, b = {"x": made((4, 2)), "y": 1.0}, {"x": (1, 2), "y": "any"}
    out = map_with_paths(lambda path, p, q: (path, q), a, b)
    assert out == {"x": ("x", (1, 2)), "y": ("y", "any")}


def test_subtrees_and_rebuild():
    like = {"w": made((4, 2)), "b": 1.0}
    other = {"w": {"anything": 1}, "b": [2]}
    assert subtrees(other, like) == [[2], {"anything": 1}]
    assert rebuild(like, ["b", "w"]) == {"b": "b", "w": "w"}
    with pytest.raises(ValueError, match=r"[Dd]ict"):
        subtrees({"w": 1}, like)
