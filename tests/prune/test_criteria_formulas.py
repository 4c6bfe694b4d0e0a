"""Criteria with a memory: the papers' formulas in float64, over several updates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

STEPS = 4


def history(seed=0, shape=(3, 5)):
    """Weights and gradients of some updates."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, *shape)) for _ in range(STEPS)]


def mean(values, decay):
    """The running mean from zero, as a sum: `sum_i (1 - d) d^(T - i) v_i`."""
    return sum((1 - decay) * decay ** (STEPS - 1 - i) * v for i, v in enumerate(values))


FORMULAS = {
    "movement": (jc.prune.movement(), lambda past: -sum(g * w for w, g in past)),
    "taylor": (
        jc.prune.taylor(decay=0.8),
        lambda past: mean([(g * w) ** 2 for w, g in past], 0.8),
    ),
    "fisher": (
        jc.prune.fisher(decay=0.7),
        lambda past: mean([g**2 for _, g in past], 0.7) * past[-1][0] ** 2 / 2,
    ),
    "gradient": (jc.prune.gradient(), lambda past: abs(past[-1][1])),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_follow_their_formulas(name, dtype):
    criterion, formula = FORMULAS[name]
    assert criterion.needs_gradients
    past = [tuple(jnp.asarray(a, dtype) for a in step) for step in history()]
    memory = criterion.init(past[0][0])
    for w, g in past:
        score, memory = criterion.score(w, g, memory)
    assert score.dtype == jnp.float32
    want = formula([tuple(np.asarray(a, np.float64) for a in step) for step in past])
    # A dozen roundings of float32, each 2^-24 of a term; terms are at most a few ones.
    np.testing.assert_allclose(score, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("make", [jc.prune.taylor, jc.prune.fisher])
@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_that_of_a_mean(make, decay):
    with pytest.raises(ValueError, match="0 <= decay < 1"):
        make(decay=decay)


def steps(tx, params, n):
    state, update = tx.init(params), jax.jit(tx.update)
    found = []
    for i in range(n):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(jc.prune.masks(state))
    return found


def test_random_masks_differ_between_leaves_and_keys_and_only_ever_shrink():
    params = {"a": jnp.ones((8, 32)), "b": jnp.ones((8, 32))}
    schedule = jc.prune.polynomial(0.9, begin=0, end=5)

    def masks(key):
        parts = jc.prune.random(key), jc.prune.unstructured(), schedule
        return steps(jc.prune.sparsify(optax.sgd(0.1), *parts), params, 5)

    one, again, other = masks(0), masks(jax.random.key(0)), masks(1)
    for before, after in itertools.pairwise(one):
        assert not (np.asarray(after["a"]) & ~np.asarray(before["a"])).any()
    final = one[-1]
    assert (np.asarray(final["a"]) != np.asarray(final["b"])).any()
    assert (np.asarray(final["a"]) == np.asarray(again[-1]["a"])).all()
    assert (np.asarray(final["a"]) != np.asarray(other[-1]["a"])).any()
    # 26 of 256 at random: each row of 32 keeps 3.2 on average, no row more than 12.
    assert np.asarray(final["a"]).sum() == 26
    assert np.asarray(final["a"]).sum(1).max() <= 12


def test_random_is_as_good_for_every_seed_of_a_vmap():
    params = {"w": jnp.ones((4, 6, 8))}

    def run(key, params):
        parts = jc.prune.random(key), jc.prune.unstructured(), jc.prune.one_shot(0.5)
        tx = optax.chain(optax.sgd(0.1), jc.prune.prune(*parts))
        return jc.prune.masks(tx.update(params, tx.init(params), params)[1])

    found = jax.vmap(run)(jax.random.split(jax.random.key(0), 4), params)["w"]
    assert (np.asarray(found).sum((1, 2)) == 24).all()
    assert len({np.asarray(m).tobytes() for m in found}) == 4
