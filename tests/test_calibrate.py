"""Statistics of activations: exact against numpy, wherever the products are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
import oracles
from checks import EPS, made, random, through

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


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution(statistic, groups):
    """Its matrices share a statistic: a row for each patch of each group, by a textbook loop."""
    x, w = random(2, 5, 6, 4), random(3, 2, 4 // groups, 8)
    numbers = ("NHWC", "HWIO", "NHWC")
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (2, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
    )
    found = jc.calibrate(fn, {"w": w}, [x], statistic)["w"]
    rows = [
        x[b, 2 * i : 2 * i + 3, j : j + 2, g * len(w[0, 0]) : (g + 1) * len(w[0, 0])].ravel()
        for b in range(2)
        for i in range(2)
        for j in range(5)
        for g in range(groups)
    ]
    assert_observed(found, [np.stack(rows)], statistic)


def test_ragged_products_have_a_statistic_of_each_group(statistic):
    """Rows behind the last group meet nothing."""
    x, w, sizes = random(9, 6), random(3, 6, 4), np.array([2, 0, 5])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray(sizes))
    found = jc.calibrate(fn, {"w": w}, [x], statistic)["w"]
    assert_observed(found, [x[:2]], statistic, 0)
    assert_observed(found, [x[2:7]], statistic, 2)
    assert found.count[1] == 0
    with pytest.raises(ValueError, match="statistic of 'w' comes from no activations"):
        found.of("w")


@pytest.mark.parametrize("how", ["one", "two", "clipped", "transposed"])
def test_experts_that_are_looked_up_have_a_statistic_each(statistic, how):
    """Each row chooses; `-1` is the last, and where indices are clipped so are larger ones."""
    x, w = random(7, 6), random(3, 6, 4)
    one = np.array([0, 2, 2, 0, -1, 0, 0])
    two = np.stack([one, np.array([2, 1, 1, 2, 1, 2, 1])], 1)
    fn, chosen = {
        "one": (lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][one]), one[:, None]),
        "two": (lambda p, x: jnp.einsum("bd,bkdf->bkf", x, p["w"][two]), two),
        "clipped": (
            lambda p, x: jnp.einsum("bd,bdf->bf", x, jnp.take(p["w"], one + 3, 0, mode="clip")),
            np.clip(one + 3, 0, 2)[:, None],
        ),
        "transposed": (
            lambda p, x: jax.vmap(jnp.matmul)(p["w"][one].swapaxes(1, 2), x),
            one[:, None],
        ),
    }[how]
    if how == "two":  # the rows are there once for each choice
        fn = lambda p, x: jnp.einsum("bkd,bkdf->bkf", jnp.stack([x, x], 1), p["w"][two])
    found = jc.calibrate(fn, {"w": w}, [x], statistic)["w"]
    for expert in range(3):
        rows = [x[b] for b in range(7) for i in chosen[b] if i % 3 == expert]
        if rows:
            assert_observed(found, [np.stack(rows)], statistic, expert)
        else:
            assert found.count[expert] == 0


def test_histograms_of_experts_count_their_own_rows():
    """Rows of others are taken off again: a percentile needs exact counts."""
    x, w = np.abs(random(40, 3)) + 1, random(2, 3, 4)
    sizes = np.array([30, 10])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray(sizes))
    half = jc.statistics.percentile(50.0)
    found = jc.calibrate(fn, {"w": w}, [x], half)["w"].value
    for expert, rows in enumerate((x[:30], x[30:])):
        np.testing.assert_array_equal(found[expert].ravel(), through(half, [rows]))


def test_what_cannot_be_observed_says_so():
    """By name if it is asked for; else it counts no rows, and using it raises."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("d"), PartitionSpec()
    x, params = random(8, 4), {"w": random(4, 4), "q": random(3, 4, 4)}
    inner = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(whole, rows), out_specs=rows)
    picked = lambda p: p["q"][np.array([0, 2])]
    cases = [
        (lambda p, x: x @ p["w"] + inner(p["w"], x), "w", "it goes into a shard_map"),
        (lambda p, x: x @ p["w"] + x[:, :2] @ p["w"][:2], "w", "contracts a part of it"),
        (lambda p, x: x @ p["w"] + x @ (p["w"] @ p["q"][0]), "w", "with another weight"),
        (lambda p, x: jnp.einsum("bd,kdf->bkf", x, picked(p)), "q", "not each meets activations"),
        (lambda p, x: x @ picked(p).reshape(2, 4, 2, 2)[0, :, 0], "q", "go through reshape"),
    ]
    for fn, name, why in cases:
        with pytest.raises(ValueError, match=f"meet '{name}' cannot be observed: .*{why}"):
            jc.calibrate(fn, params, [x], ABSMAX, rules=["w|q"])
        assert jc.calibrate(fn, params, [x], ABSMAX)[name].count == 0


@pytest.mark.parametrize("which", ["weight", "rows", "experts"])
def test_within_shard_map(statistic, which):
    """On each of eight devices: the rows of all for what all share, its own for what it owns."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    apart, whole = PartitionSpec("d"), PartitionSpec()
    if which == "experts":
        x, w, fn = random(8, 3, 4), random(8, 4, 5), lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])
    else:
        x, w, fn = random(16, 4), random(4, 8), lambda p, x: x @ p["w"]
    w_spec = {"weight": PartitionSpec(None, "d"), "rows": whole, "experts": apart}[which]
    x_spec, out = (whole, apart) if which == "weight" else (apart, apart)
    out = whole if which == "rows" else apart

    def inside(w, x):
        found = jc.calibrate(fn, {"w": w}, [x], statistic)["w"]
        return jax.tree.map(lambda part: part if which != "weight" else part[None], found)

    specs = dict(mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out)
    found = jax.jit(jax.shard_map(inside, **specs))(w, x)
    for i in range(8):
        if which == "rows":
            assert_observed(found, [x], statistic)
            break
        assert_observed(found, [x if which == "weight" else x[i]], statistic, i)


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


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("d"), PartitionSpec(None, "d")])
def test_sharded_batch_and_weights(statistic, spec):
    """Summed over eight devices by XLA, or the largest of them all."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = random(16, 8)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params, batch = {"w": place(random(8, 16), spec)}, place(x, PartitionSpec("d"))
    found = jc.calibrate(lambda p, x: x @ p["w"], params, [batch], statistic)
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
