"""Flax Linen models, unmodified: against numpy in float64, and nothing decoded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import OPS, SPECS, assert_compressed, assert_model, decoded, random, run

FLOAT_ACTIVATIONS = ["int8", "int4"]


def compressed(model, spec, *args, rules=".*(kernel|embedding)"):
    """The variables of `model`, quantized along the axes that its products contract."""
    variables = model.init(jax.random.key(0), *args)
    layout = jc.layout(model.apply, variables, *args)
    return jc.quantize.quantize(variables, {rules: SPECS[spec]()}, layout=layout)


def dense_layer(p, x):
    return x @ p["kernel"] + p["bias"]


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_mlp_of_odd_sizes(spec):
    x = random(5, 33)
    model = nn.Sequential([nn.Dense(17), nn.relu, nn.Dense(7)])
    q = compressed(model, spec, x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]
    assert_model(got, dense_layer(p["layers_2"], oracles.relu(dense_layer(p["layers_0"], x))))
    assert_compressed(rows, *[OPS[spec]] * 2)


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_attention(spec):
    """Eight numbers a head: groups of 16 along the heads' size are cut to eight."""
    x = random(2, 6, 32)
    model = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)
    q = compressed(model, spec, x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]
    kernels = [p[name]["kernel"] for name in ("query", "key", "value", "out")]
    assert_model(got, np.stack([oracles.attention(row, *kernels) for row in x]))
    assert_compressed(rows, *[OPS[spec]] * 4)


@pytest.mark.parametrize("spec", ["int8", "w8a8"])
@pytest.mark.parametrize(("strides", "groups"), [(1, 1), (2, 2)])
def test_convolution(spec, strides, groups):
    x = random(2, 7, 7, 4)
    model = nn.Conv(6, (3, 3), strides, padding="VALID", feature_group_count=groups)
    q = compressed(model, spec, x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]
    seen = x
    if spec == "w8a8":  # one scale for each image
        seen = oracles.activations(x, axis=(1, 2, 3))
    want = oracles.conv(seen, p["kernel"], (strides, strides), groups=groups) + p["bias"]
    assert_model(got, want)
    assert_compressed(rows, "convolution")


class TiedModel(nn.Module):
    """A table that is looked up, and multiplied with at the end."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        return embed.attend(nn.tanh(embed(tokens)))


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_tied_embeddings(spec):
    tokens = np.arange(12).reshape(3, 4) * 7 % 50
    q = compressed(TiedModel(), spec, tokens)
    got, rows = run(TiedModel().apply, q, tokens)
    table = decoded(q)["params"]["Embed_0"]["embedding"]
    assert_model(got, np.tanh(table[tokens]) @ table.T)
    assert_compressed(rows, "gather", OPS[spec])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32)(nn.relu(nn.Dense(16)(x))), None


class Stack(nn.Module):
    """Three blocks in one array, each computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan()(x, None)[0]


def stack_oracle(p, x):
    for layer in range(3):
        # The outer one of the two comes first.
        second, first = (
            {name: leaf[layer] for name, leaf in p[f"Dense_{i}"].items()} for i in (0, 1)
        )
        x = x + dense_layer(second, oracles.relu(dense_layer(first, x)))
    return x


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_scanned_layers_with_remat(spec):
    x = random(5, 32)
    q = compressed(Stack(), spec, x)
    got, rows = run(Stack().apply, q, x)
    [p] = decoded(q)["params"].values()
    assert_model(got, stack_oracle(p, x))
    assert_compressed(rows, *[OPS[spec]] * 2)


def test_gradient_through_scanned_layers_with_remat():
    """To the input, where the weights are integers, as to any other input."""
    x = random(2, 32)
    q = compressed(Stack(), "int8", x)
    got = jax.jit(jax.grad(lambda x: jc.accelerate(Stack().apply)(q, x).sum()))(x)
    [p] = decoded(q)["params"].values()
    want = oracles.finite_differences(lambda x: stack_oracle(p, x).sum(), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 against differences


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_gru(spec):
    x = random(2, 5, 16)
    model = nn.RNN(nn.GRUCell(16))
    q = compressed(model, spec, x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]["cell"]
    h = np.zeros((2, 16))
    for t in range(5):
        gate = {name: x[:, t] @ p["i" + name]["kernel"] + p["i" + name]["bias"] for name in "rzn"}
        past = {name: h @ p["h" + name]["kernel"] for name in "rzn"}
        r, z = (oracles.sigmoid(gate[name] + past[name]) for name in "rz")
        n = np.tanh(gate["n"] + r * (past["n"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
    assert_model(got[:, -1], h)
    assert_compressed(rows, *[OPS[spec]] * 6)


@pytest.mark.parametrize("spec", FLOAT_ACTIVATIONS)
def test_lstm_whose_kernels_are_concatenated(spec):
    x = random(2, 5, 16)
    model = nn.RNN(nn.OptimizedLSTMCell(16))
    q = compressed(model, spec, x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]["cell"]
    h, c = np.zeros((2, 16)), np.zeros((2, 16))
    for t in range(5):
        i, f, g, o = (
            x[:, t] @ p["i" + name]["kernel"] + h @ p["h" + name]["kernel"] + p["h" + name]["bias"]
            for name in "ifgo"
        )
        c = oracles.sigmoid(f) * c + oracles.sigmoid(i) * np.tanh(g)
        h = oracles.sigmoid(o) * np.tanh(c)
    assert_model(got[:, -1], h)
    assert_compressed(rows, *[OPS[spec]] * 2)


def test_dense_in_bfloat16():
    """The cast of the kernel costs nothing: it only says what the product is to be."""
    x = random(4, 32)
    model = nn.Dense(16, dtype=jnp.bfloat16)
    q = compressed(model, "int8", x)
    got, rows = run(model.apply, q, x)
    assert got.dtype == jnp.bfloat16
    p = decoded(q)["params"]
    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    want = rounded @ p["kernel"]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2**-9)
    assert_compressed(rows, "quantized_matmul")


def test_layer_norm_and_dropout_are_left_alone():
    """Flax computes a norm from float parameters; an unused rng does no harm."""
    x = random(4, 32)
    model = nn.Sequential([nn.LayerNorm(), nn.Dense(8), nn.Dropout(0.5, deterministic=True)])
    q = compressed(model, "int8", x)
    got, rows = run(model.apply, q, x)
    p = decoded(q)["params"]
    normed = oracles.layer_norm(x.astype(np.float64), **p["layers_0"])
    assert_model(got, dense_layer(p["layers_1"], normed))
    assert_compressed(rows, "quantized_matmul")
