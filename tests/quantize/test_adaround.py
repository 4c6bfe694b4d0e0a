"""AdaRound: up or down only, never worse than nearest, close to the best of all choices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_valid, random

model = lambda p, x: x @ p["w"]


def correlated(m, k):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(m, k)) + 2 * rng.normal(size=(m, 1))).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounds_up_or_down_and_is_never_worse_than_nearest(symmetric):
    x, w = correlated(100, 24), random(24, 6)
    rules = {"w": jc.quantize.int3(symmetric=symmetric, group_size=10)}
    params = {"w": jnp.asarray(w)}
    q = jc.quantize.adaround(model, params, [x], rules, clip=False, steps=500)["w"]
    assert_valid(q)
    plain = jc.quantize.quantize(params, rules)["w"]
    np.testing.assert_array_equal(q.scale, plain.scale)
    codes = oracles.codes_of(q)
    scale = oracles.spread(q.scale, w.shape, q.axis, q.group_size)
    zero = 0 if symmetric else oracles.spread(q.zero_point, w.shape, q.axis, q.group_size)
    real = np.clip(w / scale + zero, q.qtype.low, q.qtype.high)
    assert np.abs(codes - real).max() < 1 + 1e-5
    error = lambda q: np.linalg.norm(x @ (oracles.dense(q) - w), axis=0)
    assert np.all(error(q) <= error(plain) * (1 + 1e-5))
    # A column may stay as it is, and many do; those that move gain much more than a tenth.
    assert error(q).sum() < 0.9 * error(plain).sum()


def test_close_to_the_best_of_all_choices():
    """Eight weights: all 256 ways to round them are tried."""
    x, w = correlated(100, 8), random(8, 12, seed=3)
    q = jc.quantize.adaround(
        model, {"w": jnp.asarray(w)}, [x], {"w": jc.quantize.int4()}, clip=False
    )["w"]
    scale = np.asarray(q.scale, np.float64)
    below = np.floor(w / scale)
    ways = np.array(list(itertools.product([0, 1], repeat=8)))
    choices = np.clip(below + ways[:, :, None], -7, 7) * scale  # [256, 8, 12]
    best = np.linalg.norm(x @ (choices - w), axis=1).min(0)
    nearest = np.linalg.norm(x @ (np.rint(w / scale) * scale - w), axis=0)
    found = np.linalg.norm(x @ (oracles.dense(q) - w), axis=0)
    # It is a relaxation, not a search: most of what can be gained is.
    assert found.sum() - best.sum() < 0.25 * (nearest.sum() - best.sum())


def test_wrong_use_raises():
    x = correlated(10, 4)
    params, rules = {"w": jnp.ones((4, 2))}, {"w": jc.quantize.int4()}
    with pytest.raises(ValueError, match="steps is 1 or more"):
        jc.quantize.adaround(model, params, [x], rules, steps=0)
    x[0, 0] = np.inf
    with pytest.raises(ValueError, match="of 'w' are not finite"):
        jc.quantize.adaround(model, params, [x], rules)
