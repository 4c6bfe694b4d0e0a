"""`calibrate` under scan, vmap, sharding, repeated uses; static activations from it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    assert [row.op for row in rows] == ["int8_matmul" if spec.qtype.bits == 8 else "w4a8_matmul"]
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
