<<<<<<< HEAD
"""`calibrate` under scan, vmap, sharding, repeated uses; static activations from it."""
=======
"""Statistics of activations: exact against numpy, wherever the products are."""
>>>>>>> main

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
<<<<<<< HEAD
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
import oracles
from checks import random, through

RANGES = {
    "absmax": jc.statistics.absmax(),
    "minmax": jc.statistics.minmax(),
    "moving_average": jc.statistics.moving_average(0.5),
    "percentile": jc.statistics.percentile(95.0),
    "mse": jc.statistics.mse(4),
    "entropy": jc.statistics.entropy(4),
    "snr": jc.statistics.snr(4),
}


def stacked(p, x):
    """Three layers under one scan."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def alone(statistic, inputs):
    """What the statistic makes of one layer's inputs, batch by batch."""
    return through(statistic, inputs)


@pytest.mark.parametrize("name", RANGES)
def test_layers_under_scan_have_each_their_own(name):
    w = random(3, 6, 6)
    batches = [jnp.asarray(random(20, 6, seed=i)) for i in range(2)]
    found = jc.calibrate(stacked, {"w": jnp.asarray(w)}, batches, RANGES[name])["w"]
    assert found.count.shape == (3, 1, 1)
    assert np.all(found.count == 40)
    inputs = [[], [], []]
    for h in batches:
        for layer in range(3):
            inputs[layer].append(h)
            h = jnp.tanh(h @ w[layer])
    for layer in range(3):
        # tanh is compiled differently inside a scan: its last bit may differ.
        np.testing.assert_allclose(
            found.value[layer, 0, 0], alone(RANGES[name], inputs[layer]), rtol=1e-5
        )


