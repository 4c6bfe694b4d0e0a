"""jit, vmap, donation, sharding, shard_map and export around and inside accelerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
import oracles
from checks import (
    EPS,
    SPECS,
    assert_einsum,
    assert_model,
    made,
    quantized,
    random,
)

X = random(16, 64)
model = lambda p, x: x @ p["w"]
fast = jc.accelerate(model)


def assert_same(got, want, spec):
    """Integer sums have the same bits in any program; float ones the same value."""
    if spec == "w8a8":
        np.testing.assert_array_equal(got, want)
    else:
        assert_model(got, np.asarray(want, np.float64))


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def test_without_compressed_arguments_it_is_the_function_itself():
    calls = []

    def fn(p, x):
        calls.append((type(p["w"]), x))
        return x

    w = np.eye(2)
    assert jc.accelerate(fn)({"w": w}, "any object") == "any object"
    assert calls == [(np.ndarray, "any object")]


def test_it_keeps_the_name_and_takes_keywords():
    def forward(params, *, x):
        """Documented."""
        return x @ params["w"]

    fn = jc.accelerate(forward)
    assert (fn.__name__, fn.__doc__) == ("forward", "Documented.")
    q = quantized(random(64, 8), jc.quantize.int8())
    np.testing.assert_array_equal(fn({"w": q}, x=X), fast({"w": q}, X))


@pytest.mark.parametrize("spec", SPECS)
def test_with_and_without_jit(spec):
    q = {"w": quantized(random(64, 24), SPECS[spec]())}
    assert_same(fast(q, X), jax.jit(fast)(q, X), spec)


@pytest.mark.parametrize("spec", SPECS)
def test_second_calls_do_not_trace_again(spec):
    """New numbers in the same container, or the container of another seed, are no new program."""
    traces = []

    @jax.jit
    def fn(p, x):
        traces.append(1)
        return fast(p, x)

    for seed in range(3):
        q = {"w": quantized(random(64, 24, seed=seed), SPECS[spec]())}
        out = fn(q, X)
        assert (out.dtype, out.shape) == (jnp.float32, (16, 24))
    assert len(traces) == 1


def test_explain_and_layout_leave_compiled_programs_alone():
    q, traces = {"w": quantized(random(64, 24), jc.quantize.int8())}, []

    def counted(p, x):
        traces.append(1)
        return model(p, x)

    fn = jax.jit(jc.accelerate(counted))
    fn(q, X)
    jc.explain(model, q, X)
    jc.layout(model, q, X)
    fn(q, X)
    assert len(traces) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_vmap_outside_over_activations_and_over_models(spec):
    q = {"w": quantized(random(3, 64, 8), SPECS[spec]())}
    x = random(3, 5, 64)
    got = jax.jit(jax.vmap(fast))(q, x)
    one = [jax.tree.map(lambda a: a[i], q) for i in range(3)]  # noqa: B023
    want = np.stack([fast(p, row) for p, row in zip(one, x)])
    assert_same(got, want, spec)
    rows = jax.vmap(functools.partial(fast, one[0]))(x[0])
    assert_same(rows, want[0], spec)


@pytest.mark.filterwarnings("error")  # JAX warns of a donation that was of no use
def test_donation():
    """A state that is passed on beside the weights may be donated, and the weights too."""
    step = jax.jit(jc.accelerate(lambda p, x: (p, x @ p["w"])), donate_argnums=(0, 1))
    q = {"w": quantized(random(64, 64), jc.quantize.int8())}
    w = oracles.dense(q["w"])
    x = jnp.asarray(X)
    kept, got = step(q, x)
    assert_model(got, X @ w)
    assert x.is_deleted()
    assert q["w"].values.is_deleted()
    np.testing.assert_array_equal(oracles.dense(kept["w"]), w)


@pytest.mark.parametrize("spec", SPECS)
def test_inside_shard_map(spec):
    """accelerate within each device's part: rows of x, columns of w."""
    q = {"w": quantized(random(64, 16), SPECS[spec]())}
    want = fast(q, X)
    for w_spec, x_spec, out in ((P(), P("d"), P("d")), (P(None, "d"), P(), P(None, "d"))):
        specs = jax.tree.map(lambda _: w_spec, q)  # noqa: B023
        fn = jax.shard_map(fast, mesh=mesh(), in_specs=(specs, x_spec), out_specs=out)
        assert_same(jax.jit(fn)(q, X), want, spec)


def test_shard_map_inside_decodes():
    inner = jax.shard_map(lambda w, x: x @ w, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))
    fn = lambda p, x: inner(p["w"], x)
    q = {"w": made((64, 8))}
    assert_model(jax.jit(jc.accelerate(fn))(q, X), X @ oracles.dense(q["w"]))
    [row] = jc.explain(fn, q, X)
    assert (row.primitive, row.implementation) == ("shard_map", "materialised")


def test_activations_are_quantized_inside_shard_map_as_outside():
    """A weight that is made to vary with the activations is still a compressed one."""
    q = {"w": quantized(random(64, 16), jc.quantize.w8a8())}
    fn = jax.shard_map(fast, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))
    assert_einsum(jax.jit(fn)(q, X), "mk,kn->mn", X, q["w"])


@pytest.mark.parametrize("spec", SPECS)
def test_sharded_weights_and_activations(spec):
    """A container takes one sharding for all its leaves, as any subtree does."""
    q = {"w": quantized(random(64, 16), SPECS[spec]())}
    want = fast(q, X)
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh(), spec))
    for w_spec, x_spec in ((P(), P("d")), (P(None, "d"), P())):
        got = jax.jit(fast)(place(q, w_spec), place(X, x_spec))
        assert_same(got, want, spec)
        assert len({str(s.index) for s in got.addressable_shards}) == 8


EXPORTED = {
    **{name: lambda w, spec=spec: quantized(w, spec()) for name, spec in SPECS.items()},
    "zero points": lambda w: quantized(w, jc.quantize.int4(symmetric=False)),
    "bitmap": lambda w: jc.prune.pack({"w": w}, {"w": w > 0})["w"],
    "low rank": lambda w: jc.prune.low_rank({"w": w}, ["w"], rank=3)["w"],
    "fake": lambda w: jc.quantize.prepare_qat(
        {"w": w}, {"w": jc.quantize.w8a8()}, learn_scale=True
    )["w"],
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_and_back(name):
    """The program is written down with its containers, and takes them when it is read."""
    q = {"layer": {"w": EXPORTED[name](jnp.asarray(random(64, 8)))}}
    fn = jax.jit(jc.accelerate(lambda p, x: x @ p["layer"]["w"]))
    written = jax.export.export(fn, platforms=["cpu", "tpu", "cuda"])(q, X).serialize()
    back = jax.export.deserialize(written)
    assert back.in_tree == jax.tree.structure(((q, X), {}))
    # An exported program has XLA's digits of floats for the native ones: the same integers, put
    # together in another order.
    want = np.asarray(fn(q, X))
    np.testing.assert_allclose(back.call(q, X), want, rtol=0, atol=4 * EPS * np.abs(want).max())


def test_an_export_that_returns_its_weights():
    q = {"w": quantized(random(64, 8), jc.quantize.int4())}
    exported = jax.export.export(jax.jit(lambda p: p))(q)
    back = jax.export.deserialize(exported.serialize()).call(q)
    assert isinstance(back["w"], jc.arrays.QuantizedArray)
    np.testing.assert_array_equal(oracles.dense(back["w"]), oracles.dense(q["w"]))
