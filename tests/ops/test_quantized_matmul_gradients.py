"""Gradients of `quantized_matmul` against float64: finite differences, then the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import EPS

M, K, N = 4, 12, 3


def problem(group_size, zero, transpose_w, seed=0):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size is None else -(-K // group_size)
    x = rng.normal(size=(M, K)).astype(np.float32)
    codes = rng.integers(-7, 8, (K, N)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (groups, N)).astype(np.float32)
    zeros = rng.integers(-7, 8, (groups, N)).astype(np.int8) if zero else None
    g = rng.normal(size=(M, N)).astype(np.float32)
    return x, codes, scale, zeros, g


def formula(x, codes, scale, zeros, g, group_size):
    """`dy/dx` and `dy/dscale` for the cotangent `g`, written out in float64."""
    group = np.arange(K) // (group_size or K)
    centred = codes.astype(np.float64) - (0 if zeros is None else zeros[group].astype(np.float64))
    x, scale, g = (np.asarray(a, np.float64) for a in (x, scale, g))
    dx = g @ (centred * scale[group]).T
    dscale = np.zeros_like(scale)
    np.add.at(dscale, group, (x.T @ g) * centred)
    return dx, dscale


CASES = [(None, False), (None, True), (4, False), (5, True)]


@pytest.mark.parametrize(("group_size", "zero"), CASES)
def test_the_formulas_are_the_finite_differences(group_size, zero):
    """The oracle of this file, against another one: nothing of the library is run."""
    x, codes, scale, zeros, g = problem(group_size, zero, False)

    def loss(x, scale):
        axis, sizes = (-2,), None if group_size is None else (group_size,)
        return np.sum(g * (x @ oracles.dequantize(codes, scale, zeros, axis, sizes)))

    dx, dscale = formula(x, codes, scale, zeros, g, group_size)
    # Linear in each: central differences are exact but for rounding, 1e-16 / 1e-6 of it.
    near = dict(rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(oracles.finite_differences(lambda a: loss(a, scale), x), dx, **near)
    by_scale = oracles.finite_differences(lambda s: loss(np.float64(x), s), scale)
    np.testing.assert_allclose(by_scale, dscale, **near)


@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize(("group_size", "zero"), CASES)
def test_gradients_are_the_formulas(group_size, zero, transpose_w):
    x, codes, scale, zeros, g = problem(group_size, zero, transpose_w)
    turn = np.transpose if transpose_w else lambda a: a

    @jax.jit
    def gradients(x, scale):
        def fn(x, scale):
            return jc.ops.quantized_matmul(
                x,
                turn(codes),
                scale,
                None if zeros is None else turn(zeros),
                bits=4,
                group_size=group_size,
                transpose_w=transpose_w,
            )

        return jax.vjp(fn, x, scale)[1](g)

    dx, dscale = gradients(x, turn(scale))
    assert (dx.dtype, dscale.dtype) == (jnp.float32, jnp.float32)
    want_x, want_scale = formula(x, codes, scale, zeros, g, group_size)
    # Sums of at most M * K products of numbers below 60, in float32.
    atol = M * K * 60 * 2 * EPS
    np.testing.assert_allclose(dx, want_x, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(turn(np.asarray(dscale)), want_scale, rtol=1e-5, atol=atol)


def test_gradients_of_low_precision_activations_have_their_dtype():
    x, codes, scale, _, g = problem(None, False, False)
    for dtype, unit in ((jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)):
        low = jnp.asarray(x, dtype)
        _, vjp = jax.vjp(lambda x: jc.ops.quantized_matmul(x, codes, scale), low)
        [dx] = vjp(jnp.asarray(g, dtype))
        assert dx.dtype == dtype
        exact = np.asarray(jnp.asarray(g, dtype), np.float64)
        want, _ = formula(x, codes, scale, None, exact, None)
        size, _ = formula(x, np.abs(codes), scale, None, np.abs(exact), None)
        # The scaled cotangent and the result are rounded to the dtype.
        assert np.all(np.abs(np.asarray(dx, np.float64) - want) <= 2 * unit * size)


def test_integers_have_no_gradient():
    x, codes, scale, zeros, _ = problem(None, True, False)
    fn = lambda x, w, s, z: jnp.sum(jc.ops.quantized_matmul(x, w, s, z, bits=4))
    grads = jax.grad(fn, argnums=(0, 1, 2, 3), allow_int=True)(x, codes, scale, zeros)
    assert [g.dtype for g in grads] == [
        jnp.float32,
        jax.dtypes.float0,
        jnp.float32,
        jax.dtypes.float0,
    ]


def test_per_example_gradients_under_vmap():
    x, codes, scale, _, g = problem(4, False, False)
    one = lambda s, x, g: jnp.sum(
        g * jc.ops.quantized_matmul(x[None], codes, s, bits=4, group_size=4)
    )
    per_example = jax.vmap(jax.grad(one), (None, 0, 0))(scale, x, g)
    for i in range(M):
        _, want = formula(x[i : i + 1], codes, scale, None, g[i : i + 1], 4)
        np.testing.assert_allclose(per_example[i], want, rtol=1e-5, atol=1e-5)  # as above
