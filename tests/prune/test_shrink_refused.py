"""What `shrink` leaves, with the reason, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from checks import random


def two(**others):
    made = {"a": jnp.asarray(random(4, 6)), "b": jnp.asarray(random(6, 3))}
    return made | others


def columns(*indices, shape=(4, 6)):
    mask = np.ones(shape, bool)
    mask[:, list(indices)] = False
    return mask


def rows(fn, params, masks, *args):
    whole = {path: masks.get(path, optax.MaskedNode()) for path in params}
    return {(row.path, row.axis): row for row in jc.prune.removable(fn, params, whole, *args)}


X = random(2, 4)


def layer_norm(p, x):
    h = x @ p["a"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return h @ p["b"]


def root_mean_square(p, x):
    h = x @ p["a"]
    return (h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True))) @ p["b"]


def scanned(p, x):
    return jax.lax.scan(lambda h, b: (h @ b, None), x @ p["a"], p["stack"])[0]


def residual(p, x):
    return (x @ p["a"] + x @ p["c"]) @ p["b"]


def maximum(p, x):
    h = x @ p["a"]
    return (h - h.max(-1, keepdims=True)) @ p["b"]


@pytest.mark.parametrize(
    ("fn", "params", "why"),
    [
        (lambda p, x: x @ p["a"], two(), "the function returns it"),
        (lambda p, x: (x @ p["a"] @ p["b"], p["a"]), two(), "the function returns it"),
        (layer_norm, two(), "reduce_sum sums it, and it is not a constant there"),
        (residual, two(c=jnp.ones((4, 6))), "dot_general with 'b' sums it, and it is not a"),
        (maximum, two(), "reduce_max looks at all of it"),
        (scanned, two(stack=jnp.ones((2, 6, 6))), "scan needs it"),
        (lambda p, x: jnp.sort(x @ p["a"]) @ p["b"], two(), "sort goes along it"),
        (
            lambda p, x: (x @ p["a"]).reshape(2, 2, 3).transpose(0, 2, 1).reshape(2, 6) @ p["b"],
            two(),
            "only whole slices can go",
        ),
    ],
    ids=["output", "state", "layer_norm", "residual", "max", "scan", "sort", "heads"],
)
def test_what_stays_has_a_reason(fn, params, why):
    row = rows(fn, params, {"a": columns(1, 2)}, X)["a", -1]
    assert (row.size, row.masked, row.removed) == (6, 2, 0)
    assert why in row.why
    masks = {path: optax.MaskedNode() for path in params} | {"a": columns(1, 2)}
    with pytest.raises(ValueError, match="nothing that the masks drop can be removed"):
        jc.prune.shrink(fn, params, masks, X)


def test_the_mean_of_a_normalization_keeps_its_count():
    """A removed zero still counts: the divisor is a constant of the program."""
    params, mask = two(), columns(1, 2)
    masks = {"a": mask, "b": optax.MaskedNode()}
    small_fn, small = jc.prune.shrink(root_mean_square, params, masks, X)
    assert small["a"].shape == (4, 4)
    want = root_mean_square({"a": params["a"] * mask, "b": params["b"]}, X)
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5, atol=1e-6)


def test_an_axis_is_never_emptied():
    small_fn, small = jc.prune.shrink(
        lambda p, x: x @ p["a"] @ p["b"],
        two(),
        {"a": columns(*range(6)), "b": optax.MaskedNode()},
        X,
    )
    assert (small["a"].shape, small["b"].shape) == ((4, 1), (1, 3))
    np.testing.assert_array_equal(small_fn(small, X), np.zeros((2, 3)))


def test_zeros_that_nobody_masked_stay():
    params = two()
    params["a"] = params["a"].at[:, 0].set(0)
    masks = {"a": columns(5), "b": optax.MaskedNode()}
    _, small = jc.prune.shrink(lambda p, x: x @ p["a"] @ p["b"], params, masks, X)
    assert small["a"].shape == (4, 5)


def test_rows_that_nothing_reads_take_their_producers_along():
    params = two(bias=jnp.ones(6))
    fn = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]
    mask = np.ones((6, 3), bool)
    mask[[0, 4]] = False
    masks = {"a": optax.MaskedNode(), "b": mask, "bias": optax.MaskedNode()}
    small_fn, small = jc.prune.shrink(fn, params, masks, X)
    assert {k: v.shape for k, v in small.items()} == {"a": (4, 4), "bias": (4,), "b": (4, 3)}
    want = fn(params | {"b": params["b"] * mask}, X)
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5, atol=1e-6)


def test_constants_that_no_bias_can_take_up():
    """Sums of integers, and one number for all outputs."""

    def fn(p, x):
        count = jnp.sum(jnp.round(4 * (x @ p["a"])).astype(jnp.int32) + 1, -1, keepdims=True)
        return count * (jax.nn.relu(x @ p["a"] + 1.0) @ p["b"] + p["all"])

    params = two(all=jnp.float32(0.5))
    masks = dict.fromkeys(params, optax.MaskedNode()) | {"a": columns(0, 3)}
    small_fn, small = jc.prune.shrink(fn, params, masks, X)
    assert {k: v.shape for k, v in small.items()} == {"a": (4, 4), "b": (4, 3), "all": ()}
    want = fn(params | {"a": params["a"] * columns(0, 3)}, X)
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5, atol=1e-5)


def test_arguments_for_which_the_program_differs():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"] + 1.0)
        return (jnp.sin(h) if x.shape[0] > 2 else h) @ p["b"]

    masks = {"a": columns(0), "b": optax.MaskedNode()}
    small_fn, small = jc.prune.shrink(fn, two(), masks, X)
    with pytest.raises(ValueError, match="takes other steps than for the example"):
        small_fn(small, random(3, 4))
    with pytest.raises(ValueError, match=r"'a' must have the shape \(4, 5\); it is \(4, 6\)"):
        small_fn(two(), X)


def test_a_constant_that_fits_the_example_only():
    """Positions are part of the constant that is left, so their number is fixed."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]) + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]
        return h @ p["b"]

    params, masks = two(), {"a": columns(0), "b": optax.MaskedNode()}
    small_fn, small = jc.prune.shrink(fn, params, masks, X)
    want = fn(params | {"a": params["a"] * columns(0)}, X)
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"found for \[2, 3\] and is needed for \[5, 3\]"):
        small_fn(small, random(5, 4))


