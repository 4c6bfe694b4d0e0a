"""Kernels of devices as implementations: who takes what, in words and in the program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
import oracles
from checks import ON_CPU, quantized, random
from jaxcompress.kernels.triton_launch import Blocks
from jaxcompress.ops import _int8_matmul, _kernels, _nm_matmul, _quantized_matmul
from jaxcompress.ops._choice import Problem, choose
from jaxcompress.ops._kernels import call_kernel

LARGE = Problem(m=16, k=4096, n=4096, bits=4, group_size=128, dtype="bfloat16", packed=True)
X = np.ones(8, np.float32)


def lowered(fn, *args, platform="tpu"):
    exported = jax.export.export(jax.jit(fn), platforms=[platform])(*args)
    return exported.mlir_module()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(dtype="float16"), "it takes float32 and bfloat16, not float16"),
        (dict(group_size=100), "its groups are powers of two from 32 on, not 100"),
        (dict(group_size=16), "from 32 on, not 16"),
        (dict(transpose_w=True), "along the rows of w, not along its columns"),
    ],
)
def test_a_problem_that_no_kernel_does_gets_the_reference_and_the_reason(changes, reason):
    problem = Problem(**{**vars(LARGE), **changes})
    choice = choose(_quantized_matmul.table(), problem, "tpu")
    assert choice.implementation.name == "reference"
    assert f"not pallas_tpu: {reason}" in choice.why or reason in choice.why
    with pytest.raises(ValueError, match=f"'pallas_tpu' cannot run: .*{reason}"):
        choose(_quantized_matmul.table(), problem, "tpu", "pallas_tpu")


def test_a_group_of_everything_is_none():
    problem = Problem(**{**vars(LARGE), "group_size": 5000})
    assert choose(_quantized_matmul.table(), problem, "tpu").implementation.name == "pallas_tpu"


def test_small_weights_are_left_to_xla_unless_asked_for():
    small = Problem(**{**vars(LARGE), "k": 64})
    choice = choose(_quantized_matmul.table(), small, "tpu")
    assert choice.implementation.name == "reference"
    assert "64 x 4096 weights are less than one block of 256 x 128" in choice.why
    named = choose(_quantized_matmul.table(), small, "tpu", "pallas_tpu")
    assert named.implementation.name == "pallas_tpu"


def test_int8_products_are_left_to_xla_unless_asked_for():
    problem = Problem(m=4096, k=4096, n=4096)
    for platform, name in (("tpu", "pallas_tpu"),):
        choice = choose(_int8_matmul.table(), problem, platform)
        assert choice.implementation.name == "reference"
        assert f"not {name}: XLA multiplies int8 by itself" in choice.why
        assert choose(_int8_matmul.table(), problem, platform, name).implementation.name == name


@pytest.mark.parametrize(
    ("installed", "chip", "reason"),
    [
        (False, None, "not triton: jax_triton is not installed"),
        (True, None, "not triton: it is compiled for the GPU at hand, and there is none"),
        (True, "7.5", "not triton: it is proven for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0, not for 7.5"),
        (True, "9.0", None),
    ],
)
def test_triton_needs_a_package_and_a_gpu(monkeypatch, installed, chip, reason):
    monkeypatch.setattr(_kernels, "_has_jax_triton", lambda: installed)
    monkeypatch.setattr(_kernels, "chip", lambda platform: chip)
    choice = choose(_quantized_matmul.table(), LARGE, "cuda")
    assert choice.implementation.name == ("triton" if reason is None else "reference")
    assert reason is None or reason in choice.why


def test_pallas_kernels_are_for_the_tpus_that_they_compile_for(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for kind, name in (("TPU v4", "reference"), ("TPU v5 lite", "pallas_tpu")):
        monkeypatch.setattr(_kernels, "chip", lambda platform, kind=kind: kind)
        choice = choose(_quantized_matmul.table(), LARGE, "tpu")
        assert choice.implementation.name == name
        assert ("not for TPU v4" in choice.why) == (kind == "TPU v4")


def test_several_tpus_need_axes_that_are_explicit_or_manual(monkeypatch):
    """This process has eight devices; as TPUs they would be too many for XLA to cut a kernel."""
    monkeypatch.setattr(_kernels, "chip", lambda platform: "TPU v5 lite")
    table = _quantized_matmul.table()
    choice = choose(table, LARGE, "tpu")
    assert choice.implementation.name == "reference"
    assert "XLA cannot cut it over several TPUs" in choice.why
    assert choose(table, LARGE, "tpu", "pallas_tpu").implementation.name == "pallas_tpu"
    for kind, name in ((AxisType.Auto, "reference"), (AxisType.Explicit, "pallas_tpu")):
        with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(kind,))):
            assert choose(table, LARGE, "tpu").implementation.name == name
    mesh, seen = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), []
    inside = lambda x: (seen.append(choose(table, LARGE, "tpu").implementation.name), x)[1]
    jax.eval_shape(jax.shard_map(inside, mesh=mesh, in_specs=P("x"), out_specs=P("x")), X)
    assert seen == ["pallas_tpu"]


def test_this_process_has_no_chip():
    assert [_kernels.chip(platform) for platform in ("tpu", "cuda", "rocm")] == [None] * 3


def test_explain_and_the_program_agree_for_tpus():
    params = {"w": quantized(random(512, 256), jc.quantize.int4(group_size=64))}
    fn = lambda p, x: x @ p["w"]
    x = random(16, 512)
    [row] = jc.explain(fn, params, x, platform="tpu")
    assert (row.op, row.implementation) == ("quantized_matmul", "pallas_tpu")
    text = lowered(jc.accelerate(fn), params, x)
    assert "tpu_custom_call" in text
    assert "512x256xf32" not in text  # no dense weight
    [row] = jc.explain(fn, params, x, platform="cpu")
    assert row.implementation == ON_CPU
    assert "tpu_custom_call" not in lowered(jc.accelerate(fn), params, x, platform="cpu")


def test_explain_says_how_a_kernel_cuts_the_product(monkeypatch):
    params = {
        "float": quantized(random(512, 256), jc.quantize.int4(group_size=64)),
        "integer": quantized(random(512, 256), jc.quantize.w4a8(group_size=128)),
    }
    fn = lambda p, x: (x @ p["float"], x @ p["integer"])
    for here, words in ((None, "by default"), ("TPU v6 lite", "for TPU v6 lite")):
        monkeypatch.setattr(_kernels, "chip", lambda platform, here=here: here)
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        for row in jc.explain(fn, params, random(1000, 512), platform="tpu"):
            kernel = _kernels.kernel_module(row.op, "pallas_tpu")
            group = 64 if row.path == "float" else 128
            cut = kernel.blocks(1000, 256, 512, group, here)
            assert row.why.endswith(f"; blocks of {' x '.join(map(str, cut))}, {words}")
    tile = Blocks(m=16, n=64, k=128, num_warps=4, num_stages=3)
    assert _kernels._in_words(tile) == "tiles of 16 x 64 x 128, 4 warps, 3 stages"
    said = _kernels._in_words(tile._replace(programs=512))
    assert said == "tiles of 16 x 64 x 128, 4 warps, 3 stages, 512 programs"


TABLES = [
    _quantized_matmul.table(),
    _nm_matmul._table(_nm_matmul._Static(2, 4, "int8", "bfloat16", None)),
]
HERE = [("cuda", "triton", "9.0"), ("rocm", "triton", "gfx942"), ("tpu", "pallas_tpu", "TPU v5")]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("platform", "kernel", "here"), HERE)
def test_of_many_rows_a_gpu_leaves_the_product_to_xla(table, platform, kernel, here, monkeypatch):
    monkeypatch.setattr(_kernels, "_has_jax_triton", lambda: True)
    monkeypatch.setattr(_kernels, "chip", lambda asked: here if asked == platform else None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for m in (64, 65):
        problem = Problem(m=m, k=1024, n=1024, dtype="bfloat16")
        choice = choose(table, problem, platform)
        left = m > 64 and platform != "tpu"
        assert choice.implementation.name == ("reference" if left else kernel)
        assert ("of more than 64 rows XLA" in choice.why) == left


@pytest.mark.parametrize("op", ["quantized_matmul", "w4a8_matmul"])
def test_one_program_for_several_platforms_has_the_kernel_and_runs_here(op):
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 9, (16, 512)), rng.integers(0, 256, (256, 128)).astype(np.uint8)
    x = x.astype(np.int8 if op == "w4a8_matmul" else np.float32)
    scale = np.ones((4, 128), np.float32)
    options = {"bits": 4} if op == "quantized_matmul" else {}
    run = functools.partial(getattr(jc.ops, op), group_size=128, **options)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "tpu", "cuda"])(x, w, scale)
    assert "tpu_custom_call" in exported.mlir_module()
    codes = oracles.unpack(w, 4, 512, 0)
    np.testing.assert_array_equal(exported.call(x, w, scale), x.astype(np.int64) @ codes)


def test_what_surrounds_a_kernel_may_be_any_transform():
    """vmap, grad, scan and shard_map, lowered for TPUs with the kernel named."""
    w, scale = np.zeros((256, 128), np.uint8), np.ones((8, 128), np.float32)
    op = functools.partial(
        jc.ops.quantized_matmul, bits=4, group_size=64, implementation="pallas_tpu"
    )
    x = np.ones((3, 16, 512), np.float32)
    mapped = jax.vmap(op, (0, None, None))
    graded = jax.value_and_grad(lambda x, w, s: mapped(x, w, s).sum(), argnums=(0, 2))
    scanned = lambda x, w, s: jax.lax.scan(lambda c, x: (c, op(x, w, s)), 0, x)[1]
    both = jax.vmap(op, (0, 0, None))
    for fn, args in (
        (mapped, (x, w, scale)),
        (graded, (x, w, scale)),
        (scanned, (x, w, scale)),
        (both, (x, np.stack([w] * 3), scale)),
    ):
        assert "tpu_custom_call" in lowered(fn, *args)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(op, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    assert "tpu_custom_call" in lowered(inside, x[0], w, scale)


def test_mapped_rows_become_rows_and_mapped_weights_a_batch():
    shapes = []

    def kernel(x, w):
        shapes.append((x.shape, w.shape))
        return jnp.einsum("bmk,bkn->bmn", x, w)

    run = lambda x, w: call_kernel(kernel, ("bmk", "bkn"), x[None], w[None])[0]
    x, w = random(3, 4, 5), random(3, 5, 6, seed=1)
    np.testing.assert_allclose(jax.vmap(run, (0, None))(x, w[0]), x @ w[0], rtol=1e-5, atol=1e-6)
    assert shapes[-1] == ((1, 12, 5), (1, 5, 6))
    np.testing.assert_allclose(jax.vmap(run)(x, w), x @ w, rtol=1e-5, atol=1e-6)
    assert shapes[-1] == ((3, 4, 5), (3, 5, 6))
    got = jax.vmap(run, (None, 0))(x[0], w)
    np.testing.assert_allclose(got, x[0] @ w, rtol=1e-5, atol=1e-6)
    twice = jax.vmap(jax.vmap(run, (0, None)), (None, 0))(x, w)
    np.testing.assert_allclose(twice, x[None] @ w[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "kind", "gathers"),
    [
        (P("x", None), P(None, None), AxisType.Auto, False),
        (P(None, None), P(None, "y"), AxisType.Auto, False),
        (P("x", None), P(None, "y"), AxisType.Auto, False),
        (P("x", None), P(None, "y"), AxisType.Explicit, False),
        (P(None, "x"), P("x", None), AxisType.Auto, True),  # k is not cut
    ],
)
def test_rows_and_columns_stay_where_they_are(x_spec, w_spec, kind, gathers):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    kernel = lambda x, w, s: jnp.einsum("bmk,bkn->bmn", x, w) * s

    @jax.jit
    def run(x, w, s):
        return call_kernel(kernel, ("bmk", "bkn", "bgn"), x[None], w[None], s[None])[0]

    x, w, s = random(8, 16), random(16, 6, seed=1), random(1, 6, seed=2)
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = place(x, x_spec), place(w, w_spec), place(s, P(None, w_spec[1]))
    got = run(*args)
    np.testing.assert_allclose(got, x @ w * s, rtol=1e-5, atol=1e-5)
    text = run.lower(*args).compile().as_text()
    assert bool(re.search("all-gather|all-to-all|collective-permute", text)) == gathers
    if not gathers:
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(x_spec[0], w_spec[1])), 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_only_the_result_has_is_not_cut(kind):
    """A result of other letters, p and q, of which no operand has the second."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    kernel = lambda x, w: jnp.einsum("bmk,bpk->bpm", x, w)[..., :6]
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    x, w = random(8, 16), random(12, 16, seed=1)

    def run(x, w):
        out = call_kernel(kernel, ("bmk", "bpk"), x[None], w[None], result="bpq")[0]
        if kind is AxisType.Auto:  # the compiler may want the columns cut
            out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P("x", "y")))
        return out

    got = jax.jit(run)(place(x, "x", None), place(w, "y", None))
    np.testing.assert_allclose(got, (w @ x.T)[:, :6], rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda x: call_kernel(kernel, ("bmk", "bpk"), x[None], w[None], result="bpq"))
    np.testing.assert_allclose(mapped(x[None])[0, 0], (w @ x.T)[:, :6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("n_axis", [None, "y"])
def test_a_program_with_kernels_for_other_platforms_shards_here(kind, n_axis):
    """Large enough that the program has a branch for TPUs; the types of both agree."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 9, (16, 512)).astype(np.float32), rng.integers(0, 256, (256, 128))
    w, scale = w.astype(np.uint8), np.ones((8, 128), np.float32)
    op = functools.partial(jc.ops.quantized_matmul, bits=4, group_size=64)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    args = place(x, "x", None), place(w, None, n_axis), place(scale, None, n_axis)
    got = jax.jit(op)(*args)
    np.testing.assert_array_equal(got, op(x, w, scale, implementation="reference"))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("x", n_axis)), 2)


def test_gradients_of_the_scales_of_an_int8_product():
    """The op is linear in each: the derivative is the product without it."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((5, 33), (33, 4)))
    x_scale = rng.uniform(1, 2, (5, 1)).astype(np.float32)
    w_scale = rng.uniform(1, 2, (1, 4)).astype(np.float32)
    run = lambda a, b: jc.ops.int8_matmul(x, w, x_scale=a, w_scale=b).sum()
    dx, dw = jax.grad(run, argnums=(0, 1))(x_scale, w_scale)
    sums = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(dx, (sums * w_scale).sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(dw, (sums * x_scale).sum(0, keepdims=True), rtol=1e-5)
