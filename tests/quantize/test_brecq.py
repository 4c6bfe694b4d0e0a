"""BRECQ: blocks, their Fisher weights against float64, and what is learned in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_valid, random
from jaxcompress._program import name_of
from jaxcompress._sequential import traced, unstacked
from jaxcompress.quantize._blocks import in_blocks
from jaxcompress.quantize._brecq import _fisher

INT3 = {"a|b|c": jc.quantize.int3()}


def chain():
    params = {n: jnp.asarray(random(8, 8, seed=i)) for i, n in enumerate("abc")}
    return params, [jnp.asarray(random(24, 8, seed=i)) for i in (3, 4)]


def fn(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounds_up_or_down_for_the_block_as_a_whole(symmetric):
    """Inputs have a mean, so that errors of nearest rounding add up and can be made to cancel."""
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {n: jnp.asarray(random(16, 16, seed=i)) for i, n in enumerate("ab")}
    batches = [jnp.asarray(random(32, 16, seed=i) + 2) for i in (3, 4)]
    rules = {"[ab]": jc.quantize.int3(symmetric=symmetric, group_size=10)}
    how = dict(blocks=["[ab]"], clip=False, steps=500)
    new = jc.quantize.brecq(fn, params, batches, rules, **how)
    plain = jc.quantize.quantize(params, rules)
    for name in "ab":
        q, w = new[name], np.asarray(params[name])
        assert_valid(q)
        np.testing.assert_array_equal(q.scale, plain[name].scale)
        spread = lambda part, q=q, w=w: oracles.spread(part, w.shape, q.axis, q.group_size)
        zero = 0 if symmetric else spread(q.zero_point)
        real = np.clip(w / spread(q.scale) + zero, q.qtype.low, q.qtype.high)
        assert np.abs(oracles.codes_of(q) - real).max() < 1 + 1e-5
    x, dense = np.float64(np.concatenate(batches)), jax.tree.map(np.float64, params)
    run = lambda p: np.maximum(x @ p["a"], 0) @ p["b"]
    error = lambda q: np.linalg.norm(run({n: oracles.dense(q[n]) for n in "ab"}) - run(dense))
    assert error(new) < 0.9 * error(plain)


def test_a_block_of_one_layer_is_adaround():
    """The same objective, in other words: `|x (w - w_hat)|^2` is `tr(E^T x^T x E)`.

    But for the columns that AdaRound leaves at nearest, where it learnt nothing better. Each
    follows its own float32, so two roundings in a hundred may end differently.
    """
    params, x = {"w": jnp.asarray(random(16, 16))}, jnp.asarray(random(64, 16, seed=1) + 2)
    how = dict(clip=False, steps=300, learning_rate=0.01)  # small steps, so that they stay close
    fn, rules = lambda p, x: x @ p["w"], {"w": jc.quantize.int3()}
    new = jc.quantize.brecq(fn, params, [x], rules, **how)["w"]
    layer = jc.quantize.adaround(fn, params, [x], rules, **how)["w"]
    np.testing.assert_array_equal(new.scale, layer.scale)
    codes = oracles.codes_of(layer)
    learnt = np.any(codes != np.rint(params["w"] / layer.scale), 0)
    assert learnt.sum() >= 12
    assert np.mean((oracles.codes_of(new) != codes)[:, learnt]) < 0.02


def test_a_block_of_two_layers_beats_each_alone():
    """Roundings of both layers make up for each other, if the last steps make them whole.

    Where they stay between two integers, the error is as large as that of each layer alone.
    """
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.asarray(random(16, 48)), "b": jnp.asarray(random(48, 8, seed=1))}
    x, rules = jnp.asarray(np.abs(random(400, 16, seed=2))), {"[ab]": jc.quantize.int4()}
    dense = jax.tree.map(np.float64, params)
    run = lambda p: np.maximum(np.float64(x) @ p["a"], 0) @ p["b"]
    error = lambda q: np.linalg.norm(run({n: oracles.dense(q[n]) for n in "ab"}) - run(dense))
    how = dict(clip=False, steps=500)
    alone = error(jc.quantize.adaround(fn, params, [x], rules, **how))
    block = error(jc.quantize.brecq(fn, params, [x], rules, blocks=["[ab]"], **how))
    assert block < 0.87 * alone


def test_the_weights_are_the_diagonal_of_the_fisher_information():
    """`loss = sum((z c)^2) / 2` behind the first block, so that the gradient is `z c c^T`."""
    params, batches = chain()
    loss = lambda out, batch: 0.5 * jnp.sum(out["y"] ** 2) + 0 * batch.sum()
    out = lambda p, x: {"n": jnp.ones(3), "y": jax.nn.relu(x @ p["a"]) @ p["c"]}
    dense = {n: params[n] for n in "ac"}
    program = in_blocks(traced(out, dense, batches, {"a", "c"}), dense, None)
    tree = jax.tree.structure({"n": 0, "y": 0})
    z = [np.maximum(np.float64(x) @ np.float64(params["a"]), 0) for x in batches]
    targets = [[jnp.asarray(part, jnp.float32)] for part in z]
    found = _fisher(program, 0, unstacked(program, dense), targets, batches, loss, tree)
    c = np.float64(params["c"])
    want = np.stack([(part @ c @ c.T) ** 2 for part in z])
    # Two products of float32, squared.
    np.testing.assert_allclose([f[0] for f in found], want / want.mean(), rtol=1e-4, atol=1e-5)


def test_a_loss_says_which_outputs_count():
    """Of two copies of the same columns, those that the loss does not see stay at nearest."""
    half = random(16, 4)
    params = {"w": jnp.asarray(np.concatenate([half, half], 1))}
    x, rules = jnp.asarray(random(64, 16, seed=1) + 2), {"w": jc.quantize.int3()}
    loss = lambda out, batch: jnp.mean(out[:, :4] ** 2)
    how = dict(loss=loss, clip=False, steps=500)
    new = jc.quantize.brecq(lambda p, x: x @ p["w"], params, [x], rules, **how)["w"]
    plain = oracles.dense(jc.quantize.quantize(params, rules)["w"])
    seen, unseen = np.split(oracles.dense(new), 2, 1)
    np.testing.assert_array_equal(unseen, plain[:, 4:])
    error = lambda w: np.linalg.norm(np.float64(x) @ (w - half))
    assert error(seen) < 0.9 * error(unseen)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8)(nn.relu(nn.Dense(12)(x))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Block()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(
            x, None
        )
        return nn.Dense(2)(x)


def test_a_block_is_a_module():
    x = jnp.asarray(random(2, 5, 8))
    params = jax.eval_shape(Model().init, jax.random.key(0), x)
    kernels = [path for path, _ in jc._paths.leaves_with_paths(params) if path.endswith("kernel")]
    program = traced(Model().apply, params, [x], kernels)
    names = lambda program: [
        {name_of(unit).removeprefix("params/").replace("/kernel", "") for unit in group}
        for group in program.groups
    ]
    attention = {f"MultiHeadDotProductAttention_0/{n}" for n in ("query", "key", "value", "out")}
    assert names(in_blocks(program, params, None)) == [
        {"Block_0/Dense_0", "Block_0/Dense_1"},
        attention,
        {"ScanBlock_0/Dense_0[0]", "ScanBlock_0/Dense_1[0]"},
        {"ScanBlock_0/Dense_0[1]", "ScanBlock_0/Dense_1[1]"},
        {"Dense_0"},
    ]
    first, *others = names(in_blocks(program, params, ["params/(Block_0|Multi).*"]))
    assert first == {"Block_0/Dense_0", "Block_0/Dense_1"} | attention
    assert all(len(group) == 1 for group in others)


def test_stacked_layers_and_a_run_that_was_killed(tmp_path):
    def fn(p, x):
        layer = lambda x, w: (x + jax.nn.relu(x @ w["in"]["w"]) @ w["out"]["w"], None)
        return jax.lax.scan(layer, x, p["stack"])[0] @ p["head"]

    stack = {n: {"w": jnp.asarray(random(2, 8, 8, seed=i))} for i, n in enumerate(("in", "out"))}
    params, x = {"stack": stack, "head": jnp.asarray(random(8, 3))}, jnp.asarray(random(5, 8))
    rules = {"stack.*": jc.quantize.w4a8(axis=-2)}
    run = lambda **kwargs: jc.quantize.brecq(fn, params, [x], rules, steps=3, **kwargs)
    reports = []
    want = run(progress=reports.append)
    assert [r.layers for r in reports] == [
        (f"stack/in/w[{i}]", f"stack/out/w[{i}]") for i in (0, 1)
    ]
    assert_valid(want["stack"]["in"]["w"])

    def kill(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume=tmp_path, progress=kill)
    got = run(resume=tmp_path)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_wrong_use_raises():
    params, batches = chain()
    run = lambda rules=INT3, **kwargs: jc.quantize.brecq(fn, params, batches, rules, **kwargs)
    with pytest.raises(ValueError, match=r"the block 'a\|c' do not follow each other: b come"):
        run(blocks=["a|c"])
    with pytest.raises(ValueError, match="'c' has no weight that rules name"):
        run({"a|b": jc.quantize.int4()}, blocks=["a|b", "c"])
    with pytest.raises(ValueError, match="'d' matches none of the paths"):
        run(blocks=["d"])
    with pytest.raises(TypeError, match="blocks are a list of patterns"):
        run(blocks="abc")
    with pytest.raises(ValueError, match="steps is 1 or more; got 0"):
        run(steps=0)
    with pytest.raises(TypeError, match="the spec of 'a' is nf4"):
        run({"a": jc.quantize.nf4(), "b": None})
    with pytest.raises(ValueError, match=r"loss returns a scalar; got the shape \(24,\)"):
        run(loss=lambda out, batch: out[:, 0])
    with pytest.raises(ValueError, match="what 'a' leads to has the mean 0; the loss must depend"):
        run(loss=lambda out, batch: 0 * out.sum())
    batches[0] = batches[0].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="the activations of 'a' are not finite"):
        run()
