"""`NMSparseArray` and `BlockSparseArray`: what is stored, read by its documentation alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_sums, quantized, random, run
from jaxcompress.arrays import BlockSparseArray, NMSparseArray

SPECS = {
    "int8": jc.quantize.int8(),
    "int4": jc.quantize.int4(),
    "int3 groups": jc.quantize.int3(group_size=8),
    "w8a8": jc.quantize.w8a8(),
}


def nm_dense(array):
    """Values at the places that the indices name, one by one."""
    values, bits = array.values, max(1, int(np.ceil(np.log2(array.m))))
    stored = array.length // array.m * array.n
    places = (
        oracles.unpack(array.indices, bits, stored, array.along) % 2**bits if bits > 1 else None
    )
    if places is None:  # one bit a place: eight to a byte, 8 apart, as the format says
        packed = np.moveaxis(np.asarray(array.indices), array.along, -1)
        one = [(packed[..., i % 64 % 8 + i // 64 * 8] >> (i % 64 // 8)) & 1 for i in range(stored)]
        places = np.moveaxis(np.stack(one, -1), -1, array.along)
    if array.qtype is not None and array.qtype.bits < 8:
        values = oracles.unpack(values, array.qtype.bits, stored, array.along)
    values, places = (np.moveaxis(np.asarray(a), array.along, -1) for a in (values, places))
    out = np.zeros((*values.shape[:-1], array.length), values.dtype)
    for index in np.ndindex(*values.shape[:-1]):
        for i, (value, place) in enumerate(zip(values[index], places[index])):
            out[(*index, i // array.n * array.m + place)] += value
    return np.moveaxis(out, -1, array.along)


def block_dense(array):
    """Each slot's block into its place, one by one."""
    (height, width), (rows, columns) = array.block, array.matrix
    values = array.values
    if array.qtype is not None and array.qtype.bits < 8:
        values = oracles.unpack(values, array.qtype.bits, height * width, -1)
    values, where = np.asarray(values), np.asarray(array.rows)
    lead, across = where.shape[:-2], where.shape[-2]
    down = -(-rows // height)
    out = np.zeros((*lead, down * height, across * width), values.dtype)
    for *index, j, slot in np.ndindex(*where.shape):
        i = where[(*index, j, slot)]
        block = values[(*index, j, slot)].reshape(height, width)
        out[(*index, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))] += (
            block
        )
    out = out[..., :rows, :columns]
    return out.swapaxes(-1, -2) if array.transposed else out


def packed(w, pattern, sparsity, **kwargs):
    scores = w.codes() if hasattr(w, "codes") else w
    masks = jc.prune.mask({"w": jnp.abs(jnp.asarray(scores, jnp.float32))}, pattern, sparsity)
    return jc.prune.pack({"w": w}, masks, pattern=pattern, **kwargs)["w"], np.asarray(masks["w"])


@pytest.mark.parametrize(
    ("ratio", "axis", "dtype"),
    [
        *((ratio, -1, "float32") for ratio in ((2, 4), (1, 2), (4, 8), (1, 4), (3, 5))),
        *(((2, 4), axis, "float32") for axis in (0, 1)),
        ((2, 4), -1, "bfloat16"),
    ],
    ids=str,
)
def test_nm_keeps_what_the_mask_keeps(ratio, axis, dtype):
    w = jnp.asarray(random(40, 40, 40)[:, :, :3] if axis != -1 else random(2, 3, 40), dtype)
    array, mask = packed(w, jc.prune.nm(*ratio, axis=axis), 1.0)
    assert isinstance(array, NMSparseArray)
    assert (array.shape, array.dtype, array.path) == (w.shape, w.dtype, "w")
    want = np.where(mask, np.asarray(w, np.float32), 0)
    np.testing.assert_array_equal(nm_dense(array).astype(np.float32), want)
    np.testing.assert_array_equal(array.materialise().astype(jnp.float32), want)
    assert array.materialise().dtype == w.dtype


