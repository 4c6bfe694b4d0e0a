"""RigL, SET, straight-through, SR-STE, AC/DC, proximal steps: against numpy, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles

UNSTRUCTURED = jc.prune.unstructured()


def draw(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rigl_step(w, mask, g, rate, moved):
    """One update of RigL after SGD, in numpy: weights and mask."""
    w = np.where(mask, w - np.float32(rate) * g, 0).astype(np.float32)
    if not moved:
        return w, mask
    kept = int(mask.sum())
    [stay] = oracles.keep_largest([np.where(mask, abs(w), -np.inf)], kept - moved)
    [come] = oracles.keep_largest([np.where(stay, -np.inf, abs(g))], moved)
    new = stay | come
    return np.where(new & mask, w, 0), new


def test_rigl_step_by_step():
    shape, every, end, n = (12, 10), 3, 10, 14
    tx = jc.prune.rigl(
        optax.sgd(0.1), UNSTRUCTURED, 0.75, key=1, every=every, end=end, fraction=0.5
    )
    params = {"w": jnp.asarray(draw(0, shape))}
    state, update = tx.init(params), jax.jit(tx.update)
    mask = np.asarray(jc.prune.masks(state)["w"])
    assert mask.sum() == 30
    params = jc.prune.apply(params, {"w": mask})
    w = np.asarray(params["w"])
    changes = 0
    for t in range(n):
        g = draw(100 + t, shape)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        due = (t + 1) % every == 0 and t < end
        moved = int(30 * 0.5 * (1 + np.cos(np.pi * t / end)) / 2) if due else 0
        before, (w, mask) = mask, rigl_step(w, mask, g, 0.1, moved)
        changes += (before != mask).any()
        np.testing.assert_array_equal(jc.prune.masks(state)["w"], mask)
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)  # p + u rounds once more
        assert (np.asarray(params["w"])[~mask] == 0).all()
    assert changes == 3


def test_what_comes_starts_from_zero_with_clean_moments():
    tx = jc.prune.rigl(optax.adam(0.1), UNSTRUCTURED, 0.5, key=0, every=2, end=100)
    params = {"w": jnp.asarray(draw(0, (6, 8)))}
    state = tx.init(params)
    params = jc.prune.apply(params, jc.prune.masks(state))
    for t in range(2):
        before = np.asarray(jc.prune.masks(state)["w"])
        updates, state = tx.update({"w": jnp.asarray(draw(t + 1, (6, 8)))}, state, params)
        params = optax.apply_updates(params, updates)
    after = np.asarray(jc.prune.masks(state)["w"])
    come = after & ~before
    assert come.any()
    mu = np.asarray(optax.tree.get(state, "mu")["w"])
    assert (np.asarray(params["w"])[come] == 0).all()
    assert (mu[come] == 0).all()
    assert (mu[~after] == 0).all()
    assert (mu[after & before] != 0).all()


def test_set_moves_at_random_and_keeps_the_count():
    params = {"a": jnp.asarray(draw(0, (10, 20))), "b": jnp.asarray(draw(0, (10, 20)))}
    tx = jc.prune.set_(optax.sgd(0.0), UNSTRUCTURED, 0.8, key=0, every=1, fraction=0.25)
    state, update = tx.init(params), jax.jit(tx.update)
    params = jc.prune.apply(params, jc.prune.masks(state))
    grown = []
    for _ in range(4):
        before = jax.tree.map(np.asarray, jc.prune.masks(state))
        _, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        after = jax.tree.map(np.asarray, jc.prune.masks(state))
        for k in params:
            assert after[k].sum() == 40
            [stay] = oracles.keep_largest([np.where(before[k], abs(params[k]), -np.inf)], 30)
            assert (after[k] | ~stay).all()  # nothing else went
        grown.append({k: after[k] & ~before[k] for k in params})
        params = jc.prune.apply(params, after)
    assert (grown[0]["a"] != grown[0]["b"]).any()  # leaves draw apart
    assert len({g["a"].tobytes() for g in grown}) == 4  # and so do updates


@pytest.mark.parametrize(
    "pattern",
    [jc.prune.block(2, 5), jc.prune.channel(), jc.prune.unstructured(axis=-2)],
    ids=["block", "channel", "outputs"],
)
def test_units_move_as_a_whole(pattern):
    params = {"w": jnp.asarray(draw(0, (8, 20)))}
    tx = jc.prune.rigl(
        optax.sgd(0.1),
        pattern,
        0.5,
        key=0,
        every=1,
        end=9,
        fraction=0.5,
        distribution=jc.prune.uniform(),
    )
    state = tx.init(params)
    before = np.asarray(jc.prune.masks(state)["w"])
    _, state = tx.update({"w": jnp.asarray(draw(1, (8, 20)))}, state, params)
    after = np.asarray(jc.prune.masks(state)["w"])
    assert after.sum() == before.sum() == 80
    assert (after != before).any()
    kept = np.asarray(
        pattern.spread("w", pattern.units("w", after.astype(np.float32)) > 0.5, after)
    )
    np.testing.assert_array_equal(kept, after)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.multi_transform({"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["MultiSteps", "chain", "multi_transform", "apply_if_finite"],
)
def test_composes_and_vmaps_over_seeds(wrap):
    def run(key, params):
        tx = wrap(
            jc.prune.set_(optax.adamw(0.1), UNSTRUCTURED, 0.75, key=key, every=1, rules=["w"])
        )
        state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 1)), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, jc.prune.masks(state)["w"]

    params = {"w": jnp.asarray(draw(0, (3, 4, 8))).astype(jnp.bfloat16), "b": jnp.ones((3, 5))}
    keys = jax.random.split(jax.random.key(0), 3)
    trained, masks = jax.jit(jax.vmap(run))(keys, params)
    assert trained["w"].dtype == jnp.bfloat16
    assert (np.asarray(masks).sum((1, 2)) == 8).all()
    assert len({np.asarray(m).tobytes() for m in masks}) == 3
    # Weights that have just come are zero too.
    assert not (np.asarray(trained["w"] != 0) & ~np.asarray(masks)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: jc.prune.rigl(s, jc.prune.nm(2, 4, axis=-2), 0.5, key=0, end=9), "2:4 has none"),
        (lambda s: jc.prune.rigl(s, UNSTRUCTURED, 0.5, key=0, end=0), "end of 1 or more"),
        (lambda s: jc.prune.rigl(s, UNSTRUCTURED, 0.5, key=0, end=9, fraction=2.0), "0 to 1"),
        (lambda s: jc.prune.set_(s, UNSTRUCTURED, 0.5, key=0, every=0), "1 or more; got 0"),
        (lambda s: jc.prune.set_(s, UNSTRUCTURED, 0.5, key=0, fraction=-1.0), "0 to 1; got -1"),
        (lambda s: jc.prune.set_(s, UNSTRUCTURED, 50, key=0), "fraction of zeros"),
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1))


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_straight_through_and_sr_ste(decay):
    w, g = draw(0, (8, 6)), draw(1, (8, 6))
    pattern = jc.prune.nm(2, 4, axis=-2)

    def loss(params):
        pruned = jc.prune.straight_through(params, pattern, 1.0, decay=decay, rules=["w"])
        return jnp.sum(pruned["w"] * g) + jnp.sum(pruned["b"]), pruned

    grads, pruned = jax.jit(jax.grad(loss, has_aux=True))({"w": w, "b": jnp.ones(3)})
    mask = oracles.nm_mask(abs(w), 2, 4, -2)
    np.testing.assert_array_equal(pruned["w"], np.where(mask, w, 0))
    # Zhou et al., 2021, equation 8, without the learning rate.
    want = g.astype(np.float64) + decay * np.where(mask, 0, w)
    np.testing.assert_allclose(grads["w"], want, rtol=1e-6)
    np.testing.assert_array_equal(grads["b"], np.ones(3))


def test_straight_through_of_a_fake_quant_array():
    params = jc.quantize.prepare_qat({"w": draw(0, (8, 4))}, {"w": jc.quantize.int8()})
    x = draw(1, (3, 8))

    def loss(params):
        pruned = jc.prune.straight_through(params, UNSTRUCTURED, 0.5)
        return jnp.sum(jc.accelerate(lambda p: x @ p["w"])(pruned))

    grads = jax.grad(loss)(params)["w"].weight
    # Inside the range the gradient is that of the product, for hidden weights too.
    np.testing.assert_allclose(grads, np.broadcast_to(x.sum(0)[:, None], (8, 4)), rtol=1e-5)


def test_ac_dc_is_a_periodic_schedule():
    tx = jc.prune.sparsify(
        optax.sgd(0.1),
        jc.prune.magnitude(),
        UNSTRUCTURED,
        jc.prune.periodic(0.9, begin=2, end=9, every=2),
    )
    params = {"w": jnp.asarray(draw(0, (10, 10)))}
    state, update, alive = tx.init(params), jax.jit(tx.update), []
    for t in range(11):
        updates, state = update({"w": jnp.asarray(draw(t + 1, (10, 10)))}, state, params)
        params = optax.apply_updates(params, updates)
        alive.append(int(jnp.count_nonzero(params["w"])))
    # After update 4 the mask is dense again, and what was pruned moves with update 5.
    assert alive == [100, 100, 10, 10, 10, 100, 10, 10, 10, 10, 10]


def regression(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 12))
    coefficients = np.where(np.arange(12) < 4, rng.normal(size=12) * 2, 0)
    return x.astype(np.float32), (x @ coefficients + 0.1 * rng.normal(size=60)).astype(np.float32)


def descend(tx, params, loss, steps=3000):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0])
    return run(params)


def test_proximal_steps_end_at_the_lasso():
    from sklearn.linear_model import Lasso

    x, y = regression()
    alpha, rate = 0.1, 0.2
    tx = optax.chain(optax.sgd(rate), jc.prune.proximal(rate * alpha))
    loss = lambda p: jnp.mean((x @ p["w"][:, 0] - y) ** 2) / 2
    params, state = descend(tx, {"w": jnp.zeros((12, 1))}, loss)
    exact = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=10**6)
    exact.fit(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(params["w"][:, 0], exact.coef_, atol=1e-4)
    np.testing.assert_array_equal(params["w"][:, 0] != 0, exact.coef_ != 0)
    np.testing.assert_array_equal(jc.prune.masks(state)["w"][:, 0], exact.coef_ != 0)
    assert 0 < np.count_nonzero(exact.coef_) < 12


def test_group_lasso_meets_its_conditions():
    x, y = regression(1)
    y = np.stack([y, -y, 0.5 * y], -1)  # three outputs; a row of weights is a group
    penalty, rate = 0.3, 0.2
    tx = optax.chain(optax.sgd(rate), jc.prune.proximal(rate * penalty, jc.prune.row()))
    loss = lambda p: jnp.sum((x @ p["w"] - y) ** 2) / (2 * len(x))
    params, _ = descend(tx, {"w": jnp.zeros((12, 3))}, loss)
    w = np.asarray(params["w"], np.float64)
    g = x.T.astype(np.float64) @ (x @ w - y) / len(x)
    norms, weight = np.sqrt((w**2).sum(1)), penalty * np.sqrt(3)
    alive = norms > 0
    assert 0 < alive.sum() < 12
    assert ((w != 0).all(1) == alive).all()
    # Yuan and Lin, 2006: g = -weight w / |w| where a group is alive, |g| <= weight elsewhere.
    np.testing.assert_allclose(
        g[alive], -weight * (w / np.maximum(norms, 1e-9)[:, None])[alive], atol=1e-4
    )
    assert (np.sqrt((g**2).sum(1))[~alive] <= weight + 1e-4).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_step_of_soft_thresholding(dtype):
    w, u = jnp.asarray(draw(0, (6, 7)), dtype), jnp.asarray(0.1 * draw(1, (6, 7)), dtype)
    tx = jc.prune.proximal(lambda count: 0.5 / (count + 1))
    updates, state = tx.update({"w": u}, tx.init({"w": w}), {"w": w})
    got = optax.apply_updates({"w": w}, updates)["w"]
    assert got.dtype == dtype
    moved = np.asarray(w + u, np.float64)
    want = np.sign(moved) * np.maximum(abs(moved) - 0.5, 0)
    # The result is rounded to the dtype once, on the scale of the weights.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=3 * jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(np.asarray(got == 0), want == 0)
    assert float(optax.tree.get(state, "count")) == 1


def test_a_penalty_needs_groups():
    for pattern in (jc.prune.nm(2, 4, axis=-1), jc.prune.unstructured(axis=-1)):
        with pytest.raises(ValueError, match="needs groups of weights"):
            jc.prune.proximal(0.1, pattern)
