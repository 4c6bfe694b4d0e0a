"""`shrink` against the masked model: the same results and gradients at smaller shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxcompress as jc
from checks import random

NOTHING = optax.MaskedNode()


def masked(params, masks):
    """What is masked set to zero, by numpy."""

    def one(mask, leaf):
        keep = isinstance(mask, optax.MaskedNode)
        return leaf if keep else jnp.asarray(np.where(mask, leaf, 0), leaf.dtype)

    return jax.tree.map(one, masks, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def without(shape, axis, indices):
    """A mask that drops whole slices."""
    mask = np.ones(shape, bool)
    mask[(*[slice(None)] * (axis % len(shape)), list(indices))] = False
    return mask


def masks_for(params, chosen):
    """A tree of masks from `{path: (axis, indices)}`."""
    used = set()

    def one(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if path not in chosen:
            return NOTHING
        used.add(path)
        return without(leaf.shape, *chosen[path])

    made = jax.tree_util.tree_map_with_path(one, params)
    assert used == set(chosen)
    return made


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def checked(fn, params, masks, *example, args=None):
    """Shrinks, and compares with the masked function, at other arguments if given."""
    small_fn, small = jc.prune.shrink(fn, params, masks, *example)
    assert jax.tree.structure(small) == jax.tree.structure(params)
    given = args or example
    want, got = jax.jit(fn)(masked(params, masks), *given), jax.jit(small_fn)(small, *given)
    # The same sums of at most some hundred terms, in another order, in float32.
    tolerance = 1e-5 * float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=tolerance)
    return small_fn, small


def mlp_params():
    draw = lambda *shape: jnp.asarray(random(*shape, seed=sum(shape)))
    sizes = [(8, 16), (16, 12), (12, 4)]
    return [{"kernel": draw(*s), "bias": draw(s[1])} for s in sizes]


def mlp(params, x):
    x = jax.nn.relu(x @ params[0]["kernel"] + params[0]["bias"])
    x = jax.nn.gelu(x @ params[1]["kernel"] + params[1]["bias"])
    return x @ params[2]["kernel"] + params[2]["bias"]


def test_mlp_with_biases_that_nobody_masked():
    """relu(bias) is a constant: what it would add to the next layer is in that one's bias."""
    params, x = mlp_params(), random(3, 8)
    assert float(jnp.max(params[0]["bias"])) > 0
    layers = {"0/kernel": (-1, range(10)), "1/kernel": (-1, [0, 5, 11])}
    masks = masks_for(params, layers)
    _, small = checked(mlp, params, masks, x, args=(random(7, 8),))
    assert [s["kernel"] for s in shapes(small)] == [(8, 6), (6, 9), (9, 4)]
    assert size(small) == 8 * 6 + 6 + 6 * 9 + 9 + 9 * 4 + 4
    np.testing.assert_array_equal(small[0]["kernel"], params[0]["kernel"][:, 10:])
    relu = np.maximum(np.asarray(params[0]["bias"][:10], np.float64), 0)
    bias = params[1]["bias"] + relu @ np.asarray(params[1]["kernel"][:10], np.float64)
    np.testing.assert_allclose(small[1]["bias"], np.delete(bias, [0, 5, 11]), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_masked_model():
    params, x = mlp_params(), jnp.asarray(random(3, 8)).at[0].set(0.0)
    params[0]["bias"] *= 0  # at zero, where relu's own derivative is 0 and that of max 1/2
    masks = masks_for(params, {"0/kernel": (-1, range(10))})
    small_fn, small = jc.prune.shrink(mlp, params, masks, x)
    loss = lambda fn: jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x)))))
    got, want = loss(small_fn)(small), loss(mlp)(masked(params, masks))
    kept = [
        {"kernel": want[0]["kernel"][:, 10:], "bias": want[0]["bias"][10:]},
        {"kernel": want[1]["kernel"][10:], "bias": want[1]["bias"]},
        want[2],
    ]
    # Sums of a dozen float32 terms of about one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, kept)


