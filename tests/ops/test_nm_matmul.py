"""`nm_matmul` and its gradients against textbook loops, by XLA and by the TPU kernel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import jaxcompress as jc
import oracles
from checks import assert_sums, random
from jaxcompress.ops import _kernels, _nm_linear, _nm_matmul
from jaxcompress.ops._choice import Problem


def problem(lead, groups, columns, n, m, *, codes=False, seed=0):
    """Values, indices, the places `[..., groups, n, columns]` and the weight in float64."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((*lead, groups, m, columns)), -2)[..., :n, :]
    values = rng.integers(-128, 128, places.shape) if codes else rng.normal(size=places.shape)
    values = values.astype(np.int8 if codes else np.float32)
    w = np.zeros((*lead, groups, m, columns))
    np.put_along_axis(w, places, values.astype(np.float64), -2)
    flat = lambda a: a.reshape(*lead, -1, columns)
    indices = oracles.pack(flat(places), max(1, (m - 1).bit_length()), -2)
    return flat(values), indices, places, flat(w)


@settings(max_examples=4)
@given(
    rows=st.sampled_from([1, 7]),
    groups=st.sampled_from([1, 9, 40]),
    columns=st.sampled_from([1, 33]),
    pattern=st.sampled_from([(2, 4), (1, 2), (3, 5), (4, 16)]),
    matrices=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_and_its_gradients(rows, groups, columns, pattern, matrices, seed):
    n, m = pattern
    lead = (2,) if matrices else ()
    values, indices, places, w = problem(lead, groups, columns, n, m, seed=seed)
    x = random(2, rows, groups * m, seed=seed)
    run = lambda x, values: jc.ops.nm_matmul(x, values, indices, n=n, m=m)
    y, back = jax.vjp(run, x, values)
    g = random(*y.shape, seed=seed + 1)
    dx, dvalues = back(g)
    turned = np.swapaxes(w, -1, -2)
    assert_sums(y, x.astype(np.float64) @ w, abs(x) @ abs(w), groups * m)
    assert_sums(dx, g.astype(np.float64) @ turned, abs(g) @ abs(turned), columns)
    # The gradient of the matrix, where there are values.
    dw = np.swapaxes(x, -1, -2).astype(np.float64) @ g
    size = np.swapaxes(abs(x), -1, -2) @ abs(g)
    pick = lambda a: np.take_along_axis(
        (a if matrices else a.sum(0)).reshape(*lead, groups, m, columns), places, -2
    ).reshape(values.shape)
    assert_sums(dvalues, pick(dw), pick(size), 2 * rows)


def test_int8_by_int8_is_exact_and_int8_by_floats_has_the_gradient():
    values, indices, _, w = problem((), 40, 33, 2, 4, codes=True)
    x = np.random.default_rng(1).integers(-128, 128, (7, 160)).astype(np.int8)
    y = jc.ops.nm_matmul(x, values, indices, n=2, m=4)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x.astype(np.int64) @ w)
    run = lambda x: jc.ops.nm_matmul(x, values, indices, n=2, m=4, dtype=jnp.bfloat16)
    half, back = jax.vjp(run, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # Sums of whole numbers below 2^24 are exact; the result is rounded once.
    np.testing.assert_allclose(np.asarray(half, np.float64), x.astype(np.int64) @ w, rtol=2**-8)
    [dx] = back(jnp.ones_like(half))
    np.testing.assert_allclose(np.asarray(dx, np.float64), np.ones((7, 33)) @ w.T, rtol=2**-8)


def scaled(lead, groups, columns, bits, group_size, seed=0):
    """Codes of 2:4, packed below eight bits, indices and scales; and what they decode to."""
    codes, indices, _, w = problem(lead, groups, columns, 2, 4, codes=True, seed=seed)
    shift = 8 - bits
    codes, w = codes >> shift, w.astype(np.int64) >> shift
    values = codes if bits == 8 else oracles.pack(codes, bits, -2)
    runs = -(-4 * groups // group_size) if group_size else 1
    scale = np.random.default_rng(seed).uniform(0.5, 2, (*lead, runs, columns)).astype(np.float32)
    at = np.arange(4 * groups) // (group_size or 4 * groups)
    return (values, indices, scale), w * scale.astype(np.float64)[..., at, :]


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 12), (3, 64)])
def test_codes_with_scales_and_their_gradients(bits, group_size):
    for lead in ((), (3,)):
        arrays, w = scaled(lead, 20, 9, bits, group_size)
        x = random(3, 5, 80) if lead else random(2, 5, 80)
        run = lambda x, scale, arrays=arrays: jc.ops.nm_matmul(
            x, *arrays[:2], scale, n=2, m=4, bits=bits, group_size=group_size
        )
        y, back = jax.vjp(run, x, jnp.asarray(arrays[2]))
        assert_sums(y, x @ w, abs(x) @ abs(w), 80)
        dx, dscale = back(jnp.ones_like(y))
        ones = np.ones(y.shape)
        turned = np.swapaxes(w, -1, -2)
        assert_sums(dx, ones @ turned, ones @ abs(turned), 80)
        # The product is linear in the scales: with all of them, it is their gradient.
        np.testing.assert_allclose((dscale * arrays[2]).sum(), y.sum(), rtol=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 12)])
