"""Rotations folded into weights: the function stays, in float64, and what can turn does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from checks import random

X = random(3, 5, 12)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5))


def draw(shapes, seed=0):
    """Parameters away from zero and one, so that every scale and bias counts."""
    keys = iter(range(100))
    one = lambda shape: random(*shape, seed=100 * seed + next(keys)).astype(np.float64)
    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def like(tree, seed=0):
    return draw(jax.tree.map(lambda x: x.shape, tree), seed)


def flat(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def assert_same(fn, params, *args, **options):
    """Folds in float64, and compares; the new parameters and which axes were rotated."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        rules = {"rules": options["rules"]} if "rules" in options else {}
        rows = jc.quantize.rotatable(fn, params, *args, **rules)
        new = jc.quantize.fold_rotations(fn, params, *args, **options)
        run = jax.jit(fn)
        want, got = np.asarray(run(params, *args)), np.asarray(run(new, *args))
    assert got.dtype == np.float64
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    # Some hundred roundings of float64, behind divisions by scales of at least a hundredth.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
    turned = {(row.path, row.axis): row.rotated for row in rows}
    assert all(bool(row.why) == (row.rotated == 0) for row in rows)
    return new, turned


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, _=None):
        bias = self.norm is nn.LayerNorm
        h = self.norm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, use_bias=bias)(h, h)
        h = nn.gelu(nn.Dense(20, use_bias=bias)(self.norm()(x)))
        return x + nn.Dense(12, use_bias=bias)(h), None


class Language(nn.Module):
    """Words and places in, words out; layers one by one or stacked."""

    norm: type
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 12)(ids) + self.param("places", nn.initializers.normal(1.0), (5, 12))
        if self.scan:
            stack = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = stack(self.norm)(x)
        else:
            for _ in range(2):
                x, _ = Block(self.norm)(x)
        return nn.Dense(11)(self.norm()(x))


@pytest.mark.parametrize(("norm", "scan"), [(nn.RMSNorm, False), (nn.LayerNorm, True)])
def test_a_transformer(norm, scan):
    """The stream and the values of each head turn; behind the activation nothing does."""
    model = Language(norm, scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
    params = like(shapes)
    new, turned = assert_same(model.apply, params, IDS)
    streams = ("query", "key", "value", "Dense_0")
    for (path, axis), size in turned.items():
        layer, inside = path.split("/")[-2], "Block" in path
        if layer == "out":
            assert size == {-3: 0, -2: 4}[axis]  # heads, and the features of each
        elif layer in streams or not inside:
            assert size == 12, path
        else:
            assert (layer, size) == ("Dense_1", 0)
    before, after = flat(params), jax.tree.map(np.asarray, flat(new))
    for path, leaf in after.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, np.ones_like(leaf))
    table = "params/Embed_0/embedding"
    assert np.abs(after[table] - before[table]).max() > 0.1
    # Rotations keep lengths; where means are taken away they keep means too.
    size = lambda x: np.sqrt(np.sum(np.square(x), -1))
    np.testing.assert_allclose(size(after[table]), size(before[table]), rtol=1e-12)
    if norm is nn.LayerNorm:
        np.testing.assert_allclose(after[table].mean(-1), before[table].mean(-1), atol=1e-12)


def rms(x, scale=1.0):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


FUSED = {
    "table": (11, 12),
    "qkv": (12, 36),
    "bias": (36,),
    "out": (12, 12),
    "up": (12, 20),
    "down": (20, 12),
    "norms": (2, 12),
    "last": (12, 11),
}


def fused(p, ids):
    """Query, key and value in one product, heads by reshaping, as many write it."""
    x = p["table"][ids]
    q, k, v = jnp.split(rms(x, p["norms"][0]) @ p["qkv"] + p["bias"], 3, -1)
    heads = lambda x: x.reshape(*x.shape[:-1], 3, 4)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(q), heads(k)) / 2
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads(v))
    x = x + mixed.reshape(*x.shape) @ p["out"]
    x = x + jax.nn.silu(rms(x) @ p["up"]) @ p["down"]
    return rms(x) @ p["last"]


