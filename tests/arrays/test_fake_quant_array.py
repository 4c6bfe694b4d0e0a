"""`FakeQuantArray`: the float twin sees what `convert` will store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_valid, quantized, random
from jaxcompress.arrays import IntType, OddType
from jaxcompress.quantize import Spec

SPECS = {
    "int8": jc.quantize.int8(),
    "int4": jc.quantize.int4(group_size=3),
    "int2": jc.quantize.int2(),
    "asymmetric": jc.quantize.int4(symmetric=False),
}


def twin(w, spec, **kwargs):
    return jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec}, **kwargs)["w"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_converts_to_what_quantize_makes_of_the_weight(spec):
    w = random(10, 5)
    got, want = twin(w, spec).convert(), quantized(w, spec)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_stands_for_the_rounded_weight(spec):
    w = random(10, 5)
    fake, stored = twin(w, spec), quantized(w, spec)
    np.testing.assert_array_equal(fake.materialise(), stored.materialise())
    simulated = fake.simulate()
    assert_valid(simulated)
    np.testing.assert_array_equal(simulated.values, oracles.codes_of(stored))
    assert simulated.values.dtype == jnp.float32


def test_a_scale_that_follows_the_weight_is_no_leaf_and_has_no_gradient():
    w = random(10, 5)
    fake = twin(w, jc.quantize.int8())
    assert len(jax.tree.leaves(fake)) == 1
    # With the scale constant, the gradient of sum(c * w_hat) is c, everywhere in range.
    c = random(10, 5, seed=1)
    grad = jax.grad(lambda f: jnp.sum(c * f.materialise()))(fake)
    np.testing.assert_allclose(grad.weight, c, rtol=1e-6)  # times and divided by the scale


@pytest.mark.parametrize("name", ["int2", "odd", "nf4", "fp8_e4m3"])
def test_scales_that_cover_every_weight_leave_none_without_gradient(name):
    spec = Spec(qtype=OddType(3)) if name == "odd" else getattr(jc.quantize, name)()
    w, c = random(64, 5), random(64, 5, seed=1)
    grad = jax.grad(lambda f: jnp.sum(c * f.materialise()))(twin(w, spec))
    np.testing.assert_allclose(grad.weight, c, rtol=1e-6)  # times and divided by the scale


def test_a_weight_beyond_the_largest_number_has_no_gradient():
    """mxfp4: the largest of 7.9 gives the scale 1, and 6 is the largest number."""
    w = np.full((32, 1), 0.5, np.float32)
    w[3] = 7.9
    grad = jax.grad(lambda f: jnp.sum(f.materialise()))(twin(w, jc.quantize.mxfp4()))
    want = np.ones((32, 1))
    want[3] = 0
    np.testing.assert_array_equal(grad.weight, want)


def test_a_channel_that_is_not_finite_has_no_gradient():
    w = random(6, 2)
    w[0, 0] = np.inf
    fake = jc.arrays.FakeQuantArray(jnp.asarray(w), qtype=IntType(8), axis=(-2,))
    grad = jax.grad(lambda f: jnp.sum(f.simulate().values))(fake).weight
    np.testing.assert_array_equal(grad[:, 0], np.zeros(6))
    assert (grad[:, 1] > 0).all()


def test_a_learned_scale_is_a_leaf_and_starts_at_the_maximum():
    w = random(10, 5)
    fake = twin(w, jc.quantize.int8(), learn_scale=True)
    np.testing.assert_allclose(fake.scale, np.abs(w).max(0, keepdims=True) / 127, rtol=1e-6)
    # A larger scale rounds more coarsely; it is what convert stores.
    wider = jax.tree.map(lambda x: x, fake)
    wider = type(fake)(w, fake.scale * 4, qtype=fake.qtype, axis=fake.axis)
    np.testing.assert_array_equal(wider.convert().scale, fake.scale * 4)
    codes = np.rint(np.float32(w) / np.asarray(fake.scale * 4))
    np.testing.assert_array_equal(wider.convert().codes(), codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logical_dtype_and_shape_are_those_of_the_weight(dtype):
    fake = twin(jnp.ones((3, 4), dtype), jc.quantize.w8a8())
    assert (fake.shape, fake.dtype) == ((3, 4), jnp.dtype(dtype))
    assert fake.materialise().dtype == jnp.dtype(dtype)
    assert fake.convert().dtype == jnp.dtype(dtype)


def test_nbytes_are_those_of_training():
    assert twin(np.ones((8, 4)), jc.quantize.int8()).nbytes == 8 * 4 * 4
    assert twin(np.ones((8, 4)), jc.quantize.int8(), learn_scale=True).nbytes == 8 * 4 * 4 + 4 * 4


def test_outside_accelerate_it_raises():
    with pytest.raises(TypeError, match=r"FakeQuantArray \(w\) met JAX or NumPy outside"):
        np.asarray(twin(np.ones((8, 4)), jc.quantize.int8()))


def test_the_printed_form_says_what_it_is():
    fake = twin(np.ones((8, 4)), Spec(qtype=IntType(4), group_size=4))
    assert repr(fake) == (
        "FakeQuantArray(int4[8,4] as float32, axis=(-2,), group_size=(4,), path='w')"
    )