def test_nm_bytes_are_the_kept_values_and_their_places():
    w = jnp.asarray(random(128, 10))
    array, _ = packed(w, jc.prune.nm(2, 4, axis=-2), 1.0)
    assert array.nbytes == 64 * 10 * 4 + 64 * 10 * 2 // 8
    q, _ = packed(quantized(w, jc.quantize.int4()), jc.prune.nm(2, 4, axis=-2), 1.0)
    assert q.nbytes == 64 * 10 // 2 + 64 * 10 * 2 // 8 + 4 * 10


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["nm", "block"])
def test_quantized_values(name, kind):
    q = quantized(random(24, 12), SPECS[name])
    codes = oracles.codes_of(q)
    pattern = jc.prune.nm(2, 4, axis=-2) if kind == "nm" else jc.prune.block(4, 5)
    array, mask = packed(q, pattern, 1.0 if kind == "nm" else 0.5)
    want = np.where(mask, codes, 0)
    dense = nm_dense(array) if kind == "nm" else block_dense(array)
    np.testing.assert_array_equal(dense, want)
    np.testing.assert_array_equal(array.dense(), want)
    exact = oracles.dequantize(want, q.scale, None, q.axis, q.group_size)
    # One rounding of float32: a code times a scale.
    np.testing.assert_allclose(array.materialise(), exact, rtol=2**-23)
    x = random(16, 24, seed=1)
    got, rows = run(lambda p, x: x @ p["w"], {"w": array}, x)
    seen = oracles.activations(x) if name == "w8a8" else x.astype(np.float64)
    assert_sums(got, seen @ exact, abs(seen) @ abs(exact), 24)
    if kind == "nm":
        # Where activations are integers too, zeros are put back first.
        assert rows[0].op == ("nm" if name == "w8a8" else "nm_matmul")
    elif name != "int3 groups":
        assert [row.op for row in rows] == ["block_sparse_matmul"]
    assert not rows.materialised


