"""Gradients outside, custom derivatives and checkpoints inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_compressed, assert_model, made, random, run

X = random(4, 16)
W = made((16, 8), path="w")


def twin(w, spec=None, **kwargs):
    spec = spec or jc.quantize.int8()
    return jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec}, **kwargs)


@jax.custom_jvp
def dense_tanh(x, w):
    return jnp.tanh(x @ w)


@dense_tanh.defjvp
def _(primals, tangents):
    y = dense_tanh(*primals)
    return y, 3 * (1 - y**2) * tangents[0].sum(-1, keepdims=True)  # no truth: it can be told


@jax.custom_vjp
def scaled(x, w):
    return x @ w


scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (7 * g @ r[1].T, r[0].T @ g))


def test_custom_jvp_is_honoured():
    model = lambda p, x: dense_tanh(x, p["w"])
    got, rows = run(model, {"w": W}, X)
    assert_model(got, np.tanh(X @ oracles.dense(W)))
    assert_compressed(rows, "quantized_matmul")
    got = jax.jit(jax.grad(lambda x: jc.accelerate(model)({"w": W}, x).sum()))(0 * X)
    assert_model(got, np.full(X.shape, 3.0 * 8))  # at zero 1 - tanh^2 is 1, for each output


def test_custom_vjp_decodes_and_is_honoured():
    model = lambda p, x: scaled(x, p["w"])
    got, rows = run(model, {"w": W}, X)
    w = oracles.dense(W)
    assert_model(got, X @ w)
    [row] = rows
    assert (row.implementation, row.why) == ("materialised", "no rule for it")
    assert row.primitive.startswith("custom_vjp_call")
    grad = jax.jit(jax.grad(lambda x: jc.accelerate(model)({"w": W}, x).sum()))(X)
    assert_model(grad, np.broadcast_to(7 * w.sum(1), X.shape))


POLICIES = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_and_its_policies(policy):
    block = jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=POLICIES[policy])
    model = lambda p, x: block(p["w"], x)
    got, rows = run(model, {"w": W}, X)
    w = oracles.dense(W)
    # Arguments of the sine are as large as a thousand, and their rounding is its error.
    np.testing.assert_allclose(got, np.sin(X @ w), atol=2**-12)
    assert_compressed(rows, "quantized_matmul")
    grad = jax.jit(jax.grad(lambda x: jc.accelerate(model)({"w": W}, x).sum()))(X * 1e-3)
    assert_model(grad, np.cos(X * 1e-3 @ w) @ w.T)


def test_policies_decide_what_is_kept():
    def kept(policy):
        block = jax.checkpoint(lambda w, x: jnp.sin(jnp.cos(x @ w)), policy=policy)
        fn = jc.accelerate(lambda p, x: block(p["w"], x))
        return len(jax.tree.leaves(jax.vjp(lambda x: fn({"w": W}, x), X)[1]))

    assert kept(POLICIES["nothing"]) < kept(POLICIES["everything"])


def test_gradient_to_x_of_integer_weights():
    fn = lambda x: jnp.sum(jc.accelerate(lambda p, x: x @ p["w"])({"w": W}, x) ** 2)
    w = oracles.dense(W)
    assert_model(jax.jit(jax.grad(fn))(X), 2 * (X @ w) @ w.T)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.T.T, jax.lax.stop_gradient])
def test_gradients_of_a_fake_quantized_weight_pass_views(view):
    """Straight through: that of the dense product. `stop_gradient` stops it."""
    params = twin(random(16, 8))
    loss = lambda p: jnp.sum(jc.accelerate(lambda p, x: x @ view(p["w"]))(p, X))
    grad = jax.grad(loss)(params)["w"].weight
    want = np.broadcast_to(X.sum(0)[:, None], (16, 8))
    if view is jax.lax.stop_gradient:
        assert not np.any(grad)
    else:
        assert_model(grad, want)


def test_gradients_of_weight_scale_and_activation_scale_through_scan_and_remat():
    """As in a single layer used three times, by hand."""
    w = random(16, 16)
    stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": w}, [X], jc.statistics.absmax())
    params = twin(w, jc.quantize.w8a8(static=True), stats=stats, learn_scale=True)

    def looped(p, x):
        step = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
        return jax.lax.scan(lambda x, _: (step(p["w"], x), None), x, None, length=3)[0]

    def plain(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"])
        return x

    got, want = (
        jax.jit(jax.grad(lambda p: jnp.sum(jc.accelerate(fn)(p, X) ** 2)))(params)  # noqa: B023
        for fn in (looped, plain)
    )
    assert len(jax.tree.leaves(got)) == 3
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # another order of float32 sums


INSIDE = {
    "grad": lambda fn: jax.grad(lambda p, x: fn(p, x).sum()),
    "vjp": lambda fn: lambda p, x: jax.vjp(fn, p, x)[0],
    "jvp": lambda fn: lambda p, x: jax.jvp(lambda p: fn(p, x), (p,), (p,))[1],
}


@pytest.mark.parametrize("how", INSIDE)
def test_a_fake_quantized_weight_differentiated_inside_raises(how):
    """There its scales would lose their gradients without a word."""
    fn = INSIDE[how](lambda p, x: x @ p["w"])
    with pytest.raises(TypeError, match="w is differentiated inside accelerate"):
        jc.accelerate(fn)(twin(np.eye(16, 8)), X)


def test_differentiating_something_else_inside_is_fine():
    fn = lambda p, x: jax.grad(lambda x: jnp.sum(x @ p["w"]))(x)
    params = twin(random(16, 8))
    got = jc.accelerate(fn)(params, X)
    w = oracles.dense(jc.quantize.convert(params)["w"])
    assert_model(got, np.broadcast_to(w.sum(1), X.shape))