@pytest.mark.parametrize("name", RANGES)
def test_experts_have_each_their_own_and_uses_are_joined(name):
    x = random(2, 10, 4)
    params = {"experts": jnp.ones((2, 4, 3)), "shared": jnp.ones((4, 3))}

    def fn(p, x):
        y = jnp.einsum("ebk,ekn->ebn", x, p["experts"])
        return y + x[0] @ p["shared"] + (x[1] * 2) @ p["shared"]

    found = jc.calibrate(fn, params, [jnp.asarray(x)], RANGES[name])
    for expert in range(2):
        want = alone(RANGES[name], [jnp.asarray(x[expert])])
        np.testing.assert_allclose(found["experts"].value[expert, 0, 0], want, rtol=1e-6)
    both = np.concatenate([x[0], 2 * x[1]])
    assert float(found["shared"].count[0, 0]) == 20
    want = alone(RANGES[name], [jnp.asarray(both)])
    np.testing.assert_allclose(found["shared"].value[0, 0], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_vmapped_models(name):
    """Under `vmap` of the model (seeds, say) a tap joins what all of them saw."""
    x = random(3, 10, 4)
    fn = lambda p, x: jax.vmap(lambda x: x @ p["w"])(x)
    found = jc.calibrate(fn, {"w": jnp.ones((4, 2))}, [jnp.asarray(x)], RANGES[name])["w"]
    want = alone(RANGES[name], [jnp.asarray(x.reshape(30, 4))])
    np.testing.assert_allclose(found.value[0, 0], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["minmax", "percentile"])
def test_batches_that_are_sharded(name):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = random(32, 4)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
    found = jc.calibrate(fn, params, [sharded], RANGES[name])["w"]
    assert float(found.count[0, 0]) == 32
    np.testing.assert_allclose(found.value[0, 0], alone(RANGES[name], [jnp.asarray(x)]), rtol=1e-6)


def test_a_layer_that_a_batch_does_not_reach_keeps_its_average():
    def fn(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)

    batches = [jnp.full((2, 3), v) for v in (1.0, -9.0, 3.0)]
    average = jc.statistics.moving_average(0.5)
    found = jc.calibrate(fn, {"w": jnp.ones((3, 3))}, batches, average)["w"]
    assert float(found.count[0, 0]) == 4
    np.testing.assert_allclose(found.value[0, 0], [0, (0.5 * 1 + 1 * 3) / 1.5], rtol=1e-6)


def test_a_model_and_a_linen_scan():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    x = jnp.asarray(random(16, 5))
    params = model.init(jax.random.key(0), x)
    found = jc.calibrate(model.apply, params, [x], jc.statistics.minmax())["params"]
    hidden = nn.relu(nn.Dense(8).apply({"params": params["params"]["layers_0"]}, x))
    assert found["layers_0"]["bias"] is None
    np.testing.assert_allclose(
        found["layers_2"]["kernel"].value[0, 0], [0, hidden.max()], rtol=1e-6
    )


ASYMMETRIC = dict(static=True, act_symmetric=False)


def relu_layer(p, x):
    return jax.nn.relu(x) @ p["w"]


def static_params(statistic, spec, w, x):
    params = {"w": jnp.asarray(w)}
    stats = jc.calibrate(relu_layer, params, [jnp.asarray(x)], statistic)
    return params, stats, {"w": spec}


@pytest.mark.parametrize("name", RANGES)
def test_static_activations_take_every_range(name):
    w, x = random(6, 4), random(30, 6, seed=1)
    params, stats, rules = static_params(RANGES[name], jc.quantize.w8a8(static=True), w, x)
    q = jc.quantize.quantize(params, rules, stats=stats)["w"]
    largest = np.abs(np.asarray(stats["w"].value)).max()
    np.testing.assert_allclose(q.act_scale, [[largest / 127]], rtol=1e-6)
    assert q.act_offset is None


def asymmetric_oracle(x, scale, offset):
    """`x` as codes from -128 to 127, in the float32 of the definition."""
    codes = np.clip(np.rint((np.asarray(x, np.float32) - offset) / scale), -128, 127)
    return codes.astype(np.float64) * np.float64(scale) + np.float64(offset)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "spec",
    [
        jc.quantize.w8a8,
        lambda **k: jc.quantize.w4a8(group_size=4, **k),
        lambda **k: jc.quantize.Spec(
            qtype=jc.arrays.IntType(8, False), act=jc.quantize.w8a8(**k).act
        ),
    ],
    ids=["channel", "group", "zero points"],
)
def test_asymmetric_activations(spec, static):
    """Integers with an offset: the formula, and training to a rounding."""
    w, x = random(10, 4), np.maximum(random(30, 10, seed=1), 0) + np.float32(0.25)
    spec = spec(static=static, act_symmetric=False, per_token=False)
    params, stats, rules = static_params(jc.statistics.minmax(), spec, w, x)
    q = jc.quantize.quantize(params, rules, stats=stats)
    rows = jc.explain(relu_layer, q, x, platform="cpu")
    assert [row.op for row in rows] == ["int8_matmul"]
    got = np.asarray(jax.jit(jc.accelerate(relu_layer))(q, x), np.float64)
    scale = np.float32(x.max()) * np.float32(1 / 255)
    offset = np.float32(128) * scale
    want = asymmetric_oracle(x, scale, offset) @ oracles.dense(q["w"])
    # The offset's product is about as large as the sum, and both are rounded to float32.
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    t = jc.quantize.prepare_qat(params, rules, stats=stats)
    simulated = jax.jit(jc.accelerate(relu_layer))(t, x)
    # The same sums; whether the offset is added with one rounding or two is up to XLA.
    np.testing.assert_allclose(simulated, got, atol=1e-6 * np.abs(want).max())


def test_an_offset_is_worth_a_bit_after_a_relu():
    w, x = random(32, 8), np.maximum(random(200, 32, seed=1), 0)
    want = x.astype(np.float64) @ oracles.dense(
        jc.quantize.quantize({"w": w}, {"w": jc.quantize.int8()})["w"]
    )
    errors = []
    for symmetric in (True, False):
        spec = jc.quantize.w8a8(static=True, act_symmetric=symmetric)
        params, stats, rules = static_params(jc.statistics.minmax(), spec, w, x)
        q = jc.quantize.quantize(params, rules, stats=stats)
        errors.append(np.std(np.asarray(jc.accelerate(relu_layer)(q, x), np.float64) - want))
    assert 1.9 < errors[0] / errors[1] < 2.1  # half the step: 255 of them instead of 127


