"""Stacked layers, remat, tied tables, odd sizes and experts run on the codes as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_compressed, random, run

SPECS = {"int8": jc.quantize.int8(), "int4": jc.quantize.int4(group_size=4)}
OP = "quantized_matmul"


def layers(params, x):
    """Seven features; the same layer three times over, remade in the backward pass."""
    body = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, params["layers"])[0]


def tied(params, tokens):
    table = params["table"]
    return table[tokens] @ table.T


def experts(params, x):
    return jnp.einsum("end,edo->eno", x, params["experts"])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_scanned_layers_under_remat(spec):
    params, x = {"layers": jnp.asarray(random(3, 7, 7))}, random(5, 7)
    params = jc.quantize.quantize(params, {"layers": spec})
    got, rows = run(layers, params, x)
    assert_compressed(rows, OP)
    want = x.astype(np.float64)
    for w in oracles.dense(params["layers"]):
        want = np.tanh(want @ w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # three sums of seven terms
    grad = jax.grad(lambda x: jnp.sum(jc.accelerate(layers)(params, x)))(x)
    dense = {"layers": jnp.asarray(oracles.dense(params["layers"]), jnp.float32)}
    np.testing.assert_allclose(
        grad, jax.grad(lambda x: jnp.sum(layers(dense, x)))(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("spec", [jc.quantize.int8(axis=-1), jc.quantize.int4(axis=-1)])
def test_a_tied_table(spec):
    """Looked up by row, and multiplied as a matrix of logits."""
    params, tokens = {"table": jnp.asarray(random(11, 7))}, np.array([[3, 0, 10]])
    params = jc.quantize.quantize(params, {"table": spec})
    got, rows = run(tied, params, tokens)
    assert_compressed(rows, "gather", OP)
    table = oracles.dense(params["table"])
    np.testing.assert_allclose(got, table[tokens] @ table.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [*SPECS.values(), jc.quantize.int8(axis=(0, -2))])
def test_experts(spec):
    """The last has one row of scales for all experts."""
    params, x = {"experts": jnp.asarray(random(3, 9, 5))}, random(3, 4, 9)
    params = jc.quantize.quantize(params, {"experts": spec})
    got, rows = run(experts, params, x)
    assert_compressed(rows, OP)
    want = np.einsum("end,edo->eno", x, oracles.dense(params["experts"]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_flax_scan_and_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(7)(x)), None

    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = random(4, 7)
    params = stack.init(jax.random.key(0), x, None)
    params = jc.quantize.quantize(params, {".*kernel": jc.quantize.int8()})
    fn = lambda p, x: stack.apply(p, x, None)[0]
    got, rows = run(fn, params, x)
    assert_compressed(rows, OP)
    [dense] = params["params"].values()
    want = x.astype(np.float64)
    for w, b in zip(oracles.dense(dense["kernel"]), np.asarray(dense["bias"])):
        want = oracles.relu(want @ w + b)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
