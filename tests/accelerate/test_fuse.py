"""What follows a product is done inside it where that is all its result is for, and only there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import EPS, made, random
from jaxcompress.arrays._bitmap import bitmap_of
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import replace

A8 = Activation(IntType(8))
X, BIAS = random(2, 5, 64), random(48, seed=1)
exact = functools.partial(jax.nn.gelu, approximate=False)
ACTIVATIONS = [None, jax.nn.relu, jax.nn.gelu, exact, jax.nn.silu, lambda x: jnp.maximum(x, 0)]
NAMES = [None, "relu", "gelu", "gelu_exact", "silu", "relu"]


def weight(kind):
    dense, mask = random(64, 48, seed=2), np.kron(random(4, 3) > 0, np.ones((16, 16), bool))
    if kind == "blocks":
        params, masks = {"w": jnp.asarray(dense)}, {"w": jnp.asarray(mask)}
        return jc.prune.pack(params, masks, pattern=jc.prune.block(16, 16))["w"]
    if kind == "sparse":
        mask = np.random.default_rng(0).random(dense.shape) < 0.1
        return jc.prepack({"w": bitmap_of(jnp.asarray(dense), jnp.asarray(mask), 0, "w")})["w"]
    q = made((64, 48), (-2,), (32,) if kind == "w4a8" else None, 4 if kind == "w4a8" else 8)
    q = replace(q, act=None if kind == "w8a16" else A8)
    return jc.prepack({"w": q})["w"]


def assert_same(fn, params, *args):
    """With and without `jit`, where alone things are put inside products: to a few roundings."""
    want = np.asarray(jc.accelerate(fn)(params, *args))
    got = np.asarray(jax.jit(jc.accelerate(fn))(params, *args))
    # Of 64 products, and as many of the largest as there are steps.
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * EPS * np.abs(want).max())
    return got


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        *(("w8a8", which) for which in range(len(ACTIVATIONS))),
        *(("w4a8", 2), ("w8a16", 4), ("sparse", 2), ("blocks", 0), ("blocks", 3)),
    ],
)
def test_bias_activation_and_sum_are_inside(kind, which):
    w, act = weight(kind), ACTIVATIONS[which] or (lambda x: x)
    more = random(2, 5, 48, seed=3)
    has_bias, has_sum = which % 2 == 0, which % 3 != 1
    plain = lambda w, x: act(x @ w + BIAS if has_bias else x @ w)
    fn = (lambda w, x: more + plain(w, x)) if has_sum else plain
    assert_same(fn, w, X)
    [row] = jc.explain(fn, w, X)
    words = ["bias"] * has_bias + [NAMES[which]] * bool(NAMES[which])
    words += ["the array added"] * has_sum
    assert not words or row.why.endswith(f"; {', '.join(words)} inside")


def whys(fn, *args):
    return [row.why for row in jc.explain(fn, weight("w8a8"), *args)]


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: ((y := x @ w), jax.nn.relu(y)),  # the product is a result
        lambda w, x: ((y := x @ w) * y.sum()) + y,  # somebody else needs it
        lambda w, x: jnp.tanh(x @ w),  # no activation that there is
        lambda w, x: (x @ w) + X[..., :1],  # no bias: another for each row
        lambda w, x: jnp.tanh(y := x @ w) * y,
    ],
)
def test_what_others_need_stays_outside(fn):
    assert not any(why.endswith(" inside") for why in whys(fn, X))
    assert_same(lambda w, x: jax.tree.leaves(fn(w, x))[0], weight("w8a8"), X)


def test_in_bfloat16_every_step_rounds():
    fn = lambda w, x: (x @ w.astype(x.dtype)) + jnp.bfloat16(1)
    assert not any(why.endswith(" inside") for why in whys(fn, jnp.bfloat16(X)))


def test_every_format_keeps_what_follows():
    """Formats that go another way: floats of eight bits on both sides, and floats of four."""
    fp8 = jc.quantize.fp8_e4m3().qtype
    both = jc.quantize.Spec(qtype=fp8, act=jc.arrays.Activation(fp8))
    fn = lambda w, x: X[..., :48] + jax.nn.relu(x @ w + BIAS)
    for spec in (both, jc.quantize.nf4()):
        w = jc.quantize.quantize({"w": jnp.asarray(random(64, 48))}, {"w": spec})["w"]
        product = jax.jit(jc.accelerate(lambda w, x: x @ w))(w, X)
        want = X[..., :48] + np.maximum(product + BIAS, 0)
        within = 16 * EPS * np.abs(want).max()  # as above
        np.testing.assert_allclose(jax.jit(jc.accelerate(fn))(w, X), want, rtol=0, atol=within)


def test_what_lies_between_and_is_needed_ends_it():
    fn = lambda w, x: ((y := x @ w + BIAS), jax.nn.gelu(y))
    assert [why.endswith("; bias inside") for why in whys(fn, X)] == [True]
    assert_same(lambda w, x: sum(fn(w, x)), weight("w8a8"), X)


def test_two_products_are_one_sum():
    fn = lambda w, x: x @ w + jnp.flip(x, -1) @ w
    assert ["the array added inside" in why for why in whys(fn, X)].count(True) == 1
    assert_same(fn, weight("w8a8"), X)


def test_experts_have_biases_of_their_own():
    q = replace(made((3, 64, 48), (-2,)), act=A8)
    bias = random(3, 48, seed=4)
    fn = lambda w, x: jax.nn.silu(jnp.einsum("emk,ekn->emn", x, w) + bias[:, None])
    x = random(3, 5, 64)
    assert_same(fn, jc.prepack({"w": q})["w"], x)
    assert jc.explain(fn, q, x)[0].why.endswith("; bias, silu inside")


def test_several_axes_of_a_weight():
    q = replace(made((64, 4, 12), (-3,)), act=A8)
    fn = lambda w, x: jnp.einsum("bmk,khd->bmhd", x, w) + BIAS.reshape(4, 12)
    assert_same(fn, q, X)
    assert jc.explain(fn, q, X)[0].why.endswith("; bias inside")


def test_under_scan_jit_and_vmap():
    w = weight("w8a8")
    layer = lambda x, w: jax.nn.gelu(x @ w + BIAS)[..., :48]

    def scanned(w, x):
        step = lambda x, _: (jnp.pad(layer(x, w), [(0, 0), (0, 0), (0, 16)]), None)
        return jax.lax.scan(step, x, length=2)[0]

    assert "gelu inside" in jc.explain(scanned, w, X)[0].why
    assert_same(scanned, w, X)
    assert "gelu inside" in jc.explain(lambda w, x: jax.jit(layer)(x, w), w, X)[0].why
    assert_same(lambda w, x: jax.jit(layer)(x, w), w, X)
    each = jax.jit(jax.vmap(jc.accelerate(lambda w, x: layer(x, w)), (None, 0)))
    one = jax.jit(jc.accelerate(lambda w, x: layer(x, w)))
    np.testing.assert_array_equal(each(w, X), one(w, X))
    assert "gelu" in str(jax.make_jaxpr(each)(w, X))


@pytest.mark.parametrize("kind", ["w8a8", "sparse", "blocks"])
def test_gradients_are_those_of_the_steps(kind):
    w, g, more = weight(kind), random(2, 5, 48, seed=5), random(2, 5, 48, seed=6)
    fn = lambda w, x, b, m: jax.nn.gelu(x @ w + b) + m
    fused = lambda *args: jnp.sum(g * jax.jit(jc.accelerate(fn))(w, *args))
    steps = lambda *args: jnp.sum(g * jc.accelerate(fn)(w, *args))
    got = jax.jit(jax.grad(fused, (0, 1, 2)))(X, BIAS, more)
    for a, b in zip(got, jax.jit(jax.grad(steps, (0, 1, 2)))(X, BIAS, more)):
        # The same formulas, in float32: of sums of 64 products, sums of 10 or 48.
        np.testing.assert_allclose(a, b, rtol=0, atol=256 * EPS * np.abs(b).max())


def test_a_derivative_of_the_users_own_stays():
    @jax.custom_jvp
    @jax.jit
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), 7 * tangents[0]))
    w = weight("w8a8")
    fn = jax.jit(jc.accelerate(lambda w, b: relu(X @ w + b)))
    np.testing.assert_array_equal(jax.grad(lambda b: fn(w, b).sum())(BIAS), np.full(48, 70.0))


def test_a_maximum_shares_its_gradient_where_both_are_equal():
    w = weight("w8a8")
    of = lambda act: jax.jit(jc.accelerate(lambda w, b: act(jnp.zeros((5, 64)) @ w + b)))
    slope = lambda act: jax.grad(lambda b: of(act)(w, b).sum())(jnp.zeros(48))
    np.testing.assert_array_equal(slope(lambda x: jnp.maximum(x, 0)), np.full(48, 2.5))
    np.testing.assert_array_equal(slope(jax.nn.relu), np.zeros(48))


@pytest.mark.parametrize("kind", ["w8a8", "w4a8", "w8a16"])
def test_second_derivatives_are_those_of_the_steps(kind):
    w, g = weight(kind), random(5, 48, seed=5)

    def curved(run):
        slope = jax.grad(lambda x: jnp.sum(g * run(w, x) ** 2))
        return jax.jit(jax.grad(lambda x: jnp.sum(slope(x) ** 2)))(X[0])

    fn = jc.accelerate(lambda w, x: jax.nn.gelu(x @ w + BIAS))
    want = curved(fn)
    # As above, through three products.
    np.testing.assert_allclose(curved(jax.jit(fn)), want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_forward_mode_passes_over_a_product_that_does_not_move():
    w = weight("w8a8")
    fn = jax.jit(jc.accelerate(lambda w, b: jax.nn.relu(X @ w + b)))
    out, change = jax.jvp(lambda b: fn(w, b), (BIAS,), (np.ones_like(BIAS),))
    np.testing.assert_array_equal(change, out > 0)
    assert 0 < change.mean() < 1


@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "sparse", "blocks"])
def test_nothing_of_the_inner_trace_is_kept(kind):
    w = weight(kind)
    with jax.checking_leaks():
        jax.jit(jc.accelerate(lambda w, x: jax.nn.relu(x @ w + BIAS))).lower(w, X)


def test_names_and_precision_are_those_of_the_place():
    q = replace(made((64, 48), (-2,)), act=None)

    def fn(q, x):
        with jax.named_scope("here"), jax.default_matmul_precision("highest"):
            return jax.nn.gelu(x @ q + BIAS)

    run = jax.jit(jc.accelerate(fn))
    plain = str(jax.make_jaxpr(jc.accelerate(fn))(q, X))
    assert "gelu inside" in jc.explain(fn, q, X)[0].why
    assert str(jax.make_jaxpr(run)(q, X)).count("HIGHEST") == plain.count("HIGHEST") > 0
    assert "here" in run.lower(q, X).as_text(debug_info=True)


def test_exported_programs_and_sharded_rows():
    w = weight("w8a8")
    fn = lambda w, x: jax.nn.gelu(x @ w + BIAS) + x[..., :48]
    leaves, structure = jax.tree.flatten(w)
    run = jax.jit(lambda leaves, x: jc.accelerate(fn)(jax.tree.unflatten(structure, leaves), x))
    exported = jax.export.export(run, platforms=["cpu", "tpu"])(leaves, X)
    assert "@jaxcompress" not in exported.mlir_module()
    want = np.asarray(run(leaves, X))
    within = 16 * EPS * np.abs(want).max()  # as above
    np.testing.assert_allclose(exported.call(leaves, X), want, rtol=0, atol=within)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    got = run(leaves, jax.device_put(X, rows))
    np.testing.assert_array_equal(got, want)
