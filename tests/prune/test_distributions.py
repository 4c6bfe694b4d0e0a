"""Distributions: the whole has the stated number of zeros, and each leaf its due."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles

UNSTRUCTURED = jc.prune.unstructured()
SHAPES = {"conv": (3, 3, 4, 8), "hidden": (128, 20), "out": (20, 10)}


def scores(seed=0):
    rng = np.random.default_rng(seed)
    return {
        k: rng.normal(size=s, scale=1 + i).astype(np.float32)
        for i, (k, s) in enumerate(SHAPES.items())
    }


def counts(masks):
    return {path: int(np.count_nonzero(m)) for path, m in masks.items()}


@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.9", "0.999", "1"])
def test_global_is_one_search_over_all_leaves(sparsity):
    trees = scores()
    masks = jc.prune.mask(trees, UNSTRUCTURED, float(sparsity), distribution=jc.prune.global_())
    total = sum(s.size for s in trees.values())
    want = oracles.keep_largest(list(trees.values()), oracles.kept(sparsity, total))
    for path, one in zip(trees, want):
        np.testing.assert_array_equal(masks[path], one)


def test_global_breaks_ties_from_the_first_leaf_on():
    masks = jc.prune.mask(
        {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))},
        UNSTRUCTURED,
        0.25,
        distribution=jc.prune.global_(),
    )
    assert counts(masks) == {"a": 6, "b": 3}
    assert np.flatnonzero(masks["b"]).tolist() == [0, 1, 2]


def erk_densities(shapes, density):
    """Evci et al., 2020, section 3: leaves that would be more than dense are set to dense."""
    dense = set()
    while True:
        rest = {k: s for k, s in shapes.items() if k not in dense}
        room = density * sum(np.prod(s) for s in shapes.values())
        room -= sum(np.prod(shapes[k]) for k in dense)
        epsilon = room / sum(sum(s) for s in rest.values())
        found = {k: epsilon * sum(s) / np.prod(s) for k, s in rest.items()}
        over = {k for k, d in found.items() if d > 1}
        if not over:
            return found | dict.fromkeys(dense, 1.0)
        dense |= {max(over, key=found.get)}


@pytest.mark.parametrize("sparsity", ["0.1", "0.5", "0.8", "0.95", "0.99"])
def test_erk_follows_the_paper_and_the_total_is_exact(sparsity):
    masks = jc.prune.mask(scores(), UNSTRUCTURED, float(sparsity), distribution=jc.prune.erk())
    found = counts(masks)
    total = sum(int(np.prod(s)) for s in SHAPES.values())
    assert sum(found.values()) == oracles.kept(sparsity, total)
    for path, density in erk_densities(SHAPES, 1 - float(sparsity)).items():
        # Whole weights, and what rounding leaves over goes to the first leaf with room.
        assert abs(found[path] - density * np.prod(SHAPES[path])) <= len(SHAPES) + 1


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.integers(0, 10_000).map(lambda n: n / 10_000))
def test_erk_keeps_the_stated_number_at_every_sparsity(sparsity):
    leaves = {k: jc.prune.Leaf(s, int(np.prod(s))) for k, s in SHAPES.items()}
    total = sum(leaf.units for leaf in leaves.values())
    kept = lambda size: jc.prune.constant(sparsity).kept(jnp.int32(0), size)
    allotted = {path: int(n) for [path], n in jc.prune.erk().allot(leaves, kept)}
    assert sum(allotted.values()) == int(kept(total))
    assert all(0 <= n <= leaves[path].units for path, n in allotted.items())


@pytest.mark.parametrize("kept", [0, 1, 2**24 + 1, 2**30 - 3, 2**30])
def test_erk_counts_more_than_float32_can(kept):
    leaves = {k: jc.prune.Leaf((2**15, n), 2**15 * n) for k, n in (("a", 2**14), ("b", 2**14))}
    allotted = jc.prune.erk().allot(leaves, lambda size: jnp.int32(kept))
    assert sum(int(n) for _, n in allotted) == kept
    assert all(0 <= int(n) <= 2**29 for _, n in allotted)


def test_by_rule_multiplies_the_schedule():
    shares = jc.prune.by_rule({"h.*": 0.9, "out": 0.0})
    masks = jc.prune.mask(scores(), UNSTRUCTURED, 0.5, distribution=shares)
    assert counts(masks) == {"conv": 144, "hidden": oracles.kept("0.45", 2560), "out": 200}


def test_by_rule_takes_the_first_that_matches_and_refuses_a_name_that_none_has():
    both = jc.prune.by_rule({"out": 0.5, ".*": 1.0})
    assert counts(jc.prune.mask(scores(), UNSTRUCTURED, 1.0, distribution=both))["out"] == 100
    with pytest.raises(ValueError, match="'nothing' matches none of the paths 'conv'"):
        jc.prune.mask(scores(), UNSTRUCTURED, 1.0, distribution=jc.prune.by_rule({"nothing": 0.5}))
    with pytest.raises(ValueError, match="'out' is a fraction, 0 to 1; got 90"):
        jc.prune.by_rule({"out": 90})


@pytest.mark.parametrize("make", [jc.prune.global_, jc.prune.erk], ids=["global", "erk"])
def test_leaves_compete_by_their_units(make):
    trees = {"a": scores()["hidden"], "b": scores(1)["out"]}
    masks = jc.prune.mask(trees, jc.prune.block(4, 5), 0.75, distribution=make())
    units = {k: np.asarray(m)[::4, ::5] for k, m in masks.items()}
    kept = sum(np.count_nonzero(u) for u in units.values())
    assert kept == oracles.kept("0.75", 128 + 10)
    if make is jc.prune.global_:
        means = [
            s.astype(np.float64).reshape(-1, 4, s.shape[1] // 5, 5).mean((1, 3))
            for s in trees.values()
        ]
        for unit, want in zip(units.values(), oracles.keep_largest(means, kept)):
            np.testing.assert_array_equal(unit, want)


def test_an_output_does_not_compete_with_other_leaves():
    with pytest.raises(ValueError, match="'global' lets leaves compete"):
        jc.prune.mask(
            scores(), jc.prune.unstructured(axis=-2), 0.5, distribution=jc.prune.global_()
        )


@pytest.mark.parametrize("wrap", [jc.prune.prune, None], ids=["prune", "sparsify"])
@pytest.mark.parametrize("name", ["global_", "erk", "uniform"])
def test_inside_an_optimizer_under_jit(wrap, name):
    parts = jc.prune.magnitude(), UNSTRUCTURED, jc.prune.polynomial(0.9, begin=0, end=3)
    distribution = getattr(jc.prune, name)()
    if wrap is None:
        tx = jc.prune.sparsify(optax.sgd(0.1), *parts, distribution=distribution)
    else:
        tx = optax.chain(optax.sgd(0.1), wrap(*parts, distribution=distribution))
    params = jax.tree.map(jnp.asarray, scores())
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(4):
        updates, state = update(jax.tree.map(jnp.asarray, scores(i)), state, params)
        params = optax.apply_updates(params, updates)
    found = jc.prune.masks(state)
    want = jc.prune.mask(jax.tree.map(abs, params), UNSTRUCTURED, 0.9, distribution=distribution)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    jax.tree.map(lambda p, m: np.testing.assert_array_equal(p != 0, m), params, found)
