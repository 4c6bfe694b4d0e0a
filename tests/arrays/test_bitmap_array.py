"""`BitmapSparseArray`: what its leaves mean, and that slices of it are arrays again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles_pruning as oracles
from checks import random
from jaxcompress.arrays import BitmapSparseArray, IntType


def packed(w, leading=0):
    """An array put together by hand, from the documentation of the format."""
    w = np.asarray(w)
    lead, core = w.shape[:leading], w.shape[leading:]
    rows = w.reshape(*lead, -1)
    kept = int(np.count_nonzero(rows, -1).max())
    bitmap = np.zeros((*lead, -(-rows.shape[-1] // 8)), np.uint8)
    values = np.zeros((*lead, kept), w.dtype)
    for index in np.ndindex(*lead):
        following = 0
        for i, x in enumerate(rows[index]):
            if x != 0:
                bitmap[index][i // 8] += 2 ** (i % 8)
                values[index][following] = x
                following += 1
    return BitmapSparseArray(jnp.asarray(bitmap), jnp.asarray(values), core=core, kept=kept)


def sparse(*shape, seed=0, share=0.3):
    return random(*shape, seed=seed) * (np.random.default_rng(seed).random(shape) < share)


@pytest.mark.parametrize("shape", [(8,), (3, 5), (1, 1), (2, 3, 7), (64,), (9, 29)])
def test_it_decodes_as_documented(shape):
    w = sparse(*shape).astype(np.float32)
    for decode in (BitmapSparseArray.materialise, jax.jit(BitmapSparseArray.materialise)):
        np.testing.assert_array_equal(decode(packed(w)), w)
    np.testing.assert_array_equal(packed(w).mask(), w != 0)
    assert (packed(w).shape, packed(w).dtype) == (shape, jnp.float32)


def test_leading_axes_slice_all_leaves_alike():
    w = np.stack([sparse(4, 6, seed=i, share=0.2 + i / 4) for i in range(3)]).astype(np.float32)
    array = packed(w, leading=1)
    np.testing.assert_array_equal(array.materialise(), w)
    np.testing.assert_array_equal(oracles.bitmap_dense(array), w)
    part = jax.tree.map(lambda leaf: leaf[1], array)
    assert part.shape == (4, 6)
    np.testing.assert_array_equal(part.materialise(), w[1])
    np.testing.assert_array_equal(jax.vmap(lambda a: a.materialise())(array), w)
    _, scanned = jax.lax.scan(lambda c, a: (c, a.materialise()), 0, array)
    np.testing.assert_array_equal(scanned, w)


def test_codes_and_scales():
    codes = np.int8([[1, 0, -3], [0, 7, 0]])
    array = packed(codes)
    array = BitmapSparseArray(
        array.bitmap,
        array.values,
        jnp.float32([[0.5, 2.0, 1.0]]),
        core=(2, 3),
        kept=3,
        qtype=IntType(8),
        axis=(-2,),
        float_dtype=np.dtype("float16"),
    )
    np.testing.assert_array_equal(array.dense(), codes)
    np.testing.assert_array_equal(array.materialise(), [[0.5, 0, -3], [0, 14, 0]])
    assert array.materialise().dtype == array.dtype == jnp.float16
    assert array.nbytes == 1 + 3 + 12


def test_nothing_kept_and_no_elements():
    assert not packed(np.zeros((3, 4), np.float32)).materialise().any()
    empty = BitmapSparseArray(jnp.zeros(0, jnp.uint8), jnp.zeros(0), core=(0, 4), kept=0)
    assert empty.materialise().shape == (0, 4)


def test_sums_over_many_bytes_do_not_overflow():
    """The values before a byte are counted in int32: 40,000 of them here."""
    w = np.ones((200, 200), np.float32)
    w[7, 3] = 0
    w[-1, -1] = 5
    np.testing.assert_array_equal(packed(w).materialise(), w)


def test_it_is_differentiable_in_its_values():
    w = sparse(4, 6).astype(np.float32)
    c = random(4, 6, seed=1)
    array = packed(w)
    grad = jax.grad(lambda a: jnp.sum(c * a.materialise()), allow_int=True)(array)
    np.testing.assert_array_equal(grad.values, c[w != 0])


def test_views_and_products_inside_accelerate():
    w = sparse(4, 6).astype(np.float32)
    x = random(2, 6, seed=1)
    fn = lambda p, x: x @ p["w"].T
    got = jax.jit(jc.accelerate(fn))({"w": packed(w)}, x)
    np.testing.assert_allclose(got, x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-6)


def test_the_printed_form_says_what_it_is():
    w = np.eye(4, dtype=np.float32)
    assert repr(packed(w)) == "BitmapSparseArray(float32[4,4], 75.0% zeros, path='')"
    labels = jax.tree.map(lambda _: "frozen", packed(w))
    assert repr(labels) == "BitmapSparseArray(bitmap=frozen, values=frozen)"


def test_outside_accelerate_it_raises():
    with pytest.raises(TypeError, match=r"BitmapSparseArray \(no path\) met JAX or NumPy outside"):
        np.asarray(packed(np.eye(4, dtype=np.float32)))
