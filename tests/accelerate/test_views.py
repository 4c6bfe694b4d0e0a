"""Primitives that move indices about: the weight stays compressed on its way to a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
import oracles
from checks import assert_compressed, assert_model, made, random, run

# Each takes w [32, 32] and returns what x [5, k] is multiplied with.
VIEWS = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(32, 4, 8).reshape(32, 32),
    "new axis": lambda w: w[None][0],
    "squeeze": lambda w: jnp.squeeze(w[:, None, :], 1),
    "slice": lambda w: w[:, 8:24],
    "stride": lambda w: w[:, ::2],
    "split": lambda w: jnp.split(w, 4, axis=1)[2],
    "dynamic slice": lambda w: lax.dynamic_slice_in_dim(w, 4, 8, 1),
    "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "copy": lambda w: jnp.array(w, copy=True),
    "stop_gradient": lax.stop_gradient,
    "optimization_barrier": lambda w: lax.optimization_barrier((w, jnp.ones(3)))[0],
    "concatenate": lambda w: jnp.concatenate([w, w[:, :8]], 1),
    "inner jit": lambda w: jax.jit(lambda w: w.T)(w),
}
NUMPY = {
    "cast": lambda w: w,
    "copy": lambda w: w,
    "stop_gradient": lambda w: w,
    "optimization_barrier": lambda w: w,
    "dynamic slice": lambda w: w[:, 4:12],
    "concatenate": lambda w: np.concatenate([w, w[:, :8]], 1),
    "squeeze": lambda w: w,
    "split": lambda w: w[:, 16:24],
    "inner jit": lambda w: w.T,
}


@pytest.mark.parametrize("name", VIEWS)
def test_view(name):
    axis = (-1,) if name in ("transpose", "inner jit") else (-2,)
    q = {f"{bits}": made((32, 32), axis, bits=bits, path=f"{bits}") for bits in (8, 4)}
    x = random(5, 32)
    got, rows = run(lambda p, x: {bits: x @ VIEWS[name](w) for bits, w in p.items()}, q, x)
    for bits, w in q.items():
        assert_model(got[bits], x @ NUMPY.get(name, VIEWS[name])(oracles.dense(w)))
    assert_compressed(rows, "quantized_matmul", "quantized_matmul")


def test_sharding_constraint():
    """It goes to the codes, which have the axes that it was written for."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
    q, x = made((32, 16)), random(5, 32)
    got, rows = run(lambda p, x: x @ lax.with_sharding_constraint(p["w"], sharding), {"w": q}, x)
    assert_model(got, x @ oracles.dense(q))
    assert_compressed(rows, "quantized_matmul")


# What has no rule, or no scales of the form: decoded, with the reason.
DECODED = {
    "no rule for it": [
        lambda w: w * 2,
        lambda w: w[::-1],
        lambda w: jnp.sort(w, 0),
        lambda w: jnp.where(w > 0, w, 0),
    ],
    "its scales do not follow the axes": [
        lambda w: jnp.broadcast_to(w[None], (2, 32, 32))[0],
        lambda w: w.reshape(-1).reshape(32, 32),
    ],
    "joined with an array of other scales": [
        lambda w: jnp.concatenate([w, jnp.ones((32, 2))], 1),
        lambda w: jnp.concatenate([w, w])[:32],
    ],
}


@pytest.mark.parametrize(("why", "fn"), [(why, fn) for why, fns in DECODED.items() for fn in fns])
def test_what_must_decode_says_why_and_is_right(why, fn):
    q, x = made((32, 32)), random(5, 32)
    got, rows = run(lambda p, x: x @ fn(p["w"]), {"w": q}, x)
    dense = jnp.asarray(oracles.dense(q), jnp.float32)  # jnp moves numbers; numpy multiplies
    assert_model(got, np.asarray(x, np.float64) @ np.asarray(fn(dense), np.float64))
    assert {row.why for row in rows.materialised} == {why}


def test_cast_to_integers_decodes():
    q = made((4, 4))
    got, rows = run(lambda p: p["w"].astype(jnp.int32), {"w": q})
    np.testing.assert_array_equal(got, np.trunc(oracles.dense(q).astype(np.float32)))
    assert len(rows.materialised) == 1


def test_a_weight_that_is_returned_stays_compressed():
    q = made((32, 32))
    out = jc.accelerate(lambda p: p["w"].T)({"w": q})
    assert isinstance(out, jc.arrays.QuantizedArray)
    np.testing.assert_array_equal(oracles.dense(out), oracles.dense(q).T)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [(-1,), (-2,), (-2, -1)])
def test_rows_of_a_table(axis, bits):
    """Bytes are looked up, and what was found is decoded; negative and clipped indices too."""
    q = made((50, 24), axis, bits=bits)
    tokens = np.array([[0, 49, 7], [-1, 3, 3]])
    got, rows = run(lambda p, t: p["w"][t], {"w": q}, tokens)
    np.testing.assert_array_equal(got, oracles.dense(q).astype(np.float32)[tokens])
    assert_compressed(rows, "gather")


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_rows_out_of_bounds(mode):
    q = made((10, 4), (-1,))
    tokens = np.array([3, 12])
    got = jc.accelerate(lambda p, t: jnp.take(p["w"], t, axis=0, mode=mode))({"w": q}, tokens)
    dense = oracles.dense(q).astype(np.float32)
    last = {"fill": np.full(4, np.nan), "clip": dense[9], "wrap": dense[2]}[mode]
    np.testing.assert_array_equal(got, np.stack([dense[3], last]))


@pytest.mark.parametrize(("bits", "sizes"), [(8, None), (4, None), (4, (8,))])
def test_matrices_that_are_looked_up_stay_compressed(bits, sizes):
    """One expert for each token: the product is still to come."""
    q, x = made((3, 32, 8), (-2,), sizes, bits), random(5, 32)
    expert = np.array([0, 2, 1, 1, 0])
    got, rows = run(lambda p, x, e: jnp.einsum("mk,mkn->mn", x, p["w"][e]), {"w": q}, x, expert)
    assert_model(got, np.einsum("mk,mkn->mn", x, oracles.dense(q)[expert]))
    assert_compressed(rows, "quantized_matmul")


def test_single_elements_decode():
    q = made((10, 4))
    got, rows = run(lambda p, i: p["w"][i, i], {"w": q}, np.arange(4))
    np.testing.assert_array_equal(got, np.diag(oracles.dense(q)[:4]).astype(np.float32))
    assert [row.primitive for row in rows.materialised] == ["gather"]
