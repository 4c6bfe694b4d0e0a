"""`scaled_matmul` against numpy and ml_dtypes, who takes it, and what a GPU's program has."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.ops import _kernels, _scaled_matmul
from jaxcompress.ops._choice import Problem, choose

KINDS = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn]
SCALES = [np.float32, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn]


def problem(lead, m, k, n, *, group=None, kinds=(0, 0), scales=(0, 0), turned=False, seed=0):
    """The arguments and options, and the product and its magnitudes in float64."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group) if group and group < k else 1
    x = rng.normal(size=(*lead, m, k)).astype(KINDS[kinds[0]])
    w = rng.normal(size=(k, n)).astype(KINDS[kinds[1]])
    x_scale = (2.0 ** rng.integers(-3, 3, (*lead, m, groups))).astype(SCALES[scales[0]])
    w_scale = (2.0 ** rng.integers(-3, 3, (groups, n))).astype(SCALES[scales[1]])
    at = np.arange(k) // (group if groups > 1 else max(k, 1))
    a = x.astype(np.float64) * x_scale.astype(np.float64)[..., at]
    b = w.astype(np.float64) * w_scale.astype(np.float64)[at]
    args = (x, w.T if turned else w)
    options = dict(x_scale=x_scale, w_scale=w_scale, group_size=group, transpose_w=turned)
    return args, options, a @ b, np.abs(a) @ np.abs(b)


@settings(max_examples=8, deadline=None)
@given(
    lead=st.sampled_from([(), (3,)]),
    m=st.integers(0, 9),
    k=st.sampled_from([1, 31, 64, 70]),
    n=st.integers(0, 9),
    group=st.sampled_from([None, 16, 32, 100]),
    kinds=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    scales=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_formula(lead, m, k, n, group, kinds, scales, turned, seed):
    shape = dict(group=group, kinds=kinds, scales=scales, turned=turned, seed=seed)
    args, options, want, size = problem(lead, m, k, n, **shape)
    got = jc.ops.scaled_matmul(*args, **options)
    assert (got.dtype, got.shape) == (jnp.float32, want.shape)
    # A float32 sum of k products, of which both sides are exact.
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= (k + 4) * 2.0**-24 * size)


def test_a_weight_for_each_of_several_products_and_a_dtype():
    parts = [problem((), 4, 64, 5, group=32, seed=s) for s in (0, 1)]
    stack = lambda i, of: np.stack([p[i][of] for p in parts])
    options = {name: stack(1, name) for name in ("x_scale", "w_scale")}
    run = lambda x, w, x_scale, w_scale: jc.ops.scaled_matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, group_size=32, dtype=jnp.bfloat16
    )
    args = stack(0, 0), stack(0, 1), *options.values()
    want = np.stack([p[2] for p in parts])
    got = run(*args)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-4)
    np.testing.assert_array_equal(jax.vmap(run)(*args), got)


