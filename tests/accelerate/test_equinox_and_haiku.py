"""Equinox modules and Haiku functions, unmodified."""

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import OPS, SPECS, assert_compressed, assert_model, decoded, random, run


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_equinox_mlp(spec, axis):
    """`Linear` contracts -1; scales along the other axis are multiplied into its input."""
    if spec == "int4" and axis == -2:
        axis, spec_of = (-2, -1), jc.quantize.int4  # one scale; its bits are packed along -1
    else:
        spec_of = SPECS[spec]
    model = eqx.nn.MLP(32, 8, 16, 1, key=jax.random.key(0))
    x = random(5, 32)
    q = jc.quantize.quantize(model, {".*weight": spec_of(axis=axis)})
    fn = lambda model, x: jax.vmap(model)(x)
    # Activation functions are leaves of an Equinox module: its own jit leaves them alone.
    got, rows = eqx.filter_jit(jc.accelerate(fn))(q, x), jc.explain(fn, q, x)
    first, second = (decoded((layer.weight, layer.bias)) for layer in q.layers)
    hidden = oracles.relu(x @ first[0].T + first[1])
    assert_model(got, hidden @ second[0].T + second[1])
    assert_compressed(rows, *[OPS[spec]] * 2)


def test_equinox_model_as_the_function():
    """The accelerated function may be the module itself, its weights with it."""
    model = eqx.nn.Linear(32, 8, key=jax.random.key(0))
    q = jc.quantize.quantize(model, {"weight": jc.quantize.int8(axis=-1)})
    x = random(32)
    got = jc.accelerate(q)(x)
    assert_model(got, oracles.dense(q.weight) @ x + np.asarray(q.bias, np.float64))


def test_equinox_convolution():
    model = eqx.nn.Conv2d(3, 5, 3, use_bias=False, key=jax.random.key(0))
    x = random(3, 6, 6)
    layout = jc.layout(lambda model, x: model(x), model, x)
    assert layout.weight.contract == (-3, -2, -1)
    q = jc.quantize.quantize(model, {"weight": jc.quantize.int8()}, layout=layout)
    got, rows = run(lambda model, x: model(x), q, x)
    kernel = oracles.dense(q.weight).transpose(2, 3, 1, 0)
    want = oracles.conv(x.transpose(1, 2, 0)[None], kernel)[0].transpose(2, 0, 1)
    assert_model(got, want)
    assert_compressed(rows, "convolution")


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_haiku_mlp(spec):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 8])(x)))
    x = random(4, 32)
    params = model.init(jax.random.key(0), x)
    q = jc.quantize.quantize(params, {".*/w": SPECS[spec]()})
    got, rows = run(model.apply, q, x)
    first, second = (decoded(q)[f"mlp/~/linear_{i}"] for i in (0, 1))
    hidden = oracles.relu(x @ first["w"] + first["b"])
    assert_model(got, hidden @ second["w"] + second["b"])
    assert_compressed(rows, *[OPS[spec]] * 2)


def test_haiku_state_and_random_numbers():
    """`transform_with_state` threads its state through as results; nothing is lost."""

    def forward(x):
        count = hk.get_state("count", (), init=lambda shape, dtype: jax.numpy.zeros(shape))
        hk.set_state("count", count + 1)
        return hk.Linear(8)(x)

    model = hk.transform_with_state(forward)
    x = random(4, 32)
    params, state = model.init(jax.random.key(0), x)
    q = jc.quantize.quantize(params, {".*/w": jc.quantize.int8()})
    y, state = jc.accelerate(model.apply)(q, state, jax.random.key(1), x)
    assert float(state["~"]["count"]) == 1
    p = decoded(q)["linear"]
    assert_model(y, x @ p["w"] + p["b"])
