"""Scales and codes against their definitions in float64, and the straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from jaxcompress.arrays import IntType
from jaxcompress.arrays import _rounding as rounding

ULP = 2.0**-23  # the relative spacing of float32
TINY = float(np.finfo(np.float32).tiny)

absmax_scale = jax.jit(rounding.absmax_scale, static_argnums=(1, 2, 3))
minmax_scale = jax.jit(rounding.minmax_scale, static_argnums=(1, 2, 3))
encode = jax.jit(rounding.encode, static_argnums=(3, 4, 5))

LAYOUTS = [((), None), ((-2,), None), ((-2, -1), None), ((-2,), (3,)), ((-3, -1), (2, 4))]


def weights(seed=0, shape=(3, 10, 6), magnitude=1.0):
    w = np.random.default_rng(seed).normal(size=shape) * magnitude
    return w.astype(np.float32)


@pytest.mark.parametrize(("axis", "sizes"), LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_absmax_scale_puts_the_maximum_on_the_largest_code(axis, sizes, bits):
    w = weights()
    low, high = oracles.group_extremes(w, axis, sizes)
    want = np.maximum(high, -low) / (2 ** (bits - 1) - 1)
    got = absmax_scale(w, axis, sizes, IntType(bits))
    # The reciprocal and the product round once each.
    np.testing.assert_allclose(got, want, rtol=2 * ULP)


@pytest.mark.parametrize(("axis", "sizes"), LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_scale_fits_the_range_and_zero(axis, sizes, bits):
    w = weights() + np.float32(0.5)
    qtype = IntType(bits, symmetric=False)
    low, high = oracles.group_extremes(w, axis, sizes)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale, zero = minmax_scale(w, axis, sizes, qtype)
    # Two halves, a difference, the reciprocal and the product round once each.
    np.testing.assert_allclose(scale, (high - low) / (2**bits - 1), rtol=5 * ULP)
    assert zero.dtype == jnp.int8
    exact = qtype.low - low / np.asarray(scale, np.float64)
    assert np.all(np.abs(np.asarray(zero) - exact) <= 0.5 + 2**bits * 4 * ULP)


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_codes_are_the_nearest_in_range(bits, symmetric, layout, magnitude, seed):
    """`encode` is rounding to nearest within the range: no other code is closer."""
    w, (axis, sizes), qtype = weights(seed, magnitude=magnitude), layout, IntType(bits, symmetric)
    if symmetric:
        scale, zero = absmax_scale(w, axis, sizes, qtype), None
    else:
        scale, zero = minmax_scale(w, axis, sizes, qtype)
    codes = np.asarray(encode(w, scale, zero, qtype, axis, sizes))
    assert np.all(codes == np.rint(codes))
    assert codes.min() >= qtype.low
    assert codes.max() <= qtype.high
    exact = np.asarray(w, np.float64) / oracles.spread(np.asarray(scale), w.shape, axis, sizes)
    if zero is not None:
        exact = exact + oracles.spread(np.asarray(zero), w.shape, axis, sizes)
    nearest = np.clip(exact, qtype.low, qtype.high)
    # The quotient is rounded to float32 before it is rounded to an integer.
    assert np.all(np.abs(codes - nearest) <= 0.5 + 2**bits * 2 * ULP)


def test_ties_go_to_the_even_code():
    w = jnp.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]])
    codes = encode(w, jnp.ones((1, 1)), None, IntType(8), (-1,), None)
    np.testing.assert_array_equal(codes, [[0, 2, 2, 0, -2, -2, 127]])


@pytest.mark.parametrize("jit", [False, True])
def test_a_scale_without_a_meaning(jit):
    """Zero and denormal maxima give 1, so that codes are 0; what is not finite gives NaN."""
    fn = rounding.scale_of
    fn = jax.jit(fn, static_argnums=1) if jit else fn
    largest = jnp.array([0.0, TINY / 2, TINY * 100, jnp.inf, jnp.nan, 254.0], jnp.float32)
    np.testing.assert_array_equal(fn(largest, 127.0), [1, 1, 1, np.nan, np.nan, 2])
    assert float(fn(jnp.float32(TINY * 1024), 127.0)) < 1e-30  # the first that has a scale


def test_the_widest_range_of_float32_does_not_overflow():
    w = jnp.array([[-3e38, 3e38]])
    scale, zero = minmax_scale(w, (-1,), None, IntType(8, symmetric=False))
    np.testing.assert_allclose(scale, 6e38 / 255, rtol=5 * ULP)
    codes = encode(w, scale, zero, IntType(8, symmetric=False), (-1,), None)
    decoded = oracles.dequantize(codes, scale, zero, (-1,))
    # Half a scale, and the rounding of the scale itself 128 times over.
    assert np.all(np.abs(decoded - np.asarray(w, np.float64)) <= scale * (0.5 + 128 * 5 * ULP))


@pytest.mark.parametrize("qtype", [IntType(8), IntType(4), IntType(2)])
def test_learned_scales_have_the_gradient_of_lsq(qtype):
    """d(s q)/ds = round(v) - v inside, the bound outside, with v = w / s (Esser et al.)."""
    w = np.float32([-3.0, -1.2, -0.3, 0.1, 0.6, 0.9, 2.5])
    scale = np.float32([1.6 / qtype.high])
    fn = lambda s: jnp.sum(encode(w, s, None, qtype, (-1,), None) * s)
    v = w.astype(np.float64) / scale
    inside = np.abs(v) <= qtype.high
    want = np.where(inside, np.rint(v) - v, np.sign(v) * qtype.high).sum()
    # Seven numbers below 2^7 are summed in float32.
    np.testing.assert_allclose(jax.grad(fn)(scale)[0], want, atol=7 * 128 * ULP)


def test_the_rounding_of_an_integer_type_is_checked():
    with pytest.raises(ValueError, match="integer widths are 2 to 8 bits; got 1"):
        IntType(1)
    with pytest.raises(ValueError, match="got 9"):
        IntType(9)
    assert (IntType(4).low, IntType(4).high) == (-7, 7)
    assert (IntType(4, symmetric=False).low, IntType(4, symmetric=False).high) == (-8, 7)
    assert IntType(4, symmetric=False).name == "int4_asymmetric"


def test_second_derivatives_pass_straight_through_too():
    """Of `sin(c)` with `c = round(w / s)`, whose slope is `1 / s`: `-sin(c) / s^2`."""
    w, scale = jnp.array([0.3, -1.1, 2.4]), jnp.float32(0.5)
    of = lambda w: jnp.sum(jnp.sin(encode(w, scale, None, IntType(4), (), None)))
    codes = np.round(np.asarray(w, np.float64) / 0.5)
    want = np.diag(-np.sin(codes) / 0.5**2)
    np.testing.assert_allclose(jax.hessian(of)(w), want, atol=8 * ULP)
