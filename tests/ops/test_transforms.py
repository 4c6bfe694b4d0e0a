"""The ops under jit, vmap, sharding and export: the same integers, bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
import oracles
from jaxcompress.kernels import cpu


def int8(*shape, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def exact(x, w):
    return np.asarray(x, np.int64) @ np.asarray(w, np.int64)


@pytest.fixture(params=["xla", "reference"] if cpu.missing() else ["cpu", "xla", "reference"])
def matmul(request):
    return functools.partial(jc.ops.int8_matmul, implementation=request.param)


def test_with_and_without_jit(matmul):
    x, w = int8(16, 40), int8(40, 8, seed=1)
    rng = np.random.default_rng(2)
    scales = dict(
        x_scale=rng.uniform(1, 2, (16, 1)).astype(np.float32),
        w_scale=rng.uniform(1, 2, (1, 8)).astype(np.float32),
    )
    np.testing.assert_array_equal(matmul(x, w), jax.jit(matmul)(x, w))
    np.testing.assert_array_equal(matmul(x, w, **scales), jax.jit(matmul)(x, w, **scales))


@pytest.mark.parametrize(
    ("x_axis", "w_axis"), [(0, None), (1, None), (None, 0), (None, 2), (0, 0), (2, 1)]
)
def test_vmap_over_either_side(matmul, x_axis, w_axis):
    """Mapped over x, over w, over both, along any axis; twice, too."""
    x = int8(9, 6, seed=1) if x_axis is None else np.moveaxis(int8(3, 9, 6, seed=1), 0, x_axis)
    w = int8(6, 5, seed=2) if w_axis is None else np.moveaxis(int8(3, 6, 5, seed=2), 0, w_axis)
    got = jax.jit(jax.vmap(matmul, (x_axis, w_axis)))(x, w)
    front_x = x if x_axis is None else np.moveaxis(x, x_axis, 0)
    front_w = w if w_axis is None else np.moveaxis(w, w_axis, 0)
    np.testing.assert_array_equal(got, exact(front_x, front_w))


def test_vmap_of_batched_operands_and_twice(matmul):
    x, w = int8(2, 3, 4, 8, 6), int8(2, 3, 4, 6, 5, seed=1)
    twice = jax.vmap(jax.vmap(matmul))
    np.testing.assert_array_equal(jax.jit(twice)(x, w), exact(x, w))
    outer = jax.vmap(jax.vmap(matmul, (None, 0)), (0, None))  # every x with every w
    np.testing.assert_array_equal(jax.jit(outer)(x[:, 0], w[0]), exact(x[:, None, 0], w[None, 0]))


def test_vmap_of_the_other_layout(matmul):
    x, w = int8(3, 8, 6), int8(3, 5, 6, seed=1)
    got = jax.vmap(functools.partial(matmul, transpose_w=True))(x, w)
    np.testing.assert_array_equal(got, exact(x, w.swapaxes(-1, -2)))


MESH_SPECS = {
    "rows": (P("x", None), P(None, None)),
    "columns": (P(None, None), P(None, "x")),
    "contracted": (P(None, "x"), P("x", None)),
    "rows of x, columns of w": (P("x", None), P(None, "y")),
}


def make_mesh(shape=(8,), names=("x",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MESH_SPECS)
def test_sharded_over_eight_devices(matmul, name, kind):
    if name == "contracted":
        kind = AxisType.Auto  # explicit meshes ask how the result is to be sharded
    mesh = make_mesh((8, 1) if "," not in name else (4, 2), ("x", "y"), kind)
    x, w = int8(16, 64), int8(64, 24, seed=1)
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, w), MESH_SPECS[name])
    ]
    got = jax.jit(matmul)(*placed)
    np.testing.assert_array_equal(got, exact(x, w))
    if name != "contracted":  # it stays sharded
        assert len({str(shard.index) for shard in got.addressable_shards}) == 8


@pytest.mark.parametrize("lead", [(), (2,)])
def test_column_sums_of_sharded_rows(lead):
    """The xla product takes another way there; `transpose_w` and batches are part of it."""
    mesh = make_mesh(kind=AxisType.Explicit)
    x, w = int8(*lead, 16, 32), int8(*lead, 6, 32, seed=1)
    spec = P(*(None for _ in lead), "x", None)
    fn = jax.jit(functools.partial(jc.ops.int8_matmul, implementation="xla", transpose_w=True))
    got = fn(jax.device_put(x, NamedSharding(mesh, spec)), w)
    np.testing.assert_array_equal(got, exact(x, w.swapaxes(-1, -2)))


def test_inside_shard_map(matmul):
    mesh = make_mesh()
    x, w = int8(64, 16), int8(16, 6, seed=1)
    fn = jax.shard_map(matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    np.testing.assert_array_equal(jax.jit(fn)(x, w), exact(x, w))


def test_contracted_axis_summed_by_hand_inside_shard_map(matmul):
    mesh = make_mesh()
    x, w = int8(8, 64), int8(64, 6, seed=1)
    fn = jax.shard_map(
        lambda x, w: jax.lax.psum(matmul(x, w), "x"),
        mesh=mesh,
        in_specs=(P(None, "x"), P("x")),
        out_specs=P(),
    )
    np.testing.assert_array_equal(jax.jit(fn)(x, w), exact(x, w))


def test_quantized_matmul_sharded_and_mapped():
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (512, 16)).astype(np.int8)
    w, scale = oracles.pack(codes, 4, 0), rng.uniform(1, 2, (8, 16)).astype(np.float32)
    x = rng.integers(-4, 5, (8, 512)).astype(np.float32)  # whole numbers: the sums are exact
    fn = functools.partial(jc.ops.quantized_matmul, bits=4, group_size=64)
    want = fn(x, w, np.ones_like(scale))
    np.testing.assert_array_equal(want, exact(x, codes))
    mesh = make_mesh()
    for spec_x, spec_w in ((P("x"), P()), (P(), P(None, "x")), (P(None, "x"), P("x"))):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        got = jax.jit(fn)(place(x, spec_x), place(w, spec_w), place(np.ones_like(scale), spec_w))
        np.testing.assert_array_equal(got, want)
    mapped = jax.vmap(fn, (0, None, None))(x[:, None], w, scale)[:, 0]
    np.testing.assert_allclose(mapped, fn(x, w, scale), rtol=1e-5)  # another order of the sums
    stacked = np.stack([w, w[::-1]])
    both = jax.vmap(fn, (None, 0, None))(x, stacked, scale)
    np.testing.assert_allclose(both[1], fn(x, stacked[1], scale), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "tpu", "cuda"]])
def test_export_and_back(platforms):
    """One exported program for all platforms.

    It has no native kernels: the integers are the same, the floats round elsewhere.
    """

    @jax.jit
    def fn(x, w, packed, scale):
        sums = jc.ops.int8_matmul(x, w, w_scale=scale)
        return sums, jc.ops.quantized_matmul(sums, packed, scale.T[:6], bits=4, transpose_w=True)

    x, w = int8(16, 32), int8(32, 6, seed=1)
    packed = oracles.pack(np.random.default_rng(2).integers(-8, 8, (6, 6)), 4, 1)
    args = (x, w, packed, np.full((1, 6), 0.01, np.float32))
    exported = jax.export.export(fn, platforms=platforms)(*args)
    back = jax.export.deserialize(exported.serialize())
    for got, want in zip(back.call(*args), fn(*args)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert "@jaxcompress" not in exported.mlir_module()


def test_only_the_cpu_gets_the_unsigned_product():
    x, w = int8(16, 32), int8(32, 6, seed=1)
    for platform, expected in (("cpu", True), ("tpu", False), ("cuda", False)):
        exported = jax.export.export(jax.jit(jc.ops.int8_matmul), platforms=[platform])(x, w)
        assert ("ui8" in exported.mlir_module()) is expected


def test_a_second_call_does_not_compile_again(matmul):
    fn = jax.jit(chex.assert_max_traces(lambda x, w: matmul(x, w), 1))
    for seed in range(3):
        fn(int8(16, 32, seed=seed), int8(32, 6, seed=seed))
    assert fn(jnp.zeros((16, 32), jnp.int8), jnp.zeros((32, 6), jnp.int8)).dtype == jnp.int32