@pytest.mark.parametrize("sides", ["x", "w", "xw"])
def test_scaled_products_of_integers_are_those_of_the_dense_matrix(bits, group_size, sides):
    if group_size and "w" not in sides:
        group_size = None
    for lead in ((), (3,)):
        (values, indices, scale), w = scaled(lead, 20, 9, bits, group_size)
        rng = np.random.default_rng(1)
        x = rng.integers(-128, 128, (*(lead or (2,)), 5, 80)).astype(np.int8)
        x_scale = rng.uniform(0.5, 2, (*x.shape[:-1], 1)).astype(np.float32)
        scales = {"x_scale": x_scale} if "x" in sides else {}
        more = {"scale": scale} if "w" in sides else {}
        options = dict(group_size=group_size, dtype=jnp.float32)
        run = lambda scales, more, values=values, indices=indices, x=x, options=options: (
            jc.ops.nm_matmul(x, values, indices, n=2, m=4, bits=bits, **scales, **more, **options)
        )
        y, back = jax.vjp(run, scales, more)
        at = np.arange(80) // (group_size or 80)
        codes = np.round(w / scale.astype(np.float64)[..., at, :]).astype(np.int8)
        named = {"w_scale": scale} if more else {}
        dense = jc.ops.int8_matmul(x, codes, **scales, **named, **options)
        np.testing.assert_array_equal(y, dense)
        w = w if more else codes.astype(np.float64)
        wide = x.astype(np.float64) * (x_scale if scales else 1)
        assert_sums(y, wide @ w, abs(wide) @ abs(w), 20)
        # Linear in either side's scales: with all of them, they give their gradients.
        for operands, found in zip((scales, more), back(jnp.ones_like(y))):
            for name, a in operands.items():
                np.testing.assert_allclose((found[name] * a).sum(), y.sum(), rtol=1e-4)


def test_a_scale_for_the_rows_alone_is_for_integers():
    values, indices, _, _ = problem((), 8, 4, 2, 4, codes=True)
    x_scale = np.ones((2, 1), np.float32)
    with pytest.raises(TypeError, match="the rows of an int8 x; it is float32"):
        jc.ops.nm_matmul(random(2, 32), values, indices, n=2, m=4, x_scale=x_scale)


