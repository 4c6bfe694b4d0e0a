"""HQQ: better where outliers are, never worse than where it starts, and what fits exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_valid


def heavy_tailed(k, n, seed=0):
    return np.random.default_rng(seed).standard_t(3, size=(k, n)).astype(np.float32)


def lp(w, q):
    """The objective, `sum |w - w_hat|^0.7`, of each output."""
    return (np.abs(w - oracles.dense(q)) ** 0.7).sum(0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lowers_the_objective_of_every_group(bits, symmetric):
    w = heavy_tailed(96, 8)
    spec = jc.quantize.Spec(qtype=jc.arrays.IntType(bits, symmetric))
    rules = {"w": spec}
    q = jc.quantize.hqq({"w": jnp.asarray(w)}, rules)["w"]
    assert_valid(q)
    nearest = jc.quantize.quantize({"w": jnp.asarray(w)}, rules)["w"]
    # Every group keeps the best of all steps; heavy tails leave much to gain.
    assert np.all(lp(w, q) <= lp(w, nearest) * (1 + 1e-5))
    assert lp(w, q).sum() < 0.97 * lp(w, nearest).sum()


def test_more_steps_are_never_worse():
    w = heavy_tailed(64, 4, seed=1)
    fit = lambda n: jc.quantize.hqq(
        {"w": jnp.asarray(w)}, {"w": jc.quantize.int2(group_size=20)}, steps=n
    )["w"]
    errors = [lp(w, fit(n)) for n in (0, 3, 20)]
    assert np.all(errors[1] <= errors[0] * (1 + 1e-5))
    assert np.all(errors[2] <= errors[1] * (1 + 1e-5))
    assert errors[2].sum() < errors[0].sum()


def test_zeros_and_wrong_norms():
    params, rules = {"w": jnp.zeros((8, 2))}, {"w": jc.quantize.int4()}
    q = jc.quantize.hqq(params, rules)["w"]
    assert np.array_equal(oracles.dense(q), np.zeros((8, 2)))
    for norm in (0.0, 1.5):
        with pytest.raises(ValueError, match="norm is above 0 and at most 1"):
            jc.quantize.hqq(params, rules, norm=norm)


def test_the_same_under_jit():
    w = jnp.asarray(heavy_tailed(32, 4))
    make = lambda w: jc.quantize.hqq({"w": w}, {"w": jc.quantize.int3()})["w"].values
    np.testing.assert_array_equal(jax.jit(make)(w), make(w))
