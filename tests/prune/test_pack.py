"""`pack`: exactly what the masks keep, and really fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
import oracles_pruning
from checks import assert_sums, quantized, random, run
from jaxcompress.arrays import BitmapSparseArray


def half(*shape, seed=0, share=0.5):
    return np.random.default_rng(seed).random(shape) < share


@given(
    st.lists(st.sampled_from([0, 1, 3, 8, 17]), max_size=3),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 9),
)
def test_round_trip_of_any_array(shape, share, dtype, seed):
    w = jnp.asarray(random(*shape, seed=seed), dtype)
    mask = half(*shape, seed=seed, share=share)
    packed = jc.prune.pack({"w": w}, {"w": jnp.asarray(mask)})["w"]
    assert isinstance(packed, BitmapSparseArray)
    assert (packed.shape, packed.dtype, packed.path) == (w.shape, w.dtype, "w")
    want = np.where(mask, np.asarray(w, np.float32), 0)
    np.testing.assert_array_equal(packed.materialise().astype(jnp.float32), want)
    np.testing.assert_array_equal(packed.mask(), mask & (want != 0))
    np.testing.assert_array_equal(oracles_pruning.bitmap_dense(packed).astype(np.float32), want)
    assert packed.materialise().dtype == w.dtype


def test_bytes_are_a_bit_each_and_the_kept_values():
    w, mask = jnp.asarray(random(40, 50)), half(40, 50, share=0.1)
    params, masks = {"w": w}, {"w": jnp.asarray(mask)}
    kept = int(mask.sum())
    assert jc.prune.pack(params, masks)["w"].nbytes == 2000 // 8 + 4 * kept
    int8 = jc.quantize.quantize(params, {"w": jc.quantize.int8()})
    # A kept weight that rounds to code 0 is not stored.
    kept = np.count_nonzero(mask & (oracles.codes_of(int8["w"]) != 0))
    assert jc.prune.pack(int8, masks)["w"].nbytes == 2000 // 8 + kept + 4 * 50


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group_size", [None, 5])
def test_quantized_values(bits, group_size):
    make = {8: jc.quantize.int8, 4: jc.quantize.int4, 3: jc.quantize.int3, 2: jc.quantize.int2}
    q = quantized(random(13, 7), make[bits](group_size=group_size))
    mask = half(13, 7)
    packed = jc.prune.pack({"w": q}, {"w": jnp.asarray(mask)})["w"]
    codes = np.where(mask, oracles.codes_of(q), 0)
    np.testing.assert_array_equal(packed.dense(), codes)
    want = oracles.dequantize(codes, q.scale, None, q.axis, q.group_size)
    np.testing.assert_allclose(packed.materialise(), want, rtol=2**-23)
    kept = np.count_nonzero(codes)
    stored = kept if bits == 8 else -(-kept // 64) * 8 * bits
    assert packed.nbytes == -(-91 // 8) + stored + 4 * q.scale.size


@pytest.mark.parametrize("spec", [jc.quantize.int4(), jc.quantize.w8a8()])
def test_it_computes_what_the_quantized_array_does(spec):
    """The zeros are put back in integers: the same op, the same bits."""
    w = random(12, 5) * half(12, 5)
    q = quantized(w, spec)
    packed = jc.prune.pack({"w": q}, {"w": jnp.asarray(w != 0)})
    x = random(16, 12, seed=1)
    fn = lambda p, x: x @ p["w"]
    got, rows = run(fn, packed, x)
    want, _ = run(fn, {"w": q}, x)
    np.testing.assert_array_equal(got, want)
    assert not rows.materialised
    assert "bitmap" in {row.op for row in rows}


def test_dense_values_multiply_as_they_are():
    w, mask = random(12, 5), half(12, 5)
    packed = jc.prune.pack({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)})
    x = random(3, 12, seed=1)
    got, _ = run(lambda p, x: x @ p["w"], packed, x)
    want = x.astype(np.float64) @ np.where(mask, w, 0)
    assert_sums(got, want, np.abs(x) @ np.abs(np.where(mask, w, 0)), 12)


def test_a_fake_quantized_weight_is_converted_first():
    w = random(12, 5) * half(12, 5)
    params = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": jc.quantize.w4a8()})
    packed = jc.prune.pack(params, {"w": jnp.asarray(w != 0)})["w"]
    want = params["w"].convert()
    np.testing.assert_array_equal(packed.dense(), oracles.codes_of(want))
    assert packed.act == want.act


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]


@pytest.mark.parametrize("spec", [None, jc.quantize.int8(), jc.quantize.int4()])
def test_stacked_layers_keep_their_axis_under_scan(spec):
    """Layers keep different numbers; each slice is an array of its own."""
    w = random(3, 8, 8) * np.stack([half(8, 8, seed=i, share=0.2 + 0.2 * i) for i in range(3)])
    params, x = {"layers": jnp.asarray(w)}, jnp.asarray(random(2, 8))
    found = jc.layout(scanned, params, x)
    if spec is not None:
        params = jc.quantize.quantize(params, {"layers": spec}, layout=found)
    packed = jc.prune.pack(params, {"layers": jnp.asarray(w != 0)}, layout=found)
    assert packed["layers"].bitmap.shape == (3, 8)
    if spec is None:
        want = np.asarray(w, np.float64)
    else:
        want = oracles.dense(params["layers"])
    np.testing.assert_allclose(packed["layers"].materialise(), want, rtol=2**-23)
    got, rows = run(scanned, packed, x)
    out = np.asarray(x, np.float64)
    size = np.abs(out)
    for layer in want:
        out, size = out @ layer, size @ np.abs(layer)
    assert_sums(got, out, size, 3 * 16)
    assert not rows.materialised


def test_masks_come_from_anywhere_in_a_state_and_leave_the_rest():
    params = {"w": jnp.asarray(random(8, 4)), "b": jnp.ones(4)}
    parts = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.75)
    tx = optax.masked(optax.chain(optax.sgd(0.1), jc.prune.prune(*parts)), {"w": True, "b": False})
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    packed = jc.prune.pack(params, jc.prune.masks(state))
    np.testing.assert_array_equal(packed["w"].materialise(), params["w"])
    assert packed["w"].kept == 8
    assert packed["b"] is params["b"]


def test_a_node_may_stand_for_a_whole_subtree():
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "w": jnp.ones((2, 2))}
    masks = {"a": optax.MaskedNode(), "w": jnp.ones((2, 2), bool)}
    packed = jc.prune.pack(params, masks)
    assert packed["a"]["w"] is params["a"]["w"]
    assert isinstance(packed["w"], BitmapSparseArray)


ONES, MASK = jnp.ones((4, 2)), jnp.ones((4, 2), bool)


def refused(leaf, mask=MASK, **kwargs):
    return lambda: jc.prune.pack({"net": {"w": leaf}}, {"net": {"w": mask}}, **kwargs)


INT8 = lambda **kwargs: quantized(np.ones((4, 2)), jc.quantize.int8(**kwargs))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (refused(ONES.astype(int)), TypeError, "'net/w' is no floating array, and has a mask"),
        (refused(INT8(symmetric=False)), TypeError, "'net/w' has zero points"),
        (
            refused(jc.prune.pack({"w": ONES}, {"w": MASK})["w"]),
            TypeError,
            "'net/w' is a BitmapSparseArray already",
        ),
        (refused(ONES, MASK.T), ValueError, r"bool of the shape \(4, 2\); it is bool\[2, 4\]"),
        (refused(ONES, ONES), ValueError, r"must be bool.*it is float32\[4, 2\]"),
    ],
)
def test_what_cannot_be_packed(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_batch_axes_have_to_lead():
    params = {"w": jnp.ones((4, 3, 2))}
    einsum = lambda p, x: jnp.einsum("end,deo->eno", x, p["w"])
    found = jc.layout(einsum, params, jnp.ones((3, 5, 4)))
    with pytest.raises(ValueError, match=r"'w' has batch axes \(-2,\) that do not come first"):
        jc.prune.pack(params, {"w": jnp.ones((4, 3, 2), bool)}, layout=found)


def test_outside_jit_only():
    with pytest.raises(ValueError, match="pack 'w' outside jit"):
        jax.jit(lambda w: jc.prune.pack({"w": w}, {"w": MASK})["w"].bitmap)(ONES)
