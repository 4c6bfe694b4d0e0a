"""`CodebookArray`: what its leaves mean, slices of it, and the gradient of a shared value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_sums, random, run
from jaxcompress.arrays import BitmapSparseArray, CodebookArray


def made(codes, table, bits, leading=0, **static):
    """An array put together by hand, from the documentation of the format."""
    codes = np.asarray(codes, np.uint8)
    flat = codes.reshape(*codes.shape[:leading], -1)
    stored = flat if bits == 8 else oracles.pack(flat, bits, -1)
    core = codes.shape[leading:]
    return CodebookArray(jnp.asarray(table), jnp.asarray(stored), core=core, bits=bits, **static)


def indices(*shape, entries, seed=0):
    return np.random.default_rng(seed).integers(0, entries, shape)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [False, True])
def test_it_decodes_as_documented(bits, zero):
    """The largest index has every bit set: it must not come back as a negative number."""
    table = random(2**bits - zero)
    codes = indices(9, 11, entries=2**bits)
    codes[0, 0] = 2**bits - 1
    array = made(codes, table, bits, zero=zero)
    want = np.concatenate([np.zeros(int(zero), np.float32), table])[codes]
    np.testing.assert_array_equal(array.materialise(), want)
    assert (array.shape, array.dtype) == ((9, 11), jnp.float32)
    assert array.nbytes == 4 * len(table) + (99 if bits == 8 else 2 * 8 * bits)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (65,), (2, 3, 7)])
def test_any_shape(shape):
    codes, table = indices(*shape, entries=4), random(4)
    np.testing.assert_array_equal(made(codes, table, 2).materialise(), table[codes])


def stacked():
    tables, codes = random(3, 8), indices(3, 6, 6, entries=8)
    return made(codes, tables, 3, leading=1), np.stack([t[c] for t, c in zip(tables, codes)])


def test_leading_axes_keep_their_own_codebook():
    array, want = stacked()
    np.testing.assert_array_equal(array.materialise(), want)
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[1], array).materialise(), want[1])
    np.testing.assert_array_equal(jax.vmap(lambda a: a.materialise())(array), want)
    layers = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    got, rows = run(layers, {"w": array}, random(2, 6, seed=1))
    x = random(2, 6, seed=1).astype(np.float64)
    for w in want:
        x = np.tanh(x @ w)
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)  # three float32 sums of six terms
    assert [row.implementation for row in rows] == ["materialised"]
    assert "looked up at every call" in rows[0].why


@pytest.mark.parametrize("zero", [False, True])
def test_the_gradient_of_an_entry_is_the_sum_of_those_of_its_weights(zero):
    codes = indices(7, 5, entries=4)
    array = made(codes, random(4 - zero), 2, zero=zero)
    x, c = random(3, 7, seed=1), random(3, 5, seed=2)
    loss = lambda p: jnp.sum(c * jc.accelerate(lambda p, x: x @ p["w"])(p, x))
    got = jax.grad(loss, allow_int=True)({"w": array})["w"].codebook
    dense = x.astype(np.float64).T @ c
    entries = range(int(zero), 4)
    want = [dense[codes == i].sum() for i in entries]
    size = [(abs(x.astype(np.float64)).T @ abs(c))[codes == i].sum() for i in entries]
    assert_sums(got, np.array(want), size, 35 * 3)


def test_products_and_views():
    """A cast keeps it small; what no rule knows is decoded, and said to be."""
    codes, table = indices(6, 4, entries=4), random(4)
    params, x = {"w": made(codes, table, 2, path="w")}, random(2, 6, seed=1)
    exact = table.astype(np.float64)[codes]
    got, rows = run(
        lambda p, x: x @ p["w"].astype(jnp.float32) + x[:, :4] @ p["w"].T[:, :4], params, x
    )
    want = x @ exact + x[:, :4] @ exact.T[:, :4]
    assert_sums(got, want, abs(x) @ abs(exact) + abs(x[:, :4]) @ abs(exact.T[:, :4]), 10)
    assert {row.implementation for row in rows} == {"materialised"}
    assert rows[0].nbytes == 16 + 16
    half = jc.accelerate(lambda p: jnp.sum(jax.lax.stop_gradient(p["w"]).astype(jnp.bfloat16)))
    assert half(params).dtype == jnp.bfloat16
    assert not jax.grad(lambda p: half(p).astype(jnp.float32), allow_int=True)(params)[
        "w"
    ].codebook.any()


def test_a_bitmap_of_shared_values():
    """Two bits for each of the kept, as documented, and the gradient reaches the codebook."""
    mask = np.random.default_rng(3).random((5, 9)) < 0.4
    codes, table = indices(int(mask.sum()), entries=4), random(4)
    bitmap = jnp.asarray(np.packbits(mask.reshape(-1), bitorder="little"))
    kept = made(codes, table, 2)
    array = BitmapSparseArray(bitmap, kept, core=(5, 9), kept=len(codes))
    want = np.zeros((5, 9), np.float32)
    want[mask] = table[codes]
    np.testing.assert_array_equal(array.materialise(), want)
    assert array.nbytes == 6 + 16 + 16
    assert repr(array).startswith("BitmapSparseArray(4 x float32[5,9]")
    c = random(5, 9, seed=1)
    grad = jax.grad(lambda a: jnp.sum(c * a.materialise()), allow_int=True)(array)
    sums = [c.astype(np.float64)[mask][codes == i].sum() for i in range(4)]
    np.testing.assert_allclose(grad.values.codebook, sums, rtol=1e-5)  # float32 sums of a few
    x = random(2, 5, seed=2)
    got, rows = run(lambda p, x: x @ p["w"], {"w": array}, x)
    assert_sums(got, x.astype(np.float64) @ want, abs(x) @ abs(want), 5)
    assert {row.op for row in rows} == {"bitmap"}


def test_prepack_looks_the_values_up_once():
    array = made(indices(64, 8, entries=4), random(4), 2)
    assert isinstance(jc.prepack({"w": array})["w"], jax.Array)
    params = {"w": jnp.asarray(random(64, 8))}
    masks = jc.prune.mask(params, jc.prune.unstructured(), 0.9)
    shared = jc.quantize.share(params, {"w": jc.quantize.codebook(bits=3)}, masks=masks)
    fast = jc.prepack(jc.prune.pack(shared, masks))["w"]
    want = shared["w"].materialise()
    np.testing.assert_array_equal(
        fast.materialise() if hasattr(fast, "materialise") else fast, want
    )


def test_the_printed_form_says_what_it_is():
    array = made(indices(4, 4, entries=2), random(1), 1, zero=True, path="w")
    assert repr(array) == "CodebookArray(0 and 1 x float32[4,4], path='w')"
    labels = jc.quantize.trainable({"w": array})["w"]
    assert repr(labels) == "CodebookArray(codebook=weight, indices=frozen)"
