"""Rotation: orthogonal, exact before rounding, better after it, and on the integer path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
from checks import assert_compressed, assert_model, random, run
from jaxcompress.arrays import RotatedArray
from jaxcompress.arrays._rotated import mix, rotation

model = lambda p, x: x @ p["w"]
FINE = jc.quantize.int8()


def matrix(k):
    """Hartley's matrix times Hadamard's, from their definitions."""
    m = k
    while m % 2 == 0:
        m //= 2
    angle = 2 * np.pi * np.outer(np.arange(m), np.arange(m)) / m
    hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(m)
    return np.kron(hartley, scipy.linalg.hadamard(k // m) / np.sqrt(k // m))


def outliers(m, k):
    x = random(m, k)
    x[:, 3] *= 50
    return x


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([1, 12, 64, 97, 384]), st.integers(0, 100))
def test_the_rotation_is_exact_in_float64(k, seed):
    """`(x S Q) (Q^T S w)` is `x w` up to the last bits of a float64."""
    q = matrix(k)
    np.testing.assert_allclose(rotation(k), q, atol=1e-12)  # angles up to 2 pi k lose some bits
    np.testing.assert_allclose(q @ q.T, np.eye(k), atol=1e-12)
    x, w = random(5, k, seed=seed).astype(np.float64), random(k, 4, seed=seed + 1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], k)
    with jax.enable_x64(True):
        turned = np.asarray(mix(jnp.asarray(x * signs), (-1,)))
        weight = np.asarray(mix(jnp.asarray(signs[:, None] * w), (-2,)))
    assert turned.dtype == np.float64
    np.testing.assert_allclose(turned, x * signs @ q, atol=1e-12 * np.abs(x).sum())
    np.testing.assert_allclose(turned @ weight, x @ w, atol=1e-12 * np.abs(x).sum())


def test_merged_axes_keep_their_order():
    x = random(6, 4, 5).astype(np.float64)
    merged = x.transpose(2, 0, 1).reshape(5, 24) @ matrix(24)
    with jax.enable_x64(True):
        got = mix(jnp.asarray(x), (0, 1))
    np.testing.assert_allclose(got, merged.reshape(5, 6, 4).transpose(1, 2, 0), atol=1e-12)


@pytest.mark.parametrize("compensate", [False, True])
def test_what_is_stored_is_the_rotated_weight(compensate):
    x, w = outliers(64, 24), random(24, 8, seed=1)
    params, rules = {"w": jnp.asarray(w)}, {"w": FINE}
    q = jc.quantize.rotate(model, params, [x], rules, compensate=compensate)["w"]
    assert isinstance(q, RotatedArray)
    signs = np.asarray(q.signs, np.float64)
    assert signs.shape == (24, 1)
    assert set(np.unique(signs)) == {-1, 1}
    inside = oracles.dense(q.array)
    want = matrix(24) @ (signs * w)
    if not compensate:  # nearest: half a step, and float32 before it
        assert np.all(np.abs(inside - want) <= np.asarray(q.array.scale) / 2 * (1 + 1e-4))
    np.testing.assert_allclose(q.materialise(), signs * (matrix(24) @ inside), atol=1e-5)
    assert np.linalg.norm(q.materialise() - w) < 0.02 * np.linalg.norm(w)  # of eight bits
    out, rows = run(model, {"w": q}, jnp.asarray(x))
    assert_compressed(rows, "quantized_matmul")
    assert_model(out, (x * signs[:, 0]).astype(np.float64) @ matrix(24) @ inside)


def test_four_bits_of_both_are_saved_by_it():
    x, w = outliers(64, 32), random(32, 16, seed=1)
    params, rules = {"w": jnp.asarray(w)}, {"w": jc.quantize.w4a4()}
    exact = x.astype(np.float64) @ w
    error = lambda p: np.linalg.norm(jc.accelerate(model)(p, x) - exact)
    nearest = error(jc.quantize.rotate(model, params, [x], rules, compensate=False))
    q = jc.quantize.rotate(model, params, [x], rules)
    out, rows = run(model, q, jnp.asarray(x))
    assert_compressed(rows, "w4a8_matmul")
    # All but one feature are lost without it: the outlier takes the whole range.
    assert nearest < error(jc.quantize.quantize(params, rules))
    assert np.linalg.norm(out - exact) < nearest
    flipped = (x * np.asarray(q["w"].signs)[:, 0]).astype(np.float64) @ matrix(32)
    seen = oracles.activations(flipped.astype(np.float32), bits=4, axis=-1)
    want = seen @ oracles.dense(q["w"].array)
    # A rotated activation may round the other way: a step of fifteen, seldom.
    assert np.linalg.norm(out - want) <= 0.01 * np.linalg.norm(want)


def test_rotated_arrays_in_every_place():
    """Attention, a transposed weight, experts, a scan, bfloat16; nothing is decoded."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.asarray(random(4, 12, 8))

    def fn(p, x):
        x = attention.apply(p["a"], x, x)
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, p["stack"])
        x = jnp.einsum("bld,edf->eblf", x, p["experts"])
        return x.astype(jnp.bfloat16) @ p["last"].astype(jnp.bfloat16)

    params = {
        "a": attention.init(jax.random.key(0), x, x),
        "stack": jnp.asarray(random(2, 8, 8, seed=1)),
        "experts": jnp.asarray(random(3, 8, 6, seed=2)),
        "last": jnp.asarray(random(6, 5, seed=3)),
    }
    rules = {".*kernel|stack|experts|last": jc.quantize.int8()}
    q = jc.quantize.rotate(fn, params, [x], rules, compensate=False)
    out, rows = run(fn, q, x)
    assert not rows.materialised, f"\n{rows.materialised}"
    is_leaf = jc.arrays.is_compressed
    dense = jax.tree.map(lambda w: w.materialise() if is_leaf(w) else w, q, is_leaf=is_leaf)
    for w, back in zip(jax.tree.leaves(params), jax.tree.leaves(dense)):
        assert np.linalg.norm(w - back) <= 0.02 * np.linalg.norm(w)  # of eight bits
    # Two bfloat16 results of sums of six terms: eight bits of mantissa.
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(fn(dense, x), np.float32), atol=0.05, rtol=0.02
    )