@pytest.mark.parametrize("shape", [(32, 48), (30, 41), (2, 3, 17, 9), (5, 5)], ids=str)
@pytest.mark.parametrize("block", [(8, 16), (3, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_blocks_keep_what_the_mask_keeps(shape, block, sparsity):
    w = jnp.asarray(random(*shape))
    array, mask = packed(w, jc.prune.block(*block), sparsity)
    assert isinstance(array, BlockSparseArray)
    assert (array.shape, array.dtype, array.path) == (w.shape, w.dtype, "w")
    want = np.where(mask, np.asarray(w), 0)
    np.testing.assert_array_equal(block_dense(array), want)
    np.testing.assert_array_equal(array.materialise(), want)


def test_block_bytes_are_the_fullest_columns():
    mask = np.zeros((64, 64), bool)
    mask[:32, :16] = True  # two blocks in the first column
    mask[48:, 32:48] = True  # one in the third
    pattern = jc.prune.block(16, 16)
    w = jnp.asarray(random(64, 64))
    array = jc.prune.pack({"w": w}, {"w": jnp.asarray(mask)}, pattern=pattern)["w"]
    assert array.nbytes == 4 * 2 * (16 * 16 * 4 + 4) + 4 * 4  # blocks, rows, and counts
    np.testing.assert_array_equal(array.counts, [2, 0, 1, 0])
    np.testing.assert_array_equal(array.materialise(), np.where(mask, w, 0))


EQUATIONS = {
    "rows": ("mk,kn->mn", lambda p, x: x @ p["w"], (6, 30), (30, 41)),
    "vector": ("k,kn->n", lambda p, x: x @ p["w"], (30,), (30, 41)),
    "batch of rows": ("bmk,kn->bmn", lambda p, x: x @ p["w"], (2, 3, 30), (30, 41)),
    "weight first": ("nk,mk->nm", lambda p, x: p["w"].T @ x.T, (6, 30), (30, 41)),
    "experts": (
        "emk,ekn->emn",
        lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]),
        (3, 6, 17),
        (3, 17, 9),
    ),
    "cast": ("mk,kn->mn", lambda p, x: x @ p["w"].astype(jnp.float32), (6, 30), (30, 41)),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_products_gather_blocks(name):
    equation, fn, x_shape, w_shape = EQUATIONS[name]
    x, w = random(*x_shape, seed=1), jnp.asarray(random(*w_shape))
    array, mask = packed(w, jc.prune.block(4, 8), 0.5)
    exact = np.where(mask, np.asarray(w, np.float64), 0)
    if name == "weight first":
        exact_args = (exact.T, x)
    else:
        exact_args = (x, exact)
    got, rows = run(fn, {"w": array}, x)
    want = np.einsum(equation, *(a.astype(np.float64) for a in exact_args))
    size = np.einsum(equation, *(abs(a.astype(np.float64)) for a in exact_args))
    assert_sums(got, want, size, x_shape[-1])
    assert [row.op for row in rows] == ["block_sparse_matmul"], f"\n{rows}"


def test_what_is_left_over_stays_zero_in_training():
    mask = np.zeros((64, 64), bool)
    mask[:32, :16], mask[48:, 32:48] = True, True
    w, x = jnp.asarray(random(64, 64)), random(6, 64, seed=1)
    pattern = jc.prune.block(16, 16)
    array = jc.prune.pack({"w": w}, {"w": jnp.asarray(mask)}, pattern=pattern)["w"]
    loss = lambda p: jnp.sum(jc.accelerate(lambda p, x: x @ p)(p, x) ** 2)
    values = jax.grad(lambda v: loss(eqx.tree_at(lambda a: a.values, array, v)))(array.values)
    dense = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(jnp.where(mask, w, 0))
    got = block_dense(eqx.tree_at(lambda a: a.values, array, values))
    # Two float32 programs of the same sums of 64 terms below 100.
    np.testing.assert_allclose(got, np.where(mask, dense, 0), rtol=1e-4, atol=1e-3)
    assert not np.asarray(values)[1].any()


def test_a_weight_that_is_stored_output_first_is_gathered_too():
    fn = lambda p, x: x @ p["w"].T
    w, x = jnp.asarray(random(41, 30)), random(6, 30, seed=1)
    found = jc.layout(fn, {"w": w}, x)
    array, mask = packed(w, jc.prune.block(8, 4), 0.5, layout=found)
    assert array.transposed
    np.testing.assert_array_equal(block_dense(array), np.where(mask, w, 0))
    np.testing.assert_array_equal(array.materialise(), np.where(mask, w, 0))
    got, rows = run(fn, {"w": array}, x)
    exact = np.where(mask, np.asarray(w, np.float64), 0).T
    assert_sums(got, x @ exact, abs(x) @ abs(exact), 30)
    assert [row.op for row in rows] == ["block_sparse_matmul"]


def test_quantized_and_stored_output_first():
    fn = lambda p, x: x @ p["w"].T
    q, x = quantized(random(41, 30), jc.quantize.w8a8(axis=-1)), random(8, 30, seed=1)
    found = jc.layout(fn, {"w": q.materialise()}, x)
    array, mask = packed(q, jc.prune.block(8, 4), 0.5, layout=found)
    got, rows = run(fn, {"w": array}, x)
    exact = np.where(mask, oracles.dense(q), 0).T
    seen = oracles.activations(x)
    assert_sums(got, seen @ exact, abs(seen) @ abs(exact), 30)
    assert [row.op for row in rows] == ["block_sparse_matmul"]


def test_anything_else_puts_the_zeros_back():
    w, x = jnp.asarray(random(30, 41)), random(41, 6, seed=1)
    array, mask = packed(w, jc.prune.block(4, 8), 0.5)
    got, rows = run(lambda p, x: p["w"] @ x + p["w"][:, :6], {"w": array}, x)
    exact = np.where(mask, np.asarray(w, np.float64), 0)
    assert_sums(got, exact @ x + exact[:, :6], abs(exact) @ abs(x) + abs(exact[:, :6]), 42)
    assert {row.op for row in rows} == {"block_sparse"}
    assert "zeros are put back" in rows[0].why


@pytest.mark.parametrize("kind", ["nm", "block"])
def test_stacked_layers_gradients_and_vmap(kind):
    w, x = jnp.asarray(random(3, 16, 16)), random(5, 16, seed=1)
    pattern = jc.prune.nm(2, 4, axis=-2) if kind == "nm" else jc.prune.block(4, 8)
    array, mask = packed(w, pattern, 1.0 if kind == "nm" else 0.5)
    dense = jnp.where(mask, w, 0)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    got = jax.jit(jc.accelerate(fn))({"w": array}, x)
    # Two float32 programs of the same sums of 16 terms below 4, through tanh.
    np.testing.assert_allclose(got, fn({"w": dense}, x), atol=2e-5)
    to_x = lambda fn, p: jax.grad(lambda x: jnp.sum(fn(p, x) ** 2))(x)
    got = to_x(jc.accelerate(fn), {"w": array})
    np.testing.assert_allclose(got, to_x(fn, {"w": dense}), atol=2e-4)
    batched = jax.vmap(jc.accelerate(fn), (None, 0))({"w": array}, x[:, None])
    np.testing.assert_allclose(batched[:, 0], fn({"w": dense}, x), atol=2e-5)


@pytest.mark.parametrize("kind", ["nm", "block"])
@pytest.mark.parametrize("spec", [None, "int4"])
def test_files_give_back_the_same_bits(kind, spec, tmp_path):
    w = jnp.asarray(random(24, 16))
    w = w if spec is None else quantized(w, SPECS[spec])
    pattern = jc.prune.nm(2, 4, axis=-2) if kind == "nm" else jc.prune.block(4, 8)
    array, _ = packed(w, pattern, 1.0 if kind == "nm" else 0.5)
    jc.io.save(tmp_path / "x.safetensors", {"net": {"w": array}})
    back = jc.io.load(tmp_path / "x.safetensors")["net"]["w"]
    assert jax.tree.structure(back) == jax.tree.structure(array)
    jax.tree.map(np.testing.assert_array_equal, back, array)
    assert repr(back) == repr(array)
    exported = jax.export.export(jax.jit(jc.accelerate(lambda w, x: x @ w)))(
        array, jnp.ones((2, 24))
    )
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(
        again.call(array, jnp.ones((2, 24))), exported.call(array, jnp.ones((2, 24)))
    )
