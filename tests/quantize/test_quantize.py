"""`quantize` against numpy in float64: codes, scales, bounds; under jit; in every tree."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
import oracles
from checks import assert_valid, quantized, random
from jaxcompress.arrays import IntType, QuantizedArray
from jaxcompress.quantize import Spec

Q = jc.quantize
ULP = 2.0**-23
SPECS = {
    "int8": Q.int8,
    "int4": Q.int4,
    "int3": Q.int3,
    "int2": Q.int2,
    "w8a8": Q.w8a8,
    "w4a8": Q.w4a8,
    "w4a4": Q.w4a4,
    "w8a16": Q.w8a16,
    "w4a16": Q.w4a16,
}
PLACES = [(None, None), (-1, None), ((-2, -1), None), (-2, 4), (-1, 100), ((-2, -1), (3, 2))]


def assert_nearest(q, w):
    """No element is further off than half a scale, and the extremes use the whole range."""
    w = np.asarray(w, np.float64)
    scale = oracles.spread(q.scale, w.shape, q.axis, q.group_size).astype(np.float64)
    error = np.abs(w - oracles.dense(q))
    # The scale is rounded twice, so 2^bits codes may be off by so many units in the last place;
    # and the quotient is rounded before it is rounded to an integer.
    slack = 2**q.qtype.bits * 4 * ULP
    assert np.all(error <= scale * (0.5 + slack))
    low, high = oracles.group_extremes(w, q.axis, q.group_size)
    if q.qtype.symmetric:
        want = np.maximum(np.abs(low), np.abs(high)) / q.qtype.high
    else:
        want = (np.maximum(high, 0) - np.minimum(low, 0)) / (q.qtype.high - q.qtype.low)
    # A group of zeros, or of numbers whose scale would be denormal, has scale 1.
    tiny = np.finfo(np.float32).tiny
    want = np.where(want < tiny, 1.0, want)
    np.testing.assert_allclose(q.scale, want, rtol=5 * ULP)


def assert_stored(w, spec):
    q = quantized(w, spec)
    assert_valid(q)
    assert_nearest(q, w)
    assert (q.shape, q.qtype, q.act, q.path) == (w.shape, spec.qtype, spec.act, "w")
    codes = oracles.codes_of(q)
    assert codes.min() >= spec.qtype.low
    assert codes.max() <= spec.qtype.high


@pytest.mark.parametrize("make", SPECS.values(), ids=SPECS)
def test_every_spec(make):
    assert_stored(random(3, 13, 6), make(group_size=5))


@pytest.mark.parametrize(("axis", "group_size"), PLACES)
@pytest.mark.parametrize("make", [Q.int8, Q.int4, Q.int3], ids=["int8", "int4", "int3"])
def test_every_place(make, axis, group_size):
    assert_stored(random(3, 13, 6), make(axis=axis, group_size=group_size))


@st.composite
def problems(draw):
    """Rank 0 to 4, sizes 0, 1 and odd; any axes, groups, widths; three dtypes."""
    shape = draw(st.lists(st.sampled_from([0, 1, 3, 17]), max_size=4))
    axes = draw(st.lists(st.sampled_from(range(-len(shape), 0)), unique=True)) if shape else []
    group = draw(st.sampled_from([None, 1, 4, 100])) if axes else None
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    w = random(*shape, seed=draw(st.integers(0, 99))) * np.float32(magnitude)
    spec = Spec(qtype=IntType(bits, symmetric), axis=tuple(axes), group_size=group)
    return w.astype(jnp.dtype(dtype)), spec


@given(problems())
def test_the_error_is_at_most_half_a_scale(problem):
    w, spec = problem
    assert_nearest(jax.jit(lambda w: quantized(w, spec))(w), w)


@pytest.mark.parametrize(
    "spec", [Q.int8(), Q.int4(group_size=4), Q.int3(symmetric=False)], ids=["int8", "int4", "int3"]
)
def test_integers_and_scales_are_the_same_bits_with_jit(spec):
    w = random(40, 33)
    plain, compiled = quantized(w, spec), jax.jit(lambda w: quantized(w, spec))(w)
    assert jax.tree.structure(plain) == jax.tree.structure(compiled)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("jit", [False, True])
def test_zeros_and_denormals_have_scale_one(symmetric, jit):
    """Down to where a scale would not be a normal float; 1e-37 / 127 is not."""
    w = np.ones((4, 5), np.float32)
    w[:, 1:] = [0.0, 1e-45, -1e-39, 1e-37]
    fn = lambda w: quantized(w, Q.int8(symmetric=symmetric))
    q = (jax.jit(fn) if jit else fn)(w)
    np.testing.assert_array_equal(q.scale[0, 1:], [1, 1, 1, 1])
    assert not np.any(oracles.dense(q)[:, 1:])
    np.testing.assert_allclose(oracles.dense(q)[:, 0], 1, rtol=2 * ULP)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite(symmetric):
    """Outside jit it raises; inside, its channel becomes NaN and no other."""
    w = random(4, 5)
    spec = Q.int4(symmetric=symmetric)
    clean = quantized(w, spec).materialise()
    for column, bad in enumerate([np.nan, np.inf, -np.inf], start=1):
        w[2, column] = bad
        with pytest.raises(ValueError, match="'w' holds NaN or infinity"):
            quantized(w[:, column:], spec)
    dense = np.asarray(jax.jit(lambda w: quantized(w, spec).materialise())(w))
    assert np.isnan(dense[:, 1:4]).all()
    np.testing.assert_array_equal(dense[:, [0, 4]], clean[:, [0, 4]])


def test_vmap_over_seeds_is_a_loop():
    w = random(3, 7, 5)
    stacked = jax.jit(jax.vmap(lambda w: quantized(w, Q.int4())))(w)
    for i in range(3):
        one, alone = jax.tree.map(lambda x, i=i: x[i], stacked), quantized(w[i], Q.int4())
        jax.tree.map(np.testing.assert_array_equal, one, alone)


def test_a_second_call_does_not_compile_again():
    fn = jax.jit(chex.assert_max_traces(lambda p: Q.quantize(p, {".*": Q.w4a8()}), 1))
    for seed in range(3):
        fn({"w": random(4, 3, seed=seed)})


PARAMS = {"a": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones((2, 2))}}


def bits(params):
    """The width of each leaf that was quantized."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=jc.arrays.is_compressed)
    return {q.path: q.qtype.bits for _, q in leaves if isinstance(q, QuantizedArray)}


