"""`QuantizedArray`: what is stored, what it stands for, and where it refuses to be used."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
from checks import assert_valid, quantized, random
from jaxcompress.arrays import Activation, IntType, is_compressed
from jaxcompress.quantize import Spec


def spec(bits, symmetric=True, axis=-2, group_size=None):
    return Spec(qtype=IntType(bits, symmetric), axis=axis, group_size=group_size)


@st.composite
def problems(draw):
    """Weights of rank 0 to 4 with sizes 0, 1 and odd, and any spec for them."""
    shape = draw(st.lists(st.sampled_from([0, 1, 3, 17]), max_size=4))
    axes = draw(st.lists(st.sampled_from(range(-len(shape), 0)), unique=True)) if shape else []
    group = draw(st.sampled_from([None, 1, 4, 100])) if axes else None
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    w = random(*shape, seed=draw(st.integers(0, 99))).astype(jnp.dtype(dtype))
    return w, spec(bits, symmetric, tuple(axes), group)


@given(problems())
def test_any_array_is_valid_and_decodes_as_documented(problem):
    @jax.jit
    def decode(w):
        q = quantized(w, problem[1])
        return q, q.materialise(), q.codes(), q.unpacked().materialise()

    q, dense, codes, unpacked = decode(problem[0])
    assert_valid(q)
    assert (dense.shape, dense.dtype) == (q.shape, q.dtype)
    # (values - zero_point) * scale, rounded once in float32 and once to the dtype.
    want = oracles.dense(q)
    finfo = jnp.finfo(q.dtype)
    tolerance = (float(finfo.eps) + 2.0**-23) * np.abs(want) + float(finfo.smallest_subnormal)
    assert np.all(np.abs(np.asarray(dense, np.float64) - want) <= tolerance)
    np.testing.assert_array_equal(codes, oracles.codes_of(q))
    np.testing.assert_array_equal(unpacked, dense)


@pytest.mark.parametrize(
    ("bits", "group", "stored"),
    [
        (8, None, 128 * 8 + 4 * 8),
        (4, None, 64 * 8 + 4 * 8),
        (3, None, 48 * 8 + 4 * 8),
        (2, None, 32 * 8 + 4 * 8),
        (4, 32, 64 * 8 + 4 * 4 * 8),
    ],
)
def test_nbytes_counts_codes_and_scales(bits, group, stored):
    assert quantized(random(128, 8), spec(bits, group_size=group)).nbytes == stored


def test_zero_points_are_stored_in_a_byte_each():
    q = quantized(random(128, 8), spec(4, symmetric=False))
    assert q.nbytes == 64 * 8 + (4 + 1) * 8


def test_leading_axes_keep_their_own_scales_even_per_tensor():
    q = quantized(random(3, 8, 4), spec(8, axis=(-2, -1)))
    assert q.scale.shape == (3, 1, 1)


def test_it_travels_as_a_pytree_through_jit_and_map():
    q = quantized(random(70, 5), spec(4, group_size=7))
    back = jax.jit(lambda q: q)(q)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(q)))
    doubled = jax.tree.map(lambda leaf: leaf, q)
    assert (doubled.qtype, doubled.axis, doubled.path) == (q.qtype, q.axis, "w")
    assert is_compressed(doubled)
    assert not is_compressed(q.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_slice_of_its_leaves_is_an_array_again(bits):
    """As `lax.scan` and `jax.vmap` slice: leading axes hold for every leaf alike."""
    q = quantized(random(3, 70, 5), spec(bits, group_size=7))
    part = jax.tree.map(lambda leaf: leaf[1], q)
    assert_valid(part)
    np.testing.assert_array_equal(oracles.dense(part), oracles.dense(q)[1])
    decoded = jax.vmap(lambda q: q.materialise())(q)
    np.testing.assert_array_equal(decoded, q.materialise())
    _, scanned = jax.lax.scan(lambda c, q: (c, q.materialise()), 0, q)
    np.testing.assert_array_equal(scanned, q.materialise())


def test_below_eight_bits_without_a_shared_axis_a_code_takes_a_byte():
    q = quantized(random(5), spec(4, axis=()))
    assert (q.packed, q.values.dtype, q.scale.shape) == (None, jnp.int8, (5,))


def test_the_printed_form_says_what_it_is():
    q = quantized(random(8, 4), spec(4, group_size=4))
    assert repr(q) == "QuantizedArray(int4[8,4] as float32, axis=(-2,), group_size=(4,), path='w')"
    labels = jax.tree.map(lambda _: "frozen", q)
    assert repr(labels) == "QuantizedArray(values=frozen, scale=frozen)"


@pytest.mark.parametrize(
    "use",
    [
        np.asarray,
        lambda q: q @ jnp.ones((4, 2)),
        lambda q: jnp.ones((2, 8)) @ q,
        lambda q: np.ones((2, 8)) @ q,
    ],
)
def test_outside_accelerate_it_raises_and_says_what_to_do(use):
    message = r"QuantizedArray \(w\) met JAX or NumPy outside.*jc\.accelerate\(fn\)\(params"
    with pytest.raises(TypeError, match=message):
        use(quantized(random(8, 4), spec(8)))


@pytest.mark.parametrize("use", [jnp.sin, lambda q: jnp.dot(jnp.ones((2, 8)), q)])
def test_jax_functions_do_not_take_it_for_an_array(use):
    with pytest.raises(TypeError, match="QuantizedArray"):
        use(quantized(random(8, 4), spec(8)))


def test_static_activations_cover_the_tensor():
    with pytest.raises(ValueError, match="covers the whole tensor: use per_token=False"):
        Activation(IntType(8), static=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numpy_weights_become_what_jax_would_make_of_them(dtype):
    """float64 arrays of NumPy are float32 to JAX, unless it was told otherwise."""
    q = quantized(np.ones((4, 2), dtype), spec(8))
    direct = jc.quantize.quantize({"w": np.ones((4, 2), dtype)}, {"w": spec(8)})["w"]
    assert q.dtype == direct.dtype == jnp.float32
    assert direct.materialise().dtype == jnp.float32


def test_integers_are_not_quantized():
    message = re.escape("only floating arrays can be compressed; w is int32")
    with pytest.raises(TypeError, match=message):
        quantized(jnp.ones((4, 2), jnp.int32), spec(8))
    with pytest.raises(TypeError, match="w is complex64"):
        quantized(jnp.ones((4, 2), jnp.complex64), spec(8))
