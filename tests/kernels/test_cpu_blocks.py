"""The native product with block-sparse weights, against numpy, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import assert_sums, random, run
from jaxcompress.kernels import cpu
from test_cpu import PATHS, every_path, linear, on


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
    if PATHS:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(X, values, rows, *[np.zeros(0, np.float32)] * 2))