def test_the_first_rule_that_matches_a_whole_path_counts():
    got = Q.quantize(PARAMS, {"a/kernel": Q.int4(), ".*kernel": Q.int8()})
    assert bits(got) == {"a/kernel": 4, "b/kernel": 8}
    got = Q.quantize(PARAMS, {"b/.*": None, ".*/kernel": Q.int8()})
    assert bits(got) == {"a/kernel": 8}
    assert got["b"]["kernel"] is PARAMS["b"]["kernel"]
    assert got["a"]["bias"] is PARAMS["a"]["bias"]


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            {"kernel": Q.int8()},
            ValueError,
            "'kernel' matches none of the paths 'a/bias', 'a/kernel', 'b/kernel'",
        ),
        ({".*": Q.int8(), "c": None}, ValueError, "'c' matches none of the paths"),
        ({"(": Q.int8()}, ValueError, r"'\(' is no regular expression"),
        ({3: Q.int8()}, ValueError, "3 is no regular expression"),
        ([".*"], TypeError, "rules map patterns of paths to specs.*got list"),
        ({"a/kernel": "int8"}, TypeError, r"'a/kernel' maps to 'int8'; expected a spec"),
        ({"a/kernel": Q.int8}, TypeError, "expected a spec"),
        ({"a/kernel": Q.int8(axis=2)}, ValueError, r"axis 2 is out of range.*'a/kernel'"),
        ({"a/kernel": Q.int8(axis=(0, -2))}, ValueError, r"twice.*'a/kernel'"),
        ({"a/kernel": Q.int8(group_size=0)}, ValueError, r"group_size.*got 0 of 'a/kernel'"),
        ({"a/kernel": Q.int8(group_size=(2, 2))}, ValueError, r"one for each.*'a/kernel'"),
        ({"a/kernel": Q.int8(axis=(), group_size=2)}, ValueError, "needs an axis"),
        ({"a/kernel": Q.w8a8(static=True)}, ValueError, r"static activations and needs stats=jc"),
    ],
)
def test_rules_that_mean_nothing(rules, error, message):
    with pytest.raises(error, match=message):
        Q.quantize(PARAMS, rules)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.ones((2, 2), jnp.int32), "net/w is int32"),
        (jnp.ones((2, 2), bool), "net/w is bool"),
        (1.0, "'net/w' is no array but float"),
        (quantized(np.ones((2, 2)), Q.int8()), "'net/w' is a QuantizedArray already"),
    ],
)
def test_leaves_that_cannot_be_quantized(leaf, message):
    with pytest.raises(TypeError, match=message):
        Q.quantize({"net": {"w": leaf}}, {".*": Q.int8()})