def test_padding_of_a_convolution_is_zero_and_not_code_zero():
    w, x = random(3, 3, 2, 4), np.maximum(random(1, 5, 5, 2, seed=1), 0)
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    spec = jc.quantize.w8a8(axis=(0, 1, 2), per_token=False, act_symmetric=False)
    q = jc.quantize.quantize({"w": jnp.asarray(w)}, {"w": spec})
    got = np.asarray(jax.jit(jc.accelerate(fn))(q, x))
    scale = np.float32(x.max()) * np.float32(1 / 255)
    seen = asymmetric_oracle(x, scale, np.float32(128) * scale)
    want = oracles.conv(seen, oracles.dense(q["w"]), padding=((1, 1), (1, 1)))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_statistics_that_static_activations_cannot_use():
    w, x = random(6, 4), random(30, 6)
    spec = jc.quantize.w8a8(static=True)
    params, stats, rules = static_params(jc.statistics.second_moment(), spec, w, x)
    with pytest.raises(
        ValueError, match=r"'w' has the shape \(1, 1, 6, 6\); static activations take"
    ):
        jc.quantize.quantize(params, rules, stats=stats)
    x[0, 0] = np.inf
    for statistic in (jc.statistics.minmax(), jc.statistics.mse()):
        params, stats, rules = static_params(statistic, spec, w, x)
        with pytest.raises(ValueError, match="that met 'w' in calibration are not finite"):
            jc.quantize.quantize(params, rules, stats=stats)
    with pytest.raises(ValueError, match="no batches"):
        jc.calibrate(relu_layer, params, [], jc.statistics.mse())


@pytest.mark.parametrize("name", RANGES)
def test_a_count_of_zero_raises(name):
    params = {"w": jnp.ones((3, 2)), "unused": jnp.ones((3, 2))}
    fn = lambda p, x: x @ p["w"] + jax.lax.stop_gradient(x @ p["unused"])
    stats = jc.calibrate(fn, params, [jnp.ones((2, 3))], RANGES[name])
    assert float(np.max(stats["unused"].count)) == 0
    with pytest.raises(ValueError, match="'unused' comes from no activations"):
        jc.quantize.quantize(params, {"unused": jc.quantize.w8a8(static=True)}, stats=stats)


def test_memory_does_not_grow_with_the_batches():
    """The state has the shape of one value, whatever came before."""
    for statistic in RANGES.values():
        state = statistic.init(jnp.zeros(statistic.shape(4)))
        new = statistic.join(state, statistic.of(jnp.ones((9, 4))), jnp.ones(()))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, new)
=======
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
import oracles
from checks import EPS, made, random

ABSMAX, MOMENT = jc.statistics.absmax(), jc.statistics.second_moment()


def assert_observed(found, rows, statistic, index=()):
    """`found` is the statistic of `rows`, all the activations that met the weight."""
    rows = np.concatenate([np.asarray(r, np.float64).reshape(-1, r.shape[-1]) for r in rows])
    value, count = np.asarray(found.value), np.asarray(found.count)
    lead = tuple(n for n in count.shape if n > 1)  # the layers or experts
    value, count = value.reshape(lead + value.shape[count.ndim :]), count.reshape(lead)
    assert count[index] == len(rows)
    if statistic is ABSMAX:
        assert value[index] == np.abs(rows).max().astype(np.float32)  # no rounding in a maximum
    else:
        size = np.abs(rows).T @ np.abs(rows)
        assert np.all(np.abs(value[index] - rows.T @ rows) <= (len(rows) + 8) * EPS * size)


@pytest.fixture(params=[ABSMAX, MOMENT], ids=lambda s: s.name)
def statistic(request):
    return request.param


def test_plain(statistic):
    batches = [random(5, 6, seed=i) * (i + 1) for i in range(3)]
    found = jc.calibrate(lambda p, x: x @ p["w"], {"w": random(6, 4)}, batches, statistic)
    assert_observed(found["w"], batches, statistic)


def test_bias_and_unused_leaves_have_none_or_count_zero(statistic):
    params = {"w": random(6, 4), "b": random(4), "i": np.arange(3), "unused": random(2, 2)}
    found = jc.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [random(5, 6)], statistic)
    assert found["b"] is None
    assert found["i"] is None
    assert found["unused"].count == 0
    with pytest.raises(ValueError, match="statistic of 'unused' comes from no activations"):
        found["unused"].of("unused")


def test_shared_statistics_of_three_axes(statistic):
    x, w = random(2, 5, 3, 4), random(3, 4, 6)
    fn = lambda p, x: jnp.einsum("bnhd,hdf->bnf", x, p["w"])
    found = jc.calibrate(fn, {"w": w}, [x], statistic)
    assert_observed(found["w"], [x.reshape(2, 5, 12)], statistic)


