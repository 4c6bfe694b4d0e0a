"""Bias correction: means of every layer, against float64, for biases wherever they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import random

RULES = {"stack|last": jc.quantize.int2()}


def fn(p, x):
    def step(x, layer):
        w, b = layer
        return jnp.tanh(x @ w + b), None

    x, _ = jax.lax.scan(step, x, (p["stack"], p["biases"]))
    return p["bias"] + x @ p["last"]


def case():
    params = {
        "stack": random(2, 8, 8, seed=1),
        "biases": random(2, 8, seed=2),
        "last": random(8, 3, seed=3),
        "bias": random(3, seed=4),
    }
    return jax.tree.map(jnp.asarray, params), random(40, 8) + 1


def test_every_layer_keeps_its_mean():
    params, x = case()
    qparams = jc.quantize.quantize(params, RULES)
    new = jc.quantize.bias_correct(fn, params, [x[:20], x[20:]], RULES)
    assert jax.tree.structure(new) == jax.tree.structure(qparams)
    for name in ("stack", "last"):
        np.testing.assert_array_equal(new[name].values, qparams[name].values)
    dense = {k: np.asarray(v, np.float64) for k, v in params.items()}
    stack, last = oracles.dense(qparams["stack"]), oracles.dense(qparams["last"])
    a = b = x.astype(np.float64)
    for i in range(2):
        a, b = a @ dense["stack"][i], b @ stack[i]
        bias = dense["biases"][i] + a.mean(0) - b.mean(0)
        np.testing.assert_allclose(new["biases"][i], bias, atol=1e-4)  # sums of 40 in float32
        a, b = np.tanh(a + dense["biases"][i]), np.tanh(b + bias)
    bias = dense["bias"] + (a @ dense["last"]).mean(0) - (b @ last).mean(0)
    np.testing.assert_allclose(new["bias"], bias, atol=1e-4)


def test_attention_biases():
    """Behind reshapes, `[heads, size]`; each output keeps its mean."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.asarray(random(4, 6, 8)) + 1
    fn = lambda p, x: attention.apply(p, x, x)
    params = attention.init(jax.random.key(0), x, x)
    rules = {".*kernel": jc.quantize.int2()}
    qparams = jc.quantize.quantize(params, rules, layout=jc.layout(fn, params, x))
    new = jc.quantize.bias_correct(fn, params, [x], rules)
    mean = lambda p: np.asarray(jc.accelerate(fn)(p, x)).mean((0, 1))
    want = mean(params)
    assert np.abs(mean(qparams) - want).max() > 0.01
    np.testing.assert_allclose(mean(new), want, atol=1e-4)
    assert not np.array_equal(new["params"]["query"]["bias"], qparams["params"]["query"]["bias"])


def test_what_a_bias_is_spread_over_counts():
    """Biases along other dimensions than the last, in bfloat16, after any method."""
    params = {
        "w": random(6, 4),
        "rows": random(5, 1),
        "v": random(4, 5, seed=1),
        "turned": random(5),
    }
    params = {k: jnp.asarray(v, jnp.bfloat16) for k, v in params.items()}
    batches = [jnp.asarray(random(5, 6, seed=i) + 1, jnp.bfloat16) for i in range(2)]
    rules = {"[wv]": jc.quantize.w8a8()}

    def fn(p, x):
        x = jnp.tanh(x @ p["w"] + p["rows"])
        return (x @ p["v"]).T + p["turned"][:, None]

    method = lambda fn, params, batches, rules: jc.quantize.hqq(params, rules)
    new = jc.quantize.bias_correct(fn, params, batches, rules, method=method)
    assert new["w"].act is not None
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(new["rows"], params["rows"])
    float64 = lambda name, p: np.asarray(p[name], np.float64)
    change = lambda name: float64(name, new) - float64(name, params)
    quantized = method(fn, params, batches, rules)
    product = lambda p: [jc.accelerate(lambda p, x: x @ p["w"])(p, x) for x in batches]
    shift = np.mean(np.float64(product(params)) - np.float64(product(quantized)), (0, 2))
    # Products and biases in bfloat16: eight bits of numbers near one.
    np.testing.assert_allclose(change("rows")[:, 0], shift, atol=2**-7)
    gap = lambda q: np.abs(
        np.mean(
            [np.float64(jc.accelerate(fn)(q, x)) - np.float64(fn(params, x)) for x in batches], 0
        )
    ).mean()
    assert new["turned"].shape == (5,)
    assert gap(new) < gap(quantized)


def test_a_bias_that_is_shared_is_left_alone():
    params = {"a": random(4, 4), "b": random(4, 4, seed=1), "c": random(4, 4, seed=2)}
    params = jax.tree.map(jnp.asarray, params) | {"bias": jnp.ones(4)}
    fn = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"] + p["bias"] + x @ p["c"]
    x, rules = jnp.asarray(random(10, 4)), {"[abc]": jc.quantize.int2()}
    with pytest.raises(ValueError, match="no compressed leaf with a bias of its own"):
        jc.quantize.bias_correct(fn, params, [x], rules)
    with pytest.raises(ValueError, match="no batches"):
        jc.quantize.bias_correct(fn, params, [], rules)
    with pytest.raises(TypeError, match="rules map patterns"):
        jc.quantize.bias_correct(fn, params, [x], ["[abc]"])
