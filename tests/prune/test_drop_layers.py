"""`block_influence` and `drop_layers` against loops over the layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import random


def stacked(params, x):
    """A scan over two leaves and a constant for each layer; the other leaf is none of a layer."""

    def layer(x, layer):
        (w, b), size = layer
        return x + size * jnp.tanh(x @ w + b), None

    sizes = jnp.arange(1.0, 5.0)
    x, _ = jax.lax.scan(layer, x, ((params["w"], params["b"]), sizes), reverse=True)
    return x @ params["out"]


def stacked_params():
    w = random(4, 6, 6) * np.float32([[[1.0]], [[0.01]], [[0.3]], [[0.001]]])
    return {"w": jnp.asarray(w), "b": jnp.zeros((4, 6)), "out": jnp.asarray(random(6, 2))}


def loop(params, x, layers):
    """`stacked` of some layers, from the last one down; and how much each changes `x`."""
    influence = {}
    for i in reversed(layers):
        w, b = np.asarray(params["w"], np.float64)[i], np.asarray(params["b"])[i]
        new = x + (i + 1) * np.tanh(x @ w + b)
        lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(new, axis=-1)
        influence[i], x = np.mean(1 - (x * new).sum(-1) / lengths), new
    return x @ np.asarray(params["out"]), [influence[i] for i in layers]


def test_influence_is_the_mean_angle_of_each_layer():
    params, batches = stacked_params(), [random(2, 5, 6), random(2, 5, 6, seed=1)]
    found = jc.prune.block_influence(stacked, params, batches)
    assert found["out"] is None
    want = np.mean([loop(params, x, range(4))[1] for x in batches], 0)
    # 1 - cos of float32 is right to a few roundings of one.
    np.testing.assert_allclose(found["w"], want, atol=1e-6)
    np.testing.assert_array_equal(found["b"], found["w"])


def test_the_least_go_and_the_function_runs_without_them():
    params, x = stacked_params(), random(7, 6)
    scores = jc.prune.block_influence(stacked, params, [x])
    small_fn, small = jc.prune.drop_layers(stacked, params, scores, 2, x[:2])
    for name in "wb":
        np.testing.assert_array_equal(small[name], params[name][np.array([0, 2])])
    assert small["out"] is params["out"]
    # The same sums in float64; constants of a layer go with it.
    np.testing.assert_allclose(
        jax.jit(small_fn)(small, x), loop(params, x, [0, 2])[0], rtol=1e-5, atol=1e-5
    )
    gradient = jax.grad(lambda p: small_fn(p, x).sum())(small)
    assert gradient["w"].shape == (2, 6, 6)
    assert all(bool(jnp.any(g != 0)) for g in gradient["w"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        return nn.Dense(3)(scan()(x, None)[0])


def test_a_module_with_a_fixed_length():
    """Linen refuses shorter stacks, the function that is returned runs them, quantized too."""
    model, x = Model(), jnp.asarray(random(2, 5, 8))
    fn, params = jax.jit(model.apply), model.init(jax.random.key(0), x)
    scores = jc.prune.block_influence(fn, params, [x])
    stack = "ScanCheckpointBlock_0"
    order = np.argsort(scores["params"][stack]["Dense_0"]["kernel"])
    small_fn, small = jc.prune.drop_layers(fn, params, scores, 1, x)
    kept = sorted(order[1:])
    y = x
    for i in kept:
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"][stack])
        y, _ = Block().apply({"params": layer}, y, None)
    want = nn.Dense(3).apply({"params": params["params"]["Dense_0"]}, y)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"length|shape"):
        model.apply(small, x)
    q = jc.quantize.quantize(small, {".*kernel": jc.quantize.int8()})
    got = jax.jit(jc.accelerate(small_fn))(q, x)
    dense = jax.tree.map(
        lambda leaf: leaf.materialise() if jc.arrays.is_compressed(leaf) else leaf,
        q,
        is_leaf=jc.arrays.is_compressed,
    )
    # The same products in another order.
    np.testing.assert_allclose(got, small_fn(dense, x), rtol=1e-4, atol=1e-5)


def two(params, x):
    step = lambda x, w: (x + x @ w, None)
    for name in ("a", "b"):
        x, _ = jax.lax.scan(step, x, params[name])
    return x


def test_scans_compete_and_each_keeps_a_layer():
    params, x = {n: jnp.asarray(random(3, 4, 4, seed=i)) for i, n in enumerate("ab")}, random(2, 4)
    low = {"a": jnp.array([0.1, 0.2, 0.3]), "b": jnp.array([1.0, 0.25, 0.5])}
    left = lambda scores, drop: {
        n: [int(np.flatnonzero([(w == v).all() for w in params[n]])[0]) for v in leaf]
        for n, leaf in jc.prune.drop_layers(two, params, scores, drop, x)[1].items()
    }
    assert left(low, 2) == {"a": [2], "b": [0, 1, 2]}
    assert left(low, 3) == {"a": [2], "b": [0, 2]}  # the last of `a` stays
    assert left(low, 4) == {"a": [2], "b": [0]}
    assert left(low | {"a": None}, 2) == {"a": [0, 1, 2], "b": [0]}
    small_fn, small = jc.prune.drop_layers(two, params, low, 3, x)
    # This function reads the lengths from its parameters: both are the same.
    np.testing.assert_allclose(small_fn(small, x), two(small, x), rtol=1e-6)
    with pytest.raises(ValueError, match="'a' must have 1 layers"):
        small_fn(params, x)


W, X = {"w": random(3, 4, 4)}, random(2, 4)
SCORES = {"w": np.arange(3.0)}
step = lambda x, w: (x @ w, x.sum())
plain = lambda p, x: jax.lax.scan(step, x, p["w"])[0]


@pytest.mark.parametrize(
    ("fn", "scores", "drop", "message"),
    [
        (plain, SCORES, 0, "drop is 1 to 2, of 3 layers"),
        (plain, SCORES, 3, "drop is 1 to 2"),
        (plain, {"w": np.arange(4.0)}, 1, r"needs scores of 3 layers; got {'w': \(4,\)}"),
        (plain, {"w": None}, 1, "drop is 1 to 0"),
        (lambda p, x: x @ p["w"][0], SCORES, 1, "no lax.scan over the leading axis"),
        (lambda p, x: plain(p, x) + p["w"].sum(), SCORES, 1, "used by reduce_sum too"),
        (lambda p, x: jax.lax.scan(step, x, p["w"])[1] * 2, SCORES, 1, "each layer is used by mul"),
    ],
)
def test_what_cannot_be_done_is_said(fn, scores, drop, message):
    with pytest.raises(ValueError, match=message):
        jc.prune.drop_layers(fn, W, scores, drop, X)


def test_what_has_no_influence_is_said():
    with pytest.raises(ValueError, match="no batches"):
        jc.prune.block_influence(plain, W, [])
    with pytest.raises(ValueError, match=r"found no lax\.scan"):
        jc.prune.block_influence(lambda p, x: x @ p["w"][0], W, [X])
    q = jc.quantize.quantize(W, {"w": jc.quantize.int8()})
    with pytest.raises(TypeError, match="'w' is a QuantizedArray: drop layers first"):
        jc.prune.block_influence(plain, q, [X])
    with pytest.raises(TypeError, match="'w' is a QuantizedArray: drop layers first"):
        jc.prune.drop_layers(plain, q, SCORES, 1, X)
    both = {"v": W["w"], "w": W["w"]}
    fn = lambda p, x: jax.lax.scan(lambda x, layer: (x @ layer["v"] @ layer["w"], None), x, p)[0]
    with pytest.raises(ValueError, match="'w' and 'v' are of one scan and differ"):
        jc.prune.drop_layers(fn, both, {"v": np.arange(3.0), "w": np.ones(3)}, 1, X)
    torn = lambda p, x: fn(p, plain(p, x))
    with pytest.raises(ValueError, match="'w' is in two scans"):
        jc.prune.drop_layers(torn, both, {n: np.arange(3.0) for n in "vw"}, 1, X)