def test_the_order_of_contracted_axes_is_that_of_the_weight():
    """Whichever way round the einsum is written."""
    x, w = random(5, 4, 3), random(3, 4, 6)
    found = jc.calibrate(lambda p, x: jnp.einsum("ndh,hdf->nf", x, p["w"]), {"w": w}, [x], MOMENT)
    assert_observed(found["w"], [x.transpose(0, 2, 1).reshape(5, 12)], MOMENT)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, use_bias=False)(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan()(x, None)[0]


def test_scanned_layers_have_a_statistic_each(statistic):
    x = random(5, 6)
    variables = Stack().init(jax.random.key(0), x)
    found = jc.calibrate(Stack().apply, variables, [x, 2 * x], statistic)
    [[weights]] = [list(p["Dense_0"].values()) for p in variables["params"].values()]
    [[observed]] = [list(p["Dense_0"].values()) for p in found["params"].values()]
    assert observed.count.shape == (3, 1, 1)
    dense = jax.jit(lambda w, x: jnp.tanh(x @ w))  # what the layers see, to the bit
    inputs = [x, 2 * x]
    for layer in range(3):
        one = jc.statistics.Observed(observed.value[layer], observed.count[layer])
        assert_observed(one, inputs, statistic)
        inputs = [dense(weights[layer], x) for x in inputs]


@pytest.mark.parametrize("how", ["vmap", "einsum", "picked"])
def test_experts_have_a_statistic_each(statistic, how):
    x, w = random(3, 5, 6), random(3, 6, 4)
    fn = {
        "vmap": lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]),
        "einsum": lambda p, x: jnp.einsum("end,edf->enf", x, p["w"]),
        "picked": lambda p, x: [x[e] @ p["w"][e] for e in range(3)],
    }[how]
    found = jc.calibrate(fn, {"w": w}, [x], statistic)["w"]
    for expert in range(3):
        assert_observed(found, [x[expert]], statistic, expert)


def test_convolution(statistic):
    """A row is a patch, in the order of the kernel."""
    x = random(2, 6, 6, 3)
    model = nn.Conv(4, (3, 2), strides=2, padding="VALID", use_bias=False)
    variables = model.init(jax.random.key(0), x)
    found = jc.calibrate(model.apply, variables, [x], statistic)["params"]["kernel"]
    assert_observed(found, [oracles.patches(x, 3, 2, (2, 2))], statistic)


def test_a_weight_used_twice_sums_or_takes_the_maximum(statistic):
    x, w = random(5, 6), random(6, 6)
    fn = lambda p, x: (x @ p["w"], (3 * x[:2]) @ p["w"])
    found = jc.calibrate(fn, {"w": w}, [x], statistic)
    assert_observed(found["w"], [x, 3 * x[:2]], statistic)


def test_a_weight_used_in_a_loop(statistic):
    x, w = random(5, 6), random(6, 4)

    def fn(p, x):
        step = lambda total, s: (total + (s * x) @ p["w"], None)
        return lax.scan(step, jnp.zeros((5, 4)), jnp.arange(3.0))[0]

    found = jc.calibrate(fn, {"w": w}, [x], statistic)
    assert_observed(found["w"], [0 * x, x, 2 * x], statistic)


def test_concatenated_weights(statistic):
    params, x = {"q": random(6, 4), "k": random(6, 4)}, random(5, 6)
    fn = lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)
    found = jc.calibrate(fn, params, [x], statistic)
    assert_observed(found["q"], [x], statistic)
    assert_observed(found["k"], [x], statistic)


def test_weights_concatenated_along_what_is_contracted_are_not_observed():
    """Each meets a part of the activations only; none is better than a wrong one."""
    params, x = {"q": random(3, 4), "k": random(3, 4)}, random(5, 6)
    found = jc.calibrate(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]]), params, [x], ABSMAX)
    assert found["q"].count == 0


