"""The dtype whose cotangents add up by their maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress._max_dtype import from_max, to_max


@jax.custom_vjp
def use(tap, cotangent):
    return jnp.float32(0)


use.defvjp(lambda tap, c: (jnp.float32(0), c), lambda c, _: (to_max(c), jnp.zeros_like(c)))


def gradient(fn, shape=()):
    @jax.jit  # arrays of the dtype exist within programs only
    def run():
        tap = to_max(jnp.zeros(shape))
        _, backward = jax.vjp(fn, tap)
        return from_max(backward(jnp.float32(1))[0])

    return np.asarray(run())


def test_there_and_back():
    x = jnp.array([0.0, 1.5, 3e38])
    np.testing.assert_array_equal(jax.jit(lambda x: from_max(to_max(x)))(x), x)
    assert jax.eval_shape(to_max, x).dtype.name == "max32"


@pytest.mark.parametrize("jit", [False, True])
def test_several_uses_give_the_maximum(jit):
    fn = lambda tap: sum(use(tap, jnp.float32(c)) for c in (2, 5, 3))
    assert gradient(jax.jit(fn) if jit else fn) == 5


def test_uses_in_a_loop_and_around_it():
    def fn(tap):
        body = lambda total, c: (total + use(tap, c), None)
        looped, _ = lax.scan(body, jnp.float32(0), jnp.array([2.0, 7.0, 3.0]))
        return looped + use(tap, jnp.float32(4))

    assert gradient(fn) == 7


def test_stacked_taps_and_vmap():
    scanned = lambda tap: lax.scan(
        lambda total, x: (total + use(*x), None), jnp.float32(0), (tap, jnp.array([2.0, 7.0]))
    )[0]
    np.testing.assert_array_equal(gradient(scanned, (2,)), [2, 7])
    mapped = lambda tap: jax.vmap(use)(tap, jnp.array([3.0, 1.0])).sum()
    np.testing.assert_array_equal(gradient(mapped, (2,)), [3, 1])


def test_no_use_gives_zero_and_slices_keep_their_place():
    assert gradient(lambda tap: jnp.float32(0)) == 0
    second = lambda tap: use(lax.dynamic_slice_in_dim(tap, 1, 1), jnp.array([6.0]))
    np.testing.assert_array_equal(gradient(second, (3,)), [0, 6, 0])
