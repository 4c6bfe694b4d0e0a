"""`prune` and `sparsify` step by step against loops in numpy, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import jaxcompress as jc
import oracles_pruning as oracles
from checks import random

MAGNITUDE, UNSTRUCTURED = jc.prune.magnitude(), jc.prune.unstructured()
HALF = MAGNITUDE, UNSTRUCTURED, jc.prune.constant(0.5)
# Multiples of 1/8 stay exact through every product and sum below.
grid = lambda *shape, seed: np.round(random(*shape, seed=seed) * 8) / 8


def run(tx, w, steps, gradient):
    """The weights, masks and states after each step; `gradient(i)` is that of step `i`."""
    params = {"w": jnp.asarray(w)}
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        updates, state = update({"w": jnp.asarray(gradient(i))}, state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params["w"]), np.asarray(jc.prune.masks(state)["w"]), state


def largest(w, kept):
    [mask] = oracles.keep_largest([np.abs(w)], kept)
    return mask


@pytest.mark.parametrize("form", ["prune", "sparsify"])
def test_every_step_of_momentum(form):
    sgd, w = optax.sgd(0.5, momentum=0.5), grid(6, 5, seed=0)
    tx = optax.chain(sgd, jc.prune.prune(*HALF))
    if form == "sparsify":
        tx = jc.prune.sparsify(sgd, *HALF)
    moment, mask = np.zeros_like(w), np.ones(w.shape, bool)
    for i, (got, got_mask, state) in enumerate(run(tx, w, 5, lambda i: grid(6, 5, seed=i + 1))):
        g = grid(6, 5, seed=i + 1)
        before = mask
        # `sparsify` masks gradients by the mask so far; `prune` never touches the moments.
        moment = 0.5 * moment + (g * before if form == "sparsify" else g)
        w = w - 0.5 * moment
        mask = largest(w, 15)
        w = np.where(mask, w, 0)
        if form == "sparsify":
            moment = np.where(mask & before, moment, 0)
        np.testing.assert_array_equal(got_mask, mask)
        np.testing.assert_array_equal(got, w)
        [trace] = [x for x in jax.tree.leaves(state) if x.shape == w.shape and x.dtype != bool]
        np.testing.assert_array_equal(trace, moment)


@pytest.mark.parametrize("form", ["prune", "sparsify"])
def test_masks_follow_the_schedule_and_then_stay(form):
    w, schedule = grid(5, 8, seed=0), jc.prune.polynomial(0.8, begin=1, end=8, every=3)
    parts = MAGNITUDE, UNSTRUCTURED, schedule
    tx = optax.chain(optax.sgd(1.0), jc.prune.prune(*parts))
    if form == "sparsify":
        tx = jc.prune.sparsify(optax.sgd(1.0), *parts)
    chosen = oracles.updates_that_choose(1, 8, 3, 12)
    mask = np.ones(w.shape, bool)
    for i, (got, got_mask, _) in enumerate(run(tx, w, 12, lambda i: grid(5, 8, seed=i + 1))):
        g = grid(5, 8, seed=i + 1)
        w = w - (g * mask if form == "sparsify" else g)
        if i in chosen:
            sparsity = 0.8 - 0.8 * (1 - (i + 1 - 1) / 7) ** 3
            mask = largest(w, 40 - int(np.floor(sparsity * 40 + 0.5)))
        w = np.where(mask, w, 0)
        np.testing.assert_array_equal(got_mask, mask)
        np.testing.assert_array_equal(got, w)
    assert mask.sum() == 8


def test_what_was_pruned_can_come_back():
    w = np.float32([[4, 3, 2, 1]])
    gradient = [np.float32([[0, 0, 0, 0]]), np.float32([[0, 0, 0, -9]])]
    tx = optax.chain(optax.sgd(1.0), jc.prune.prune(*HALF))
    states = list(run(tx, w, 2, gradient.__getitem__))
    assert states[0][0].tolist() == [[4, 3, 0, 0]]
    assert states[1][0].tolist() == [[4, 0, 0, 9]]


def test_moments_of_what_came_back_start_from_zero():
    """A criterion with gradients regrows a weight whose moments are of long ago."""
    saliency = jc.prune.Criterion(
        "saliency", lambda w: (), lambda w, g, memory: (jnp.abs(g), memory), needs_gradients=True
    )
    tx = jc.prune.sparsify(optax.adam(0.1), saliency, UNSTRUCTURED, jc.prune.constant(0.5))
    gradients = [np.float32([[4, 3, 2, 1]]), np.float32([[1, 2, 3, 4]])]
    (_, first, one), (_, second, two) = run(
        tx, np.ones((1, 4), np.float32), 2, gradients.__getitem__
    )
    assert first.tolist() == [[True, True, False, False]]
    assert second.tolist() == [[False, False, True, True]]
    for name in ("mu", "nu"):
        assert np.flatnonzero(optax.tree.get(one, name)["w"]).tolist() == [0, 1]
        assert not np.any(optax.tree.get(two, name)["w"])  # just pruned, or pruned until now


def test_the_criterion_sees_raw_gradients_and_the_optimizer_masked_ones():
    saliency = jc.prune.Criterion(
        "saliency", lambda w: (), lambda w, g, memory: (jnp.abs(g), memory), needs_gradients=True
    )
    tx = jc.prune.sparsify(optax.trace(0.0), saliency, UNSTRUCTURED, jc.prune.constant(0.5))
    gradients = [np.float32([[4, 3, 2, 1]]), np.float32([[1, 2, 30, 40]])]
    _, (_, mask, state) = run(tx, np.ones((1, 4), np.float32), 2, gradients.__getitem__)
    assert mask.tolist() == [[False, False, True, True]]  # though masked, they were seen
    assert not np.any(optax.tree.get(state, "trace")["w"])  # and did not get inside


def test_a_criterion_remembers():
    """An average of magnitudes over time: the memory goes in and comes out."""
    average = jc.prune.Criterion(
        "average",
        lambda w: jnp.zeros(w.shape),
        lambda w, g, memory: (new := memory + jnp.abs(w), new),
    )
    tx = optax.chain(optax.sgd(1.0), jc.prune.prune(average, UNSTRUCTURED, jc.prune.constant(0.5)))
    w, total = grid(4, 4, seed=0), 0
    for i, (got, mask, _) in enumerate(run(tx, w, 3, lambda i: grid(4, 4, seed=i + 1))):
        w = w - grid(4, 4, seed=i + 1)
        total = total + np.abs(w)
        w = np.where(largest(total, 8), w, 0)
        np.testing.assert_array_equal(mask, largest(total, 8))
        np.testing.assert_array_equal(got, w)


def test_moments_belong_to_the_longest_path_that_fits():
    """`w` and `a/w` have one shape; each has its own mask, one has none."""
    params = {"a": {"w": jnp.ones((2, 2))}, "w": jnp.ones((2, 2))}
    tx = jc.prune.sparsify(optax.adam(0.1), *HALF, rules=["w"])
    _, state = tx.update(params, tx.init(params), params)
    assert np.count_nonzero(optax.tree.get(state, "mu")["a"]["w"]) == 4
    assert np.count_nonzero(optax.tree.get(state, "mu")["w"]) == 2


def test_all_weights_together_in_one_vector():
    """Inside `optax.flatten` there is one vector: its rule is the empty path."""
    tx = optax.flatten(jc.prune.sparsify(optax.adam(0.1), *HALF, rules=[""]))
    params = {"a": jnp.full((2, 3), 9.0), "b": jnp.full((2, 3), 1.0)}
    updates, _ = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert [np.count_nonzero(x) for x in params.values()] == [6, 0]


def test_n_of_m_after_every_update():
    pattern = jc.prune.nm(2, 4, axis=-2)
    tx = optax.chain(optax.sgd(0.5), jc.prune.prune(MAGNITUDE, pattern, jc.prune.constant(1.0)))
    w = grid(8, 6, seed=0)
    for i, (got, _, _) in enumerate(run(tx, w, 3, lambda i: grid(8, 6, seed=i + 1))):
        w = w - 0.5 * grid(8, 6, seed=i + 1)
        w = np.where(oracles.nm_mask(np.abs(w), 2, 4, -2), w, 0)
        np.testing.assert_array_equal(got, w)


def test_keep_holds_given_masks():
    masks = {"w": np.random.default_rng(0).random((5, 4)) < 0.5, "b": optax.MaskedNode()}
    params = {"w": jnp.asarray(random(5, 4)), "b": jnp.ones(4)}
    tx = optax.chain(optax.adam(0.1), jc.prune.keep(masks))
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(np.asarray(params["w"]) != 0, masks["w"])
    assert np.all(np.asarray(params["b"]) != 1)
    np.testing.assert_array_equal(jc.prune.masks(state)["w"], masks["w"])


def primitives(jaxpr):
    """The names of all primitives, inside loops and branches too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                yield from primitives(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from primitives(inner)


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, jc.prune.nm(2, 4, axis=-1)], ids=["all", "2:4"])
@pytest.mark.parametrize("form", ["prune", "sparsify"])
@pytest.mark.parametrize(
    "schedule", [jc.prune.constant(0.5), jc.prune.polynomial(0.9, begin=0, end=9)], ids=["c", "p"]
)
def test_an_update_of_the_mask_sorts_nothing(form, pattern, schedule):
    parts = MAGNITUDE, pattern, schedule
    tx = jc.prune.prune(*parts)
    if form == "sparsify":
        tx = jc.prune.sparsify(optax.identity(), *parts)
    params = {"w": jnp.ones((16, 16))}
    names = set(primitives(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr))
    assert "while" in names  # the search was found
    # A cumulative sum would gather scores that are sharded.
    assert not {n for n in names if "sort" in n or "top_k" in n or n.startswith("cum")}