def test_other_uses_decode_and_say_so():
    x, w = outliers(64, 24), random(24, 8, seed=1)
    q = jc.quantize.rotate(model, {"w": jnp.asarray(w)}, [x], {"w": FINE}, compensate=False)
    out, rows = run(lambda p: jnp.abs(p["w"]).sum(0), q)
    assert [row.primitive for row in rows.materialised] == ["abs"]
    np.testing.assert_allclose(out, np.abs(np.asarray(q["w"].materialise())).sum(0), rtol=1e-5)
    out, rows = run(lambda p, x: x @ p["w"].T, q, random(3, 8))
    assert [row.why for row in rows.materialised] == [
        "its features are rotated along other axes than the product contracts"
    ]
    np.testing.assert_allclose(out, random(3, 8) @ np.asarray(q["w"].materialise()).T, rtol=1e-4)


def test_saved_and_loaded(tmp_path):
    x, w = outliers(64, 24), random(24, 8, seed=1)
    q = jc.quantize.rotate(model, {"w": jnp.asarray(w)}, [x], {"w": jc.quantize.w4a8()})
    jc.io.save(tmp_path / "q", q)
    back = jc.io.load(tmp_path / "q")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_wrong_use_raises():
    x, w = outliers(64, 24), random(24, 8, seed=1)
    params = {"w": jnp.asarray(w)}
    with pytest.raises(ValueError, match="'w': static activation scales are those before"):
        jc.quantize.rotate(model, params, [x], {"w": jc.quantize.w8a8(static=True)})
    with pytest.raises(ValueError, match="damping is positive"):
        jc.quantize.rotate(model, params, [x], {"w": FINE}, damping=0.0)
    with pytest.raises(TypeError, match="rounds to integers; the spec of 'w' is nf4"):
        jc.quantize.rotate(model, params, [x], {"w": jc.quantize.nf4()})
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="of 'w' are not finite"):
        jc.quantize.rotate(model, params, [x], {"w": FINE})
