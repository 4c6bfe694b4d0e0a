"""`block_sparse_matmul` and its gradients against textbook loops, by XLA and by the TPU kernels."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import jaxcompress as jc
from jaxcompress.ops import _block_sparse, _kernels


def problem(lead, m, k, n, block, *, counted=True, matrices=False, seed=0):
    """x, blocks, rows and counts; what is left over of the blocks is zeros."""
    rng, (height, width) = np.random.default_rng(seed), block
    down, across = -(-k // height), -(-n // width)
    batch = lead if matrices else ()
    slots = max(1, down // 2)
    order = np.argsort(rng.random((*batch, across, down)), -1)[..., :slots]
    counts = rng.integers(0, slots + 1, (*batch, across)) if counted else None
    blocks = rng.normal(size=(*batch, across, slots, height, width)).astype(np.float32)
    if counted:
        blocks[np.arange(slots) >= counts[..., None]] = 0
        counts = counts.astype(np.int32)
    x = rng.normal(size=(*lead, m, k)).astype(np.float32)
    return x, blocks, order.astype(np.int32), counts


def dense(blocks, rows, counts, k, n):
    """The matrix, block by block, in float64."""
    across, slots, height, width = blocks.shape
    w = np.zeros((-(-k // height) * height, across * width))
    for c, s in np.ndindex(across, slots):
        if counts is None or s < counts[c]:
            r = rows[c, s]
            w[r * height : (r + 1) * height, c * width : (c + 1) * width] = blocks[c, s]
    return w[:k, :n]


def close(got, want, terms):
    # Float32 sums of so many products of normal numbers, which are below 25.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=terms * 25 * 2**-23)


@settings(max_examples=4)
@given(
    m=st.sampled_from([1, 7, 16]),
    k=st.sampled_from([16, 33, 65]),
    n=st.sampled_from([1, 33, 64]),
    block=st.sampled_from([(16, 16), (8, 32), (5, 7)]),
    counted=st.booleans(),
    matrices=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_and_its_gradients(m, k, n, block, counted, matrices, seed):
    x, blocks, rows, counts = problem(
        (2,), m, k, n, block, counted=counted, matrices=matrices, seed=seed
    )
    run = lambda x, blocks: jc.ops.block_sparse_matmul(x, blocks, rows, columns=n, counts=counts)
    y, back = jax.vjp(run, x, blocks)
    g = np.random.default_rng(seed).normal(size=y.shape).astype(np.float32)
    dx, dblocks = back(g)
    check(x, blocks, rows, counts, n, g, y, dx, dblocks)


def check(x, blocks, rows, counts, n, g, y, dx, dblocks):
    """Against numpy; a gradient of blocks is that of the matrix, where there are blocks."""
    m, k = x.shape[-2:]
    height, width = blocks.shape[-2:]
    own = lambda a, i, core: a if a is None or a.ndim == core else a[i]
    want = np.zeros(blocks.shape)
    for i in range(len(x)):
        rows_i, counts_i = own(rows, i, 2), own(counts, i, 1)
        w = dense(own(blocks, i, 4), rows_i, counts_i, k, n)
        close(y[i], x[i] @ w, k)
        close(dx[i], g[i] @ w.T, n)
        dw = np.pad(x[i].T.astype(np.float64) @ g[i], ((0, -k % height), (0, -n % width)))
        for c, s in np.ndindex(rows_i.shape):
            if counts_i is None or s < counts_i[c]:
                r = rows_i[c, s]
                into = own(want, i, 4)
                into[c, s] += dw[r * height : (r + 1) * height, c * width : (c + 1) * width]
    close(dblocks, want, m * len(x))


@pytest.mark.parametrize("matrices", [False, True])
def test_the_kernels_for_tpus_train_too(matrices, monkeypatch):
    """The op as on a TPU, its three kernels in the interpreter."""
    kernel = lambda table, problem, implementation, *args: next(
        i for i in table if i.name == "pallas_tpu"
    ).run(*args)
    monkeypatch.setattr(_block_sparse, "dispatch", kernel)
    n = 300
    x, blocks, rows, counts = problem((2,), 9, 400, n, (128, 128), matrices=matrices)
    with pltpu.force_tpu_interpret_mode():
        run = lambda x, blocks: jc.ops.block_sparse_matmul(
            x, blocks, rows, columns=n, counts=counts
        )
        y, back = jax.vjp(run, x, blocks)
        g = np.random.default_rng(0).normal(size=y.shape).astype(np.float32)
        dx, dblocks = back(g)
        check(x, blocks, rows, counts, n, g, y, dx, dblocks)


def test_int8_blocks_and_a_dtype():
    x, blocks, rows, counts = problem((), 7, 32, 32, (16, 16))
    codes = np.round(blocks * 20).astype(np.int8)
    run = lambda x: jc.ops.block_sparse_matmul(
        x, codes, rows, columns=32, counts=counts, dtype=jnp.bfloat16
    )
    y, back = jax.vjp(run, x)
    w = dense(codes, rows, counts, 32, 32)
    assert y.dtype == jnp.bfloat16
    # One rounding to bfloat16 of sums whose own error is much smaller.
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ w, rtol=2**-8, atol=1e-3)
    [dx] = back(jnp.ones_like(y))
    np.testing.assert_allclose(dx, np.ones((7, 32)) @ w.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("block", "dtype", "weights", "platform", "name", "reason"),
    [
        ((128, 256), "bfloat16", "bfloat16", "tpu", "pallas_tpu", ""),
        ((128, 128), "float32", "int8", "tpu", "pallas_tpu", ""),
        ((64, 128), "float32", "float32", "tpu", "reference", "multiples of 128, not 64x128"),
        ((128, 128), "float16", "float16", "tpu", "reference", "it takes float32, bfloat16, not"),
        ((48, 16), "float16", "int8", "cuda", "triton", ""),
        ((8, 16), "float16", "float16", "cuda", "reference", "multiples of 16, not 8x16"),
        ((16, 16), "float32", "float64", "cuda", "reference", "not float64"),
    ],
)
def test_who_takes_what(block, dtype, weights, platform, name, reason, monkeypatch):
    monkeypatch.setattr(_kernels, "_has_jax_triton", lambda: True)
    if platform == "cuda":  # and Triton, which chooses the tile, may be absent
        monkeypatch.setattr(_kernels, "chip", lambda platform: "9.0")
        tile = SimpleNamespace(blocks=lambda *sizes, chip: 64)
        monkeypatch.setattr(_kernels, "kernel_module", lambda op, backend: tile)
    choice = _block_sparse.plan(16, 1024, 1024, block, weights, dtype, platform)
    assert choice.implementation.name == name
    assert reason in choice.why
    said = "blocks of" in choice.why
    assert said == (name != "reference")


def test_a_program_for_tpus_has_three_kernels():
    x, blocks, rows, counts = problem((), 16, 512, 512, (128, 128))
    loss = lambda x, blocks: jnp.sum(
        jc.ops.block_sparse_matmul(x, blocks, rows, columns=512, counts=counts) ** 2
    )
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = jax.export.export(step, platforms=["tpu"])(x, blocks).mlir_module()
    assert text.count("@tpu_custom_call") == 3
    with pytest.raises(ValueError, match="'triton' cannot run: it is for GPUs"):
        jc.ops.block_sparse_matmul(x, blocks, rows, columns=512, implementation="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=np.ones((2, 32), np.int32)), TypeError, "x is int32"),
        (dict(blocks=np.ones((2, 1, 16, 16), np.int32)), TypeError, "blocks is int32"),
        (dict(rows=np.zeros((2, 1), np.int8)), TypeError, "int32 rows; got int8"),
        (dict(counts=np.zeros(2, bool)), TypeError, "int32 counts; got bool"),
        (dict(rows=np.zeros((2, 3), np.int32)), ValueError, r"got x\(2, 32\), blocks\(2, 1"),
        (dict(columns=64), ValueError, "64 columns are not 2 blocks of 16"),
        (dict(counts=np.zeros((2, 1), np.int32)), ValueError, r"counts of the shape \(2,\)"),
        (dict(implementation="fast"), ValueError, "no implementation 'fast'"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    good = dict(x=np.ones((2, 32), np.float32), blocks=np.ones((2, 1, 16, 16), np.float32))
    given = good | dict(rows=np.zeros((2, 1), np.int32), columns=32) | changes
    arrays = [given.pop(name) for name in ("x", "blocks", "rows")]
    with pytest.raises(error, match=message):
        jc.ops.block_sparse_matmul(*arrays, **given)


def test_leading_dimensions_have_to_agree():
    x, blocks, rows, _ = problem((3,), 4, 32, 32, (16, 16), matrices=True)
    run = functools.partial(jc.ops.block_sparse_matmul, columns=32)
    with pytest.raises(ValueError, match="leading dimensions of x"):
        run(x[:2], blocks, rows)