def test_heads_in_one_axis_turn_one_by_one():
    """`I (x) Q` on both sides: what a head adds to the stream keeps its inner products."""
    params = draw(FUSED) | {"norms": np.ones((2, 12))}
    new, turned = assert_same(fused, params, IDS)
    assert turned["out", -2] == 4
    assert turned["qkv", -2] == turned["up", -2] == turned["last", -2] == 12
    assert turned["down", -2] == 0
    heads = lambda p: np.asarray(p["out"], np.float64).reshape(3, 4, 12)
    moved = np.abs(heads(new) - heads(params)).max((1, 2))
    assert np.all(moved > 0.1)
    gram = lambda w: np.einsum("hdf,hdg->hfg", w, w)
    traces = lambda w: np.trace(gram(w), axis1=1, axis2=2)
    np.testing.assert_allclose(traces(heads(new)), traces(heads(params)), rtol=1e-12)
    # The same rotation on the values: each head alone maps the same inputs to the stream.
    value = np.asarray(new["bias"])[24:].reshape(3, 4), params["bias"][24:].reshape(3, 4)
    through = lambda b, w: np.linalg.norm(np.einsum("hd,hdf->hf", b, w), axis=-1)
    np.testing.assert_allclose(
        through(value[0], heads(new)), through(value[1], heads(params)), rtol=1e-12
    )


def two(middle):
    """`middle` between two weights; a third one meets what enters it."""

    def fn(p, x):
        y = x @ p["a"]
        return middle(y, p) @ p["b"] + (y @ p["f"]).sum()

    return fn


