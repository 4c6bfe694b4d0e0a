"""`prepack`: the same values in another order, wherever a `QuantizedArray` may stand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from checks import assert_einsum, made, quantized, random
from jaxcompress.arrays import PrepackedArray
from jaxcompress.arrays._prepacked import prepack_array
from jaxcompress.kernels import cpu


def assert_same_leaves(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=12)  # every shape compiles
@given(
    k=st.sampled_from([1, 7, 130]),
    n=st.sampled_from([1, 33]),
    lead=st.sampled_from([(), (2,)]),
    bits=st.integers(2, 8),
    grouped=st.booleans(),
    symmetric=st.booleans(),
    k_last=st.booleans(),
)
def test_there_and_back(k, n, lead, bits, grouped, symmetric, k_last):
    shape, axis = ((*lead, n, k), (-1,)) if k_last else ((*lead, k, n), (-2,))
    q = made(shape, axis, (4,) if grouped else None, bits, symmetric)
    p = prepack_array(q)
    assert p.shape == q.shape
    assert p.values.shape[-4:] == (-(-n // 16), -(-q.values.shape[axis[0]] // 4), 16, 4)
    assert_same_leaves(p.canonical(), q)
    np.testing.assert_array_equal(p.materialise(), q.materialise())


PRODUCTS = [
    # equation, shape of x, shape of the weight, the axes that share scales
    ("mk,kn->mn", (3, 40), (40, 24), (-2,)),
    ("abk,kn->abn", (2, 3, 40), (40, 24), (-2,)),
    ("mk,nk->mn", (3, 40), (24, 40), (-1,)),
    ("mk,khs->mhs", (3, 40), (40, 2, 12), (-3,)),
    ("mhs,hsn->mn", (3, 2, 20), (2, 20, 24), (-3, -2)),
    ("emk,ekn->emn", (2, 3, 40), (2, 40, 24), (-2,)),
]


@pytest.mark.parametrize(("equation", "x", "w", "axis"), PRODUCTS)
@pytest.mark.parametrize("spec", [jc.quantize.w8a8, jc.quantize.int8, jc.quantize.int4])
def test_products_run_as_they_are(equation, x, w, axis, spec):
    q = quantized(random(*w), spec(axis=axis))
    p, x = prepack_array(q), random(*x, seed=1)
    fn = lambda w, x: jnp.einsum(equation, x, w)
    [row] = jc.explain(fn, p, x)
    assert row.op in ("int8_matmul", "quantized_matmul")
    assert "every call" not in row.why
    got = jax.jit(jc.accelerate(fn))(p, x)
    contracted = tuple(i - x.ndim for i, c in enumerate(equation.split(",")[0]) if c in "khs")
    assert_einsum(got, equation, x, q, contracted)


def test_weight_first_transposed_cast_and_stopped():
    q = quantized(random(24, 40), jc.quantize.int8(axis=-1))
    p, x = prepack_array(q), random(3, 40)
    for fn in (
        lambda w, x: (w @ x.T).T,
        lambda w, x: x @ w.T,
        lambda w, x: x @ jax.lax.stop_gradient(w).T,
        lambda w, x: x @ w.astype(jnp.float32).T,
    ):
        rows = jc.explain(fn, p, x)
        assert [row.implementation for row in rows if row.implementation == "unpacked"] == []
        assert_einsum(jc.accelerate(fn)(p, x), "mk,nk->mn", x, q)
    low = jc.accelerate(lambda w, x: x @ w.astype(jnp.bfloat16).T)(p, jnp.bfloat16(x))
    assert low.dtype == jnp.bfloat16


def test_anything_else_is_put_back_and_said():
    q = quantized(random(40, 24), jc.quantize.int8())
    p, x = prepack_array(q), random(3, 24)
    fn = lambda w, x: x @ w[:16].T
    rows = jc.explain(fn, p, x)
    assert "unpacked" in [row.implementation for row in rows]
    assert any("put back at every call" in row.why for row in rows)
    np.testing.assert_array_equal(jc.accelerate(fn)(p, x), jc.accelerate(fn)(q, x))


def test_layers_under_scan_vmap_and_gradients():
    q = quantized(random(3, 40, 40), jc.quantize.w8a8())
    p, x = prepack_array(q), random(2, 40)

    def model(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    got = jax.jit(jc.accelerate(model))(p, x)
    np.testing.assert_array_equal(got, jax.jit(jc.accelerate(model))(q, x))
    each = jax.vmap(jc.accelerate(lambda w, x: x @ w), (0, None))
    np.testing.assert_array_equal(each(p, x), each(q, x))
    # The gradient is that of the canonical array: the same straight-through formula, in floats
    # that XLA sums in another order.
    loss = lambda x, w: jnp.sum(jc.accelerate(model)(w, x) ** 2)
    dx = jax.grad(loss)(x, q)
    np.testing.assert_allclose(jax.grad(loss)(x, p), dx, atol=1e-5 * np.abs(dx).max())
    scales = lambda s, w, x: jnp.sum(jc.accelerate(lambda w, x: x @ w)(s(w), x))
    dp = jax.grad(lambda s: scales(lambda w: with_scale(w, s), p_first(p), x))(p.scale[0])
    dq = jax.grad(lambda s: scales(lambda w: with_scale(w, s), p_first(q), x))(q.scale[0])
    np.testing.assert_allclose(dp, dq, rtol=1e-5)


def p_first(w):
    return jax.tree.map(lambda a: a[0], w)


def with_scale(w, scale):
    return jax.tree.unflatten(
        jax.tree.structure(w), [jax.tree.leaves(w)[0], scale, *jax.tree.leaves(w)[2:]]
    )


@pytest.mark.parametrize("columns", ["x", None])
@pytest.mark.parametrize("n", [256, 200])
def test_sharded_by_columns_or_not(columns, n):
    """256 columns are two panels a device; 200 are 13, which eight devices cannot share."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    q = quantized(random(40, n), jc.quantize.w8a8())
    p, x = prepack_array(q), random(8, 40)
    values = place(p.values, columns if n == 256 else None)
    placed = jax.tree.unflatten(jax.tree.structure(p), [values, place(p.scale, None, columns)])
    fn = jax.jit(jc.accelerate(lambda w, x: x @ w))
    got = fn(placed, place(x))
    np.testing.assert_array_equal(got, fn(q, x))
    if cpu.missing() is None and columns and n == 256:
        assert len({str(shard.index) for shard in got.addressable_shards}) == 8


