"""Ridge regression on learned images: kernels by integration, losses by numpy, pools by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import dblquad

import jaxcompress as jc

d = jc.distill.dataset


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expectations(xx, xy, yy):
    """`E[relu(u) relu(v)]` and `P(u > 0, v > 0)` of Gaussians, by numerical integration."""
    inverse = np.linalg.inv([[xx, xy], [xy, yy]])
    scale = 1 / (2 * np.pi * np.sqrt(xx * yy - xy**2))

    def density(u, v):
        at = np.array([u, v])
        return scale * np.exp(-0.5 * at @ inverse @ at)

    whole = lambda f: dblquad(f, 0, 12, 0, 12, epsabs=1e-7)[0]
    return whole(lambda u, v: u * v * density(u, v)), whole(density)


def test_relu_ntk_is_that_of_gaussian_layers():
    x, y = random(2, 3), random(1, 3, seed=1)
    got = d.relu_ntk(2)(jnp.asarray(x), jnp.asarray(y))
    for i in range(2):
        s = np.array([[a @ b / 3 for b in (x[i], y[0])] for a in (x[i], y[0])], np.float64)
        t = s[0, 1]
        for _ in range(2):  # weights of variance two, so the diagonal stays
            both, positive = expectations(s[0, 0], s[0, 1], s[1, 1])
            s[0, 1] = s[1, 0] = 2 * both
            t = s[0, 1] + t * 2 * positive
        np.testing.assert_allclose(got[i, 0], t, rtol=1e-5)


def test_relu_ntk_of_an_image_with_itself_has_a_value_and_a_slope():
    x = jnp.asarray(random(3, 2, 2))
    kernel = d.relu_ntk(2)
    own = (np.asarray(x) ** 2).mean((1, 2))
    # S stays |x|^2 / d and T grows by it with each layer.
    np.testing.assert_allclose(jnp.diagonal(kernel(x, x)), 3 * own, rtol=1e-5)
    slope = jax.grad(lambda x: jnp.trace(kernel(x, x)))(x)
    np.testing.assert_allclose(slope, 6 * np.asarray(x) / 4, rtol=1e-4)
    assert np.isfinite(kernel(jnp.zeros((1, 4)), x.reshape(3, 4))).all()
    np.testing.assert_allclose(d.relu_ntk(1)(x, -x)[0, 0], 0, atol=1e-6)
    with pytest.raises(ValueError, match="0 hidden layers or more; got -1"):
        d.relu_ntk(-1)


def regression(ours, cross, ridge, per, batch, classes):
    y = np.eye(classes) - 1 / classes
    ours, cross = (np.asarray(a, np.float64) for a in (ours, cross))
    damped = ours + ridge * np.trace(ours) / len(ours) * np.eye(len(ours))
    guess = cross @ np.linalg.inv(damped) @ np.repeat(y, per, 0)
    return ((np.repeat(y, batch, 0) - guess) ** 2).sum(1).mean()


SET, REAL = random(3, 2, 6), random(3, 7, 6, seed=1)


def test_kip_is_ridge_regression():
    method = d.kip(lambda x, y: x @ y.T, optax.sgd(0.1), ridge=0.1)
    _, loss = method.update(jax.random.key(0), method.init(jnp.asarray(SET)), jnp.asarray(REAL))
    s, r = SET.reshape(6, 6), REAL.reshape(21, 6)
    np.testing.assert_allclose(loss, regression(s @ s.T, r @ s.T, 0.1, 2, 7, 3), rtol=1e-5)


def test_kip_sees_real_and_learned_images_changed_alike():
    how, key = d.Augmentation(), jax.random.key(3)
    images, real = random(2, 1, 6, 6, 1), random(2, 4, 6, 6, 1, seed=1)
    dot = lambda x, y: x.reshape(len(x), -1) @ y.reshape(len(y), -1).T
    method = d.kip(dot, optax.sgd(0.1), ridge=0.1, augmentation=how)
    _, loss = method.update(key, method.init(jnp.asarray(images)), jnp.asarray(real))
    s, r = (d.augment(key, jnp.asarray(x.reshape(-1, 6, 6, 1)), how) for x in (images, real))
    assert np.abs(np.asarray(s) - images[:, 0]).max() > 0.1
    want = regression(dot(s, s), dot(r, s), 0.1, 1, 4, 2)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def draw(key):
    a, b = jax.random.split(key)
    return {"w": jax.random.normal(a, (6, 5)), "v": jax.random.normal(b, (5, 3))}


hidden = lambda p, x: jnp.tanh(x @ p["w"])
logits = lambda p, x: hidden(p, x) @ p["v"]


def pool_of(**options):
    key, tx = jax.random.key(3), optax.adam(0.02)
    return d.frepo(key, draw, hidden, logits, tx, ridge=0.1, **options)


def test_frepo_is_ridge_regression_on_features_of_one_of_its_networks():
    method = pool_of(pool=1, net_tx=optax.sgd(0.5))
    start = method.init(jnp.asarray(SET))
    w = np.asarray(start.state.params["w"][0], np.float64)
    f = lambda x: np.tanh(x.reshape(-1, 6).astype(np.float64) @ w)
    after, loss = method.update(jax.random.key(0), start, jnp.asarray(REAL))
    want = regression(f(SET) @ f(SET).T, f(REAL) @ f(SET).T, 0.1, 2, 7, 3)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    # The network then makes a step of cross-entropy on the learned images: by hand, of `v`.
    v = np.asarray(start.state.params["v"][0], np.float64)
    h = np.tanh(np.asarray(after.flat, np.float64) @ w)
    q = np.exp(h @ v) / np.exp(h @ v).sum(-1, keepdims=True)
    slope = h.T @ (q - np.repeat(np.eye(3), 2, 0)) / 6
    np.testing.assert_allclose(after.state.params["v"][0], v - 0.5 * slope, rtol=1e-4, atol=1e-6)


def test_networks_of_a_pool_begin_anew_at_their_age():
    method = pool_of(pool=2, age=3)
    learned, ages = method.init(jnp.asarray(SET)), []
    for key in jax.random.split(jax.random.key(4), 12):
        before = learned
        learned, _ = method.update(key, learned, jnp.asarray(REAL))
        ages.append(learned.state.age.tolist())
        old = np.asarray(before.state.age) == 2
        new = old & (np.asarray(learned.state.age) == 0)
        moved = np.abs(learned.state.params["w"] - before.state.params["w"]).max((1, 2))
        assert (moved[new] > 0.1).all()  # another network
        assert (moved[~new] < 0.01).all()  # a step of Adam, or none
    assert max(map(max, ages)) == 2
    assert sum(a == [0, 0] or 0 in a for a in ages[4:]) > 0


@pytest.mark.parametrize(
    "make", [lambda: d.kip(d.relu_ntk(1), optax.adam(0.02), ridge=0.1), lambda: pool_of(pool=3)]
)
def test_updates_are_pure_resume_and_come_nearer(make):
    method, real = make(), jnp.asarray(REAL)
    learned = method.init(jnp.asarray(SET))
    keys = jax.random.split(jax.random.key(5), 60)
    losses = []
    for i, key in enumerate(keys):
        if i == 30:
            kept = jax.tree.map(lambda x: x, learned)
        learned, loss = method.update(key, learned, real)
        losses.append(float(loss))
    again, afresh = kept, make()
    for key in keys[30:]:
        again, _ = afresh.update(key, again, real)
    np.testing.assert_array_equal(again.images, learned.images)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    with pytest.raises(ValueError, match=r"real images must be .* \(3, 2, 6\); got \(2, 7, 6\)"):
        method.update(keys[0], learned, real[:2])
    with pytest.raises(ValueError, match=r"per class, ...\]; got \(6, 6\)"):
        method.init(learned.flat)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="ridge is positive; got 0"):
        d.kip(d.relu_ntk(1), optax.sgd(0.1), ridge=0.0)
    with pytest.raises(ValueError, match="1 or more; got 0 and 100"):
        pool_of(pool=0)
