"""`w4a8_matmul` against its formula in float64, and who takes a `w4a8` weight on which platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
from checks import ON_CPU, assert_sums, quantized, random
from jaxcompress.ops import _w4a8_matmul
from jaxcompress.ops._choice import Problem, choose

w4a8_matmul = jc.ops.w4a8_matmul


def problem(*, lead=(), batched=False, m=3, k=70, n=5, group_size=None, zero=False, seed=0):
    """Arguments, options, and the rows and the decoded weight in float64."""
    rng = np.random.default_rng(seed)
    w_lead = lead if batched else ()
    x = rng.integers(-128, 128, (*lead, m, k)).astype(np.int8)
    codes = rng.integers(-8, 8, (*w_lead, k, n)).astype(np.int8)
    groups = 1 if group_size is None or group_size >= k else -(-k // group_size)
    scale = rng.uniform(0.5, 2, (*w_lead, groups, n)).astype(np.float32)
    rows = rng.uniform(0.5, 2, (*lead, m, 1)).astype(np.float32)
    zeros = rng.integers(-8, 8, scale.shape).astype(np.int8) if zero else None
    group = np.arange(k) // (group_size if groups > 1 else max(k, 1))
    decoded = codes - (zeros[..., group, :].astype(np.int64) if zero else 0)
    decoded = decoded * scale[..., group, :].astype(np.float64)
    options = dict(x_scale=rows, w_zero_point=zeros, group_size=group_size)
    arrays = (x, oracles.pack(codes, 4, -2), scale)
    return arrays, options, x * rows.astype(np.float64), decoded, groups


@given(
    lead=st.sampled_from([(), (2,), (2, 3)]),
    batched=st.booleans(),
    m=st.sampled_from([0, 1, 3]),
    k=st.sampled_from([0, 1, 64, 70]),
    n=st.sampled_from([0, 1, 5]),
    group_size=st.sampled_from([None, 7, 32, 100]),
    zero=st.booleans(),
    implementation=st.sampled_from([None, "xla", "reference"]),
)
def test_the_formula(implementation, **sizes):
    arrays, options, x, decoded, groups = problem(**sizes)
    run = jax.jit(
        lambda *arrays, x_scale, w_zero_point: w4a8_matmul(
            *arrays,
            x_scale=x_scale,
            w_zero_point=w_zero_point,
            group_size=options["group_size"],
            implementation=implementation,
        )
    )
    got = run(*arrays, x_scale=options["x_scale"], w_zero_point=options["w_zero_point"])
    assert got.dtype == jnp.float32
    # The sums of groups are exact integers; they are scaled, added, and scaled again.
    assert_sums(got, x @ decoded, np.abs(x) @ np.abs(decoded), groups + 2)


def test_the_derivatives_of_the_scales():
    """The op is linear in each: the derivative is the product without it."""
    arrays, options, x, decoded, _ = problem(k=64, group_size=32)
    x_codes, w, scale = arrays
    rows = options["x_scale"]
    run = lambda s, r: w4a8_matmul(x_codes, w, s, x_scale=r, group_size=32).sum()
    dscale, drows = jax.grad(run, argnums=(0, 1))(scale, rows)
    codes = decoded / np.repeat(scale, 32, 0)
    by_group = np.stack([x[:, g : g + 32] @ codes[g : g + 32] for g in (0, 32)])
    np.testing.assert_allclose(dscale, by_group.sum(1), rtol=1e-5)
    want = (x_codes.astype(np.float64) @ decoded).sum(1, keepdims=True)
    np.testing.assert_allclose(drows, want, rtol=1e-5)


LARGE = Problem(m=16, k=4096, n=4096, bits=4, group_size=128, packed=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(group_size=64), "its groups are powers of two from 128 on, not 64"),
        (dict(group_size=384), "from 128 on, not 384"),
        (dict(n=100), "4096 x 100 weights are less than one block of 256 x 128"),
        (dict(group_size=5000), None),
        ({}, None),
    ],
)
def test_what_the_kernel_for_tpus_takes(changes, reason):
    problem = Problem(**{**vars(LARGE), **changes})
    choice = choose(_w4a8_matmul.table(), problem, "tpu")
    assert choice.implementation.name == ("reference" if reason else "pallas_tpu")
    assert reason is None or reason in choice.why


def test_explain_and_the_program_agree():
    params = {"w": quantized(random(512, 256), jc.quantize.w4a8(group_size=128))}
    fn, x = lambda p, x: x @ p["w"], random(16, 512)
    for platform, name in (
        ("tpu", "pallas_tpu"),
        ("cuda", "reference"),  # no GPU in this process
        ("cpu", ON_CPU),
    ):
        [row] = jc.explain(fn, params, x, platform=platform)
        assert (row.op, row.implementation) == ("w4a8_matmul", name), row
        exported = jax.export.export(jax.jit(jc.accelerate(fn)), platforms=[platform])
        text = exported(params, x).mlir_module()
        assert ("tpu_custom_call" in text) == (name == "pallas_tpu")


def test_one_program_for_two_platforms():
    """Too small for a kernel, which has its own test: the CPU's product and the reference."""
    arrays, options, *_ = problem(k=64, group_size=32)
    fn = jax.jit(functools.partial(w4a8_matmul, **options))
    exported = jax.export.export(fn, platforms=["cpu", "tpu"])(*arrays)
    want = w4a8_matmul(*arrays, implementation="reference", **options)
    np.testing.assert_allclose(exported.call(*arrays), want, rtol=1e-5)


def test_vmap_and_grad_around_the_kernel_lower():
    (x, w, scale), *_ = problem(lead=(3,), m=8, k=512, n=128, group_size=128)
    op = functools.partial(w4a8_matmul, group_size=128, implementation="pallas_tpu")
    mapped = jax.vmap(op, (0, None, None))
    graded = jax.value_and_grad(lambda s, x, w: mapped(x, w, s).sum())
    exported = jax.export.export(jax.jit(graded), platforms=["tpu"])(scale, x, w)
    assert "tpu_custom_call" in exported.mlir_module()


X, W = np.zeros((3, 64), np.int8), np.zeros((32, 4), np.uint8)
SCALE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "takes int8 activations; x is float32", (np.float32(X), W, SCALE), {}),
        (TypeError, "int4 packed as uint8; w is int8", (X, np.int8(W), SCALE), {}),
        (TypeError, "w_zero_point is float32", (X, W, SCALE), dict(w_zero_point=SCALE)),
        (
            ValueError,
            r"64 codes take 32 bytes; w has the shape \(64, 4\)",
            (X, W.repeat(2, 0), SCALE),
            {},
        ),
        (ValueError, r"got shapes", (X, W[None], SCALE), {}),
        (
            ValueError,
            r"expected w_scale of the shape \(2, 4\)",
            (X, W, np.ones((3, 4))),
            dict(group_size=32),
        ),
        (
            ValueError,
            "'triton' cannot run: .*for GPUs",
            (X, W, SCALE),
            dict(implementation="triton"),
        ),
    ],
)
def test_what_it_cannot_do_is_said(error, message, args, options):
    with pytest.raises(error, match=message):
        w4a8_matmul(*args, **options)