GRADIENTS = jc.prune.Criterion("taylor", lambda w: (), lambda w, g, m: (w * g, m), True)
MATRIX = {"net": {"w": jnp.ones((2, 2))}}


@pytest.mark.parametrize("form", ["prune", "sparsify"])
@pytest.mark.parametrize(
    ("params", "rules", "error", "message"),
    [
        (MATRIX, ["w"], ValueError, "'w' matches none of the paths 'net/w'"),
        ({"n": jnp.ones((2, 2), jnp.int8)}, ["n"], TypeError, r"'n' cannot be pruned: .*int8\[2"),
        ({"b": jnp.ones(2)}, None, ValueError, r"'b' float32\[2\]"),
    ],
)
def test_what_cannot_be_pruned(form, params, rules, error, message):
    tx = jc.prune.prune(*HALF, rules=rules)
    if form == "sparsify":
        tx = jc.prune.sparsify(optax.sgd(0.1), *HALF, rules=rules)
    with pytest.raises(error, match=message):
        tx.init(params)


def test_params_are_needed():
    for tx in (
        jc.prune.prune(*HALF),
        jc.prune.sparsify(optax.sgd(0.1), *HALF),
        jc.prune.keep({"net": {"w": jnp.ones((2, 2), bool)}}),
    ):
        with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
            tx.update(MATRIX, tx.init(MATRIX))


