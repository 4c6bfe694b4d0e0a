"""Patterns: N:M keeps exactly N of every M neighbours along the contracted axis."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles_pruning as oracles

RATIOS = [(1, 2), (2, 4), (4, 8), (1, 4), (3, 4)]


def groups_of(mask, m, axis):
    rows = np.moveaxis(np.asarray(mask), axis, -1)
    return rows.reshape(*rows.shape[:-1], -1, m)


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_nm_keeps_the_n_largest_of_each_group(ratio, axis):
    # Few different values, so that nearly every group has ties.
    scores = np.random.default_rng(0).integers(-3, 4, (8, 16, 24)).astype(np.float32)
    mask = jc.prune.mask(jnp.asarray(scores), jc.prune.nm(*ratio, axis=axis), 1.0)
    np.testing.assert_array_equal(mask, oracles.nm_mask(scores, *ratio, axis))
    assert (groups_of(mask, ratio[1], axis).sum(-1) == ratio[0]).all()


@hypothesis.given(st.sampled_from(RATIOS), st.data())
def test_nm_with_any_floats(ratio, data):
    n, m = ratio
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1.0]
    values = st.sampled_from(special) | st.floats(width=32, allow_nan=False)
    scores = np.array(data.draw(st.lists(values, min_size=4 * m, max_size=4 * m)), np.float32)
    mask = jc.prune.mask(jnp.asarray(scores.reshape(4, m)), jc.prune.nm(n, m, axis=-1), 1.0)
    np.testing.assert_array_equal(mask, oracles.nm_mask(scores.reshape(4, m), n, m, -1))


def test_nm_of_equal_scores_keeps_the_first():
    mask = jc.prune.mask(jnp.ones((2, 8)), jc.prune.nm(2, 4, axis=-1), 1.0)
    assert np.asarray(mask).astype(int).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2


def test_nm_of_nan_still_keeps_exactly_n():
    mask = jc.prune.mask(jnp.full((2, 8), jnp.nan), jc.prune.nm(2, 4, axis=-1), 1.0)
    assert (groups_of(mask, 4, -1).sum(-1) == 2).all()


@pytest.mark.parametrize("share", ["0", "0.25", "0.3", "0.75", "1"])
@pytest.mark.parametrize("ratio", [(2, 4), (4, 8), (1, 4)], ids=str)
def test_a_share_of_the_groups_is_constrained_the_cheapest_first(ratio, share):
    n, m = ratio
    # Whole numbers: their sums are exact in any order.
    scores = np.random.default_rng(1).integers(0, 50, (16, 40)).astype(np.float32)
    mask = jc.prune.mask(jnp.asarray(scores), jc.prune.nm(n, m, axis=-2), float(share))
    grouped = groups_of(scores, m, -2)
    loss = np.sort(grouped, -1)[..., : m - n].sum(-1)
    [dense] = oracles.keep_largest([loss], oracles.kept(share, loss.size))
    kept = groups_of(mask, m, -2).sum(-1)
    np.testing.assert_array_equal(kept, np.where(dense, m, n))
    want = groups_of(oracles.nm_mask(scores, n, m, -2), m, -2) | dense[..., None]
    np.testing.assert_array_equal(groups_of(mask, m, -2), want)


def test_nm_runs_under_jit_and_vmap():
    scores = np.random.default_rng(2).integers(0, 9, (3, 8, 6)).astype(np.float32)
    choose = jax.jit(jax.vmap(lambda s: jc.prune.mask(s, jc.prune.nm(2, 4, axis=0), 1.0)))
    np.testing.assert_array_equal(choose(scores), oracles.nm_mask(scores, 2, 4, 1))


def test_unstructured_scores_each_weight():
    scores = np.random.default_rng(3).integers(-9, 9, (6, 7)).astype(np.float32)
    mask = jc.prune.mask(jnp.asarray(scores), jc.prune.unstructured(), 0.5)
    np.testing.assert_array_equal(mask, oracles.keep_largest([scores], 21)[0])


def model(params, x):
    hidden = jnp.einsum("td,dhs->ths", x, params["query"])
    mixed = jnp.einsum("ths,hsd->td", hidden, params["out"])
    return mixed @ params["dense"]["kernel"] @ params["linear"]["weight"].T


def attention():
    random = np.random.default_rng(4)
    shapes = {"query": (8, 2, 4), "out": (2, 4, 8)}
    params = {k: jnp.asarray(random.normal(size=s), jnp.float32) for k, s in shapes.items()}
    kernel, weight = random.normal(size=(2, 8, 8)).astype(np.float32)
    return params | {"dense": {"kernel": kernel}, "linear": {"weight": weight}}


def test_nm_takes_the_contracting_axes_from_a_layout():
    params = attention()
    scores = jax.tree.map(jnp.abs, params)
    found = jc.layout(model, params, jnp.ones((3, 8)))
    masks = jc.prune.mask(scores, jc.prune.nm(2, 4, layout=found), 1.0)
    axes = {"query": -3, "out": -2, "dense": {"kernel": -2}, "linear": {"weight": -1}}
    want = jax.tree.map(lambda s, axis: oracles.nm_mask(s, 2, 4, axis), scores, axes)
    jax.tree.map(np.testing.assert_array_equal, masks, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.prune.nm(2, 4), "axis=-2 .Flax's Dense"),
        (lambda: jc.prune.nm(2, 4, axis=-2, layout={}), "one of them"),
        (lambda: jc.prune.nm(4, 4, axis=-1), "0 < n < m; got n=4, m=4"),
        (lambda: jc.prune.nm(0, 4, axis=-1), "0 < n < m"),
        (lambda: jc.prune.nm(5, 4, axis=-1), "0 < n < m"),
    ],
)
def test_nm_refuses_what_means_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((8, 6), -1, r"'net/w' has the shape \(8, 6\), which 4 does not divide.*rules="),
        ((8, 6), 2, r"along axis 2: 'net/w' has the shape \(8, 6\)"),
        ((8, 6), -3, r"along axis -3: 'net/w'"),
    ],
)
def test_nm_names_the_leaf_that_does_not_fit(shape, axis, message):
    with pytest.raises(ValueError, match=message):
        jc.prune.mask({"net": {"w": jnp.ones(shape)}}, jc.prune.nm(2, 4, axis=axis), 1.0)


def test_nm_names_the_leaf_that_the_layout_does_not_contract():
    params = {"w": jnp.ones((4, 4)), "table": jnp.ones((4, 4))}
    found = jc.layout(lambda p, x: x @ p["w"] + p["table"], params, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="no contracting axis for 'table'"):
        jc.prune.mask(params, jc.prune.nm(2, 4, layout=found), 1.0)
