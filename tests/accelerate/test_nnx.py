"""Flax NNX: modules and states as parameters, `nnx.jit` inside, updates in place."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
import oracles
from checks import OPS, SPECS, assert_compressed, assert_model, decoded, random, run


class MLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(32, 16, rngs=rngs)
        self.second = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def oracle(state, x):
    p = jax.tree.map(lambda a: a, nnx.to_pure_dict(state))
    hidden = oracles.relu(x @ p["first"]["kernel"] + p["first"]["bias"])
    return hidden @ p["second"]["kernel"] + p["second"]["bias"]


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_module_as_parameters(spec):
    model, x = MLP(), random(4, 32)
    q = jc.quantize.quantize(model, {".*kernel": SPECS[spec]()})
    got, rows = run(lambda model, x: model(x), q, x)
    assert_model(got, oracle(decoded(nnx.state(q)), x))
    assert_compressed(rows, *[OPS[spec]] * 2)
    assert {row.path for row in rows} == {"first/kernel", "second/kernel"}


def test_state_as_parameters():
    graph, state = nnx.split(MLP())
    x = random(4, 32)
    q = jc.quantize.quantize(state, {".*kernel": jc.quantize.int8()})
    got, rows = run(lambda state, x: nnx.merge(graph, state)(x), q, x)
    assert_model(got, oracle(decoded(q), x))
    assert_compressed(rows, "quantized_matmul", "quantized_matmul")


def test_nnx_jit_inside():
    model, x = MLP(), random(4, 32)
    q = jc.quantize.quantize(model, {".*kernel": jc.quantize.int8()})
    forward = nnx.jit(lambda model, x: model(x))
    fn = lambda model, x: forward(model, x)
    for _ in range(2):  # what nnx.jit remembers of the first call hides nothing in the second
        got, rows = run(fn, q, x)
        assert_model(got, oracle(decoded(nnx.state(q)), x))
        assert_compressed(rows, "quantized_matmul", "quantized_matmul")


def test_nnx_jit_outside():
    model, x = MLP(), random(4, 32)
    q = jc.quantize.quantize(model, {".*kernel": jc.quantize.int8()})
    got = nnx.jit(jc.accelerate(lambda model, x: model(x)))(q, x)
    assert_model(got, oracle(decoded(nnx.state(q)), x))


class Counting(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_an_update_in_place_that_is_not_returned_raises():
    q = jc.quantize.quantize(Counting(), {".*kernel": jc.quantize.int8()})
    with pytest.raises(TypeError, match=r"norm/mean was updated in place .* not returned"):
        jc.accelerate(lambda model, x: model(x))(q, random(4, 8))


def test_an_update_in_place_that_is_returned_is_kept():
    q = jc.quantize.quantize(Counting(), {".*kernel": jc.quantize.int8()})
    x = random(4, 8)
    _, state = jc.accelerate(lambda model, x: (model(x), nnx.state(model)))(q, x)
    hidden = x @ decoded(nnx.state(q))["linear"]["kernel"].get_value()
    # Flax moves the running mean by a hundredth.
    np.testing.assert_allclose(
        state["norm"]["mean"].get_value(), 0.01 * hidden.mean(0), rtol=1e-4, atol=1e-6
    )
    assert isinstance(state["linear"]["kernel"].get_value(), jc.arrays.QuantizedArray)


def test_a_module_in_evaluation_is_not_updated():
    model = Counting()
    model.eval()
    q = jc.quantize.quantize(model, {".*kernel": jc.quantize.int8()})
    got = jc.accelerate(lambda model, x: model(x))(q, random(4, 8))
    assert got.shape == (4, 8)
