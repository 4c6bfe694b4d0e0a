"""Delayed start, frozen ranges, clipped weights."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from checks import random


def matmul(p, x):
    return x @ p["w"] + p["b"]


def params(spec=None):
    dense = {"w": jnp.asarray(random(6, 3)), "b": jnp.zeros(3)}
    return dense, jc.quantize.lsq(dense, {"w": spec or jc.quantize.int4()})


def test_a_delayed_start():
    dense, twin = params()
    x = jnp.asarray(random(5, 6, seed=1))
    delayed = jc.quantize.delayed(matmul, 10)
    once = chex.assert_max_traces(lambda step, p, x: delayed(step, p, x), 1)  # the step is data
    run = jax.jit(once)
    for step in (0, 9):
        np.testing.assert_array_equal(run(step, twin, x), jax.jit(matmul)(dense, x))
    for step in (10, 11):
        np.testing.assert_array_equal(run(step, twin, x), jax.jit(jc.accelerate(matmul))(twin, x))
    grad = jax.jit(jax.grad(lambda p, step: delayed(step, p, x).sum()))
    early, late = grad(twin, 3), grad(twin, 30)
    assert not np.asarray(early["w"].scale).any()
    assert np.asarray(late["w"].scale).any()
    np.testing.assert_allclose(early["w"].weight, np.tile(x.sum(0)[:, None], 3), rtol=1e-6)


def test_frozen_ranges_stop_while_weights_move():
    _, twin = params()
    tx = optax.chain(optax.adam(0.1), jc.quantize.freeze_ranges(2))
    state = tx.init(twin)
    scales, weights = [twin["w"].scale], [twin["w"].weight]
    for _ in range(4):
        grads = jax.tree.map(jnp.ones_like, twin)
        updates, state = tx.update(grads, state, twin)
        assert jax.tree.structure(updates) == jax.tree.structure(twin)
        twin = optax.apply_updates(twin, updates)
        scales.append(twin["w"].scale)
        weights.append(twin["w"].weight)
    moved = [bool((a != b).all()) for a, b in itertools.pairwise(scales)]
    assert moved == [True, True, False, False]
    assert all((a != b).all() for a, b in itertools.pairwise(weights))
    with pytest.raises(ValueError, match="freeze_ranges needs params"):
        tx.update(grads, state)


def test_clipped_weights_stay_within_the_limit():
    twin = jc.quantize.prepare_qat(
        {"w": jnp.asarray(random(6, 3)), "b": jnp.zeros(3)}, {"w": jc.quantize.binary()}
    )
    tx = optax.chain(optax.sgd(1.0), jc.quantize.clip_weights(0.5))
    grads = jax.tree.map(lambda p: 3.0 * jnp.sign(p) - 1, twin)
    updates, _ = tx.update(grads, tx.init(twin), twin)
    new = optax.apply_updates(twin, updates)
    want = np.clip(twin["w"].weight - grads["w"].weight, -0.5, 0.5)
    np.testing.assert_allclose(new["w"].weight, want, rtol=1e-6)
    np.testing.assert_array_equal(new["b"], 1.0)
    with pytest.raises(ValueError, match="limit must be positive"):
        jc.quantize.clip_weights(0.0)