def test_gradients_reach_the_scales():
    """The op is linear in each: the derivative is the product without it."""
    args, options, _, _ = problem((), 4, 64, 5)
    x, w = (a.astype(np.float64) for a in args)
    run = lambda x_scale, w_scale: jc.ops.scaled_matmul(
        *args, x_scale=x_scale, w_scale=w_scale
    ).sum()
    dx, dw = jax.grad(run, argnums=(0, 1))(options["x_scale"], options["w_scale"])
    np.testing.assert_allclose(dx, (x @ w * options["w_scale"]).sum(1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(dw, (x @ w * options["x_scale"]).sum(0, keepdims=True), rtol=1e-4)
    powers = jnp.full(options["w_scale"].shape, 4, "float8_e8m0fnu")  # no gradient reaches these
    dx = jax.grad(lambda x_scale: run(x_scale, powers))(options["x_scale"])
    np.testing.assert_allclose(dx, 4 * (x @ w).sum(1, keepdims=True), rtol=1e-4)


def static(weights="float8_e4m3fn", scales="float8_e8m0fnu", group=32):
    return _scaled_matmul._Static(weights, scales, group, False, "float32", None)


@pytest.mark.parametrize(
    ("changes", "dtype", "k", "chip", "name", "reason"),
    [
        (dict(group=None), "float8_e5m2", 64, "9.0", "xla", ""),
        (dict(group=None), "float8_e5m2", 64, "8.0", "reference", "10.0, 12.0; 8.0 is at hand"),
        (dict(group=None), "float4_e2m1fn", 64, "10.0", "reference", "not float4_e2m1fn"),
        ({}, "float8_e4m3fn", 64, "10.0", "scaled_dot", "not xla: it scales whole rows"),
        ({}, "float8_e4m3fn", 64, "9.0", "reference", "scaled blocks are for 10.0, 12.0; 9.0"),
        ({}, "float8_e4m3fn", 65, "10.0", "reference", "whole, and 65 are not by 32"),
        (dict(weights="float4_e2m1fn"), "float4_e2m1fn", 64, "12.0", "scaled_dot", ""),
        (
            dict(weights="float4_e2m1fn", scales="float8_e4m3fn", group=16),
            "float4_e2m1fn",
            64,
            "10.0",
            "scaled_dot",
            "",
        ),
        (dict(weights="float4_e2m1fn"), "float8_e4m3fn", 64, "10.0", "reference", "mxfp8, mxfp4"),
        (dict(scales=None), "float8_e4m3fn", 64, "10.0", "reference", "scales of two dtypes"),
        (dict(group=64), "float8_e4m3fn", 64, "10.0", "reference", "float8_e4m3fn by 64"),
    ],
)
def test_who_takes_what(changes, dtype, k, chip, name, reason, monkeypatch):
    monkeypatch.setattr(_scaled_matmul, "chip", lambda platform: chip)
    problem = Problem(m=16, k=k, n=64, dtype=dtype)
    choice = choose(_scaled_matmul._table(static(**changes)), problem, "cuda")
    assert choice.implementation.name == name
    assert reason in choice.why


def products(fn, *args):
    """Those of the program for an NVIDIA GPU."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if re.search("dot_general|scaled_dot", line)]


@pytest.mark.parametrize("turned", [False, True])
def test_a_program_for_a_gpu_has_floats_of_eight_bits_or_scaled_blocks(turned, monkeypatch):
    monkeypatch.setattr(_scaled_matmul, "chip", lambda platform: "10.0")
    for group, scales, mark in (
        (None, (0, 0), r"f8E4M3FN"),
        (32, (1, 1), "__op$block_scaled_dot"),
    ):
        args, options, _, _ = problem(
            (), 16, 64, 8, group=group, kinds=(0, 0), scales=scales, turned=turned
        )
        run = lambda *args, options=options: jc.ops.scaled_matmul(*args, **options)
        [product] = products(run, *args)
        assert mark in product


def test_fp8_of_both_sides_goes_to_xla_as_it_is(monkeypatch):
    monkeypatch.setattr(_scaled_matmul, "chip", lambda platform: "9.0")
    monkeypatch.setattr(_kernels, "chip", lambda platform: "9.0")
    kind = jc.quantize.fp8_e4m3().qtype
    spec = jc.quantize.Spec(qtype=kind, act=jc.arrays.Activation(kind))
    params = jc.quantize.quantize({"w": jnp.ones((64, 8))}, {"w": spec})
    fn, x = lambda p, x: x @ p["w"], jnp.ones((16, 64))
    [row] = jc.explain(fn, params, x, platform="cuda")
    assert (row.op, row.implementation) == ("scaled_matmul", "xla")
    [product] = products(jc.accelerate(fn), params, x)
    assert product.count("f8E4M3FN") == 2


def test_mxfp8_of_both_sides_is_a_product_of_scaled_blocks(monkeypatch):
    monkeypatch.setattr(_scaled_matmul, "chip", lambda platform: "10.0")
    spec = jc.quantize.mxfp8(activations=True)
    params = jc.quantize.quantize({"w": jnp.ones((64, 8))}, {"w": spec})
    fn, x = lambda p, x: x @ p["w"], jnp.ones((16, 64))
    [row] = jc.explain(fn, params, x, platform="cuda")
    assert (row.op, row.implementation) == ("scaled_matmul", "scaled_dot")
    [product] = products(jc.accelerate(fn), params, x)
    assert "__op$block_scaled_dot" in product


OK = problem((), 2, 64, 3, group=32)


@pytest.mark.parametrize(
    ("args", "changes", "error", "message"),
    [
        ((jnp.ones((2, 64)), OK[0][1]), {}, TypeError, "scaled_matmul takes x of float8_e4m3fn"),
        (OK[0], dict(w_scale=jnp.ones((2, 3), jnp.bfloat16)), TypeError, "it is bfloat16"),
        (OK[0], dict(x_scale=OK[1]["x_scale"][:1, :1, None]), ValueError, r"x_scale of .*\(2, 2\)"),
        (OK[0], dict(w_scale=OK[1]["w_scale"][:, :2]), ValueError, r"shape \(2, 3\)"),
        (OK[0], dict(transpose_w=True), ValueError, r"w\[..., n, k\]; got shapes"),
        (OK[0], dict(implementation="scaled_dot"), ValueError, "'scaled_dot' cannot run: .*mxfp8"),
    ],
)
def test_bad_input_is_named(args, changes, error, message):
    with pytest.raises(error, match=message):
        jc.ops.scaled_matmul(*args, **{**OK[1], **changes})
