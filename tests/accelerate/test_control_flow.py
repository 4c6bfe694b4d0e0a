"""Loops, branches, nested jit and vmap around a compressed weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import oracles
from checks import assert_compressed, assert_model, made, random, run

X = random(4, 16)
W = made((16, 16), path="w")
tanh_of = lambda x, w: jnp.tanh(x @ w * 0.01)


def loop_oracle(x, w, steps=3):
    for _ in range(steps):
        x = np.tanh(x @ w * 0.01)
    return x


LOOPS = {
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda i, x: tanh_of(x, p["w"]), x),
    "while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, tanh_of(c[1], p["w"])), (0, x)
    )[1],
    "weight in the carry": lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (c[0], tanh_of(c[1], c[0])), (p["w"], x)
    )[1],
    "scan": lambda p, x: lax.scan(
        lambda x, _: (tanh_of(x, p["w"]), None), x, None, length=3, unroll=2
    )[0],
    "python": lambda p, x: tanh_of(tanh_of(tanh_of(x, p["w"]), p["w"]), p["w"]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name):
    got, rows = run(LOOPS[name], {"w": W}, X)
    assert_model(got, loop_oracle(X, oracles.dense(W)))
    assert_compressed(rows, "quantized_matmul")


def test_layers_picked_by_number_in_a_loop():
    w = made((3, 16, 16))

    def fn(p, x):
        return lax.fori_loop(
            0, 3, lambda i, x: tanh_of(x, lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), x
        )

    got, rows = run(fn, {"w": w}, X)
    want = X
    for layer in oracles.dense(w):
        want = np.tanh(want @ layer * 0.01)
    assert_model(got, want)
    assert_compressed(rows, "quantized_matmul")


@pytest.mark.parametrize("positive", [True, False])
def test_cond(positive):
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: -x @ w, p["w"], x)

    x = np.abs(X) if positive else -np.abs(X)
    got, rows = run(fn, {"w": W}, x)
    assert_model(got, np.abs(X) @ oracles.dense(W))
    assert_compressed(rows, "quantized_matmul")


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_switch(branch):
    def fn(p, x, i):
        return lax.switch(i, [lambda x: x, lambda x: x @ p["w"], lambda x: 2 * x @ p["w"]], x)

    got, rows = run(fn, {"w": W}, X, branch)
    assert_model(got, X if branch == 0 else branch * X @ oracles.dense(W))
    assert_compressed(rows, "quantized_matmul")


def test_jit_inside_on_first_and_later_calls():
    """JAX and quax remember jitted functions; neither a result nor a row may be lost."""
    inner = jax.jit(lambda w, x: x @ w)
    for seed in range(2):
        w = made((16, 16), seed=seed)
        for _ in range(2):
            got, rows = run(lambda p, x: inner(p["w"], x), {"w": w}, X)
            assert_model(got, X @ oracles.dense(w))
            assert_compressed(rows, "quantized_matmul")


def test_jit_inside_that_returns_a_weight_untouched():
    keep = jax.jit(lambda w, x: (w, x + 1))

    def fn(p, x):
        w, x = keep(p["w"], x)
        return x @ w

    got, rows = run(fn, {"w": W}, X)
    assert_model(got, (X + 1) @ oracles.dense(W))
    assert_compressed(rows, "quantized_matmul")


def test_vmap_inside_over_activations_and_over_experts():
    got, rows = run(lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), {"w": W}, X)
    assert_model(got, X @ oracles.dense(W))
    assert_compressed(rows, "quantized_matmul")
    experts, x = made((3, 16, 8)), random(3, 4, 16)
    got, rows = run(lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x), {"w": experts}, x)
    assert_model(got, x @ oracles.dense(experts))
    assert_compressed(rows, "quantized_matmul")