def test_fine_tuning():
    params, x = mlp_params(), random(16, 8)
    masks = masks_for(params, {"0/kernel": (-1, range(10))})
    small_fn, small = jc.prune.shrink(mlp, params, masks, x)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(small, state):
        loss = lambda p: jnp.mean((small_fn(p, x) - mlp(params, x)) ** 2)
        value, grads = jax.value_and_grad(loss)(small)
        updates, state = tx.update(grads, state, small)
        return optax.apply_updates(small, updates), state, value

    state, losses = tx.init(small), []
    for _ in range(30):
        small, state, value = step(small, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2


def test_quantized_afterwards():
    params, x = mlp_params(), random(3, 8)
    masks = masks_for(params, {"0/kernel": (-1, range(10))})
    small_fn, small = jc.prune.shrink(mlp, params, masks, x)
    int8 = jc.quantize.quantize(small, {"1/kernel": jc.quantize.int8()})
    decoded = [small[0], small[1] | {"kernel": int8[1]["kernel"].materialise()}, small[2]]
    got, want = jc.accelerate(small_fn)(int8, x), small_fn(decoded, x)
    # The scales are applied after the sums of a dozen terms instead of before.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def filled(shapes, seed=0):
    """Numbers for shapes, since what initializes them takes long to compile."""
    rng = np.random.default_rng(seed)

    def one(path, v):
        made = rng.normal(size=v.shape) * 0.5
        return jnp.asarray(np.abs(made) + 0.5 if "var" in str(path[-2:]) else made, v.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def batch_norm():
    return nn.BatchNorm(use_running_average=True)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        y = batch_norm()(nn.Conv(10, (3, 3), use_bias=False, name="inner")(x))
        y = batch_norm()(nn.Conv(8, (3, 3), use_bias=False, name="outer")(nn.relu(y)))
        x = nn.avg_pool(nn.relu(x + y), (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(6, name="dense")(x)))


def test_cnn_with_residuals_and_batch_norm_in_linen():
    """Of the sum only channels go that both sides have lost; flattening spreads them."""
    model, x = Residual(), random(2, 4, 4, 3)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    chosen = {
        "params/stem/kernel": (-1, [1, 2, 6]),
        "params/inner/kernel": (-1, [0, 3, 4, 9]),
        "params/outer/kernel": (-1, [2, 6, 7]),
        "params/dense/kernel": (-1, [5]),
    }
    masks = masks_for(params, chosen)
    _, small = checked(model.apply, params, masks, x, args=(random(3, 4, 4, 3),))
    got = shapes(small)["params"]
    assert got["stem"] == {"kernel": (3, 3, 3, 6), "bias": (6,)}
    assert got["inner"]["kernel"] == (3, 3, 6, 6)
    assert got["outer"]["kernel"] == (3, 3, 6, 6)
    assert got["dense"] == {"kernel": (2 * 2 * 6, 5), "bias": (5,)}
    assert got["head"] == {"kernel": (5, 3), "bias": (3,)}
    assert shapes(small)["batch_stats"]["BatchNorm_0"] == {"mean": (6,), "var": (6,)}
    rows = {(row.path, row.axis): row for row in jc.prune.removable(model.apply, params, masks, x)}
    stem = rows["params/stem/kernel", -1]
    assert (stem.size, stem.masked, stem.removed) == (8, 3, 2)
    assert stem.why.endswith("sums it, and it is not a constant there")


class Small(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.second = nnx.Conv(6, 3, (3, 3), rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = x + self.second(nnx.relu(self.norm(self.first(x))))
        return self.head(x.mean((1, 2)))


def test_nnx():
    graph, params = nnx.split(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    params, x = filled(params), random(2, 4, 4, 3)
    masks = masks_for(params, {"first/kernel": (-1, [0, 2])})
    fn = lambda params, x: nnx.merge(graph, params)(x)
    _, small = checked(fn, params, masks, x)
    found = {row.path: row.removed for row in jc.prune.removable(fn, params, masks, x)}
    norm = dict.fromkeys(["norm/bias", "norm/mean", "norm/scale", "norm/var"], 2)
    assert found == norm | {"first/kernel": 2, "first/bias": 2, "second/kernel": 2}
    assert small["second"]["kernel"].shape == (3, 3, 4, 3)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(6, (1, 1), name="expand")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=6, name="depthwise")(x)
        y = nn.Conv(4, (1, 1), name="beside")(nn.relu(x))
        x = jnp.concatenate([x, nn.silu(y)], -1)
        return nn.Conv(3, (1, 1), name="project")(x)


def test_depthwise_convolution_and_concatenation():
    """The bias that is left of a channel makes a border in the padded convolution."""
    model, x = Depthwise(), random(2, 4, 4, 3)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    chosen = {"params/expand/kernel": (-1, [1, 4]), "params/beside/kernel": (-1, [0])}
    _, small = checked(model.apply, params, masks_for(params, chosen), x)
    got = shapes(small)["params"]
    assert got["expand"]["kernel"] == (1, 1, 3, 4)
    assert got["depthwise"] == {"kernel": (3, 3, 1, 8), "bias": (8,)}
    assert got["beside"]["kernel"] == (1, 1, 8, 3)
    assert got["project"]["kernel"] == (1, 1, 11, 3)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 12, name="embed")(tokens)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, qkv_features=8, name="attention")(y)
        y = nn.gelu(nn.Dense(10, name="up")(nn.LayerNorm()(x)))
        return nn.Dense(5, name="head")(x + nn.Dense(12, name="down")(y))


def test_transformer_loses_heads_and_hidden_units():
    model, tokens = Transformer(), np.arange(12).reshape(2, 6) % 7
    params = filled(jax.eval_shape(model.init, jax.random.key(0), tokens))
    chosen = {
        "params/attention/value/kernel": (-2, [0, 3]),
        "params/attention/value/bias": (-2, [0, 3]),
        "params/up/kernel": (-1, [2, 3, 9]),
    }
    masks = masks_for(params, chosen)
    _, small = checked(model.apply, params, masks, tokens, args=(np.ones((3, 5), int),))
    got = shapes(small)["params"]
    for name in ("query", "key", "value"):
        assert got["attention"][name] == {"kernel": (12, 2, 2), "bias": (2, 2)}
    assert got["attention"]["out"] == {"kernel": (2, 2, 12), "bias": (12,)}
    assert (got["up"]["kernel"], got["down"]["kernel"]) == ((12, 7), (7, 12))


def attention(params, x):
    """Heads of one fused projection, by reshape."""
    q, k, v = jnp.split((x @ params["qkv"]).reshape(-1, 3 * 4, 2), 3, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(2)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    return mixed.reshape(-1, 8) @ params["out"]


def test_heads_of_a_fused_projection():
    """It is enough that nothing is taken from a head, or that it gives nothing."""
    params, x = {"qkv": jnp.asarray(random(6, 24)), "out": jnp.asarray(random(8, 6))}, random(5, 6)
    # Values of head 1 are zero, and nothing is read from head 2.
    masks = {"qkv": without((6, 24), -1, [18, 19]), "out": without((8, 6), 0, [4, 5])}
    _, small = checked(attention, params, masks, x)
    assert shapes(small) == {"qkv": (6, 12), "out": (4, 6)}
    half = masks | {"out": np.ones((8, 6), bool), "qkv": without((6, 24), -1, [18])}
    [row] = jc.prune.removable(attention, params, half, x)
    assert row.why == "it is one of 12 x 2 in a reshape, where only whole slices can go"


def test_heads_that_a_pattern_chose():
    """The mask of the output projection is enough: query, key and value go along."""
    params, x = {"qkv": jnp.asarray(random(6, 24)), "out": jnp.asarray(random(8, 6))}, random(5, 6)
    weak = {"qkv": params["qkv"], "out": params["out"].at[2:4].mul(0.01)}
    masks = jc.prune.mask(jax.tree.map(abs, weak), jc.prune.heads(4, axis=-2), 0.25, rules=["out"])
    assert not masks["out"][2:4].any()
    _, small = checked(attention, weak, masks, x)
    assert shapes(small) == {"qkv": (6, 18), "out": (6, 6)}


def test_custom_backward_and_remat_stay():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), x), lambda x, g: (3.0 * g * jnp.cos(x),))

    def fn(params, x):
        hidden = jax.checkpoint(lambda x: rounded(4 * (x @ params["a"])))(x)
        return hidden @ params["b"]

    params, x = {"a": jnp.asarray(random(5, 6)), "b": jnp.asarray(random(6, 2))}, random(3, 5)
    masks = masks_for(params, {"a": (-1, [0, 1])})
    small_fn, small = checked(fn, params, masks, x)
    assert shapes(small) == {"a": (5, 4), "b": (4, 2)}
    total = lambda fn: lambda p: jnp.sum(fn(p, x))
    got, want = jax.grad(total(small_fn))(small), jax.grad(total(fn))(masked(params, masks))
    np.testing.assert_allclose(got["a"], want["a"][:, 2:], rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(got["a"]))) > 0
    assert "remat" in str(jax.make_jaxpr(small_fn)(small, x))