def test_gradients_do_not_reach_the_end_of_a_chain():
    with pytest.raises(ValueError, match=r"taylor needs gradients.*sparsify"):
        jc.prune.prune(GRADIENTS, UNSTRUCTURED, jc.prune.constant(0.5))


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"'net/w' has the shape \(2, 2\), its mask \(3,\)"):
        jc.prune.keep({"net": {"w": jnp.ones(3, bool)}}).init(MATRIX)


def test_masks_of_a_state_without_pruning_or_with_two():
    with pytest.raises(ValueError, match="no pruning in this state"):
        jc.prune.masks(optax.adam(0.1).init(MATRIX))
    twice = optax.chain(jc.prune.prune(*HALF), jc.prune.prune(*HALF)).init(MATRIX)
    with pytest.raises(ValueError, match="'net/w' is pruned by 2 transformations"):
        jc.prune.masks(twice)


def test_masks_of_two_prunings_of_different_leaves_are_merged():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    half, all_ = (jc.prune.prune(MAGNITUDE, UNSTRUCTURED, jc.prune.constant(s)) for s in (0.5, 1.0))
    tx = optax.multi_transform({"half": half, "all": all_}, {"a": "half", "b": "all"})
    _, state = tx.update(params, tx.init(params), params)
    masks = jc.prune.masks(state)
    assert [np.count_nonzero(masks[k]) for k in "ab"] == [2, 0]