def test_axes_are_those_of_the_layout():
    def fn(p, x):
        x = jnp.einsum("td,dhs->ths", x, p["query"])
        return jnp.einsum("ths,hsd->td", x, p["out"]) @ p["linear"].T + p["bias"]

    shapes = {"query": (8, 2, 3), "out": (2, 3, 8), "linear": (5, 8), "bias": (5,)}
    params = {k: jnp.asarray(random(*s)) for k, s in shapes.items()}
    found = jc.layout(fn, params, jnp.ones((4, 8)))
    rules = {"query|out|linear": Q.int8()}
    got = Q.quantize(params, rules, layout=found)
    axes = {k: q.axis for k, q in got.items() if k != "bias"}
    assert axes == {"query": (-3,), "out": (-3, -2), "linear": (-1,)}
    # The spec's own axis comes first; leaves without a product need one.
    assert Q.quantize(params, {"linear": Q.int8(axis=-2)}, layout=found)["linear"].axis == (-2,)
    with pytest.raises(ValueError, match=r"for 'bias' \(it is no weight of two dim.*give its spec"):
        Q.quantize(params, {"bias": Q.int8()}, layout=found)
    assert Q.quantize(params, {"bias": Q.int8(axis=-1)}, layout=found)["bias"].scale.shape == (1,)
    shared = jc.layout(lambda p, x: x @ p["w"] + x @ p["w"].T, {"w": jnp.ones((3, 3))}, jnp.ones(3))
    with pytest.raises(ValueError, match="contract different axes"):
        Q.quantize({"w": jnp.ones((3, 3))}, {"w": Q.int8()}, layout=shared)


def test_without_layout_axis_two_from_the_end_and_all_of_a_vector():
    got = Q.quantize(
        {"w": jnp.ones((2, 3, 4)), "b": jnp.ones(4), "s": jnp.ones(())}, {".*": Q.int8()}
    )
    assert {k: q.scale.shape for k, q in got.items()} == {"w": (2, 1, 4), "b": (1,), "s": ()}


def test_static_activations_take_the_scale_from_statistics():
    fn = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"] + p["a"]["bias"]
    batches = [random(5, 4, seed=i) for i in range(3)]
    stats = jc.calibrate(fn, PARAMS, batches, jc.statistics.absmax())
    q = Q.quantize(PARAMS, {".*kernel": Q.w8a8(static=True)}, stats=stats)
    largest = max(np.abs(b).max() for b in batches)
    np.testing.assert_allclose(q["a"]["kernel"].act_scale, [[largest / 127]], rtol=2 * ULP)
    inside = max(np.abs(b @ np.ones((4, 2))).max() for b in batches)
    np.testing.assert_allclose(q["b"]["kernel"].act_scale, [[inside / 127]], rtol=1e-6)


def test_statistics_that_do_not_fit():
    fn = lambda p, x: x @ p["a"]["kernel"]
    rules = {".*kernel": Q.w8a8(static=True)}
    stats = jc.calibrate(fn, PARAMS, [jnp.ones((5, 4))], jc.statistics.absmax())
    with pytest.raises(ValueError, match="'b/kernel' comes from no activations"):
        Q.quantize(PARAMS, rules, stats=stats)
    moments = jc.calibrate(fn, PARAMS, [jnp.ones((5, 4))], jc.statistics.second_moment())
    with pytest.raises(ValueError, match="take a magnitude or a range for each layer"):
        Q.quantize(PARAMS, {"a/kernel": Q.w8a8(static=True)}, stats=moments)


X = random(3, 6)


def linen():
    model = nn.Sequential([nn.Dense(5), nn.Dense(4)])
    return model.init(jax.random.key(0), X), model.apply, r".*kernel", None


def haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(hk.Linear(5)(x))))
    return model.init(jax.random.key(0), X), model.apply, r".*w", None


def nnx_state():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    return state, lambda state, x: nnx.merge(graph, state)(x), r".*kernel", None


def nnx_module():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1)))
    return model, lambda model, x: model(x), r".*kernel", None


def equinox():
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(6, 5, key=keys[0]), eqx.nn.Linear(5, 4, key=keys[1])]
    model = eqx.nn.Sequential(layers)
    return model, lambda model, x: jax.vmap(model)(x), r".*weight", -1


TREES = [linen, haiku, nnx_state, nnx_module, equinox]


@pytest.mark.parametrize("make", TREES, ids=lambda f: f.__name__)
def test_any_tree(make):
    params, fn, pattern, axis = make()
    q = Q.quantize(params, {pattern: Q.int4(axis=axis, group_size=4)})
    weights = [
        x
        for x in jax.tree.leaves(q, is_leaf=jc.arrays.is_compressed)
        if isinstance(x, QuantizedArray)
    ]
    assert len(weights) == 2
    got = jc.accelerate(fn)(q, X)
    first, second = sorted(weights, key=lambda w: w.shape, reverse=True)
    if axis == -1:
        first, second = sorted(weights, key=lambda w: w.shape[-1], reverse=True)
    turn = (lambda w: w.T) if axis == -1 else (lambda w: w)
    # Biases are zero, or where not (Equinox) read from the model.
    biases = [np.zeros(5), np.zeros(4)]
    if make is equinox:
        biases = [layer.bias for layer in params.layers]
    hidden = X.astype(np.float64) @ turn(oracles.dense(first)) + biases[0]
    want = hidden @ turn(oracles.dense(second)) + biases[1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # two sums of five and six terms
    assert isinstance(q, type(params))
