"""Layer by layer: the order, what each layer sees, and runs that were killed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import random
from jaxcompress._program import name_of, trace
from jaxcompress._sequential import sequential

DENSE = nn.Dense


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + DENSE(8)(nn.gelu(DENSE(12)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    """Attention, three layers in a scan with remat, an output layer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return DENSE(2)(scan()(x, None)[0])


@pytest.fixture(scope="module")
def whole():
    model, x = Model(), jnp.asarray(random(2, 5, 8))
    return jax.jit(model.apply), model.init(jax.random.key(0), x), [x, x + 1]


def paths(params, end="kernel"):
    return {p for p, _ in jc._paths.leaves_with_paths(params) if p.endswith(end)}


def test_groups_are_layers_in_their_order(whole):
    fn, params, batches = whole
    program = trace(fn, params, batches[0], paths(params))
    names = [[name_of(u).replace("params/", "") for u in group] for group in program.groups]
    assert sorted(names[0]) == [
        f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("key", "query", "value")
    ]
    scan = "ScanCheckpointBlock_0/Dense_"
    # Dense(8) is created first, called second: the function decides, not the names.
    assert names[1:] == [
        ["MultiHeadDotProductAttention_0/out/kernel"],
        *([f"{scan}{d}/kernel[{i}]"] for i in range(3) for d in (1, 0)),
        ["Dense_0/kernel"],
    ]


def test_a_layer_sees_the_layers_before_it_replaced(whole):
    """Every kernel is halved; each statistic is that of a model halved up to there."""
    fn, params, batches = whole
    statistic, seen = jc.statistics.second_moment(), {}

    def halve(unit, leaves, observed, tell):
        seen[unit] = np.asarray(observed.of(unit[0])).squeeze()
        return {name_of(unit): leaves[name_of(unit)] / 2}

    new = sequential(fn, params, batches, paths(params), statistic, halve, identity=None)
    jax.tree_util.tree_map_with_path(
        lambda key, a, b: np.testing.assert_array_equal(b, a / 2 if "kernel" in str(key) else a),
        params,
        new,
    )
    after = jc.calibrate(fn, new, batches, statistic)
    for (path, row), value in seen.items():
        want = functools.reduce(lambda tree, key: tree[key], path.split("/"), after)
        want = np.asarray(want.value).squeeze()
        # The same sums in another order: float32 to a few hundred roundings.
        np.testing.assert_allclose(value, want if row is None else want[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_stacked_layers_and_what_a_scan_returns(reverse):
    """The pieces together are the function, with outputs of each layer, and backwards."""

    def fn(p, x):
        def step(x, layer):
            w, b = layer
            return jnp.tanh(x @ w + b), x.sum()

        return jax.lax.scan(step, x, (p["w"], p["b"]), reverse=reverse)

    params = {"w": jnp.asarray(random(4, 6, 6)), "b": jnp.asarray(random(4, 6, seed=1))}
    x = jnp.asarray(random(3, 6, seed=2))
    program = trace(fn, params, x, {"w"})
    order = [0, 1, 2, 3][:: -1 if reverse else 1]
    assert program.groups == [[("w", i)] for i in order]
    values = [x]
    leaves = {f"{name}[{i}]": params[name][i] for i in range(4) for name in "wb"}
    for g in range(4):
        values = program.segment(g)[1](leaves, values)
    for got, want in zip(values, jax.tree.leaves(fn(params, x))):
        # Four layers of float32 sums of six, compiled in another way: numbers near one.
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)


def test_a_weight_that_is_used_again_takes_what_is_between_into_its_group():
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["a"] @ p["c"]
    params = {n: jnp.asarray(random(4, 4, seed=i)) for i, n in enumerate("abc")}
    program = trace(fn, params, jnp.ones((2, 4)), set("abc"))
    assert program.groups == [[("a", None), ("b", None)], [("c", None)]]


def test_a_lookup_is_no_product():
    params = {"table": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="'table' meets no product"):
        sequential(
            lambda p, i: p["table"][i],
            params,
            [jnp.array([1, 2])],
            {"table"},
            jc.statistics.absmax(),
            print,
            identity=None,
        )


def test_batches_of_other_shapes_raise():
    params = {"w": jnp.eye(4)}
    with pytest.raises(ValueError, match="batch 1 has"):
        jc.quantize.gptq(
            lambda p, x: x @ p["w"],
            params,
            [jnp.ones((2, 4)), jnp.ones((1, 4))],
            {"w": jc.quantize.int4()},
        )


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
        return x @ p["last"]

    params = {"stack": jnp.asarray(random(3, 6, 6)), "last": jnp.asarray(random(6, 6, seed=1))}
    batches = [jnp.asarray(random(9, 6, seed=2)), jnp.asarray(random(9, 6, seed=3))]
    rules = {"stack": jc.quantize.w4a8(group_size=4), "last": jc.quantize.int3()}
    run = lambda **kwargs: jc.quantize.gptq(fn, params, batches, rules, **kwargs)
    reports = []
    want = run(progress=reports.append)
    assert [r.number for r in reports] == list(range(1, reports[0].total + 1))

    def kill(report):
        if report.number == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(resume=tmp_path, progress=kill)
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    assert len(kept) == 2
    got = run(resume=tmp_path)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept, "a finished layer was done again"
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="a run with other weights, batches, rules or options"):
        run(resume=tmp_path, damping=0.02)


def test_a_scan_without_wanted_weights_stays_one():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["head"]
    params = {"w": jnp.asarray(random(3, 4, 4)), "head": jnp.asarray(random(4, 2))}
    program = trace(fn, params, jnp.ones((2, 4)), {"head"})
    assert program.scanned == {}
    assert [eqn.primitive.name for eqn in program.jaxpr.eqns].count("scan") == 1