def test_the_bound_of_a_sum_counts_kept_values_and_with_scales_the_zeros_too():
    k, seen = 262_140, jnp.ones((1, 262_140), jnp.int8)
    values, places = np.full((k // 2, 1), 127, np.int8), np.tile([[0], [1]], (k // 4, 1))
    indices = oracles.pack(places, 2, -2)
    y = jc.ops.nm_matmul(127 * seen, values, indices, n=2, m=4)
    assert int(y[0, 0]) == 127 * 127 * k // 2
    with pytest.raises(ValueError, match="at most 131071 products of int8; got 262140"):
        jc.ops.nm_matmul(seen, values, indices, n=2, m=4, scale=jnp.ones((1, 1)))


def test_scales_of_rows_are_floats_that_fit_and_so_is_the_result():
    values, indices, _, _ = problem((), 4, 3, 2, 4, codes=True)
    x = np.ones((2, 5, 16), np.int8)
    run = lambda **options: jc.ops.nm_matmul(x, values, indices, n=2, m=4, **options)
    with pytest.raises(ValueError, match=r"x_scale that broadcasts to \(2, 5, 1\); got \(4, 1\)"):
        run(x_scale=jnp.ones((4, 1)))
    with pytest.raises(TypeError, match="x_scale is of floats; got int32"):
        run(x_scale=jnp.ones((5, 1), jnp.int32))
    with pytest.raises(TypeError, match="of int8 without scales; got dtype"):
        run(x_scale=jnp.ones((5, 1)), dtype=jnp.int32)


@pytest.mark.parametrize("codes", [False, True])
def test_the_kernel_for_tpus_in_the_op(codes, monkeypatch):
    kernel = lambda table, problem, implementation, *args: table[0].run(*args)
    monkeypatch.setattr(_nm_matmul, "dispatch", kernel)
    values, indices, _, w = problem((), 80, 130, 2, 4, codes=codes)
    x = random(2, 5, 320)
    x = (x * 20).astype(np.int8) if codes else x
    with pltpu.force_tpu_interpret_mode():
        y = jc.ops.nm_matmul(x, values, indices, n=2, m=4)
    assert_sums(y, x.astype(np.float64) @ w, abs(x).astype(np.float64) @ abs(w), 320)
    if codes:  # with a scale that all columns share, and packed
        (values, indices, scale), w = scaled((), 80, 130, 4, 64)
        w = w / scale[np.arange(320) // 64] * scale[np.arange(320) // 64, :1]
        x, options = random(2, 5, 320), dict(n=2, m=4, bits=4, group_size=64)
        with pltpu.force_tpu_interpret_mode():
            y = jc.ops.nm_matmul(x, values, indices, scale[:, :1], **options)
        assert_sums(y, x @ w, abs(x) @ abs(w), 320)
        # Integers on both sides, rows and columns scaled after the sums.
        (values, indices, scale), w = scaled((), 80, 130, 4, None)
        x, x_scale = (random(2, 5, 320) * 20).astype(np.int8), abs(random(2, 5, 1, seed=1))
        with pltpu.force_tpu_interpret_mode():
            y = jc.ops.nm_matmul(x, values, indices, scale, n=2, m=4, bits=4, x_scale=x_scale)
        wide = x.astype(np.float64) * x_scale
        assert_sums(y, wide @ w, abs(wide) @ abs(w), 3)  # exact sums, two scales


@pytest.mark.parametrize(
    ("pattern", "dtype", "weights", "platform", "name", "reason"),
    [
        ((2, 4), "bfloat16", "bfloat16", "tpu", "pallas_tpu", ""),
        ((4, 16), "int8", "int8", "tpu", "pallas_tpu", ""),
        ((2, 4), "float16", "float16", "tpu", "reference", "float32, bfloat16 and int8, not"),
        ((3, 5), "float32", "float32", "tpu", "reference", "up to 4 of 16, not 3:5"),
        ((8, 16), "float32", "float32", "cuda", "reference", "up to 4 of 16, not 8:16"),
        ((2, 4), "float16", "int8", "cuda", "triton", ""),
        ((2, 4), "int8", "int8", "cuda", "triton", ""),
        ((2, 4), "float16", "float64", "cuda", "reference", "not float64"),
        ((2, 4), "float32", "float32", "cpu", "reference", "it is for TPUs"),
    ],
)
def test_who_takes_what(pattern, dtype, weights, platform, name, reason, monkeypatch):
    monkeypatch.setattr(_kernels, "_has_jax_triton", lambda: True)
    if platform == "cuda":  # and Triton, which chooses the tile, may be absent
        monkeypatch.setattr(_kernels, "chip", lambda platform: "9.0")
        tile = SimpleNamespace(blocks=lambda *sizes, chip: 64)
        monkeypatch.setattr(_kernels, "kernel_module", lambda op, backend: tile)
    choice = _nm_matmul.plan(16, 1024, 1024, *pattern, weights, dtype, platform)
    assert choice.implementation.name == name
    assert reason in choice.why
    said = "blocks of" in choice.why
    assert said == (name != "reference")


SPECS = {
    "floats": None,
    "int8": jc.quantize.int8(),
    "int4 by 128": jc.quantize.int4(group_size=128),
    "w8a8": jc.quantize.w8a8(),
    "w4a8, offsets": jc.quantize.w4a8(act_symmetric=False),
}


@pytest.mark.parametrize("spec", SPECS)
def test_explain_and_the_program_agree_for_tpus(spec):
    w, pattern = jnp.asarray(random(512, 256)), jc.prune.nm(2, 4, axis=-2)
    masks = jc.prune.mask({"w": abs(w)}, pattern, 1.0)
    params = {"w": w}
    if SPECS[spec] is not None:
        params = jc.quantize.quantize(params, {"w": SPECS[spec]})
    params = jc.prune.pack(params, masks, pattern=pattern)
    fn, x = lambda p, x: x @ p["w"], random(16, 512)
    for platform, name in (("tpu", "pallas_tpu"), ("cpu", "reference")):
        row, *more = jc.explain(fn, params, x, platform=platform)
        integers = params["w"].act is not None and platform == "cpu"
        assert (row.op, row.implementation) == ("nm" if integers else "nm_matmul", name)
        assert row.why.startswith("rows quantized, then kept values") == (
            params["w"].act is not None and platform == "tpu"
        )
        # Without a kernel of its own it is the dense product of integers, as before.
        assert [r.op for r in more] == ["int8_matmul"] * integers
    exported = jax.export.export(jax.jit(jc.accelerate(fn)), platforms=["tpu"])(params, x)
    assert exported.mlir_module().count("@tpu_custom_call") == 1
    assert "512x256x" not in exported.mlir_module()  # no dense weight


@pytest.mark.parametrize(
    ("matrices", "options"),
    [
        ((2, 3), {}),
        ((), dict(act_symmetric=False)),
        ((), dict(static=True)),
        ((3,), dict(per_token=False, axis=(0, -2))),
    ],
    ids=["rows", "offsets", "static", "shared"],
)
def test_what_kernels_multiply_is_what_the_dense_integers_are(options, matrices, monkeypatch):
    """The steps around a kernel, with the reference in its place, and the gradients."""
    pattern = jc.prune.nm(2, 4, axis=-2)
    w, x = {"w": jnp.asarray(random(*matrices, 32, 12))}, jnp.asarray(random(*matrices, 5, 32))
    fn = lambda p, x: jax.nn.relu(x @ p["w"] + jnp.arange(12.0)) + 1
    spec = {"w": jc.quantize.w8a8(**options)}
    stats = jc.calibrate(fn, w, [x], jc.statistics.absmax()) if options.get("static") else None
    masks = jc.prune.mask({"w": abs(w["w"])}, pattern, 1.0)
    q = jc.quantize.quantize(w, spec, stats=stats)
    packed = jc.prune.pack(q, masks, pattern=pattern)
    dense = {"w": packed["w"].expanded()}
    loss = lambda p, x: (jc.accelerate(fn)(p, x) ** 2).sum()
    run = lambda p: jax.jit(lambda x: jax.value_and_grad(loss, 1)(p, x))(x)
    want, dwant = run(dense)
    taken = []

    def kernel(table, problem, implementation, *args):
        taken.append(problem.dtype)
        return table[0].run(*args)

    monkeypatch.setattr(_nm_linear, "dispatch", kernel)
    got, dgot = run(packed)
    # Equal integers; scales and what follows are a few roundings in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(dgot, dwant, rtol=1e-4, atol=1e-4)
    assert taken == ["int8"]


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, "bfloat16", "puts the zeros back was faster"),
        (dict(n=1), "bfloat16", "two of four, not 1:4"),
        ({}, "float32", "alike, not float32 x bfloat16"),
        (dict(weights="int8", bits=4), "int8", "as they are, not packed"),
        (dict(scaled=True), "bfloat16", "it scales integers, not floats"),
        (dict(weights="int8", scaled=True), "int8", "puts the zeros back was faster"),
        (dict(weights="int8", scaled=True, group_size=64), "int8", "not groups of 64"),
    ],
)
def test_sparse_tensor_cores_are_taken_by_name_alone(changes, dtype, reason, monkeypatch):
    monkeypatch.setattr(_kernels, "_has_jax_triton", lambda: True)
    monkeypatch.setattr(_kernels, "chip", lambda platform: "9.0")
    options = dict(n=2, m=4, weights="bfloat16", dtype=dtype, implementation=None)
    table = _nm_matmul._table(_nm_matmul._Static(**{**options, **changes}))
    [sparse] = [i for i in table if i.name == "triton_sparse"]
    problem = Problem(m=16, k=1024, n=1024, dtype=dtype)
    said = sparse.refuses(problem, "cuda") or sparse.defers(problem, "cuda")
    assert reason in said
    assert (sparse.refuses(problem, "cuda") is None) == (reason == "puts the zeros back was faster")
    assert "NVIDIA" in sparse.refuses(problem, "tpu")


