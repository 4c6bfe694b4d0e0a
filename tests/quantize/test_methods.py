"""LSQ, LSQ+, PACT, DoReFa: their gradients against the published formulas, in loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from checks import random

RANGE = jc.statistics.minmax()
STATIC = functools.partial(jc.quantize.w4a8, static=True)


def matmul(p, x):
    return x @ p["w"]


def stats_of(x):
    return jc.calibrate(matmul, {"w": jnp.ones((x.shape[-1], 1))}, [jnp.asarray(x)], RANGE)


def lsq_gradient(x, s, low, high, upstream):
    """Equation 3 of the paper, a number at a time; at a bound a number counts as inside.

    The paper counts it as outside. It matters where a ReLU puts half of all numbers there.
    """
    total = 0.0
    for value, g in zip(np.ravel(x), np.ravel(upstream)):
        v = value / s
        if v < low * (1 + 1e-6):
            total += g * low
        elif v > high * (1 + 1e-6):
            total += g * high
        else:
            total += g * (np.rint(v) - v)
    return total


@pytest.mark.parametrize("spec", [jc.quantize.int4(), jc.quantize.int2(axis=(-2, -1))])
def test_lsq_weights(spec):
    w, c = random(20, 3), random(20, 3, seed=1)
    t = jc.quantize.lsq({"w": jnp.asarray(w)}, {"w": spec})["w"]
    high, per_tensor = t.qtype.high, t.scale.size == 1
    mean = np.abs(w).mean(None if per_tensor else 0, keepdims=True)
    np.testing.assert_allclose(t.scale, 2 * mean / np.sqrt(high), rtol=1e-6)
    got = jax.grad(lambda t: jnp.sum(c * t.materialise()))(t).scale
    columns = [slice(None)] if per_tensor else range(3)
    for i, column in enumerate(columns):
        s = float(t.scale[0, i])
        count = w.size if per_tensor else 20
        want = lsq_gradient(w[:, column], s, -high, high, c[:, column]) / np.sqrt(count * high)
        np.testing.assert_allclose(got[0, i], want, rtol=1e-4)  # 60 terms that cancel, in float32
    # The weights' own gradient is not scaled.
    plain = jax.grad(lambda t: jnp.sum(c * t.materialise()))(t).weight
    inside = np.abs(w) <= np.asarray(t.scale) * high
    np.testing.assert_allclose(plain, np.where(inside, c, 0), rtol=1e-5)


def test_lsq_activations():
    w, x = random(6, 2), random(9, 6, seed=1)
    stats = stats_of(x / 2)  # half of the range: some are clipped
    t = jc.quantize.lsq({"w": jnp.asarray(w)}, {"w": STATIC()}, stats=stats)
    got = jax.grad(lambda t: jc.accelerate(matmul)(t, x).sum())(t)["w"].act_scale
    upstream = np.broadcast_to(np.asarray(t["w"].materialise(), np.float64).sum(1), x.shape)
    s = float(t["w"].act_scale[0, 0])
    want = lsq_gradient(x, s, -127, 127, upstream) / np.sqrt(6 * 127)
    np.testing.assert_allclose(got, [[want]], rtol=1e-3)  # roundings that cancel


def test_unsigned_activations_of_lsq_start_at_zero():
    w, x = random(6, 2), np.maximum(random(9, 6, seed=1), 0)
    t = jc.quantize.lsq(
        {"w": jnp.asarray(w)}, {"w": STATIC(act_symmetric=False)}, stats=stats_of(x)
    )
    assert t["w"].act_offset is None
    np.testing.assert_allclose(t["w"].act_scale, [[x.max() / 255]], rtol=1e-6)
    q = jc.quantize.convert(t)["w"]
    np.testing.assert_array_equal(q.act_offset, 128 * t["w"].act_scale)
    seen = np.rint(x * np.float32(255 / x.max())) * (float(x.max()) / 255)
    got = jc.accelerate(matmul)({"w": q}, x)
    np.testing.assert_allclose(got, seen @ np.asarray(q.materialise(), np.float64), atol=1e-5)


def test_lsq_plus_offsets_follow_what_is_clipped():
    w, x = random(6, 2), np.maximum(random(9, 6, seed=1), 0)
    stats = stats_of(x / 2)
    spec = STATIC(act_symmetric=False)
    t = jc.quantize.lsq_plus({"w": jnp.asarray(w)}, {"w": spec}, stats=stats)
    mean, std = w.mean(0), w.std(0)
    want = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 8
    np.testing.assert_allclose(t["w"].scale[0], want, rtol=1e-5)
    scale, offset = (float(a[0, 0]) for a in (t["w"].act_scale, t["w"].act_offset))
    grads = jax.grad(lambda t: jc.accelerate(matmul)(t, x).sum())(t)["w"]
    upstream = np.broadcast_to(np.asarray(t["w"].materialise(), np.float64).sum(1), x.shape)
    code = (x - offset) / scale
    outside = (code > 127 * (1 + 1e-6)) | (code < -128 * (1 + 1e-6))
    assert outside.sum() >= 3
    want = np.sum(upstream[outside]) / np.sqrt(6 * 255)
    # In range the two paths to the offset cancel; what is left is float32's.
    np.testing.assert_allclose(grads.act_offset, [[want]], atol=1e-5)
    want = lsq_gradient(x - offset, scale, -128, 127, upstream) / np.sqrt(6 * 255)
    np.testing.assert_allclose(grads.act_scale, [[want]], rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_pact_is_its_formula(bits):
    w, x = random(6, 2), random(50, 6, seed=1)
    act = jc.arrays.Activation(jc.arrays.IntType(bits), per_token=False, static=True)
    spec = jc.quantize.Spec(qtype=jc.arrays.IntType(8), act=act)
    stats = stats_of(np.maximum(x, 0) / 2)
    t = jc.quantize.pact({"w": jnp.asarray(w)}, {"w": spec}, stats=stats)
    a = float(t["w"].act_clip[0, 0])
    np.testing.assert_allclose(a, x.max() / 2, rtol=1e-6)
    assert len(jax.tree.leaves(t)) == 2  # the weight and its clipping
    steps = 2**bits - 1
    seen = np.rint(np.clip(x, 0, a) * np.float32(steps / a)) * (a / steps)
    weights = np.asarray(t["w"].materialise(), np.float64)
    run = jc.accelerate(matmul)
    got = jax.jit(run)(t, x)
    # A tie may go either way: the quotient is rounded before it is.
    np.testing.assert_allclose(got, seen @ weights, atol=1e-4)
    grads, dx = jax.grad(lambda t, x: run(t, x).sum(), (0, 1))(t, jnp.asarray(x))
    upstream = np.broadcast_to(weights.sum(1), x.shape)
    np.testing.assert_allclose(grads["w"].act_clip, [[upstream[x >= a].sum()]], rtol=1e-4)
    np.testing.assert_allclose(dx, np.where((x >= 0) & (x < a), upstream, 0), atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_dorefa_is_its_formula(bits):
    w, c = random(20, 3), random(20, 3, seed=1)
    qtype = jc.arrays.OddType(1) if bits == 1 else jc.arrays.IntType(bits)
    t = jc.quantize.dorefa({"w": jnp.asarray(w)}, {"w": jc.quantize.Spec(qtype=qtype)})["w"]
    if bits == 1:
        want, slope = np.sign(w) * np.abs(w).mean(0), 1.0
    else:
        tanh, steps = np.tanh(w.astype(np.float64)), 2**bits - 1
        largest = np.abs(tanh).max(0)
        levels = np.rint((tanh / (2 * largest) + 0.5) * steps) / steps
        want, slope = largest * (2 * levels - 1), 1 - tanh**2
    np.testing.assert_allclose(t.materialise(), want, atol=2e-6)
    got = jax.grad(lambda t: jnp.sum(c * t.materialise()))(t).weight
    np.testing.assert_allclose(got, c * slope, rtol=1e-4, atol=1e-6)


def prepared(name, w, x):
    """Every method, with the spec that it is for."""
    stats, params = stats_of(x), {"w": jnp.asarray(w)}
    method, spec = {
        "ste": (jc.quantize.prepare_qat, jc.quantize.w4a8()),
        "lsq": (jc.quantize.lsq, STATIC()),
        "lsq_plus": (jc.quantize.lsq_plus, STATIC(act_symmetric=False)),
        "pact": (jc.quantize.pact, STATIC()),
        "dorefa": (jc.quantize.dorefa, jc.quantize.w4a8()),
        "binary": (jc.quantize.prepare_qat, jc.quantize.binary()),
        "ternary": (jc.quantize.prepare_qat, jc.quantize.ternary()),
        "gradients": (jc.quantize.prepare_qat, jc.quantize.w8a8(grad_bits=8)),
    }[name]
    return method(params, {"w": spec}, stats=stats)


METHODS = ("ste", "lsq", "lsq_plus", "pact", "dorefa", "binary", "ternary", "gradients")


@pytest.mark.parametrize("name", METHODS)
def test_training_and_what_it_converts_to(name):
    """Any optimizer lowers the loss, and `convert` gives what training saw."""
    x = np.maximum(random(64, 16, seed=1), 0)
    y = x @ random(16, 4, seed=2)
    params = prepared(name, random(16, 4), x)
    run = jc.accelerate(matmul)
    loss = lambda p: jnp.mean((run(p, x) - y) ** 2)
    tx = optax.multi_transform(
        {"weight": optax.adam(0.05), "scale": optax.sgd(1e-3)}, jc.quantize.trainable(params)
    )

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 60))
    (params, _), losses = scan((params, tx.init(params)))
    # A target of full precision: 1 and 2 bits of it cannot follow far.
    assert losses[-1] < losses[0] * (0.7 if name in ("binary", "ternary") else 0.2)
    converted = jc.quantize.convert(params)
    want, got = jax.jit(run)(params, x), jax.jit(run)(converted, x)
    # The same integers; scales that are means, and offsets, may round otherwise.
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    assert converted["w"].act == params["w"].act


def test_methods_work_on_layers_stacked_under_scan_and_seeds_under_vmap():
    w, x = random(2, 3, 8, 8), np.maximum(random(5, 8, seed=1), 0)
    stack = lambda p, x: jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0]
    stats = jc.calibrate(stack, {"w": jnp.asarray(w[0])}, [jnp.asarray(x)], RANGE)
    run, rules = jc.accelerate(stack), {"w": STATIC()}
    for method in (jc.quantize.lsq, jc.quantize.pact, jc.quantize.dorefa):
        prepare = lambda w, method=method: method({"w": w}, rules, stats=stats)
        loss = lambda w, prepare=prepare: jnp.sum(run(prepare(w), x) ** 2)
        got = jax.jit(jax.vmap(jax.grad(loss)))(jnp.asarray(w))
        for seed in range(2):
            # Compiled for two seeds at once; sums in another order, rounding at ties.
            one = jax.jit(jax.grad(loss))(jnp.asarray(w[seed]))
            np.testing.assert_allclose(got[seed], one, rtol=1e-3, atol=1e-3)


def test_what_methods_refuse():
    params, x = {"w": jnp.ones((4, 2))}, np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="'w': pact learns to clip static integer activations"):
        jc.quantize.pact(params, {"w": jc.quantize.w8a8()})
    with pytest.raises(ValueError, match="'w': dorefa takes symmetric integers, not nf4"):
        jc.quantize.dorefa(params, {"w": jc.quantize.nf4(group_size=None)})
    with pytest.raises(ValueError, match="'w': learned scales need a symmetric spec"):
        jc.quantize.lsq(params, {"w": jc.quantize.int4(symmetric=False)})
    with pytest.raises(ValueError, match="'w': odd levels of 8 bits are no int8"):
        jc.quantize.dorefa(params, {"w": jc.quantize.w8a8(grad_bits=8)})
    with pytest.raises(ValueError, match="gradients take 2 to 8 bits"):
        jc.quantize.w8a8(grad_bits=9)
    with pytest.raises(ValueError, match="need integer weights, not nf4"):
        jc.quantize.Spec(qtype=jc.quantize.nf4().qtype, act=jc.quantize.w8a8(grad_bits=8).act)
    del x
