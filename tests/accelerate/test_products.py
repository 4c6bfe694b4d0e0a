"""Products in any order of axes, with any scales, against numpy on the decoded codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
import oracles
from checks import (
    OPS,
    SPECS,
    assert_compressed,
    assert_einsum,
    assert_model,
    made,
    random,
    run,
    seen,
)

# Equation, the shape of x, the shape of w, the axes of w and of x that are contracted.
EQUATIONS = [
    ("mk,kn->mn", (5, 33), (33, 7), -2, -1),
    ("mk,nk->mn", (5, 33), (7, 33), -1, -1),
    ("km,kn->nm", (33, 5), (33, 7), -2, 0),
    ("k,kn->n", (33,), (33, 7), -2, -1),
    ("mk,k->m", (5, 33), (33,), -1, -1),
    ("abk,kn->abn", (2, 3, 33), (33, 7), -2, -1),
    ("emk,ekn->emn", (3, 5, 33), (3, 33, 7), -2, -1),
    ("mek,ekn->nme", (5, 3, 33), (3, 33, 7), -2, -1),
    ("mk,ekn->emn", (5, 33), (3, 33, 7), -2, -1),
    ("mk,khd->mhd", (5, 33), (33, 3, 4), -3, -1),
    ("mhd,hdn->mn", (5, 4, 8), (4, 8, 7), (-3, -2), (-2, -1)),
    ("mhd,hdn->mn", (5, 4, 8), (4, 8, 7), (-2, -3), (-2, -1)),
    ("hmd,hdn->hmn", (4, 5, 8), (4, 8, 7), (-2,), (-1,)),
]


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "axis", "contract"),
    EQUATIONS,
    ids=[f"{e} {a}" for e, _, _, a, _ in EQUATIONS],
)
def test_einsum(equation, x_shape, w_shape, axis, contract):
    x, w = random(*x_shape), random(*w_shape, seed=1)
    rules = {name: spec(axis=axis) for name, spec in SPECS.items()}
    q = jc.quantize.quantize(dict.fromkeys(SPECS, w), rules)
    fn = lambda p, x: {name: jnp.einsum(equation, x, w) for name, w in p.items()}
    got, rows = run(fn, q, x)  # one compilation for all
    assert_compressed(rows, *OPS.values())
    for name in SPECS:
        assert_einsum(got[name], equation, x, q[name], contract)


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_weight_first(spec):
    w, x = random(7, 33), random(33, 5, seed=1)
    q = jc.quantize.quantize({"w": w}, {"w": SPECS[spec](axis=-1)})
    got, rows = run(lambda p, x: p["w"] @ x, q, x)
    assert_compressed(rows, OPS[spec])
    assert_model(got, oracles.dense(q["w"]) @ x)


# Shared axes and groups that do not follow the product x[m, k] w[k, n].
OTHER_SCALES = [
    ((-2, -1), None),  # one scale; bits are packed along n
    ((-1, -2), None),
    ((-1,), None),  # a scale for each k: it moves to x
    ((-2, -1), (8, 8)),  # blocks
    ((-1, -2), (16, 8)),
    ((-2, -1), (5, 7)),
    ((-2, -1), (64, 16)),
    ((-2,), (5,)),
]


@pytest.mark.parametrize(("axis", "sizes"), OTHER_SCALES, ids=str)
def test_scales_that_do_not_follow_the_product(axis, sizes):
    x, turned = random(5, 32), tuple(-3 - a for a in axis)
    plain = {f"{bits}": made((32, 48), axis, sizes, bits) for bits in (8, 4, 3)}
    other = {f"{bits}.T": made((48, 32), turned, sizes, bits) for bits in (8, 4, 3)}
    as_seen = lambda name, w: w.T if name.endswith("T") else w
    fn = lambda p, x: {name: x @ as_seen(name, w) for name, w in p.items()}
    got, rows = run(fn, plain | other, x)
    for name, w in (plain | other).items():
        assert_model(got[name], x @ as_seen(name, oracles.dense(w)))
    assert not rows.materialised
    assert {row.op for row in rows} == {"quantized_matmul"}


def test_zero_points_in_blocks():
    q = {"w": made((32, 48), (-2, -1), (8, 16), 4, symmetric=False)}
    x = random(5, 32)
    got, rows = run(lambda p, x: x @ p["w"], q, x)
    assert_model(got, x @ oracles.dense(q["w"]))
    assert_compressed(rows, "quantized_matmul")


WHY = {
    "contracted and other axes": (made((32, 6), (-1,), (3,)), lambda p, x: x @ p["w"]),
    "zero points vary along a contracted": (
        made((32, 6), (-1,), symmetric=False),
        lambda p, x: x @ p["w"],
    ),
    "the axes that the product merges": (
        made((32, 6, 2), (-3, -1)),
        lambda p, x: jnp.einsum("mk,khd->mhd", x, p["w"]),
    ),
    "the other operand is int32": (made((32, 6)), lambda p, x: x.astype(jnp.int32) @ p["w"]),
    "an empty product": (made((32, 6)), lambda p, x: x[:0] @ p["w"]),
    "the other operand is compressed too": (made((32, 32)), lambda p, x: x @ (p["w"] @ p["w"])),
}


@pytest.mark.parametrize("why", WHY)
def test_a_product_that_must_decode_says_why_and_is_right(why):
    w, fn = WHY[why]
    x = random(5, 32)
    got, rows = run(fn, {"w": w}, x)
    want = np.asarray(fn({"w": oracles.dense(w)}, x), np.float64)
    if want.size:
        assert_model(got, want)
    assert why in " ".join(row.why for row in rows.materialised)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in subjaxprs_of(equation):
            yield from equations(inner)


def subjaxprs_of(equation):
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns"))
    return [getattr(p, "jaxpr", p) for p in leaves if hasattr(p, "eqns")]


def test_scale_of_a_contracted_axis_is_never_multiplied_into_the_weight():
    """Not in the gradient either: there it would make a float weight, and its transpose."""
    w, x = made((512, 256), (-1,)), random(4, 512)
    model = jc.accelerate(lambda p, x: x @ p["w"])
    fn = jax.grad(lambda x, w: jnp.sum(model({"w": w}, x)))
    np.testing.assert_allclose(fn(x, w)[0], oracles.dense(w).sum(1), rtol=1e-5, atol=1e-3)
    found = list(equations(jax.make_jaxpr(fn)(x, w).jaxpr))
    assert any(e.primitive.name == "dot_general" for e in found)
    assert not [e for e in found if e.primitive.name == "mul" and e.outvars[0].aval.size >= w.size]


@pytest.mark.parametrize("spec", ["int8", "w8a8"])
def test_ragged_dot(spec):
    x, w = random(6, 32), random(3, 32, 8, seed=1)
    sizes = np.array([1, 3, 2], np.int32)
    q = jc.quantize.quantize({"w": w}, {"w": SPECS[spec]()})
    got, rows = run(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes), q, x, sizes)
    expert = np.repeat(np.arange(3), sizes)
    assert_model(got, np.einsum("mk,mkn->mn", seen(x, q["w"]), oracles.dense(q["w"])[expert]))
    assert_compressed(rows, "ragged_dot_general")


@pytest.mark.parametrize(
    ("w", "why"),
    [
        (made((3, 32, 8), (-2,), (8,)), "groups or zero points in a ragged product"),
        (made((3, 32, 8), symmetric=False), "groups or zero points in a ragged product"),
    ],
)
def test_ragged_dot_that_must_decode(w, why):
    x, sizes = random(6, 32), np.array([1, 3, 2], np.int32)
    got, rows = run(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes), {"w": w}, x, sizes)
    expert = np.repeat(np.arange(3), sizes)
    assert_model(got, np.einsum("mk,mkn->mn", x, oracles.dense(w)[expert]))
    assert [row.why for row in rows.materialised] == [why]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_convolution(groups, bits):
    w, x = made((3, 2, 4 // groups, 6), (-4, -3, -2), bits=bits), random(2, 6, 5, 4)

    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            (2, 1),
            ((1, 1), (0, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    got, rows = run(fn, {"w": w}, x)
    assert_model(got, oracles.conv(x, oracles.dense(w), (2, 1), ((1, 1), (0, 1)), groups))
    assert_compressed(rows, "convolution")


@pytest.mark.parametrize(
    ("w", "why"),
    [
        (made((3, 3, 4, 6), (-2,)), "one scale for each output feature"),
        (made((3, 3, 4, 6), (-4, -3, -2), symmetric=False), "takes no zero points"),
    ],
)
def test_convolution_that_must_decode(w, why):
    x = random(2, 5, 5, 4)
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    got, rows = run(lambda p, x: conv(x, p["w"]), {"w": w}, x)
    assert_model(got, oracles.conv(x, oracles.dense(w)))
    [row] = rows
    assert row.implementation == "materialised"
    assert why in row.why
