"""Trajectory matching: experts and the unrolled descent against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

d = jc.distill.dataset


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


logits = lambda p, x: x @ p["w"] + p["b"]
START = {"w": jnp.asarray(random(4, 3)), "b": jnp.zeros(3)}
X, Y = random(12, 4, seed=1), np.arange(12) % 3
SET = random(3, 2, 4, seed=2)


def descended(w, b, x, y, rate):
    """One step of gradient descent on the mean cross-entropy."""
    z = x @ w + b
    q = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    back = (q - np.eye(3)[y]) / len(x)
    return w - rate * x.T @ back, b - rate * back.sum(0)


def expert(epochs):
    halves = [(jnp.asarray(X[i::2]), jnp.asarray(Y[i::2])) for i in range(2)]
    return d.expert(logits, START, [halves] * epochs, optax.sgd(0.3))


def test_an_expert_is_ordinary_training():
    path = expert(2)
    w, b = (np.asarray(START[k], np.float64) for k in ("w", "b"))
    assert len(path) == 3
    for epoch in range(2):
        for i in range(2):
            w, b = descended(w, b, X[i::2].astype(np.float64), Y[i::2], 0.3)
        np.testing.assert_allclose(path[epoch + 1]["w"], w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(path[epoch + 1]["b"], b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="one epoch or more"):
        expert(0)


def test_mtt_is_its_formula():
    ends = expert(3)[1::2]
    method = d.mtt(logits, optax.sgd(0.1), steps=4, rate=0.2)
    _, loss = method.update(jax.random.key(0), method.init(jnp.asarray(SET)), ends)
    (w, b), (v, c) = (tuple(np.asarray(end[k], np.float64) for k in ("w", "b")) for end in ends)
    away = ((w - v) ** 2).sum() + ((b - c) ** 2).sum()
    for _ in range(4):
        w, b = descended(w, b, SET.reshape(6, 4).astype(np.float64), np.repeat(range(3), 2), 0.2)
    left = ((w - v) ** 2).sum() + ((b - c) ** 2).sum()
    np.testing.assert_allclose(loss, left / away, rtol=1e-4)


def test_a_step_of_mtt_may_see_some_of_the_images_only():
    ends = expert(3)[1::2]
    (w, b), (v, c) = (tuple(np.asarray(end[k], np.float64) for k in ("w", "b")) for end in ends)
    away = ((w - v) ** 2).sum() + ((b - c) ** 2).sum()
    flat, labels = SET.reshape(6, 4).astype(np.float64), np.repeat(range(3), 2)
    possible = {}
    for i in range(6):
        for j in range(6):
            one = descended(w, b, flat[i : i + 1], labels[i : i + 1], 0.2)
            two = descended(*one, flat[j : j + 1], labels[j : j + 1], 0.2)
            possible[i, j] = (((two[0] - v) ** 2).sum() + ((two[1] - c) ** 2).sum()) / away
    method = d.mtt(logits, optax.sgd(0.1), steps=2, rate=0.2, batch=1)
    drawn = set()
    for key in jax.random.split(jax.random.key(3), 12):
        _, loss = method.update(key, method.init(jnp.asarray(SET)), ends)
        pair = min(possible, key=lambda pair: abs(possible[pair] - loss))
        np.testing.assert_allclose(loss, possible[pair], rtol=1e-5)
        drawn.add(pair)
    assert len(drawn) > 6
    assert any(i != j for i, j in drawn)  # each step draws anew
    whole = d.mtt(logits, optax.sgd(0.1), steps=2, rate=0.2, batch=99)
    every = d.mtt(logits, optax.sgd(0.1), steps=2, rate=0.2)
    key, learned = jax.random.key(4), whole.init(jnp.asarray(SET))
    assert whole.update(key, learned, ends)[1] == every.update(key, learned, ends)[1]


def test_updates_are_pure_resume_and_come_nearer():
    ends = expert(3)[::3]
    make = lambda: d.mtt(logits, optax.adam(0.05), steps=3, rate=0.5)
    method = make()
    learned = method.init(jnp.asarray(SET))
    keys, losses = jax.random.split(jax.random.key(1), 60), []
    for i, key in enumerate(keys):
        if i == 30:
            kept = jax.tree.map(lambda x: x, learned)
        learned, loss = method.update(key, learned, ends)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert learned.state.log_rate != kept.state.log_rate  # it is learned as well
    again, afresh = kept, make()
    for key in keys[30:]:
        again, _ = afresh.update(key, again, ends)
    np.testing.assert_array_equal(again.images, learned.images)
    np.testing.assert_array_equal(again.state.log_rate, learned.state.log_rate)


def test_each_step_has_an_augmentation_of_its_own():
    fn = lambda p, x: x.reshape(len(x), -1) @ p
    images, start = jnp.asarray(random(2, 1, 4, 4, 1)), jnp.zeros((16, 2))
    how = d.Augmentation()
    method = d.mtt(fn, optax.sgd(0.1), steps=2, augmentation=how)
    ends = (start, jnp.ones((16, 2)))
    losses = {
        float(method.update(key, method.init(images), ends)[1])
        for key in jax.random.split(jax.random.key(2), 4)
    }
    assert len(losses) == 4


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"got 0 and 0\.02"):
        d.mtt(logits, optax.sgd(0.1), steps=0)
    with pytest.raises(ValueError, match="batch is 1 or more, or None; got 0"):
        d.mtt(logits, optax.sgd(0.1), batch=0)
    method = d.mtt(logits, optax.sgd(0.1))
    with pytest.raises(ValueError, match="at two times, of one structure"):
        method.update(jax.random.key(0), method.init(jnp.asarray(SET)), (START, {"w": START["w"]}))
