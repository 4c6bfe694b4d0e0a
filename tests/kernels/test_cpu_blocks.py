"""The native product with block-sparse weights, against numpy, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import EPS, assert_einsum, assert_sums, made, random, run
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import replace
from jaxcompress.kernels import cpu
from test_cpu import PATHS, every_path, linear, on

A8 = Activation(IntType(8))


def pruned(shape, block, share=0.7, seed=0):
    """A packed array, and in numpy what it stands for."""
    rng, (height, width) = np.random.default_rng(seed), block
    down, across = -(-shape[-2] // height), -(-shape[-1] // width)
    kept = rng.random((*shape[:-2], down, across)) >= share
    mask = np.repeat(np.repeat(kept, height, -2), width, -1)[..., : shape[-2], : shape[-1]]
    w, pattern = random(*shape, seed=seed), jc.prune.block(height, width)
    packed = jc.prune.pack({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)}, pattern=pattern)
    return packed["w"], w * mask


def assert_product(got, x, w):
    x = np.asarray(x, np.float64)
    assert_sums(got, x @ w, np.abs(x) @ np.abs(w), w.shape[-2])


@every_path
@pytest.mark.parametrize(
    ("m", "shape", "block"),
    [(1, (70, 130), (8, 16)), (50, (64, 100), (16, 48)), (7, (30, 300), (7, 144))],
)
def test_floats_are_those_of_numpy(path, m, shape, block, monkeypatch):
    packed, w = pruned(shape, block)
    x = random(m, shape[0])
    assert_product(on(monkeypatch, path, linear, packed, x), x, w)


def test_it_is_chosen_and_said():
    packed, w = pruned((64, 96), (16, 16))
    x, fn = random(5, 64), lambda p, x: x @ p
    out, [row] = run(fn, packed, x)
    assert_product(out, x, w)
    assert (row.op, row.implementation) == (
        "block_sparse_matmul",
        "reference" if cpu.missing() else "cpu",
    )
    [narrow] = jc.explain(fn, pruned((64, 96), (8, 8))[0], x)
    assert narrow.implementation == "reference"
    assert "multiples of 16 wide, not 8" in narrow.why or cpu.missing()


def test_layers_gradients_and_export():
    packed, w = pruned((3, 64, 64), (16, 32))
    x, g = random(3, 5, 64), random(3, 5, 64, seed=1)
    product = jax.jit(jc.accelerate(lambda w, x: jnp.einsum("lmk,lkn->lmn", x, w)))
    assert_product(product(packed, x), x, w)
    dx = jax.grad(lambda x: jnp.sum(g * product(packed, x)))(x)
    assert_product(dx, g, np.swapaxes(w, -1, -2))
    structure = jax.tree.structure(packed)
    fn = jax.jit(lambda leaves, x: product(jax.tree.unflatten(structure, leaves), x))
    exported = jax.export.export(fn, platforms=["cpu", "tpu"])(jax.tree.leaves(packed), x)
    assert "@jaxcompress" not in exported.mlir_module()
    assert_product(exported.call(jax.tree.leaves(packed), x), x, w)


def codes(shape, block, bits=8, act=A8, seed=0):
    """A packed array of codes, and the array that it is made of, zeros included."""
    rng, (height, width) = np.random.default_rng(seed), block
    down, across = -(-shape[-2] // height), -(-shape[-1] // width)
    kept = rng.random((*shape[:-2], down, across)) >= 0.7
    mask = np.repeat(np.repeat(kept, height, -2), width, -1)[..., : shape[-2], : shape[-1]]
    q = replace(made(shape, (-2,), bits=bits), act=act)
    packed = jc.prune.pack({"w": q}, {"w": jnp.asarray(mask)}, pattern=jc.prune.block(*block))["w"]
    return packed, replace(made(shape, (-2,)), values=np.asarray(q.codes()) * mask, act=act)


@every_path
@pytest.mark.parametrize(
    ("m", "shape", "block", "bits"),
    [(1, (70, 130), (8, 16), 8), (50, (64, 100), (16, 48), 4), (7, (300, 40), (100, 32), 8)],
)
def test_codes_give_the_floats_of_the_dense_integer_product(
    path, m, shape, block, bits, monkeypatch
):
    packed, q = codes(shape, block, bits)
    x, fast = random(m, shape[0]), jc.prepack({"w": packed})["w"]
    assert fast.panels or cpu.missing()
    want = on(monkeypatch, path, linear, q, x)
    assert_einsum(want, "mk,kn->mn", x, q)
    for w in (packed, fast):  # the same integers, then the same scales
        np.testing.assert_array_equal(on(monkeypatch, path, linear, w, x), want)
    np.testing.assert_array_equal(fast.materialise(), packed.materialise())
    assert jax.tree.all(jax.tree.map(np.array_equal, fast.stored(), packed))


def test_codes_in_layers_with_what_follows(tmp_path):
    packed, q = codes((3, 64, 64), (16, 32))
    x, g, bias = random(3, 5, 64), random(3, 5, 64, seed=1), random(64, seed=2)
    fn = lambda w, x: jax.nn.gelu(jnp.einsum("lmk,lkn->lmn", x, w) + bias)
    fast = jc.prepack({"w": packed})
    out, [row] = run(lambda p, x: fn(p["w"], x), fast, x)
    want = jax.nn.gelu(jc.accelerate(lambda w, x: jnp.einsum("lmk,lkn->lmn", x, w))(q, x) + bias)
    within = 16 * EPS * np.abs(want).max()  # the same sums, a few roundings
    np.testing.assert_allclose(out, want, rtol=0, atol=within)
    if PATHS:
        assert row.why.startswith("native")
        assert row.why.endswith("; bias, gelu inside")
        [loose] = jc.explain(lambda p, x: fn(p, x), packed, x)
        assert "rearranged at every call" in loose.why
    step = lambda x, w: (x, jax.nn.gelu(x @ w + bias))
    each = jax.jit(jc.accelerate(lambda w, x: jax.lax.scan(step, x, w)[1]))(fast["w"], x[0])
    assert each.shape == (3, 5, 64)
    dx = jax.grad(lambda x: jnp.sum(g * jax.jit(jc.accelerate(fn))(fast["w"], x)))(x)
    want = jax.grad(lambda x: jnp.sum(g * jax.jit(jc.accelerate(fn))(q, x)))(x)
    np.testing.assert_allclose(dx, want, rtol=0, atol=64 * EPS * np.abs(want).max())
    jc.io.save(tmp_path / "w", fast)
    assert not jc.io.load(tmp_path / "w")["w"].panels
    leaves, structure = jax.tree.flatten(fast["w"])
    whole = jax.jit(lambda leaves, x: jc.accelerate(fn)(jax.tree.unflatten(structure, leaves), x))
    exported = jax.export.export(whole, platforms=["cpu", "tpu"])(leaves, x)
    assert "@jaxcompress" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(leaves, x), out, rtol=0, atol=within)


X, VALUES = np.zeros((1, 2, 8), np.float32), np.zeros((1, 1, 1, 4, 16), np.float32)
ROWS = np.zeros((1, 1, 1), np.int32)


@pytest.mark.parametrize(
    ("message", "values", "rows", "width"),
    [
        ("not in the matrix", VALUES, ROWS + 2, 16),
        ("not in the matrix", VALUES, ROWS - 1, 16),
        ("not those of the blocks", VALUES[..., :8], ROWS, 16),
        ("multiples of 16 wide", VALUES, ROWS, 24),
    ],
)
def test_the_native_side_returns_an_error(message, values, rows, width):
    out = jax.ShapeDtypeStruct((1, 2, 16), jnp.float32)
    static = dict(height=np.int64(4), width=np.int64(width), activation=np.int64(0), path="")
    call = jax.jit(lambda *a: jax.ffi.ffi_call("jaxcompress_block_matmul", out)(*a, **static))
    none = np.zeros(0, np.float32)
    if PATHS:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(X, values, rows, np.int32(none), none, none))


CODES, SCALE = np.zeros((1, 1, 1, 4, 16), np.int8), np.ones((1, 1, 16), np.float32)


@pytest.mark.parametrize(
    ("message", "values", "rows", "scale", "options"),
    [
        ("not in the matrix", CODES, ROWS + 2, SCALE, {}),
        ("not those of the blocks", CODES[..., :8], ROWS, SCALE, {}),
        ("of 4 high and of 16 wide", CODES, ROWS, SCALE, dict(height=6)),
        ("a scale a column", CODES, ROWS, SCALE[..., :3], {}),
        ("are no bytes", VALUES, ROWS, SCALE, {}),
        ("scratch buffer is too small", CODES, ROWS, SCALE, dict(scratch=64)),
        ("is 1 to 127", CODES, ROWS, SCALE, dict(high=0)),
    ],
)
def test_the_native_side_returns_an_error_of_codes(message, values, rows, scale, options):
    scratch = options.pop("scratch", 4096)
    out = [jax.ShapeDtypeStruct((1, 2, 16), jnp.float32)]
    out.append(jax.ShapeDtypeStruct((scratch,), jnp.uint8))
    static = dict(height=4, width=16, by_rows=1, high=127, activation=0) | options
    static = {name: np.int64(value) for name, value in static.items()}
    name, none = "jaxcompress_quantized_block_matmul", np.zeros(0, np.float32)
    call = jax.jit(lambda *a: jax.ffi.ffi_call(name, out)(*a, **static, path=""))
    if PATHS:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(X, values, rows, np.int32(none), scale, *[none] * 3))
