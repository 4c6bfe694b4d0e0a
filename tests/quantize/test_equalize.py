"""Equalization: the same function, ranges shared, and nothing where it would not be the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import random

RULES = {"[abc]": jc.quantize.int4()}
dense = functools.partial(jc.quantize.equalize, method=lambda fn, params, batches, rules: params)


def case():
    return {
        "a": random(6, 8) * np.exp(2 * random(1, 8, seed=1)),
        "b": random(8, 8, seed=2) * np.exp(2 * random(8, 1, seed=3)),
        "c": random(4, 8, seed=4),
        "bias": random(8, seed=5),
    }


def fn(p, x):
    x = jax.nn.relu(x @ p["a"] + p["bias"])
    return jax.nn.relu(x @ p["b"]) @ p["c"].T


def float64(p, x):
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    x = np.maximum(x @ p["a"] + p["bias"], 0)
    return np.maximum(x @ p["b"], 0) @ p["c"].T


def test_the_function_is_the_same_and_ranges_are_shared():
    x = random(5, 6, seed=6, dtype=np.float64)
    with jax.enable_x64(True):
        params = {k: jnp.asarray(v, jnp.float64) for k, v in case().items()}
        new = dense(fn, params, [jax.ShapeDtypeStruct((5, 6), np.float64)], RULES)
    want = float64(params, x)
    # A few hundred roundings of float64.
    np.testing.assert_allclose(float64(new, x), want, rtol=1e-13, atol=1e-13 * np.abs(want).max())
    # Twenty rounds over the chain of three leave less than that between the ranges.
    for one, two in ((new["a"], new["b"].T), (new["b"], new["c"])):
        np.testing.assert_allclose(np.abs(one).max(0), np.abs(two).max(0), rtol=1e-3)
    spread = lambda w: np.ptp(np.log(np.abs(w).max(0)))
    assert spread(new["a"]) < spread(params["a"])


def test_powers_of_two_are_exact():
    """Where the scales are powers of two, not a bit of the output changes."""
    params = {"a": jnp.asarray(np.sign(random(6, 8))), "bias": jnp.asarray(random(8))}
    ones = np.sign(random(8, 8, seed=2))
    params |= {"b": jnp.asarray(ones * 4.0 ** np.arange(-4, 4)[:, None], jnp.float32)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]
    x = jnp.asarray(random(5, 6, seed=6))
    new = dense(fn, params, [x], {"[ab]": jc.quantize.int4()})
    assert np.array_equal(np.abs(new["b"][:, 0]), 2.0 ** np.arange(-4, 4))
    assert np.array_equal(fn(new, x), fn(params, x))


def test_a_dead_channel_stays():
    params = {k: jnp.asarray(v) for k, v in case().items()}
    params["a"] = params["a"].at[:, 3].set(0.0)
    new = dense(fn, params, [jnp.ones((5, 6))], RULES)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert new["bias"][3] == params["bias"][3]


def test_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            return nn.Conv(3, (2, 2))(x)

    x = jnp.asarray(random(2, 6, 6, 3))
    params = Net().init(jax.random.key(0), x)
    scale = jnp.asarray(np.exp(2 * random(4)))
    first = params["params"]["Conv_0"]
    params["params"]["Conv_0"] = {"kernel": first["kernel"] * scale, "bias": first["bias"] + 1}
    new = dense(Net().apply, params, [x], {".*kernel": jc.quantize.int8()})
    ranges = np.abs(new["params"]["Conv_0"]["kernel"]).max((0, 1, 2))
    np.testing.assert_allclose(
        ranges, np.abs(new["params"]["Conv_1"]["kernel"]).max((0, 1, 3)), rtol=1e-5
    )
    want = Net().apply(params, x)
    # Sums of 36 products in float32, in two scalings.
    np.testing.assert_allclose(Net().apply(new, x), want, atol=1e-5 * np.abs(want).max())


def test_scales_of_a_tensor_lose_less():
    """What it is for: one scale for all channels, and a method of the caller's choice."""
    params, x = {k: jnp.asarray(v) for k, v in case().items()}, jnp.asarray(random(64, 6, seed=7))
    rules = {"[abc]": jc.quantize.int8(axis=(-2, -1))}
    want = float64(params, np.float64(x))

    def error(q):
        decoded = {k: oracles.dense(q[k]) if k in "abc" else q[k] for k in q}
        return np.linalg.norm(float64(decoded, np.float64(x)) - want)

    plain = error(jc.quantize.quantize(params, rules))
    assert error(jc.quantize.equalize(fn, params, [x], rules)) < 0.3 * plain
    assert (
        error(jc.quantize.equalize(fn, params, [x], rules, method=jc.quantize.gptq)) < 0.3 * plain
    )


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"],
        lambda p, x: (jax.nn.relu(x @ p["a"]) @ p["b"]) + jax.nn.relu(x @ p["a"]),
        lambda p, x: jnp.maximum(x @ p["a"], 1.0) @ p["b"],
        lambda p, x: jax.nn.relu(x @ p["a"] + x[:, :1]) @ p["b"],
        lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][:, None]) @ p["b"],
        lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][::-1]) @ p["b"],
    ],
    ids=["gelu", "used twice", "clipped at one", "a residual", "another axis", "turned about"],
)
def test_no_pair_where_it_would_change_the_function(fn):
    params = {k: jnp.asarray(case()[k]) for k in ("a", "b", "bias")}
    with pytest.raises(ValueError, match="no two layers"):
        dense(fn, params, [jnp.ones((8, 6))], {"[ab]": jc.quantize.int4()})


def test_rules_name_both_of_a_pair():
    params = {k: jnp.asarray(v) for k, v in case().items()}
    new = dense(fn, params, [jnp.ones((5, 6))], {"[ab]": jc.quantize.int4()})
    assert np.array_equal(new["c"], params["c"])
    with pytest.raises(ValueError, match="no two layers, of those that rules name"):
        dense(fn, params, [jnp.ones((5, 6))], {"[ac]": jc.quantize.int4()})
    with pytest.raises(ValueError, match="steps is 1 or more; got 0"):
        jc.quantize.equalize(fn, params, [jnp.ones((5, 6))], RULES, steps=0)
