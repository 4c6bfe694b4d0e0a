"""`mask`: masks of any scores, each leaf with the stated count; what is left alone; errors."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles

UNSTRUCTURED = jc.prune.unstructured()


@hypothesis.given(
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=5),
    st.sampled_from(["0", "0.1", "0.5", "0.9", "1"]),
    st.integers(0, 9),
)
def test_each_leaf_keeps_the_stated_count_and_the_largest(shape, sparsity, seed):
    scores = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)
    mask = jc.prune.mask({"w": jnp.asarray(scores)}, UNSTRUCTURED, float(sparsity))["w"]
    kept = oracles.kept(sparsity, scores.size)
    assert np.count_nonzero(mask) == kept
    np.testing.assert_array_equal(mask, oracles.keep_largest([scores], kept)[0])


def test_leaves_do_not_compete():
    scores = {"large": jnp.full((2, 3), 9.0), "small": jnp.full((4, 5), 1e-9)}
    masks = jc.prune.mask(scores, UNSTRUCTURED, 0.5)
    assert [np.count_nonzero(masks[k]) for k in scores] == [3, 10]


def test_without_rules_floating_matrices_are_pruned_and_nothing_else():
    params = {
        "kernel": jnp.ones((2, 2)),
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "conv": jnp.ones((1, 1, 2, 2)),
        "bias": jnp.ones(2),
        "table": jnp.ones((2, 2), jnp.int32),
        "scalar": jnp.ones(()),
    }
    masks = jc.prune.mask(params, UNSTRUCTURED, 0.5)
    nothing = {k for k, m in masks.items() if isinstance(m, optax.MaskedNode)}
    assert nothing == {"bias", "table", "scalar"}
    assert all(masks[k].dtype == bool for k in params.keys() - nothing)


def test_rules_name_whole_paths():
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(4)}, "w": jnp.ones((2, 2))}
    masks = jc.prune.mask(params, UNSTRUCTURED, 0.5, rules=[r"a/.*"])
    assert isinstance(masks["w"], optax.MaskedNode)
    assert np.count_nonzero(masks["a"]["w"]) == 2
    assert np.count_nonzero(masks["a"]["b"]) == 2  # a vector too, since it is named


def test_the_weight_of_a_fake_quant_array_is_scored():
    params = jc.quantize.prepare_qat(
        {"w": -jnp.arange(16.0).reshape(4, 4)}, {"w": jc.quantize.int4()}
    )
    masks = jc.prune.mask(jax.tree.map(jnp.abs, params), UNSTRUCTURED, 0.75)
    assert np.flatnonzero(masks["w"]).tolist() == [12, 13, 14, 15]


def test_runs_under_jit():
    scores = jnp.arange(12.0).reshape(3, 4)
    masks = jax.jit(lambda s: jc.prune.mask({"w": s}, UNSTRUCTURED, 0.5))(scores)
    assert np.flatnonzero(masks["w"]).tolist() == list(range(6, 12))


def test_holes_in_the_tree_stay():
    masks = jc.prune.mask([None, (jnp.ones((2, 2)),)], UNSTRUCTURED, 0.5)
    assert masks[0] is None
    assert np.count_nonzero(masks[1][0]) == 2


@pytest.mark.parametrize(
    ("scores", "rules", "error", "message"),
    [
        ({"a": {"n": jnp.ones((2, 2), jnp.int8)}}, ["a/n"], TypeError, r"'a/n' .* int8\[2, 2\]"),
        ({"a": jnp.ones(2), "n": jnp.ones(3, jnp.int32)}, None, ValueError, r"'a' float32\[2\]"),
        ({"a": jnp.ones((2, 2))}, ["b"], ValueError, "'b' matches none of the paths 'a'"),
        ({"a": jnp.ones((2, 2))}, "a", TypeError, "list"),
        ({"a": jnp.ones((2, 2))}, ["("], ValueError, "no regular expression"),
        ({}, None, ValueError, "no leaf"),
        ({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}, None, ValueError, "same path"),
    ],
)
def test_errors_say_what_there_is(scores, rules, error, message):
    with pytest.raises(error, match=message):
        jc.prune.mask(scores, UNSTRUCTURED, 0.5, rules=rules)


def test_what_is_compressed_already_has_no_scores():
    params = jc.quantize.quantize({"w": jnp.ones((4, 4))}, {"w": jc.quantize.int8()})
    with pytest.raises(TypeError, match="'w' cannot be pruned: it is a QuantizedArray"):
        jc.prune.mask(params, UNSTRUCTURED, 0.5, rules=["w"])
    with pytest.raises(ValueError, match="'w' a QuantizedArray"):
        jc.prune.mask(params, UNSTRUCTURED, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
def test_sparsity_is_a_fraction(sparsity):
    with pytest.raises(ValueError, match="0 to 1"):
        jc.prune.mask(jnp.ones((2, 2)), UNSTRUCTURED, sparsity)