def test_an_example_of_one_is_looked_at_as_two():
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + 1.0) @ p["b"] + p["bias"]
    params = two(bias=jnp.ones(3))
    masks = dict.fromkeys(params, optax.MaskedNode()) | {"a": columns(0)}
    small_fn, small = jc.prune.shrink(fn, params, masks, X[:1])
    want = fn(params | {"a": params["a"] * columns(0)}, X)
    for x in (X, X[:1]):
        np.testing.assert_allclose(small_fn(small, x), want[: len(x)], rtol=1e-5, atol=1e-5)
    assert not jax.make_jaxpr(small_fn)(small, X).consts  # the bias has taken it up
    np.testing.assert_allclose(small["bias"], 1 + params["b"][0], rtol=1e-6)


@pytest.mark.parametrize("by", ["shape", "position"])
def test_an_example_of_one_that_says_nothing_of_more(by):
    """Where two do not fit, or the constant is another for each, it holds for one only."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"] + 1.0)
        if by == "shape":
            return h.reshape(1, 6) @ p["b"]
        return (h + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]) @ p["b"]

    params, masks = two(), {"a": columns(0), "b": optax.MaskedNode()}
    small_fn, small = jc.prune.shrink(fn, params, masks, X[:1])
    want = fn(params | {"a": params["a"] * columns(0)}, X[:1])
    np.testing.assert_allclose(small_fn(small, X[:1]), want, rtol=1e-5, atol=1e-5)
    if by == "position":
        with pytest.raises(ValueError, match=r"found for \[1, 3\].*with an example of two"):
            small_fn(small, X)


def test_what_is_refused():
    fn = lambda p, x: x @ p["a"] @ p["b"]
    scattered = np.arange(24).reshape(4, 6) % 5 > 0
    with pytest.raises(ValueError, match="drop no whole slice of any leaf"):
        jc.prune.shrink(fn, two(), {"a": scattered, "b": optax.MaskedNode()}, X)
    with pytest.raises(ValueError, match=r"'a' has the shape \(4, 6\), its mask \(4,\)"):
        jc.prune.shrink(fn, two(), {"a": np.ones(4, bool), "b": optax.MaskedNode()}, X)
    int8 = jc.quantize.quantize(two(), {"a": jc.quantize.int8()})
    with pytest.raises(TypeError, match="'a' is a QuantizedArray: shrink first"):
        jc.prune.shrink(fn, int8, {"a": columns(0), "b": optax.MaskedNode()}, X)
