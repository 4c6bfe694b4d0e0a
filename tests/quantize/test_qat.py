"""Training for quantization: gradients by their formulas, and what `convert` makes of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles
from checks import EPS, random

Q = jc.quantize
ULP = 2.0**-23
SPECS = {
    "int8": Q.int8(),
    "int4 groups": Q.int4(group_size=5),
    "int4 asymmetric": Q.int4(symmetric=False),
    "int3 tensor": Q.int3(axis=(-2, -1)),
    "int2": Q.int2(),
    "w8a8": Q.w8a8(),
    "w8a8 static": Q.w8a8(static=True),
    "w4a8": Q.w4a8(),
    "w4a8 groups": Q.w4a8(group_size=4),
    "w4a4": Q.w4a4(per_token=False),
}


def model(p, x):
    return jax.nn.relu(x @ p["first"] + p["bias"]) @ p["second"]


def problem():
    params = {"first": random(12, 9) / 3, "second": random(9, 4, seed=1) / 3, "bias": random(9)}
    x, y = random(20, 12, seed=2), random(20, 4, seed=3)
    return jax.tree.map(jnp.asarray, params), x, y


@functools.cache
def statistics():
    params, x, _ = problem()
    return jc.calibrate(model, params, [x], jc.statistics.absmax())


def prepared(spec, learn_scale=False):
    rules = {"first|second": spec}
    return Q.prepare_qat(problem()[0], rules, stats=statistics(), learn_scale=learn_scale)


def loss(params, x, y):
    return jnp.mean((jc.accelerate(model)(params, x) - y) ** 2)


def train(params, tx, steps=8):
    """Trained parameters and the losses; nothing may change shape, dtype or be compiled anew."""
    _, x, y = problem()
    state = tx.init(params)
    facts = lambda tree: (
        jax.tree.structure(tree),
        [(a.shape, a.dtype) for a in jax.tree.leaves(tree)],
    )
    before = facts((params, state))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert facts((params, state)) == before
    return params, losses


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_trained_then_converted(spec):
    """Evaluation while training is inference after it, static activation scales included."""
    learn_scale = spec.qtype.symmetric
    start = prepared(spec, learn_scale)
    params, losses = train(start, optax.adam(0.02))
    assert min(losses[1:]) < losses[0]
    _, x, y = problem()
    converted = Q.convert(params)
    for name in ("first", "second"):
        simulated = params[name].simulate()
        np.testing.assert_array_equal(oracles.codes_of(converted[name]), simulated.values)
        np.testing.assert_array_equal(converted[name].scale, simulated.scale)
        if spec.act is not None and spec.act.static:
            assert np.all(params[name].act_scale != start[name].act_scale)  # it was trained
            np.testing.assert_array_equal(converted[name].act_scale, params[name].act_scale)
    run = jax.jit(jc.accelerate(model))
    seen, served = run(params, x), run(converted, x)
    if spec.act is not None and spec.group_size is None:
        # Integer sums are far below 2^24 here: the float ones are exact as well. What is left are
        # the roundings of two scales, twice.
        np.testing.assert_allclose(seen, served, rtol=0, atol=8 * EPS * np.abs(seen).max())
    else:
        # Sums of twelve and nine terms in another order.
        np.testing.assert_allclose(seen, served, rtol=1e-4, atol=1e-5)
    errors = [np.mean((np.asarray(out, np.float64) - y) ** 2) for out in (seen, served)]
    assert abs(errors[0] - errors[1]) <= 1e-3


def weights_around_the_bound():
    """Inside, at the bound on both sides, and outside, for a scale of 1/4 and 4 bits."""
    return np.float32([[0.3, 1.75, -1.75, 1.76, -1.9, 0.0, 1.7499, -40.0]]).T


def fixed_scale(w, scale, spec):
    twin = Q.prepare_qat({"w": jnp.asarray(w)}, {"w": spec}, learn_scale=True)["w"]
    return {
        "w": type(twin)(
            twin.weight,
            jnp.full_like(twin.scale, scale),
            twin.act_scale,
            qtype=twin.qtype,
            axis=twin.axis,
            group_size=twin.group_size,
            act=twin.act,
            path="w",
        )
    }


def test_the_gradient_to_a_weight_is_one_inside_and_at_the_bound_zero_outside():
    params = fixed_scale(weights_around_the_bound(), 0.25, Q.int4())
    c = random(1, 8)
    fn = lambda p: jc.accelerate(lambda p, x: (x @ p["w"]).sum())(p, c)
    for grad in (jax.grad(fn), jax.jit(jax.grad(fn))):
        got = grad(params)["w"].weight[:, 0]
        inside = np.abs(weights_around_the_bound()[:, 0]) <= 1.75
        # The activation, times the scale and divided by it.
        np.testing.assert_allclose(got, np.where(inside, c[0], 0), rtol=2 * ULP)


@pytest.mark.parametrize("make", [Q.int8, Q.int4, Q.int2], ids=lambda f: f.__name__)
def test_the_largest_weight_of_each_channel_is_at_the_bound(make):
    """Dynamic scales: nothing is outside, so every gradient passes."""
    params = Q.prepare_qat({"w": jnp.asarray(random(33, 50) * 3)}, {"w": make()})
    c = random(2, 33, seed=1)
    fn = lambda p: jc.accelerate(lambda p, x: (x @ p["w"]).sum())(p, c)
    got = jax.jit(jax.grad(fn))(params)["w"].weight
    want = np.broadcast_to(c.sum(0)[:, None], (33, 50))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_gradient_to_an_activation_is_one_inside_and_at_the_bound_zero_outside():
    w = np.float32(np.diag([1.0, 1, 1, 1, 1]))  # exact in 8 bits
    params, x = {"w": jnp.asarray(w)}, np.float32([[0.3, 2.0, -2.0, 2.1, -9.0]])
    calibration = np.float32([[2.0, 0, 0, 0, 0]])
    fn = lambda p, x: x @ p["w"]
    stats = jc.calibrate(fn, params, [calibration], jc.statistics.absmax())
    params = Q.prepare_qat(params, {"w": Q.w8a8(static=True)}, stats=stats)
    got = jax.grad(lambda x: jc.accelerate(fn)(params, x).sum())(x)
    np.testing.assert_allclose(got, [[1, 1, 1, 0, 0]], rtol=4 * ULP)
    converted = Q.convert(params)
    served = jax.grad(lambda x: jc.accelerate(fn)(converted, x).sum())(x)
    np.testing.assert_allclose(served, [[1, 1, 1, 0, 0]], rtol=4 * ULP)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_learned_scales_get_the_gradient_of_lsq(bits, group_size):
    """sum g (round(v) - v) where |v| <= high, else g sign(v) high; v = w / s (Esser et al.)."""
    make = {8: Q.int8, 4: Q.int4, 2: Q.int2}[bits]
    w, x = random(10, 3), random(6, 10, seed=1)
    c = random(6, 3, seed=2)
    params = fixed_scale(w, 0.6 / (2 ** (bits - 1) - 1), make(group_size=group_size))
    fn = lambda p: jnp.sum(c * jc.accelerate(lambda p, x: x @ p["w"])(p, x))
    got = jax.jit(jax.grad(fn))(params)["w"].scale
    scale = np.asarray(params["w"].scale, np.float64)
    sizes = None if group_size is None else (group_size,)
    v = w.astype(np.float64) / oracles.spread(scale, w.shape, (-2,), sizes)
    high = 2 ** (bits - 1) - 1
    inside = np.abs(v) <= high
    each = (x.T.astype(np.float64) @ c) * np.where(inside, np.rint(v) - v, np.sign(v) * high)
    groups = -(-10 // (group_size or 10))
    want = [
        each[i * (group_size or 10) : (i + 1) * (group_size or 10)].sum(0) for i in range(groups)
    ]
    # Sixty products of numbers up to 127 in float32, some of which cancel.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=60 * 127 * ULP)


def test_the_static_scale_of_activations_gets_the_gradient_of_lsq_too():
    w, x, c = np.eye(5, dtype=np.float32), random(6, 5) * 2, random(6, 5, seed=1)
    params, fn = {"w": jnp.asarray(w)}, lambda p, x: x @ p["w"]
    stats = jc.calibrate(fn, params, [np.ones((1, 5), np.float32)], jc.statistics.absmax())
    params = Q.prepare_qat(params, {"w": Q.w8a8(static=True)}, stats=stats)
    got = jax.grad(lambda p: jnp.sum(c * jc.accelerate(fn)(p, x)))(params)["w"].act_scale
    v = x.astype(np.float64) / np.asarray(params["w"].act_scale, np.float64)
    each = np.where(np.abs(v) <= 127, np.rint(v) - v, np.sign(v) * 127)
    np.testing.assert_allclose(got, [[np.sum(c * each)]], rtol=1e-5)


def test_labels_for_multi_transform():
    params = prepared(Q.w8a8(static=True), learn_scale=True)
    params["table"] = jnp.arange(3)
    params["fixed"] = Q.quantize({"w": jnp.ones((2, 2))}, {"w": Q.int8()})["w"]
    labels = Q.trainable(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert (labels["bias"], labels["table"]) == ("weight", "frozen")
    first = labels["first"]
    assert (first.weight, first.scale, first.act_scale) == ("weight", "scale", "scale")
    assert (labels["fixed"].values, labels["fixed"].scale) == ("frozen", "frozen")


def test_each_label_has_its_own_optimizer():
    params = prepared(Q.w8a8(static=True), learn_scale=True)
    tx = optax.multi_transform(
        {"weight": optax.adamw(0.01, weight_decay=0.1), "scale": optax.set_to_zero()},
        Q.trainable,
    )
    trained, losses = train(params, tx)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(trained["first"].scale, params["first"].scale)
    np.testing.assert_array_equal(trained["first"].act_scale, params["first"].act_scale)
    assert np.all(trained["first"].weight != params["first"].weight)


def test_integers_are_frozen():
    """Fine-tuning what is left in floats: `allow_int` gives integers a gradient of float0."""
    params, x, y = problem()
    params = Q.quantize(params, {"first": Q.int4(), "second": Q.w8a8()})
    tx = optax.multi_transform(
        {"weight": optax.sgd(0.1), "scale": optax.sgd(0.1), "frozen": Q.freeze()}, Q.trainable
    )
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    tuned, losses = params, []
    for _ in range(3):
        tuned, state, value = step(tuned, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    for name in ("first", "second"):
        jax.tree.map(np.testing.assert_array_equal, tuned[name], params[name])
        assert [a.dtype for a in jax.tree.leaves(tuned[name])] == [
            a.dtype for a in jax.tree.leaves(params[name])
        ]
    assert np.any(tuned["bias"] != params["bias"])


def test_freeze_needs_params():
    with pytest.raises(ValueError, match="freeze needs params"):
        Q.freeze().update({"w": jnp.ones(2)}, optax.EmptyState())


def test_moments_have_the_shape_and_dtype_of_what_they_belong_to():
    params = prepared(Q.int4(), learn_scale=True)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    mu = optax.tree.get(optax.adam(0.1).init(params), "mu")
    assert jax.tree.structure(mu) == jax.tree.structure(params)
    assert mu["first"].weight.dtype == jnp.bfloat16


def test_vmap_over_seeds_trains_each_as_alone():
    _, x, y = problem()
    stacked = {"first": random(3, 12, 9), "second": random(3, 9, 4), "bias": random(3, 9)}

    def grad(params):
        params = Q.prepare_qat(params, {"first|second": Q.w8a8()})
        return jax.grad(loss)(params, x, y)

    together = jax.jit(jax.vmap(grad))(stacked)
    for i in range(3):
        alone = jax.jit(grad)(jax.tree.map(lambda a, i=i: a[i], stacked))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6)  # another order of sums


def test_what_cannot_be_trained():
    asymmetric = {"w": Q.int8(symmetric=False)}
    with pytest.raises(ValueError, match="'w': learned scales need a symmetric spec"):
        Q.prepare_qat({"w": jnp.ones((2, 2))}, asymmetric, learn_scale=True)
    with pytest.raises(TypeError, match="w is int32"):
        Q.prepare_qat({"w": jnp.ones((2, 2), jnp.int32)}, {"w": Q.int8()})
    with pytest.raises(ValueError, match="matches none of the paths 'w'"):
        Q.prepare_qat({"w": jnp.ones((2, 2))}, {"v": Q.int8()})
    with pytest.raises(ValueError, match="found no FakeQuantArray"):
        Q.convert({"w": jnp.ones((2, 2))})


def test_a_gradient_inside_accelerate_raises():
    params = prepared(Q.int8())
    _, x, y = problem()
    inside = jc.accelerate(jax.grad(lambda p: jnp.mean((model(p, x) - y) ** 2)))
    with pytest.raises(TypeError, match="first is differentiated inside accelerate"):
        inside(params)
