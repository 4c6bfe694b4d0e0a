"""What a compiled product needs beside its operands: with a kernel, no float weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import ON_CPU, quantized, random

M, K, N = 32, 1024, 1024
FLOAT_WEIGHT = 4 * K * N
SPECS = {
    "w8a8": jc.quantize.w8a8(),
    "w4a8": jc.quantize.w4a8(),
    "int8": jc.quantize.int8(),
    "int4": jc.quantize.int4(),
}


def temporary_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def implementations(fn, *args):
    return {row.implementation for row in jc.explain(fn, *args)}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_kernel_makes_no_float_weight(spec):
    """The codes may be unpacked, a byte each; a float has four."""
    q, x = quantized(random(K, N), spec), random(M, K)
    fn = lambda q, x: x @ q
    assert implementations(fn, q, x) == {ON_CPU}
    temporary = temporary_bytes(jc.accelerate(fn), q, x)
    assert temporary < FLOAT_WEIGHT / 2


def test_the_reference_makes_one_and_explain_says_which_it_is():
    """So that the test above can fail."""
    w = jnp.asarray(np.ones((K, N), np.int8))
    scale = jnp.ones((1, N))
    x = random(M, K)
    run = lambda x, w: jc.ops.quantized_matmul(x, w, scale, implementation="reference")
    assert temporary_bytes(run, x, w) >= FLOAT_WEIGHT
    q = quantized(random(K, N), jc.quantize.int8(group_size=100))
    rows = jc.explain(lambda q, x: x @ q, q, x, platform="tpu")
    assert {row.implementation for row in rows} == {"reference"}
