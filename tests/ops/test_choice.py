"""The table of implementations: what is taken, what is said, and that both agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from checks import quantized, random
from jaxcompress.kernels import cpu
from jaxcompress.ops import _choice, _int8_matmul, _quantized_matmul
from jaxcompress.ops._choice import Implementation, Problem, choose, dispatch
from jaxcompress.ops._refusal import refused

SMALL, LARGE = Problem(m=1, k=4, n=4), Problem(m=100, k=4, n=4)


def refuses(problem, platform):
    if platform != "cpu":
        return f"not for {platform}"
    return "too few rows" if problem.m < 10 else None


TABLE = (
    Implementation("fast", "a fast product", lambda x: x + 1, refuses),
    Implementation("reference", "a plain product", lambda x: x + 2),
)


def test_the_first_that_does_the_problem_is_taken():
    assert choose(TABLE, LARGE, "cpu") == (TABLE[0], "a fast product")


def test_what_was_passed_over_is_said():
    assert choose(TABLE, SMALL, "cpu") == (TABLE[1], "a plain product; not fast: too few rows")
    assert choose(TABLE, LARGE, "tpu").why == "a plain product; not fast: not for tpu"


def test_a_named_one_is_taken_or_raises():
    assert choose(TABLE, LARGE, "cpu", "reference") == (
        TABLE[1],
        "a plain product (asked for by name)",
    )
    with pytest.raises(ValueError, match="implementation 'fast' cannot run: too few rows"):
        choose(TABLE, SMALL, "cpu", "fast")
    with pytest.raises(ValueError, match="no implementation 'slow' of this op; there are 'fast'"):
        choose(TABLE, SMALL, "cpu", "slow")


@pytest.mark.parametrize(
    ("problem", "name", "expected"),
    [(LARGE, None, 1), (SMALL, None, 2), (LARGE, "fast", 1), (LARGE, "reference", 2)],
)
def test_dispatch_runs_the_choice(problem, name, expected):
    assert int(jax.jit(lambda x: dispatch(TABLE, problem, name, x))(jnp.int32(0))) == expected


def test_dispatch_refuses_what_runs_nowhere():
    with pytest.raises(ValueError, match="implementation 'fast' cannot run: too few rows"):
        dispatch(TABLE, SMALL, "fast", jnp.int32(0))


def test_one_program_has_the_choice_of_each_platform():
    table = (
        Implementation("fast", "", jnp.sin, refuses),
        Implementation("reference", "", jnp.cos),
    )
    fn = jax.jit(lambda x: dispatch(table, LARGE, None, x))
    for platform, there, absent in (("cpu", "sine", "cosine"), ("tpu", "cosine", "sine")):
        text = jax.export.export(fn, platforms=[platform])(jnp.float32(0)).mlir_module()
        assert f"stablehlo.{there} " in text
        assert f"stablehlo.{absent} " not in text
    both = jax.export.export(fn, platforms=["cpu", "tpu"])(jnp.float32(0)).mlir_module()
    assert "stablehlo.sine " in both
    assert "stablehlo.cosine " in both


def on_tpus(x, w, scale):
    return jc.ops.int8_matmul(x, w, w_scale=scale, implementation="pallas_tpu")


NAMED = [np.ones((8, 64), np.int8), np.ones((64, 8), np.int8), np.ones((1, 8), np.float32)]
HERE = "implementation 'pallas_tpu' cannot run on cpu, .*compiled for: it is for TPUs; there '.*'"


@pytest.mark.parametrize(
    "fn",
    [
        on_tpus,
        jax.jit(on_tpus),
        lambda x, w, s: jax.vmap(on_tpus, (0, None, None))(x[None], w, s),
        jax.jit(lambda x, w, s: jax.vmap(on_tpus)(x[None], w[None], s[None])),
        lambda x, w, s: jax.grad(lambda s: on_tpus(x, w, s).sum())(s),
        jax.jit(lambda x, w, s: jax.value_and_grad(lambda s: on_tpus(x, w, s).sum())(s)),
        lambda x, w, s: jax.lax.scan(lambda c, x: (c, on_tpus(x, w, s)), 0, x[None]),
        lambda *args: jax.jit(
            jax.shard_map(
                on_tpus,
                mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
                in_specs=(P("d"), P(), P()),
                out_specs=P("d"),
            )
        )(*args),
    ],
    ids=["eager", "jit", "vmap", "jit vmap", "grad", "jit grad", "scan", "shard_map"],
)
def test_a_named_implementation_gives_its_reason_here(fn):
    with pytest.raises(ValueError, match=HERE):
        fn(*NAMED)


def test_a_named_implementation_gives_its_reason_without_jit_and_over_explicit_axes():
    with jax.disable_jit():
        with pytest.raises(ValueError, match=HERE):
            on_tpus(*NAMED)
        assert jc.ops.int8_matmul(*NAMED[:2], implementation="xla")[0, 0] == 64
        assert jc.ops.int8_matmul(*NAMED[:2])[0, 0] == 64
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(NAMED[0], NamedSharding(mesh, P("d", None)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=HERE):
        jax.jit(on_tpus)(x, *NAMED[1:])


@pytest.mark.parametrize("platforms", [["tpu"], ["cpu", "tpu"], ["tpu", "rocm"]])
def test_a_named_implementation_gives_the_reason_of_the_platform_compiled_for(platforms):
    """One traced program: lowering it decides."""
    traced = jax.jit(on_tpus).trace(*NAMED)
    lower = lambda: traced.lower(lowering_platforms=tuple(platforms))
    export = lambda: jax.export.export(jax.jit(on_tpus), platforms=platforms)(*NAMED)
    for run in (lower, export):
        if platforms == ["tpu"]:
            run()
            continue
        [wrong] = {*platforms} - {"tpu"}
        with pytest.raises(ValueError, match=f"cannot run on {wrong}, .*: it is for TPUs"):
            run()


def test_a_platform_that_the_library_does_not_know_has_a_reason():
    stop = refused(jnp.sin, {"cpu": "not here"}, "it is for another one")
    for platform, why in (("cpu", "not here"), ("METAL", "it is for another one")):
        with pytest.raises(ValueError, match=why):
            jax.jit(stop).trace(np.float32(0)).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("lead", [(), (2,), (0,)])
def test_a_named_kernel_takes_no_rows(lead):
    """The kernels flatten leading dimensions, whose number zero elements leave open."""
    x, w = np.zeros((*lead, 0, 64), np.int8), np.zeros((*lead, 64, 8), np.int8)
    op = functools.partial(jc.ops.int8_matmul, implementation="pallas_tpu")
    for fn, given in ((op, x), (jax.vmap(op, (0, None)), np.stack([x, x]))):
        [out] = jax.export.export(jax.jit(fn), platforms=["tpu"])(given, w).out_avals
        assert out.shape == (*given.shape[:-1], 8)


def test_the_platforms_are_those_of_jax():
    assert set(_choice.PLATFORMS) == {"cpu", "cuda", "rocm", "tpu"}


@pytest.mark.parametrize("table", [_int8_matmul.table(), _quantized_matmul.table()])
def test_a_table_ends_with_a_reference_that_refuses_nothing(table):
    assert table[-1].name == "reference"
    problems = [Problem(m=m, k=7, n=3, bits=b, dtype="bfloat16") for m in (0, 1) for b in (2, 8)]
    for platform in _choice.PLATFORMS:
        assert all(table[-1].refuses(p, platform) is None for p in problems)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("shape", [(16, 6), (3, 16, 6)])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("native", [True, False])
def test_what_is_said_is_what_is_compiled(rows, shape, group_size, native, monkeypatch):
    """An unsigned operand is the mark of the xla product, a custom call that of the native one."""
    if not native:
        monkeypatch.setattr(cpu, "missing", lambda: "they were left out")
    expected = "xla" if cpu.missing() else "cpu"
    spec = jc.quantize.w8a8(group_size=group_size)
    params, x = {"w": quantized(random(*shape), spec)}, random(*shape[:-2], rows, 16)
    fn = lambda p, x: x @ p["w"]
    [row] = jc.explain(fn, params, x)
    text = jax.jit(jc.accelerate(fn)).lower(params, x).as_text()
    unsigned = any("dot_general" in line and "ui8" in line for line in text.splitlines())
    assert (row.op, row.implementation) == ("int8_matmul", expected)
    assert (f"not cpu: {cpu.missing()}" in row.why) == (expected == "xla")
    assert unsigned == (expected == "xla")
    assert ("jaxcompress_quantized_matmul" in text) == (expected == "cpu")