SHAPES = dict.fromkeys("abdef", (12, 12)) | {"g": (12,), "c": (12,), "m": (2, 12, 12)}
TURNS = {
    "nothing": lambda y, p: y,
    "bias": lambda y, p: y + p["c"],
    "minus": lambda y, p: -(y / 3 - p["c"]) * 2.0,
    "residual": lambda y, p: y + y @ p["d"] @ p["e"],
    "scale": lambda y, p: y * p["g"] + p["c"],
    "two scales": lambda y, p: y * p["g"] * p["c"],
    "a number": lambda y, p: y + 3.0,
    "mean": lambda y, p: y - y.mean(-1, keepdims=True),
    "sum": lambda y, p: y * y.sum(-1, keepdims=True),
    "product with ones": lambda y, p: y * (y @ jnp.ones((12, 1))),
    "length": lambda y, p: y / jnp.linalg.norm(y, axis=-1, keepdims=True),
    "variance": lambda y, p: y / jnp.std(y, -1, keepdims=True),
    "gram": lambda y, p: jnp.einsum("bid,bjd,bje->bie", y, y, y),
    "window": lambda y, p: jnp.cumsum(y[:, 1:4], 1)[:, ::-1],
    "tokens": lambda y, p: jnp.concatenate(
        [y, jnp.zeros((3, 1, 12)), jnp.pad(y, [(0, 0), (1, 0), (0, 0)])], 1
    ),
    "looked up": lambda y, p: y[:, jnp.array([2, 0, 0])],
    "masked": lambda y, p: jnp.where(jnp.arange(5)[:, None] > 2, y, 0.0),
    "branches": lambda y, p: jax.lax.cond(y.sum() > 0, lambda: y, lambda: -y),
    "loop": lambda y, p: jax.lax.scan(lambda s, t: (s + y @ p["d"] @ p["e"], s), y, jnp.ones(3))[
        1
    ].sum(0),
    "halves": lambda y, p: y.reshape(3, 5, 2, 6)[:, :, ::-1].reshape(3, 5, 12),
    "heads turned round": lambda y, p: y.reshape(3, 5, 3, 4).swapaxes(2, 3).reshape(3, 5, 12),
    "convolution": lambda y, p: jax.lax.conv_general_dilated(
        y, p["d"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "experts": lambda y, p: jax.lax.ragged_dot(y[0] * p["g"] + p["c"], p["m"], jnp.array([2, 3])),
    "cast": lambda y, p: jax.lax.optimization_barrier(jax.lax.stop_gradient(y)),
    "transposed": lambda y, p: (p["d"].T @ y[..., None])[..., 0],
}
STAYS = {
    "relu": (lambda y, p: jax.nn.relu(y), "max acts on each"),
    "gate": (lambda y, p: y * (y @ p["d"]), "mul meets each"),
    "divided": (lambda y, p: 1 / y, "div meets each"),
    "square": (lambda y, p: y * y, "weighs the squares"),
    "square and itself": (lambda y, p: y**2 + y, "squares are added to something"),
    "gram of a scale": (
        lambda y, p: jnp.einsum("bid,bjd,bje->bie", *[y * p["g"]] * 3),
        "'g' scales it and has to stay: behind it, two activations",
    ),
    "fourth": (lambda y, p: y / ((y**2) ** 2).sum(-1, keepdims=True), "squared twice"),
    "cube": (lambda y, p: y**3, "integer_pow acts on each"),
    "weighted": (lambda y, p: y / (y**2 @ p["g"])[..., None], "weighs the squares"),
    "weighted mean": (lambda y, p: y / (y**2 * p["g"]).sum(-1, keepdims=True), "mul meets each"),
    "largest": (lambda y, p: y - y.max(-1, keepdims=True), "reduce_max looks at each"),
    "sorted": (lambda y, p: jnp.sort(y, -1), "sort needs it"),
    "sum so far": (lambda y, p: jnp.cumsum(y, -1), "cumsum goes along"),
    "turned round": (lambda y, p: y[..., ::-1], "rev turns it round"),
    "a part": (lambda y, p: y - y[..., 1:3].sum(-1, keepdims=True), "a slice takes a part"),
    "one": (lambda y, p: y - y[..., :1], "a slice takes a part"),
    "strided": (lambda y, p: y - y[..., ::2].sum(-1, keepdims=True), "slice needs it"),
    "beside": (lambda y, p: jnp.concatenate([y[..., 6:], y[..., :6]], -1), "a slice takes|beside"),
    "padded": (
        lambda y, p: jax.lax.pad(y, p["g"][0], [(0, 0, 0), (0, 0, 0), (1, -1, 0)]),
        "pad puts something",
    ),
    "constant": (lambda y, p: y + jnp.asarray(X[0, 0], y.dtype), "holds a constant"),
    "places": (lambda y, p: y + jnp.arange(12.0), "iota counts|holds a constant"),
    "mask": (lambda y, p: jnp.where(p["g"] > 0, y, 0.0), "gt acts on each"),
    "gram": (
        lambda y, p: y + jnp.take(jnp.einsum("bid,bie->de", y, y), jnp.array([1]), 0),
        "gather looks",
    ),
    "cut in two ways": (
        lambda y, p: (
            y.reshape(3, 5, 2, 6).sum(2).sum(-1)[..., None]
            + y.reshape(3, 5, 3, 4)[:, :, 0].max(-1, keepdims=True)
            + y
        ),
        "reshapes make both",
    ),
    "while": (
        lambda y, p: jax.lax.while_loop(lambda s: s.sum() < 0, lambda s: s + 1, y),
        "while needs it",
    ),
    "norm of a layer": (
        lambda y, p: rms(rms(y, p["g"]) + y @ p["d"]),
        "'g' scales it and has to stay",
    ),
    "scale and residual": (lambda y, p: y * p["g"] + y, "'g' scales it and has to stay"),
    "scale of another kind": (lambda y, p: y * (1 + p["g"]), "mul meets each"),
    "scale used twice": (lambda y, p: y * p["g"] + p["g"], "'g' scales it and has to stay"),
}


@pytest.mark.parametrize("name", TURNS)
def test_what_turns(name):
    params = draw(SHAPES)
    _, turned = assert_same(two(TURNS[name]), params, X)
    assert turned.get(("m", -2), 12) == 12
    assert (
        turned["b", -2] == turned["f", -2] == {"halves": 6, "heads turned round": 4}.get(name, 12)
    )


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    middle, why = STAYS[name]
    with pytest.raises(ValueError, match=f"(?s)no features of fn can be rotated:.*({why})"):
        jc.quantize.fold_rotations(two(middle), draw(SHAPES), X)


@settings(max_examples=3, deadline=None)
@given(st.integers(2, 25), st.integers(0, 100))
def test_any_size_and_seed(k, seed):
    fn = lambda p, x: rms(x @ p["a"], p["g"]) @ p["b"]
    params, x = draw({"a": (4, k), "g": (k,), "b": (k, 3)}, seed), random(2, 4)
    new, turned = assert_same(fn, params, x, seed=seed)
    assert turned["b", -2] == k
    assert k == 2 or np.abs(new["b"] - params["b"] * params["g"][:, None]).max() > 1e-3


def test_seeds_differ_and_spaces_too():
    fn = lambda p, x: jax.nn.relu(x @ p["a"] @ p["b"]) @ p["c"] @ p["d"]
    eye = {name: np.eye(16) for name in "abcd"}
    new = jc.quantize.fold_rotations(fn, eye, random(2, 16))
    assert np.abs(new["a"] - new["c"]).max() > 0.1
    again = jc.quantize.fold_rotations(fn, eye, random(2, 16))
    jax.tree.map(np.testing.assert_array_equal, new, again)
    other = jc.quantize.fold_rotations(fn, eye, random(2, 16), seed=1)
    assert np.abs(new["a"] - other["a"]).max() > 0.1
    np.testing.assert_allclose(np.abs(new["a"]), 0.25, atol=1e-6)  # Hadamard's, 1 / sqrt(16)


def test_a_tied_table_turns_and_keeps_its_scale():
    """Looked up and multiplied: it can be rotated, not scaled."""

    def fn(p, ids):
        x = p["table"][ids]
        return rms(x + rms(x, p["g"]) @ p["b"]) @ p["table"].T

    params = draw({"table": (11, 12), "b": (12, 12), "g": (12,)})
    _, turned = assert_same(fn, params, IDS)
    assert turned == {("table", -1): 12, ("b", -2): 12}
    last = lambda p, ids: rms(p["table"][ids], p["g"]) @ p["table"].T
    with pytest.raises(ValueError, match="'g' scales it and has to stay: what it scales passes by"):
        jc.quantize.fold_rotations(last, params, IDS)


def test_scales_of_layers_need_weights_of_layers():
    """A slice of a stack is no layer of its own to what follows axes."""
    params = draw({"a": (12, 12), "b": (2, 12, 12), "g": (2, 12)})
    fn = lambda p, x: rms(x @ p["a"], p["g"][1]) @ p["b"][0]
    with pytest.raises(ValueError, match="'g' scales it and has to stay: 'b' is not stacked"):
        jc.quantize.fold_rotations(fn, params, X)
    ones = params | {"g": np.ones((2, 12))}
    assert assert_same(fn, ones, X)[1]["b", -2] == 12
    experts = lambda p, x: jnp.einsum("etd,edf->etf", p["g"][:, None] * (x[0] @ p["a"]), p["b"])
    assert assert_same(experts, params, X)[1]["b", -2] == 12


def test_a_scale_of_what_merges_with_other_axes_stays():
    fn = lambda p, x: ((x @ p["a"]) * p["g"]).reshape(3, 60) @ p["m"] @ p["b"]
    _, turned = assert_same(fn, draw(SHAPES | {"m": (60, 12)}), X)
    assert (turned["m", -2], turned["b", -2]) == (0, 12)


def test_a_scale_of_zero():
    fn, params = two(TURNS["scale"]), draw(SHAPES)
    params["g"][3] = 0
    with pytest.raises(ValueError, match="'g' scales it and has to stay: it is 0 where 'c' is not"):
        jc.quantize.fold_rotations(fn, params, X)
    params["c"][3] = 0
    assert_same(fn, params, X)


def test_rules_say_what_may_change():
    fn, params = two(TURNS["bias"]), draw(SHAPES)
    with pytest.raises(ValueError, match="the rules leave 'c' as it is"):
        jc.quantize.fold_rotations(fn, params, X, rules=["[abf]"])
    _, turned = assert_same(fn, params, X, rules=["[abcf]"])
    assert turned["b", -2] == 12


def test_what_is_returned_stays():
    def fn(p, x):
        y = x @ p["a"]
        return y, y @ p["b"]

    with pytest.raises(ValueError, match=r"b +-2 +12 +0 +the function returns it"):
        jc.quantize.fold_rotations(fn, draw(SHAPES), X)


def test_only_what_weights_gain_by_turns():
    """Queries and keys could turn; no weight is multiplied along them."""
    fn = lambda p, x: jnp.einsum("bid,bjd->bij", x @ p["a"], x @ p["b"])
    with pytest.raises(ValueError, match="no features"):
        jc.quantize.fold_rotations(fn, draw(SHAPES), X)


def test_outliers_of_the_stream_spread():
    """One of 64 features is 40, the others of the normal distribution; the norm keeps ratios.

    At four bits a step is 40 / 7: what is below half of it, 2.9, rounds to zero, and with it
    all that the products are made of, as the weight of the outlier is zero: an error of 1.
    Turned, the outlier puts 40 / sqrt(64) = 5 into every feature. The range is about 5 + 2.5,
    steps are 7.5 / 7, the error of a feature of size one is 7.5 / 7 / sqrt(12) = 0.31. Weights
    of four bits add theirs, 2.5 / 7 / sqrt(12) = 0.1 of themselves, times the whole token:
    0.1 sqrt(1600 + 63) / sqrt(63) = 0.5. GPTQ knows what adds up.
    """
    table = jnp.asarray(random(200, 64)).at[:, 3].set(40.0)
    b = jnp.asarray(random(64, 32, seed=1)).at[3].set(0.0)
    params, ids, fn = (
        {"table": table, "b": b},
        np.arange(200),
        lambda p, i: rms(p["table"][i]) @ p["b"],
    )
    exact = np.asarray(fn(params, ids), np.float64)
    act = jc.arrays.Activation(jc.arrays.IntType(4))
    a4 = {"b": jc.quantize.Spec(qtype=jc.arrays.IntType(8), act=act)}
    w4a4 = {"b": jc.quantize.w4a4()}

    def error(quantized):
        got = np.asarray(jc.accelerate(fn)(quantized, ids), np.float64)
        return np.linalg.norm(got - exact) / np.linalg.norm(exact)

    new = jc.quantize.fold_rotations(fn, params, ids)
    assert error(jc.quantize.quantize(params, a4)) > 0.9
    assert error(jc.quantize.quantize(new, a4)) < 0.4
    assert error(jc.quantize.gptq(fn, new, [ids], w4a4)) < 0.5


def test_types_stay():
    params = {n: jnp.asarray(random(12, 12), jnp.bfloat16) for n in "ab"} | {"n": np.arange(3)}
    fn = lambda p, x: x @ p["a"] @ p["b"]
    new = jc.quantize.fold_rotations(fn, params, X)
    assert new["n"] is params["n"]
    assert new["a"].dtype == jnp.bfloat16
    compressed = jc.quantize.quantize(params, {"a": jc.quantize.int8()})
    with pytest.raises(TypeError, match="'a' is a QuantizedArray: fold first"):
        jc.quantize.fold_rotations(fn, compressed, X)


def test_a_scale_that_scales_twice_stays():
    params = draw({"a": (12, 8), "g": (8,), "h": (8,), "b": (8, 4)})
    twice = lambda p, x: (x @ p["a"] * p["g"] * p["h"] * p["g"]) @ p["b"]
    [row] = [r for r in jc.quantize.rotatable(twice, params, X) if r.path == "b"]
    assert row.rotated == 0
    assert "'g'" in row.why
