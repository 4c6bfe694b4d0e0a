"""Batch norms of Linen and NNX behind Dense and Conv: the same function, identity norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
import oracles
from checks import random


class Net(nn.Module):
    """Every mixture: with and without biases, scales, and a convolution."""

    @nn.compact
    def __call__(self, x):
        norm = lambda **kwargs: nn.BatchNorm(use_running_average=True, **kwargs)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False, padding="VALID")(x)))
        x = norm(epsilon=0.01)(nn.Conv(5, (2, 2), strides=2, padding="VALID")(x))
        x = x.reshape(len(x), -1)
        x = norm(use_scale=False)(nn.Dense(6, use_bias=False)(x))
        return norm(use_bias=False)(nn.Dense(3)(x))


def float64(variables, x):
    """The same in NumPy."""
    params, stats = variables["params"], variables["batch_stats"]

    def norm(i, x, epsilon=1e-5):
        own = params.get(f"BatchNorm_{i}", {})
        found = (x - stats[f"BatchNorm_{i}"]["mean"]) / np.sqrt(
            stats[f"BatchNorm_{i}"]["var"] + epsilon
        )
        return found * own.get("scale", 1.0) + own.get("bias", 0.0)

    affine = lambda name, x: x @ params[name]["kernel"] + params[name].get("bias", 0.0)
    x = np.maximum(norm(0, oracles.conv(x, params["Conv_0"]["kernel"])), 0)
    x = oracles.conv(x, params["Conv_1"]["kernel"], (2, 2)) + params["Conv_1"]["bias"]
    x = norm(1, x, 0.01).reshape(len(x), -1)
    return norm(3, affine("Dense_1", norm(2, affine("Dense_0", x))))


def disturbed(tree, seed=0):
    """Positive numbers for variances and scales, any for the rest."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return leaf
        if "var" in name or "scale" in name:
            return jnp.asarray(rng.uniform(0.3, 3, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def test_linen_norms_of_every_kind():
    x = random(2, 6, 6, 3, dtype=np.float64)
    with jax.enable_x64(True):
        variables = jax.eval_shape(Net().init, jax.random.key(0), x)
        variables = jax.tree.map(
            lambda leaf: jnp.asarray(random(*leaf.shape, seed=leaf.size), jnp.float64), variables
        )
        variables = disturbed(variables)
        new = jc.quantize.fold_batch_norm(
            Net().apply, variables, [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        )
    variables, new = jax.tree.map(np.asarray, (variables, new))
    want, got = float64(variables, x), float64(new, x)
    # Exact but for a few hundred roundings of float64. Linen keeps its epsilons in float32,
    # so the NumPy norms are the identity to 1e-5 * 2^-24 only.
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * np.abs(want).max())
    for i, epsilon in enumerate((1e-5, 0.01, 1e-5, 1e-5)):
        norm = new["params"].get(f"BatchNorm_{i}", {})
        assert np.all(norm.get("scale", 1.0) == np.float32(1))
        assert np.all(norm.get("bias", 0.0) == np.float32(0))
        stats = new["batch_stats"][f"BatchNorm_{i}"]
        np.testing.assert_allclose(stats["var"], 1 - epsilon, rtol=1e-6)
    assert np.all(np.asarray(new["batch_stats"]["BatchNorm_1"]["mean"]) == 0)
    old = variables["params"]["Dense_1"]["kernel"]
    statistic, gamma = variables["batch_stats"]["BatchNorm_3"], variables["params"]["BatchNorm_3"]
    factor = np.asarray(gamma["scale"]) / np.sqrt(np.asarray(statistic["var"]) + 1e-5)
    np.testing.assert_allclose(new["params"]["Dense_1"]["kernel"], old * factor, rtol=1e-7)


def test_only_the_kernels_that_rules_name():
    x = jnp.asarray(random(2, 6, 6, 3))
    variables = disturbed(Net().init(jax.random.key(0), x))
    new = jc.quantize.fold_batch_norm(Net().apply, variables, [x], [".*Dense_0/kernel"])
    changed = {
        path
        for (path, a), (_, b) in zip(*map(jc._paths.leaves_with_paths, (variables, new)))
        if not np.array_equal(a, b)
    }
    assert changed == {
        "params/Dense_0/kernel",
        "params/BatchNorm_2/bias",
        "batch_stats/BatchNorm_2/mean",
        "batch_stats/BatchNorm_2/var",
    }
    want = Net().apply(variables, x)
    # Sums of at most 36 products of float32, through four layers.
    np.testing.assert_allclose(Net().apply(new, x), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nnx(dtype):
    class Model(nnx.Module):
        def __init__(self, rngs):
            how = dict(rngs=rngs, dtype=dtype, param_dtype=dtype)
            self.linear = nnx.Linear(6, 5, **how)
            self.norm = nnx.BatchNorm(5, use_running_average=True, epsilon=1e-3, **how)

        def __call__(self, x):
            return self.norm(self.linear(x))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    x = jnp.asarray(random(7, 6), dtype)
    state = disturbed(state)
    new = jc.quantize.fold_batch_norm(fn, state, [x])
    want = np.asarray(fn(state, x), np.float64)
    # Three products and sums, and the rounding of the new kernel.
    atol = 8 * float(jnp.finfo(dtype).eps) * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(fn(new, x), np.float64), want, atol=atol)
    assert np.all(np.asarray(jax.tree.leaves(new["norm"]["scale"])[0]) == 1)


def test_scanned_layers():
    """Each has a norm of its own, stacked."""

    def fn(p, x):
        def step(x, layer):
            x = (x @ layer["w"] - layer["mean"]) * jax.lax.rsqrt(layer["var"] + 1e-3)
            return jax.nn.relu(x), None

        return jax.lax.scan(step, x, p)[0]

    params = disturbed({"mean": jnp.ones((3, 4)), "var": jnp.ones((3, 4))})
    params["w"], x = jnp.asarray(random(3, 4, 4)), jnp.asarray(random(5, 4))
    new = jc.quantize.fold_batch_norm(fn, params, [x])
    np.testing.assert_allclose(new["var"], 1 - 1e-3)
    np.testing.assert_allclose(fn(new, x), fn(params, x), atol=1e-5)  # float32, sums of four


NOTHING = {
    "a scale": lambda p, x: x @ p["w"] * p["s"] + p["b"],
    "layer norm": lambda p, x: (
        nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x @ p["w"]) * p["s"]
    ),
    "used twice": lambda p, x: (lambda y: (y - p["b"]) * jax.lax.rsqrt(p["s"] + 0.1) + y)(
        x @ p["w"]
    ),
    "other dimension": lambda p, x: (
        ((x @ p["w"]) - p["b"][:, None]) * jax.lax.rsqrt(p["s"][:, None] + 0.1)
    ),
    # The norm could not be made the identity.
    "a factor that stays": lambda p, x: (
        (x @ p["w"] - p["b"]) * (jax.lax.rsqrt(p["s"] + 0.1) * jnp.arange(3.0))
    ),
    "a norm of two": lambda p, x: (
        lambda root: (x @ p["w"] - p["b"]) * root + (x[:, :3] - p["c"]) * root
    )(jax.lax.rsqrt(p["s"] + 0.1)),
}


@pytest.mark.parametrize("fn", NOTHING.values(), ids=NOTHING)
def test_what_is_no_batch_norm_is_left(fn):
    params = {"w": jnp.ones((4, 3)), "c": jnp.ones(3)}
    params |= {"s": jnp.array([2.0, 1.0, 3.0]), "b": jnp.array([1.0, -1.0, 0.5])}
    with pytest.raises(ValueError, match="found no batch norm behind any product"):
        jc.quantize.fold_batch_norm(fn, params, [jnp.ones((3, 4))])


def test_a_named_kernel_without_a_norm_raises():
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 3)), "s": jnp.ones(3), "b": jnp.ones(3)}
    fn = lambda p, x: ((x @ p["w"] - p["b"]) * jax.lax.rsqrt(p["s"] + 0.1)) @ p["v"]
    with pytest.raises(ValueError, match="no batch norm behind the product with 'v'"):
        jc.quantize.fold_batch_norm(fn, params, [jnp.ones((3, 4))], ["v|w"])
    with pytest.raises(ValueError, match="no batches"):
        jc.quantize.fold_batch_norm(fn, params, [])