def test_exported_programs_need_no_native_library():
    p = prepack_array(quantized(random(40, 24), jc.quantize.w8a8()))
    fn = jax.jit(lambda leaves, x: jc.accelerate(lambda w, x: x @ w)(rebuild(leaves), x))
    rebuild = functools.partial(jax.tree.unflatten, jax.tree.structure(p))
    args = (jax.tree.leaves(p), random(3, 40))
    exported = jax.export.export(fn, platforms=["cpu", "tpu"])(*args)
    assert "@jaxcompress" not in exported.mlir_module()
    # Its scales are multiplied elsewhere: the integers are the same, the floats to a rounding.
    np.testing.assert_allclose(exported.call(*args), fn(*args), rtol=1e-6)


def test_files_hold_the_canonical_order(tmp_path):
    params = {"a": quantized(random(70, 24), jc.quantize.int4(group_size=32)), "b": jnp.ones(3)}
    packed = {"a": prepack_array(params["a"]), "b": params["b"]}
    for name, tree in (("plain", params), ("packed", packed)):
        jc.io.save(tmp_path / name, tree)
    loaded = [jc.io.load(tmp_path / name) for name in ("plain", "packed")]
    assert_same_leaves(*loaded)
    assert_same_leaves(loaded[1]["a"], params["a"])


def test_what_is_packed_and_what_stays():
    params = {
        "dense": quantized(random(16, 8), jc.quantize.int8()),
        "tensor": quantized(random(16, 8), jc.quantize.int8(axis=(-2, -1))),
        "free": quantized(random(16, 8), jc.quantize.int8(axis=())),
        "apart": quantized(random(4, 5, 6), jc.quantize.int8(axis=(-3, -1))),
        "vector": quantized(random(16), jc.quantize.int8(axis=-1)),
        "bias": jnp.ones(8),
    }
    kinds = {name: type(leaf).__name__ for name, leaf in jc.prepack(params).items()}
    native = cpu.missing() is None
    assert (kinds["dense"] == kinds["tensor"] == "PrepackedArray") == native
    assert kinds["free"] == kinds["apart"] == kinds["vector"] == "QuantizedArray"
    assert isinstance(prepack_array(params["dense"]), PrepackedArray)
    assert "no columns" in prepack_array(params["vector"])
    assert "not neighbours" in prepack_array(params["apart"])
    assert "no axis shares a scale" in prepack_array(params["free"])


def test_without_native_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "they were left out")
    q = quantized(random(16, 8), jc.quantize.w8a8())
    assert jc.prepack({"w": q})["w"] is q
    p, x = prepack_array(q), random(3, 16)
    fn = lambda w, x: x @ w
    [row] = jc.explain(fn, p, x)
    assert row.implementation == "xla"
    assert "not cpu: they were left out" in row.why
    np.testing.assert_array_equal(jc.accelerate(fn)(p, x), jc.accelerate(fn)(q, x))


@pytest.mark.parametrize("pattern", [jc.prune.unstructured(), jc.prune.nm(2, 4, axis=-2)])
@pytest.mark.parametrize("bits", [4, 8])
def test_sparse_integers_get_their_zeros_back_once(pattern, bits):
    params = {"w": quantized(random(64, 48), {4: jc.quantize.w4a8, 8: jc.quantize.w8a8}[bits]())}
    weights = {"w": params["w"].materialise()}
    share = 1.0 if pattern.name == "2:4" else 0.5  # of the groups, or of the weights
    masks = jc.prune.mask(jax.tree.map(jnp.abs, weights), pattern, share)
    sparse = jc.prune.pack(params, masks, pattern=pattern)
    fast, fn = jc.prepack(sparse), lambda p, x: x @ p["w"]
    np.testing.assert_array_equal(fast["w"].materialise(), sparse["w"].materialise())
    np.testing.assert_array_equal(*(jc.accelerate(fn)(p, random(5, 64)) for p in (fast, sparse)))
    at_every_call, once = (jc.explain(fn, p, random(5, 64)) for p in (sparse, fast))
    assert [row.primitive for row in at_every_call] == ["expand", "dot_general"]
    assert [row.primitive for row in once] == ["dot_general"]