def test_sharded_batch(statistic):
    """Summed over eight devices by XLA, or the largest of them all."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = random(16, 6)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    found = jc.calibrate(lambda p, x: x @ p["w"], {"w": random(6, 4)}, [placed], statistic)
    assert_observed(found["w"], [x], statistic)


def test_jitted_function_and_second_calibration(statistic):
    inner = jax.jit(lambda w, x: x @ w)
    x = random(5, 6)
    for _ in range(2):
        found = jc.calibrate(lambda p, x: inner(p["w"], x), {"w": random(6, 4)}, [x], statistic)
        assert_observed(found["w"], [x], statistic)


def test_half_precision_activations(statistic):
    x = jnp.asarray(random(5, 6)).astype(jnp.bfloat16)
    w = jnp.asarray(random(6, 4)).astype(jnp.bfloat16)
    found = jc.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x], statistic)
    assert found["w"].value.dtype == jnp.float32
    assert_observed(found["w"], [np.asarray(x, np.float32)], statistic)


def test_a_batch_is_read_once_and_the_function_traced_twice():
    """Once for the layout and once for all batches."""
    traces, taken = [], []

    def fn(p, x):
        traces.append(1)
        return x @ p["w"]

    def batches():
        for i in range(4):
            taken.append(i)
            yield random(5, 6, seed=i)

    jc.calibrate(fn, {"w": random(6, 4)}, batches(), ABSMAX)
    assert (len(traces), taken) == (2, [0, 1, 2, 3])


def test_patterns(statistic):
    params = {"a": {"w": random(6, 6)}, "b": {"w": random(6, 6)}}
    fn = lambda p, x: x @ p["a"]["w"] @ p["b"]["w"]
    found = jc.calibrate(fn, params, [random(5, 6)], statistic, rules=["b/.*"])
    assert found["a"]["w"].count == 0
    assert np.all(found["b"]["w"].count == 5)


def test_patterns_that_match_nothing():
    with pytest.raises(ValueError, match="'nothing' matches none of the paths 'w'"):
        jc.calibrate(lambda p, x: x @ p["w"], {"w": random(6, 6)}, [], ABSMAX, rules=["nothing"])


def test_compressed_leaves_take_part_and_are_not_observed():
    x = random(5, 6)
    params = {"q": made((6, 6)), "w": random(6, 4)}
    found = jc.calibrate(lambda p, x: (x @ p["q"]) @ p["w"], params, [x], ABSMAX)
    assert found["q"].count == 0
    want = np.abs(x @ oracles.dense(params["q"])).max()
    np.testing.assert_allclose(found["w"].value, want, rtol=1e-6)  # a float32 layer before it


def test_a_statistic_of_your_own():
    squares = jc.statistics.Statistic("squares", lambda x: jnp.sum(x**2, -2), lambda k: (k,))
    x = random(5, 6)
    found = jc.calibrate(lambda p, x: x @ p["w"], {"w": random(6, 4)}, [x, x], squares)["w"]
    np.testing.assert_allclose(found.value[0, 0], 2 * (x**2).sum(0), rtol=1e-5)  # ten squares


def test_no_batches():
    with pytest.raises(ValueError, match="calibrate got no batches"):
        jc.calibrate(lambda p, x: x @ p["w"], {"w": random(6, 4)}, iter(()), ABSMAX)


def test_activations_that_no_gradient_reaches_are_not_seen():
    fn = lambda p, x: lax.stop_gradient(x @ p["w"]) + x.sum()
    found = jc.calibrate(fn, {"w": random(6, 4)}, [random(5, 6)], ABSMAX)
    with pytest.raises(ValueError, match="does not lead to the function's output"):
        found["w"].of("w")


def test_a_function_without_floating_results():
    with pytest.raises(TypeError, match="returns floating arrays"):
        jc.calibrate(
            lambda p, x: jnp.argmax(x @ p["w"], -1), {"w": random(6, 4)}, [random(5, 6)], ABSMAX
        )


def test_static_activations_are_quantized_with_what_was_seen():
    x, w = random(5, 6), random(6, 4)
    fn = lambda p, x: x @ p["w"]
    stats = jc.calibrate(fn, {"w": w}, [x, 0.1 * x], ABSMAX)
    q = jc.quantize.quantize({"w": w}, {"w": jc.quantize.w8a8(static=True)}, stats=stats)
    # A product and a rounded reciprocal.
    np.testing.assert_allclose(q["w"].act_scale, np.abs(x).max() / 127, rtol=1e-6)
    unseen = jc.calibrate(lambda p, x: x, {"w": w}, [x], ABSMAX)
    with pytest.raises(ValueError, match="statistic of 'w' comes from no activations"):
        jc.quantize.quantize({"w": w}, {"w": jc.quantize.w8a8(static=True)}, stats=unseen)
>>>>>>> main
