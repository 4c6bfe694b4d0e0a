"""Data distillation: choices against loops, matching against its formula, one protocol."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

import jaxcompress as jc

d = jc.distill.dataset


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


FEATURES, LABELS = random(40, 3), np.repeat([0, 2, 5, 1], 10)


def test_random_takes_as_many_of_each_class():
    chosen = d.random(LABELS, 4, seed=1)
    assert np.bincount(LABELS[chosen], minlength=6).tolist() == [4, 4, 4, 0, 0, 4]
    assert len(set(chosen)) == 16
    np.testing.assert_array_equal(chosen, d.random(LABELS, 4, seed=1))
    assert not np.array_equal(chosen, d.random(LABELS, 4, seed=2))


def test_herding_is_greedy():
    chosen = d.herding(FEATURES, LABELS, 3)
    for label, mine in zip((0, 1, 2, 5), np.split(chosen, 4)):
        rows = np.flatnonzero(label == LABELS)
        mean, taken = FEATURES[rows].astype(np.float64).mean(0), []
        for _ in range(3):
            free = [i for i in rows if i not in taken]
            off = [mean - FEATURES[[*taken, i]].astype(np.float64).mean(0) for i in free]
            taken.append(free[int(np.argmin(np.linalg.norm(off, axis=1)))])
        np.testing.assert_array_equal(mine, taken)


def test_k_centre_leaves_nothing_far_away():
    chosen = d.k_centre(FEATURES, LABELS, 3)
    for label, mine in zip((0, 1, 2, 5), np.split(chosen, 4)):
        rows = np.flatnonzero(label == LABELS)
        reach = lambda centres, rows=rows: max(
            min(np.linalg.norm(FEATURES[i] - FEATURES[c]) for c in centres) for i in rows
        )
        best = min(map(reach, itertools.combinations(rows, 3)))
        assert reach(mine) <= 2 * best
        assert len(set(mine)) == 3


def test_choices_are_distinct_where_all_are_alike():
    for choose in (d.herding, d.k_centre):
        assert len(set(choose(np.ones((5, 2)), np.zeros(5, int), 4))) == 4


def test_choices_say_what_is_wrong():
    with pytest.raises(ValueError, match="from 1 to the 10 examples of class 0; got 11"):
        d.random(LABELS, 11, seed=0)
    with pytest.raises(ValueError, match="39 features and 40 labels"):
        d.herding(FEATURES[:39], LABELS, 1)


IMAGES = jnp.asarray(random(3, 8, 8, 2))


@functools.cache
def changed(how):
    """What sixteen keys make of the images."""
    run = jax.jit(jax.vmap(lambda key: d.augment(key, IMAGES, how)))
    return np.asarray(run(jax.random.split(jax.random.key(0), 16)))


def test_augmentation_changes_and_nothing_does_not():
    still = d.Augmentation(0, 1, 0, 0, 0, 0, flip=False)
    np.testing.assert_allclose(
        changed(still), np.broadcast_to(IMAGES, (16, *IMAGES.shape)), atol=1e-5
    )
    out = changed(d.Augmentation())
    assert out.shape == (16, *IMAGES.shape)
    same = [np.allclose(x, IMAGES, atol=1e-5) for x in out]
    assert 0 < sum(same) < 8  # a flip is none half of the time


def test_each_change_is_one_for_all_images_and_differentiable():
    alike = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)
    fn = jax.jit(lambda key, x: d.augment(key, x))
    for key in jax.random.split(jax.random.key(1), 8):
        out = np.asarray(fn(key, alike))
        np.testing.assert_allclose(out, np.broadcast_to(out[:1], out.shape), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda x, key: jnp.sum(d.augment(key, x) ** 2)))
    grads = [slope(IMAGES, key) for key in jax.random.split(jax.random.key(1), 8)]
    assert all(np.isfinite(g).all() and np.any(g) for g in grads)


def test_only_shifts_are_those_of_scipy():
    how = d.Augmentation(2.0, 1, 0, 0, 0, 0, flip=False)
    moved = [x for x in changed(how) if not np.allclose(x, IMAGES, atol=1e-5)]
    assert moved
    shift = functools.partial(scipy.ndimage.shift, order=1, mode="grid-constant")
    for out in moved[:2]:
        best = min(
            np.abs(shift(IMAGES[0, ..., 0], (u, v)) - out[0, ..., 0]).max()
            for u in np.linspace(-2, 2, 81)
            for v in np.linspace(-2, 2, 81)
        )
        # The nearest on a grid of 0.05 pixels, of images whose neighbours differ by about 3.
        assert best < 0.4


def net(key):
    a, b = jax.random.split(key)
    return {"w": jax.random.normal(a, (6, 5)), "v": jax.random.normal(b, (5, 3)), "b": jnp.ones(3)}


hidden = lambda p, x: jnp.tanh(x @ p["w"])
logits = lambda p, x: hidden(p, x) @ p["v"] + p["b"]
SET, REAL = jnp.asarray(random(3, 2, 6)), jnp.asarray(random(3, 7, 6, seed=1))


def drawn(key):
    """The network that a method draws for a key: the first of two."""
    return jax.tree.map(np.asarray, net(jax.random.split(key)[0]))


def test_dm_is_its_formula():
    key = jax.random.key(3)
    _, loss = (method := d.dm(net, hidden, optax.sgd(0.1))).update(key, method.init(SET), REAL)
    w = drawn(key)["w"].astype(np.float64)
    mean = lambda x: np.tanh(np.asarray(x, np.float64) @ w).mean(1)
    np.testing.assert_allclose(loss, np.sum((mean(SET) - mean(REAL)) ** 2), rtol=1e-5)


def test_dc_is_its_formula():
    key = jax.random.key(4)
    _, loss = (method := d.dc(net, logits, optax.sgd(0.1))).update(key, method.init(SET), REAL)
    p = {k: v.astype(np.float64) for k, v in drawn(key).items()}

    def gradients(x, label):
        x = np.asarray(x, np.float64)
        h = np.tanh(x @ p["w"])
        z = h @ p["v"] + p["b"]
        q = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        back = (q - np.eye(3)[label]) / len(x)
        return h.T @ back, x.T @ (back @ p["v"].T * (1 - h**2))

    want = 0.0
    for label in range(3):
        for a, b in zip(gradients(SET[label], label), gradients(REAL[label], label)):
            for column in range(a.shape[1]):
                u, v = a[:, column], b[:, column]
                want += 1 - u @ v / np.sqrt((u @ u) * (v @ v))
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: d.dm(net, hidden, optax.adam(0.05), **kw),
        lambda **kw: d.dc(net, logits, optax.adam(0.05), **kw),
        lambda **kw: d.dc(net, logits, optax.adam(0.05), net_steps=1, age=4, **kw),
    ],
)
def test_updates_are_pure_resume_and_come_nearer(make):
    method = make()
    learned = method.init(SET)
    keys = jax.random.split(jax.random.key(5), 60)
    for i, key in enumerate(keys):
        if i == 30:
            kept = jax.tree.map(lambda x: x, learned)
        learned, _ = method.update(key, learned, REAL)
    again, afresh = kept, make()
    for key in keys[30:]:
        again, _ = afresh.update(key, again, REAL)
    np.testing.assert_array_equal(again.images, learned.images)
    trial = jax.random.split(jax.random.key(6), 20)
    mean = lambda at: np.mean([method.update(key, at, REAL)[1] for key in trial])
    assert mean(learned) < 0.7 * mean(method.init(SET))
    assert learned.flat.shape == (6, 6)
    assert learned.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"real images must be .* \(3, 2, 6\); got \(2, 7, 6\)"):
        method.update(keys[0], learned, REAL[:2])
    with pytest.raises(ValueError, match=r"per class, ...\]; got \(3, 2\)"):
        method.init(SET[..., 0])


def test_dc_trains_its_network_on_the_learned_images():
    """Against softmax regression by hand: momentum, three steps, two updates a network."""
    draw = lambda key: {"w": jax.random.normal(key, (6, 3))}
    linear = lambda p, x: x @ p["w"]
    make = functools.partial(d.dc, draw, linear, optax.sgd(0.1))
    method = make(net_steps=3, age=2, net_tx=optax.sgd(0.5, momentum=0.5))
    learned, w = method.init(SET), None
    for i, key in enumerate(jax.random.split(jax.random.key(8), 5)):
        if i % 2 == 0:
            w = np.asarray(draw(jax.random.split(key, 3)[0])["w"], np.float64)
            speed = np.zeros_like(w)
        # The loss is that of the network so far, on the images so far.
        fixed = d.dc(lambda key, w=w: {"w": jnp.float32(w)}, linear, optax.sgd(0.1))
        want, loss = fixed.update(key, fixed.init(learned.images), REAL)
        learned, found = method.update(key, learned, REAL)
        np.testing.assert_allclose(found, loss, rtol=1e-5)
        np.testing.assert_allclose(learned.images, want.images, rtol=1e-4, atol=1e-6)
        x, y = np.asarray(learned.flat, np.float64), np.asarray(learned.labels)
        for _ in range(3):
            q = np.exp(x @ w) / np.exp(x @ w).sum(-1, keepdims=True)
            speed = 0.5 * speed + x.T @ (q - np.eye(3)[y]) / len(x)
            w = w - 0.5 * speed
        np.testing.assert_allclose(learned.state.params["w"], w, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="net_steps is 0 or more, age 1 or more; got 2 and 0"):
        make(net_steps=2, age=0)
    with pytest.raises(ValueError, match="got -1 and 10"):
        make(net_steps=-1)


def test_augmentation_meets_real_and_learned_alike():
    """A set of the real images themselves has nothing to learn, however they are changed."""
    images = jnp.asarray(random(2, 3, 8, 8, 1))
    flat = lambda x: x.reshape(len(x), -1)
    draw = lambda key: jax.random.normal(key, (64, 2))
    how = d.Augmentation()
    for method in (
        d.dm(draw, lambda w, x: flat(x) @ w, optax.sgd(0.1), augmentation=how),
        d.dc(draw, lambda w, x: flat(x) @ w, optax.sgd(0.1), augmentation=how),
    ):
        for key in jax.random.split(jax.random.key(7), 6):
            _, loss = method.update(key, method.init(images), images)
            np.testing.assert_allclose(loss, 0, atol=1e-5)


def test_evaluation_trains_fresh_networks_on_the_set_alone():
    x = jnp.asarray(np.concatenate([random(20, 6) + 2, random(20, 6, seed=1) - 2]))
    y = jnp.repeat(jnp.arange(2), 20)
    draw = lambda key: {"w": jax.random.normal(key, (6, 2)) * 0.1}
    run = functools.partial(
        d.evaluate,
        jax.random.key(0),
        draw,
        lambda p, x: x @ p["w"],
        test_images=x,
        test_labels=y,
        tx=optax.adam(0.1),
        steps=30,
        networks=3,
    )
    ticks = []
    right = run(images=x[::10], labels=y[::10], progress=lambda: ticks.append(1))
    assert right.shape == (3,)
    assert len(ticks) == 3
    assert float(right.min()) > 0.9
    wrong = run(images=x[::10], labels=1 - y[::10])
    assert float(wrong.max()) < 0.1  # what it learns is the set
    soft = run(images=x[::10], labels=jax.nn.one_hot(y[::10], 2) * 0.8 + 0.1)
    assert float(soft.min()) > 0.9
    np.testing.assert_array_equal(right, run(images=x[::10], labels=y[::10]))
    with pytest.raises(ValueError, match="4 and 3"):
        run(images=x[::10], labels=y[:3])