VALUES, INDICES = np.ones((16, 4), np.float32), np.zeros((16, 4), np.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=np.ones((2, 32), np.int32)), TypeError, "floats or int8; x is int32"),
        (dict(x=np.ones((2, 32), np.int8)), TypeError, "int8 values for int8 activations"),
        (dict(values=VALUES.astype(np.int16)), TypeError, "values is int16"),
        (dict(indices=INDICES.astype(np.int32)), TypeError, "uint8; indices is int32"),
        (dict(n=5), ValueError, "got 5 of 4"),
        (dict(bits=1), ValueError, "2 to 8 bits; got bits=1"),
        (dict(x=np.ones((2, 30), np.float32)), ValueError, "a multiple of 4"),
        (dict(x=np.ones((2, 36), np.float32)), ValueError, r"values\[..., 18, columns\]"),
        (dict(indices=INDICES[:8]), ValueError, r"indices\[..., 16, columns\]"),
        (dict(implementation="triton"), ValueError, "'triton' cannot run: it is for GPUs"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    good = dict(x=np.ones((2, 32), np.float32), values=VALUES, indices=INDICES, n=2, m=4)
    given = good | changes
    arrays = [given.pop(name) for name in ("x", "values", "indices")]
    with pytest.raises(error, match=message):
        jc.ops.nm_matmul(*arrays, **given)
