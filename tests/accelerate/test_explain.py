"""`explain`: a row for each leaf and use, right for every platform and on every call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import ON_CPU, made, quantized, random

X = jax.ShapeDtypeStruct((32, 64), jnp.float32)
model = lambda p, x: x @ p["w"]


def test_a_row_says_all_there_is():
    q = {"a": {"w": quantized(random(64, 8), jc.quantize.w8a8())}}
    q = jc.quantize.quantize({"a": {"w": random(64, 8)}}, {"a/w": jc.quantize.w8a8()})
    [row] = jc.explain(lambda p, x: x @ p["a"]["w"], q, X)
    assert row.path == "a/w"
    assert row.container == "QuantizedArray"
    assert row.primitive == "dot_general"
    assert (row.op, row.implementation) == ("int8_matmul", ON_CPU)
    assert row.nbytes == 64 * 8 + 8 * 4
    assert "uint8 x int8" in row.why


@pytest.mark.parametrize(
    ("platform", "implementation"),
    [
        ("cpu", ON_CPU),
        ("gpu", "reference"),
        ("cuda", "reference"),
        ("rocm", "reference"),
        ("tpu", "reference"),
    ],
)
def test_platform(platform, implementation):
    q = {"w": quantized(random(64, 8), jc.quantize.w8a8())}
    [row] = jc.explain(model, q, X, platform=platform)
    assert row.implementation == implementation
    if implementation == "reference":
        name = "cuda" if platform == "gpu" else platform
        assert f"not xla: it is for the CPU, and {name}" in row.why


def test_the_platform_is_that_of_the_default_backend():
    q = {"w": made((64, 8))}
    assert jc.explain(model, q, X) == jc.explain(model, q, X, platform=jax.default_backend())


def test_unknown_platform():
    with pytest.raises(ValueError, match=r"one of gpu, cpu, cuda, rocm, tpu; got 'npu'"):
        jc.explain(model, {"w": made((64, 8))}, X, platform="npu")


def test_nothing_compressed():
    with pytest.raises(ValueError, match="no compressed array in params"):
        jc.explain(model, {"w": jnp.ones((64, 8))}, X)


def test_nothing_runs():
    def fn(p, x):
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return x @ p["w"]

    assert len(jc.explain(fn, {"w": made((64, 8))}, X)) == 1


@jax.jit
def decodes(w):
    return jnp.sort(w, 0)


@pytest.mark.parametrize("inner", [decodes, jax.jit(lambda w: w * 2), jax.checkpoint(jnp.sin)])
def test_the_second_call_sees_what_the_first_saw(inner):
    """quax remembers jitted functions by the static fields of their arguments."""
    fn = lambda p, x: x @ inner(p["w"])
    q = {"w": made((64, 8), path="w")}
    first = jc.explain(fn, q, X)
    assert [row.path for row in first.materialised] == ["w"]
    jax.jit(jc.accelerate(fn))(q, jnp.ones((32, 64)))
    assert jc.explain(fn, q, X) == first


def test_a_row_for_each_use_and_one_for_equal_uses():
    q = {"w": made((8, 8), path="w"), "v": made((8, 8), path="v")}
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    rows = jc.explain(lambda p, x: x @ p["w"] @ p["w"] @ p["v"] + jnp.sum(p["v"] * 2), q, x)
    assert sorted((row.path, row.primitive) for row in rows) == [
        ("v", "dot_general"),
        ("v", "mul"),
        ("w", "dot_general"),
    ]
    assert [row.primitive for row in rows.materialised] == ["mul"]
    assert isinstance(rows.materialised, jc.explain(lambda p: p["v"] * 2, q).__class__)


def test_a_primitive_that_nobody_registered_is_decoded_and_recorded():
    q = {"w": made((8, 8), path="w")}
    rows = jc.explain(lambda p: jnp.fft.fft2(p["w"]), q)
    assert {(row.path, row.implementation) for row in rows} == {("w", "materialised")}
    got = jc.accelerate(lambda p: jnp.linalg.norm(p["w"]))(q)
    np.testing.assert_allclose(got, np.linalg.norm(q["w"].materialise()), rtol=1e-6)


def test_training_twins_and_bitmaps_have_rows_too():
    w = jnp.asarray(random(64, 8))
    q = {"w": jc.quantize.prepare_qat({"w": w}, {"w": jc.quantize.int8()})["w"]}
    [row] = jc.explain(model, q, X)
    assert (row.op, row.implementation) == ("simulated", "reference")
    q = jc.prune.pack({"w": w}, {"w": w > 0})
    [row] = jc.explain(model, q, X)
    assert (row.op, row.primitive) == ("bitmap", "expand")
    assert row.nbytes == q["w"].nbytes


def test_it_prints_as_a_table():
    q = {"w": made((64, 8), path="w")}
    head, line = str(jc.explain(model, q, X)).splitlines()
    assert head.split() == ["path", "primitive", "op", "implementation", "bytes", "why"]
    assert line.split()[:5] == ["w", "dot_general", "quantized_matmul", ON_CPU, "544"]


def test_rows_that_are_quantized_first_reach_blocks_as_float32():
    mask = jc.prune.mask({"w": jnp.ones((256, 128))}, jc.prune.block(128, 128), 0.5)
    weights = jc.quantize.quantize({"w": jnp.ones((256, 128))}, {"w": jc.quantize.w8a8()})
    blocks = jc.prune.pack(weights, mask, pattern=jc.prune.block(128, 128))
    x = jnp.ones((8, 256), jnp.float16)
    [row] = jc.explain(lambda p, x: x @ p["w"], blocks, x, platform="tpu")
    assert row.implementation == "pallas_tpu"
