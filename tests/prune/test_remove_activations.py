"""Activation functions replaced by lines: exact where they are lines, else the nearest ones."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import assert_model, random

relu = jax.nn.relu


def positive(*shape, seed=0):
    return np.abs(random(*shape, seed=seed)) + 0.1


def layers(*sizes, make=positive, bias=True):
    params = {}
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        params[f"{i}"] = {"w": jnp.asarray(make(k, n, seed=i) / k)}
        if bias:
            params[f"{i}"]["b"] = jnp.asarray(make(n, seed=50 + i))
    return params


def chain(*acts):
    def fn(p, x):
        for i, act in enumerate([*acts, lambda x: x]):
            x = act(x @ p[f"{i}"]["w"] + p[f"{i}"].get("b", 0.0))
        return x

    return fn


def exact(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@pytest.mark.parametrize("bias", [True, False])
def test_a_relu_that_does_nothing_is_the_product_of_two_matrices(bias):
    params, fn, x = layers(3, 16, 4, bias=bias), chain(relu), positive(5, 3, seed=9)
    new_fn, new = jc.prune.remove_activations(fn, params, [x], count=1)
    p = exact(params)
    # Multiplied in float64, rounded to float32 once.
    np.testing.assert_array_equal(new["0"]["w"], (p["0"]["w"] @ p["1"]["w"]).astype(np.float32))
    assert new["1"]["w"].shape == (0, 4)
    if bias:
        np.testing.assert_allclose(new["0"]["b"], p["0"]["b"] @ p["1"]["w"], rtol=1e-7)
        np.testing.assert_array_equal(new["1"]["b"], params["1"]["b"])
    other = positive(11, 3, seed=10)  # another batch size
    assert_model(jax.jit(new_fn)(new, other), chain(relu)(p, other.astype(np.float64)))
    assert "max" not in str(jax.make_jaxpr(new_fn)(new, other))


def test_the_one_product_is_summed_as_the_second_was():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layers(3, 16, 4, bias=False))
    highest = jax.lax.Precision.HIGHEST
    sums = dict(precision=highest, preferred_element_type=jnp.float32)

    def fn(p, x):
        x = relu(jnp.matmul(x, p["0"]["w"], **sums).astype(jnp.bfloat16))
        return jnp.matmul(x, p["1"]["w"], **sums)

    x = jnp.asarray(positive(5, 3, seed=9), jnp.bfloat16)
    new_fn, new = jc.prune.remove_activations(fn, params, [x], count=1)
    [product] = [
        e for e in jax.make_jaxpr(new_fn)(new, x).eqns if e.primitive.name == "dot_general"
    ]
    assert product.params["precision"] == (highest, highest)
    assert product.outvars[0].aval.dtype == jnp.float32


def test_where_one_matrix_would_be_larger_both_stay():
    params, fn, x = layers(12, 3, 16), chain(relu), positive(5, 12, seed=9)
    [row] = jc.prune.activations(fn, params, [x])
    assert (row.before, row.after, row.merges) == ("0/w", "1/w", False)
    assert row.why == "192 numbers in one matrix, 84 in two"
    new_fn, new = jc.prune.remove_activations(fn, params, [x], tolerance=0.0)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_model(new_fn(new, x), fn(exact(params), x.astype(np.float64)))
    assert "max" not in str(jax.make_jaxpr(new_fn)(new, x))


@pytest.mark.parametrize("bias", [True, False])
def test_the_line_of_each_channel_is_that_of_least_squares(bias):
    params, fn = layers(12, 3, 16, make=random, bias=bias), chain(jax.nn.gelu)
    batches = [random(30, 12, seed=7), random(30, 12, seed=8)]
    [row] = jc.prune.activations(fn, params, batches)
    new_fn, new = jc.prune.remove_activations(fn, params, batches, count=1)
    p, x = exact(params), np.concatenate(batches).astype(np.float64)
    z = x @ p["0"]["w"] + p["0"].get("b", 0.0)
    h = np.asarray(jax.nn.gelu(jnp.asarray(z, jnp.float32)), np.float64)
    lines = np.array([np.polyfit(z[:, i], h[:, i], 1) for i in range(3)])
    line = z * lines[:, 0] + lines[:, 1]
    # Moments of 60 rows in float32.
    np.testing.assert_allclose(new["0"]["w"], p["0"]["w"] * lines[:, 0], rtol=1e-5)
    if bias:
        want = p["0"]["b"] * lines[:, 0] + lines[:, 1]
        np.testing.assert_allclose(new["0"]["b"], want, rtol=1e-5, atol=1e-6)
    after = line @ p["1"]["w"] + p["1"].get("b", 0.0)
    before = h @ p["1"]["w"] + p["1"].get("b", 0.0)
    np.testing.assert_allclose(new_fn(new, x.astype(np.float32)), after, rtol=1e-4, atol=1e-5)
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert change > 0.005
    np.testing.assert_allclose(row.change, change, rtol=1e-4)


def test_the_least_matters_first_and_a_chain_becomes_one_matrix():
    params, x = layers(3, 16, 16, 4), positive(20, 3, seed=9)
    fn = chain(lambda x: jnp.sin(9 * x), lambda x: relu(x + 4))
    one_fn, one = jc.prune.remove_activations(fn, params, [x], count=1)
    assert "sin" in str(jax.make_jaxpr(one_fn)(one, x))
    assert_model(jax.jit(one_fn)(one, x), fn(exact(params), x.astype(np.float64)), steps=200)
    line_fn, line = jc.prune.remove_activations(one_fn, one, [x], tolerance=1.0)
    assert sum(leaf.size for leaf in jax.tree.leaves(line) if leaf.ndim == 2) == 3 * 4
    out = np.asarray(line_fn(line, x[:3]))
    step = out[0] + out[2] - out[1]  # an affine function of all inputs, whatever the lines are
    np.testing.assert_allclose(line_fn(line, x[:1] + x[2:3] - x[1:2])[0], step, rtol=1e-3)


def test_convolutions_stay_two_and_a_norm_is_part_of_the_line():
    """At the border of the second the line is that of zeros that were never there: none."""
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def fn(p, x):
        x = (conv(x, p["a"]) - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5)
        return nn.silu(conv(relu(x), p["b"])).mean((1, 2))

    x = positive(2, 4, 4, 2)
    params = {"a": positive(3, 3, 2, 6), "b": random(3, 3, 6, 4)}
    params = jax.tree.map(jnp.asarray, params | {"mean": 0.1 * positive(6), "var": positive(6)})
    [row] = jc.prune.activations(fn, params, [x])
    assert (row.before, row.after, row.why) == ("a", "b", "a convolution is not merged")
    assert row.change < 1e-5  # positive all through: a line, to rounding
    new_fn, new = jc.prune.remove_activations(fn, params, [x], count=1)
    out, grads = jax.jit(jax.value_and_grad(lambda p: new_fn(p, x).sum()))(new)
    np.testing.assert_allclose(out, jax.jit(fn)(params, x).sum(), rtol=1e-4)
    assert bool(jnp.any(grads["a"] != 0))
    assert not bool(jnp.any(grads["mean"] != 0))


UNFIT = {
    "a gate": lambda p, x: (relu(x @ p["a"]) * (x @ p["c"])) @ p["b"],
    "a residual": lambda p, x: (lambda z: relu(z) @ p["b"] + z)(x @ p["a"]),
    "a second use": lambda p, x: (lambda h: h @ p["b"] + h)(relu(x @ p["a"])),
    "a norm of the data": lambda p, x: jax.nn.standardize(x @ p["a"]) @ p["b"],
    "a softmax": lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
    "returned": lambda p, x: (lambda h: (h, h @ p["b"]))(relu(x @ p["a"])),
    "returned before": lambda p, x: (lambda z: (z, relu(z) @ p["b"]))(x @ p["a"]),
    "shared": lambda p, x: relu(x @ p["a"]) @ p["a"],
    "stacked": lambda p, x: jax.lax.scan(lambda x, w: (relu(x @ w), None), x, p["s"])[0],
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_has_more_between_or_after_it_stays(name):
    params = {key: jnp.asarray(random(4, 4)) for key in "abc"} | {"s": jnp.ones((2, 4, 4))}
    assert jc.prune.activations(UNFIT[name], params, [random(3, 4)]) == ()


def test_wrong_use_is_named():
    params, fn, x = layers(3, 8, 4, make=random), chain(relu), random(9, 3)
    remove = jc.prune.remove_activations
    for wrong in (dict(), dict(count=1, tolerance=0.1)):
        with pytest.raises(ValueError, match="one of count and tolerance"):
            remove(fn, params, [x], **wrong)
    with pytest.raises(ValueError, match="count is 1 or more"):
        remove(fn, params, [x], count=0)
    with pytest.raises(ValueError, match="are 1 activation functions, not 2 to remove"):
        remove(fn, params, [x], count=2)
    with pytest.raises(ValueError, match=r"one within 1e-06:\nbefore(.|\n)*0/w"):
        remove(fn, params, [x], tolerance=1e-6)
    with pytest.raises(ValueError, match="matches none"):
        remove(fn, params, [x], count=1, rules=["other"])
    with pytest.raises(TypeError, match="'0/w' is a QuantizedArray: remove first"):
        remove(fn, jc.quantize.quantize(params, {".*w": jc.quantize.int8()}), [x], count=1)
    new_fn, _ = remove(fn, params, [x], count=1)
    with pytest.raises(ValueError, match=r"'0/w' must have the shape \(3, 4\); it is \(3, 8\)"):
        new_fn(params, x)
