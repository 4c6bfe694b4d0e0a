"""The native product with unstructured sparse weights, against numpy, on every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
from checks import assert_sums, made, random, run, seen
from jaxcompress.arrays import BitmapSparseArray, PrepackedSparseArray
from jaxcompress.arrays import _prepacked_sparse as layout
from jaxcompress.arrays._bitmap import bitmap_of
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import replace
from jaxcompress.kernels import cpu
from test_cpu import PATHS, every_path, linear, on

A8 = Activation(IntType(8))


def kept(shape, share, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def floats(shape, share=0.1, seed=0, leading=0):
    w, mask = random(*shape, seed=seed), kept(shape, share, seed)
    return bitmap_of(jnp.asarray(w), jnp.asarray(mask), leading, "w"), w * mask


def codes(shape, share=0.05, bits=8, act=None, axis=(-2,)):
    q = replace(made(shape, axis, bits=bits), act=act)
    mask = kept(shape, share)
    sparse = bitmap_of(q, jnp.asarray(mask), 0, "w")
    return sparse, replace(made(shape, axis), values=np.asarray(q.codes()) * mask, act=act)


def assert_product(got, x, w):
    """`got` is `x @ w`, of a dense float64 `w`."""
    x = np.asarray(x, np.float64)
    assert_sums(got, x @ w, np.abs(x) @ np.abs(w), w.shape[0])


@every_path
@settings(max_examples=5)  # every shape compiles; the native test has many
@given(
    m=st.sampled_from([1, 2, 4, 5, 15, 16, 31, 33, 49, 70]),
    k=st.sampled_from([1, 3, 255, 256, 257, 700]),
    n=st.sampled_from([1, 15, 17, 63, 64, 65, 130]),
    share=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 9),
)
def test_floats_are_those_of_numpy(path, m, k, n, share, seed):
    sparse, w = floats((k, n), share, seed)
    packed, x = layout.prepack_sparse(sparse), random(m, k, seed=seed + 1)
    if share <= layout.FLOATS and not isinstance(packed, str):
        with pytest.MonkeyPatch.context() as patch:
            assert_product(on(patch, path, linear, packed, x), x, w)
    else:  # of a few weights more than that share may be kept
        assert "the dense product is the faster one" in packed


@every_path
@pytest.mark.parametrize(("bits", "act"), [(8, A8), (4, A8), (8, None), (3, None)])
@pytest.mark.parametrize("m", [1, 37])
def test_codes_give_the_sums_of_the_dense_integer_product(path, bits, act, m, monkeypatch):
    sparse, q = codes((300, 70), bits=bits, act=act)
    packed, x = layout.prepack_sparse(sparse), random(m, 300)
    got = on(monkeypatch, path, linear, packed, x)
    rows, w = seen(x, q), oracles.dense(q)
    assert_sums(got, rows @ w, np.abs(rows) @ np.abs(w), 300)
    if act is not None:  # whole numbers, then the same scales: the same floats
        np.testing.assert_array_equal(got, on(monkeypatch, path, linear, sparse, x))


def test_it_is_chosen_and_said():
    sparse, w = floats((300, 70))
    params, x = {"w": sparse}, random(5, 300)
    fn = lambda p, x: x @ p["w"]
    [expanded] = jc.explain(fn, params, x)
    assert (expanded.primitive, "jc.prepack" in expanded.why) == ("expand", True)
    fast = jc.prepack(params)
    assert isinstance(fast["w"], PrepackedSparseArray) == (cpu.missing() is None)
    packed = {"w": layout.prepack_sparse(sparse)}
    out, [row] = run(fn, packed, x)
    assert_product(out, x, w)
    share = np.count_nonzero(w) / w.size
    assert (row.op, row.implementation) == (
        "sparse_matmul",
        "reference" if cpu.missing() else "cpu",
    )
    assert f"{share:.1%}" in row.why or cpu.missing()
    [elsewhere] = jc.explain(fn, packed, x, platform="tpu")
    assert (elsewhere.implementation, "it is for the CPU" in elsewhere.why) == ("reference", True)


def test_above_the_break_even_zeros_are_put_back_once():
    params = {"f": floats((64, 48), 0.6)[0], "q": codes((64, 48), 0.3, act=A8)[0]}
    fast = jc.prepack(params)
    assert isinstance(fast["f"], jax.Array)
    np.testing.assert_array_equal(fast["f"], params["f"].materialise())
    assert not isinstance(fast["q"], (BitmapSparseArray, PrepackedSparseArray))


@pytest.mark.parametrize(
    ("message", "array"),
    [
        ("60.*above 40%", floats((64, 48), 0.6)[0]),
        ("above 8%", codes((64, 48), 0.3, act=A8)[0]),
        ("above 20%", codes((64, 48), 0.3)[0]),
        ("not known without a layout", floats((4, 8, 8))[0]),
        ("two bytes, and k is 70000", floats((70_000, 1), 0.001)[0]),
        ("it is empty", floats((0, 4))[0]),
        ("sum floats may not hold", codes((40_000, 1), 0.07, act=A8)[0]),
        ("every axis", bitmap_of(jnp.ones(8) * 0, jnp.zeros(8, bool), 0, "w")),
    ],
)
def test_what_is_not_packed_says_why(message, array):
    contract = (0,) if array.ndim == 1 else None
    reason = layout.prepack_sparse(array, contract)
    assert isinstance(reason, str)
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_there_and_back(share, tmp_path):
    for leading, shape in ((0, (33, 130)), (1, (3, 20, 70))):
        sparse, w = floats(shape, share, leading=leading)
        packed = layout.prepack_sparse(sparse)
        np.testing.assert_array_equal(packed.materialise(), w)
        assert packed.shape == shape
        for a, b in zip(jax.tree.leaves(packed.stored()), jax.tree.leaves(sparse)):
            np.testing.assert_array_equal(a, b)
    sparse, _ = codes((200, 70), bits=4)
    packed = layout.prepack_sparse(sparse)
    jc.io.save(tmp_path / "packed", {"w": packed})
    loaded = jc.io.load(tmp_path / "packed")["w"]
    assert isinstance(loaded, BitmapSparseArray)
    np.testing.assert_array_equal(loaded.materialise(), packed.materialise())


def test_a_layout_names_the_axes():
    """Equinox contracts the last axis, attention the first and keeps two."""
    for shape, fn, equation in (
        ((70, 300), lambda p, x: x @ p["w"].T, "mk,nk->mn"),
        ((300, 7, 10), lambda p, x: jnp.einsum("mk,khd->mhd", x, p["w"]), "mk,khd->mhd"),
    ):
        sparse, w = floats(shape)
        x, params = random(3, 300), {"w": sparse}
        found = jc.layout(fn, params, x)
        packed = {"w": layout.prepack_sparse(sparse, found["w"].contract)}
        out, [row] = run(fn, packed, x)
        assert row.op == "sparse_matmul"
        want = np.einsum(equation, x.astype(np.float64), w)
        size = np.einsum(equation, np.abs(x).astype(np.float64), np.abs(w))
        assert_sums(out, want, size, 300)
    missed = {"w": layout.prepack_sparse(floats((70, 300))[0])}
    rows = jc.explain(lambda p, x: x @ p["w"].T, missed, random(3, 300))
    assert rows[0].implementation == "unpacked"


def test_layers_under_scan_and_vmap():
    sparse, w = floats((3, 70, 70), leading=1)
    packed, x = layout.prepack_sparse(sparse), random(2, 70)

    def model(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    got = jax.jit(jc.accelerate(model))(packed, x)
    want = x.astype(np.float64)
    for layer in w:
        want = np.tanh(want @ layer)
    np.testing.assert_allclose(got, want, atol=1e-5)  # three layers of float32 sums of 70
    each = jax.vmap(jc.accelerate(lambda w, x: x @ w), (0, None))(packed, x)
    for one, layer in zip(each, w):
        assert_product(one, x, layer)


def test_gradients_are_those_of_the_dense_product():
    sparse, w = floats((300, 70))
    packed, x, g = layout.prepack_sparse(sparse), random(5, 300), random(5, 70, seed=1)
    loss = lambda values, x: jnp.sum(g * linear(replace(packed, values=values), x))
    dvalues, dx = jax.jit(jax.grad(loss, (0, 1)))(packed.values, x)
    assert_product(dx, g, w.T.astype(np.float64))
    full = x.astype(np.float64).T @ g
    kept_ones = np.asarray(packed.values) != 0
    places = np.asarray(layout.scatter(*leaves(packed), 300, packed.part))
    np.testing.assert_allclose(np.where(places != 0, full, 0), full * (w != 0))
    dense = layout.scatter(jnp.where(kept_ones, dvalues, 0), *leaves(packed)[1:], 300, packed.part)
    np.testing.assert_allclose(dense, full * (w != 0), rtol=1e-5, atol=1e-5)


def leaves(packed):
    return packed.values, packed.places, packed.starts, packed.columns


def test_sharded_by_rows_and_exported():
    sparse, w = floats((300, 70))
    packed, x = layout.prepack_sparse(sparse), random(8, 300)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    got = jax.jit(linear)(packed, jax.device_put(x, rows))
    assert_product(got, x, w)
    rebuild = functools.partial(jax.tree.unflatten, jax.tree.structure(packed))
    fn = jax.jit(lambda parts, x: linear(rebuild(parts), x))
    exported = jax.export.export(fn, platforms=["cpu", "tpu"])(jax.tree.leaves(packed), x)
    assert "@jaxcompress" not in exported.mlir_module()
    assert_product(exported.call(jax.tree.leaves(packed), x), x, w)


def test_what_is_not_finite_spoils_only_its_sums():
    w = np.zeros((300, 3), np.float32)
    w[0, 0] = w[7, 1] = 2
    packed = layout.prepack_sparse(bitmap_of(jnp.asarray(w), jnp.asarray(w != 0), 0, "w"))
    x = np.zeros((2, 300), np.float32)
    x[0, [1, 2, 3, 7, 256]] = np.inf  # runs are filled up, but not with other places
    if PATHS:
        out = np.asarray(jax.jit(linear)(packed, x))
        assert not np.isfinite(out[0, 1])
        np.testing.assert_array_equal(np.delete(out.reshape(-1), 1), 0)


X = np.zeros((1, 2, 8), np.float32)
GOOD = dict(
    values=np.zeros((1, 8), np.float32),
    places=np.zeros((1, 8), np.uint16),
    starts=np.array([[0, 4, 8, 8]], np.int32),
    columns=np.arange(3, dtype=np.uint8)[None],
    scale=np.zeros(0, np.float32),
    given=np.zeros(0, np.float32),
    bias=np.zeros(0, np.float32),
    residual=np.zeros(0, np.float32),
)


def raw(x, *operands, scratch=4096, **static):
    """The foreign function itself, with nothing checked before."""
    shapes = (
        jax.ShapeDtypeStruct((1, 2, 3), jnp.float32),
        jax.ShapeDtypeStruct((scratch,), jnp.uint8),
    )
    static = dict(high=0, part=256, activation=0) | static
    static = {name: np.int64(value) for name, value in static.items()}
    return jax.ffi.ffi_call("jaxcompress_sparse_matmul", shapes)(x, *operands, **static, path="")[0]


@pytest.mark.parametrize(
    ("message", "operands", "options"),
    [
        ("leave its values", dict(starts=np.array([[0, 4, 8, 12]], np.int32)), {}),
        ("leave its values", dict(starts=np.array([[0, 8, 4, 8]], np.int32)), {}),
        ("leave its values", dict(starts=np.array([[0, 2, 8, 8]], np.int32)), {}),
        ("columns or rows", dict(columns=np.array([[0, 1, 3]], np.uint8)), {}),
        ("columns or rows", dict(places=np.full((1, 8), 8, np.uint16)), {}),
        ("a start for each column", dict(starts=np.zeros((1, 3), np.int32)), {}),
        ("a column for each run", dict(columns=np.zeros((1, 4), np.uint8)), {}),
        ("differ in number", dict(places=np.zeros((1, 4), np.uint16)), {}),
        ("are float32 or int8", dict(values=np.zeros((1, 8), np.int32)), {}),
        ("and none of floats", dict(scale=np.zeros(3, np.float32)), {}),
        ("multiplied by codes", {}, dict(high=127)),
        ("is 1 to 127", {}, dict(high=128)),
        ("one entry along k", {}, dict(part=0)),
        ("scratch buffer is too small", {}, dict(scratch=16)),
    ],
)
def test_the_native_side_returns_an_error(message, operands, options):
    if PATHS:
        call = functools.partial(raw, **options)
        assert not np.asarray(jax.jit(raw)(X, *GOOD.values())).any()
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(call)(X, *(GOOD | operands).values()))
