"""Backward products on integers: the definition, no bias, and integers in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import random
from jaxcompress.ops._gradients import stochastic_round


def matmul(p, x):
    return x @ p["w"]


def test_stochastic_rounding_is_right_on_average():
    """Of 100,000 numbers with fraction f, the share rounded up is f, within five deviations."""
    for f in (0.1, 0.5, 0.9):
        for base in (-3.0, 0.0, 50.0):
            x = jnp.full(100_000, base + f, jnp.float32)
            up = np.asarray(jax.jit(stochastic_round)(x)) - base
            assert set(np.unique(up)) == {0.0, 1.0}
            assert abs(up.mean() - f) < 5 * np.sqrt(f * (1 - f) / 100_000) + 4e-6
    np.testing.assert_array_equal(stochastic_round(jnp.arange(-5.0, 5)), jnp.arange(-5.0, 5))


def test_neighbours_and_equal_numbers_round_independently():
    x = jnp.full((400, 400), 0.5)
    up = np.asarray(stochastic_round(x)) - 0.5
    for other in (np.roll(up, 1, 0), np.roll(up, 1, 1), up.T):
        # The correlation of 160,000 fair coins: 5 / sqrt(160000); the transpose repeats half.
        assert abs(np.mean(up * other)) * 4 < 0.02


@pytest.mark.parametrize(
    "spec",
    [
        lambda **k: jc.quantize.w8a8(**k),
        lambda **k: jc.quantize.w4a8(group_size=16, **k),
        lambda **k: jc.quantize.w8a8(act_symmetric=False, **k),
        lambda **k: jc.quantize.w8a8(axis=-1, **k),
    ],
    ids=["channel", "group", "offset", "transposed"],
)
def test_gradients_are_near_those_in_floats(spec):
    """Eight bits: a rounding of one code in 127, at random, in sums of 40 and 64."""
    transposed = spec().axis == -1
    w, x, c = random(40, 24), random(64, 40, seed=1), random(64, 24, seed=2)
    w = w.T if transposed else w
    fn = (lambda p, x: x @ p["w"].T) if transposed else matmul

    def grads(**options):
        t = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec(**options)})
        loss = lambda t, x: jnp.sum(c * jc.accelerate(fn)(t, x))
        dt, dx = jax.jit(jax.grad(loss, (0, 1)))(t, jnp.asarray(x))
        return np.asarray(dt["w"].weight), np.asarray(dx)

    for got, want in zip(grads(grad_bits=8), grads()):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        # The step is max / 127, the variance of random rounding at most step^2 / 4, a
        # gradient's largest about 2.5 deviations: 2.5 / 127 / 2 = 1 %.
        assert 1e-4 < error < 0.015


def test_gradients_of_a_convolution_are_near_those_in_floats():
    w, x, c = random(3, 3, 4, 6), random(8, 9, 9, 4, seed=1), random(8, 9, 9, 6, seed=2)
    # An example and a feature with small gradients have scales of their own.
    c[0] *= 1e-3
    c[..., 0] *= 1e-3
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def grads(**options):
        rules = {"w": jc.quantize.w8a8(axis=(0, 1, 2), **options)}
        t = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, rules)
        loss = lambda t, x: jnp.sum(c * jc.accelerate(conv)(t, x))
        dt, dx = jax.jit(jax.grad(loss, (0, 1)))(t, jnp.asarray(x))
        return np.asarray(dt["w"].weight), np.asarray(dx)

    (dw, dx), (want_w, want_x) = grads(grad_bits=8), grads()
    for got, want in ((dw, want_w), (dw[..., 0], want_w[..., 0]), (dx, want_x), (dx[0], want_x[0])):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        # As above for a dot: the largest of some hundred gradients is about 3 deviations.
        assert 1e-4 < error < 0.02


def test_the_backward_products_are_integers():
    t = jc.quantize.prepare_qat({"w": jnp.ones((64, 32))}, {"w": jc.quantize.w8a8(grad_bits=8)})
    loss = lambda t, x: jnp.sum(jc.accelerate(matmul)(t, x) ** 2)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(t, jnp.ones((32, 64))).as_text()
    names = ("dot_general", "@jaxcompress_int8_matmul")
    products = [line for line in text.splitlines() if any(name in line for name in names)]
    integers = [line for line in products if "xi32>" in line]
    assert len(integers) == 2, "\n".join(products)
    assert len(products) == 3  # and the forward one, in floats


def test_it_works_under_vmap_and_refuses_sums_that_leave_int32():
    w, x = random(2, 8, 4), random(5, 8, seed=1)
    rules = {"w": jc.quantize.w8a8(grad_bits=8)}
    loss = lambda w: jnp.sum(
        jc.accelerate(matmul)(jc.quantize.prepare_qat({"w": w}, rules), x) ** 2
    )
    got = jax.jit(jax.vmap(jax.grad(loss)))(jnp.asarray(w))
    for seed in range(2):
        np.testing.assert_allclose(got[seed], jax.jit(jax.grad(loss))(w[seed]), rtol=0.1, atol=0.5)
    long = jnp.ones((131_072, 1))
    t = jc.quantize.prepare_qat({"w": jnp.ones((1, 1))}, rules)
    with pytest.raises(ValueError, match="summed over at most 131071; got 131072"):
        jax.eval_shape(jax.grad(lambda t: jc.accelerate(matmul)(t, long).sum()), t)
