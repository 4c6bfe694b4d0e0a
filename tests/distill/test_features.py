"""Losses on features and relations: one contract for all, and what is special to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxcompress as jc
import oracles_features as oracles

d = jc.distill
BATCH, PLACES, SMALL, LARGE = 5, 4, 3, 6


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PROJECTOR = {"kernel": random(SMALL, LARGE, seed=8), "bias": random(LARGE, seed=9)}
VID = {"mean": PROJECTOR, "spread": random(LARGE, seed=10)}
MAPS = (BATCH, 2, 2)
HEADS = 3

# Each with its oracle, the shape of the student's and the teacher's features, that of its
# `where`, and whether it is zero where both are equal.
LOSSES = {
    "fitnet": (
        lambda s, t, **kw: d.fitnet(s, t, PROJECTOR, **kw),
        lambda s, t, **kw: oracles.fitnet(s, t, PROJECTOR, **kw),
        (BATCH, PLACES, SMALL),
        (BATCH, PLACES, LARGE),
        (BATCH, PLACES, LARGE),
    ),
    "attention_transfer": (
        d.attention_transfer,
        oracles.attention_transfer,
        (*MAPS, SMALL),
        (*MAPS, LARGE),
        MAPS,
    ),
    "nst": (d.nst, oracles.nst, (*MAPS, SMALL), (*MAPS, LARGE), MAPS),
    "vid": (
        lambda s, t, **kw: d.vid(s, t, VID, **kw),
        lambda s, t, **kw: oracles.vid(s, t, VID, **kw),
        (BATCH, SMALL),
        (BATCH, LARGE),
        (BATCH, LARGE),
    ),
    **{
        name: (getattr(d, name), getattr(oracles, name), (BATCH, SMALL), (BATCH, 2, 3), (BATCH,))
        for name in ("similarity_preserving", "rkd_distance", "rkd_angle", "pkt")
    },
    "self_relation": (
        lambda s, t, **kw: d.self_relation(s, t, heads=HEADS, **kw),
        lambda s, t, **kw: oracles.self_relation(s, t, HEADS, **kw),
        (BATCH, PLACES, 3),
        (BATCH, PLACES, 6),
        (BATCH, PLACES),
    ),
}
each = pytest.mark.parametrize("name", LOSSES)
ZERO = [n for n in LOSSES if n not in ("fitnet", "vid")]  # those two have a projector between


def inputs(name, seed=0):
    _, _, s, t, _ = LOSSES[name]
    return random(*s, seed=seed), random(*t, seed=seed + 1)


@functools.cache
def compiled(name):
    """`(losses, gradient to the student, gradient to the teacher)`, compiled once a shape."""
    loss, *_, shape = LOSSES[name]

    def total(s, t, where):
        losses = loss(s, t, where=where)
        return losses.sum(), losses

    @jax.jit
    def run(s, t, where=None):
        where = jnp.ones(shape, bool) if where is None else where
        (_, losses), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(s, t, where)
        return losses, *grads

    return run


def assert_close(got, want):
    # A part in a million, and as much of one for a difference of numbers of that size.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@each
@pytest.mark.parametrize("seed", [0, 20])
def test_value_is_that_of_the_definition(name, seed):
    s, t = inputs(name, seed)
    got, _, to_teacher = compiled(name)(s, t)
    assert got.dtype == jnp.float32
    assert_close(got, LOSSES[name][1](s, t))
    np.testing.assert_array_equal(to_teacher, 0)


@each
def test_where_leaves_out(name):
    _, oracle, *_, shape = LOSSES[name]
    s, t = inputs(name)
    where = np.random.default_rng(3).random(shape) < 0.7
    where[0] = False
    assert where.any()
    got, *_ = compiled(name)(s, t, where)
    assert_close(got, oracle(s, t, where=where))
    for found in compiled(name)(s, t, np.zeros(shape, bool)):
        np.testing.assert_array_equal(found, 0)


@each
def test_gradients_to_second_order(name):
    loss, *_ = LOSSES[name]
    with jax.enable_x64(True):
        s, t = (jnp.asarray(x, jnp.float64) for x in inputs(name, 30))
        check_grads(jax.jit(lambda s: loss(s, t)), (s,), order=2, modes=["rev"])


@pytest.mark.parametrize("name", ZERO)
def test_student_equals_teacher(name):
    _, _, _, shape, _ = LOSSES[name]
    t = random(*shape)
    losses, grad, _ = compiled(name)(t, t)
    # The compiler may round the two sides differently: squares of 1e-7 are left.
    np.testing.assert_allclose(losses, 0, atol=1e-12)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


@each
def test_features_of_zeros_and_equal_examples(name):
    """Nothing has a length, a distance or an angle then: still numbers, and gradients."""
    s, t = inputs(name)
    for a, b in ((0 * s, t), (s, 0 * t), (0 * s, 0 * t), (np.ones_like(s), t)):
        losses, grad, _ = compiled(name)(a, b)
        np.testing.assert_allclose(losses, LOSSES[name][1](a, b), rtol=2e-6, atol=2e-6)
        assert np.isfinite(grad).all()


@each
def test_large_and_small_features(name):
    s, t = inputs(name)
    # `self_relation` puts inner products into a softmax: of features of 100 they are of
    # 1e4, and their rounding, 1e4 * 2^-24 a few times, is an absolute error of the exponents.
    large, rtol = (100, 5e-3) if name == "self_relation" else (1e4, 3e-6)
    for a, b in ((np.float32(large) * s, t), (s, np.float32(large) * t)):
        losses, grad, _ = compiled(name)(a, b)
        np.testing.assert_allclose(losses.sum(), LOSSES[name][1](a, b).sum(), rtol=rtol)
        assert np.isfinite(grad).all()


@each
def test_bfloat16_is_computed_in_float32(name):
    loss, oracle, *_ = LOSSES[name]
    s, t = (jnp.asarray(x, jnp.bfloat16) for x in inputs(name, 40))
    assert_close(jax.jit(loss)(s, t), oracle(*(np.asarray(x, np.float64) for x in (s, t))))


@pytest.mark.parametrize("name", ["attention_transfer", "nst"])
def test_channels_may_lie_anywhere(name):
    loss, oracle, *_ = LOSSES[name]
    s, t = inputs(name)
    got = loss(*(jnp.moveaxis(jnp.asarray(x), -1, 1) for x in (s, t)), axis=1)
    assert_close(got, oracle(s, t))


def test_pkt_between_opposites():
    """Probabilities of exactly zero, on either side: only epsilon keeps the loss finite."""
    line = np.float32([[1.0], [1.0], [-1.0], [2.0]])
    spread = random(4, 3)
    for a, b in ((spread, line), (line, spread), (line[[0, 2]], line[[0, 1]])):
        assert_close(d.pkt(jnp.asarray(a), jnp.asarray(b)), oracles.pkt(a, b))


def test_fitnet_projects_along_its_axis():
    s, t = random(BATCH, SMALL, 7), random(BATCH, LARGE, 7, seed=1)
    got = d.fitnet(jnp.asarray(s), jnp.asarray(t), PROJECTOR, axis=1)
    want = oracles.fitnet(np.moveaxis(s, 1, -1), np.moveaxis(t, 1, -1), PROJECTOR)
    assert_close(got, want)


def test_the_projector_learns():
    s, t = map(jnp.asarray, (random(64, SMALL), random(64, LARGE, seed=1)))
    params = d.projector(jax.random.key(0), SMALL, LARGE)
    loss = jax.jit(lambda p: d.fitnet(s, t, p).mean())
    descend = jax.jit(lambda p: jax.tree.map(lambda p, g: p - 0.5 * g, p, jax.grad(loss)(p)))
    start = loss(params)
    for _ in range(200):
        params = descend(params)
    best = np.linalg.lstsq(np.c_[s, np.ones(64)], np.asarray(t), rcond=None)[0]
    floor = np.mean((np.c_[s, np.ones(64)] @ best - t) ** 2)
    assert start > 2 * floor
    np.testing.assert_allclose(loss(params), floor, rtol=1e-3)


def test_single_examples_have_no_relations():
    one = jnp.asarray(random(1, 4)), jnp.asarray(random(1, 4, seed=1))
    for name in ("rkd_distance", "rkd_angle", "pkt", "similarity_preserving"):
        fn = jax.jit(jax.value_and_grad(lambda s, t, n=name: getattr(d, n)(s, t).sum()))
        value, grad = fn(*one)
        assert value == 0
        np.testing.assert_array_equal(grad, 0)


# Contrastive: a memory besides.
CRD = dict(
    projectors={
        "student": PROJECTOR,
        "teacher": {"kernel": random(4, LARGE, seed=11), "bias": random(LARGE, seed=12)},
    },
    memory=d.crd_memory(jax.random.key(3), 20, LARGE),
    index=jnp.array([4, 0, 19, 7, 7 + 1]),
    negatives=jnp.asarray(np.random.default_rng(4).integers(0, 20, (BATCH, 9))),
)


def test_crd_is_that_of_the_definition():
    s, t = random(BATCH, SMALL), random(BATCH, 4, seed=1)
    assert bool((CRD["negatives"] == CRD["index"][:, None]).any())  # one that must not count
    loss, memory = d.crd(jnp.asarray(s), jnp.asarray(t), **CRD)
    want, banks = oracles.crd(
        s, t, *(CRD[k] for k in ("projectors", "memory", "index", "negatives"))
    )
    # Similarities are divided by 0.07, and so are their roundings.
    np.testing.assert_allclose(loss, want, rtol=3e-6)
    for got, bank in zip(memory, banks):
        np.testing.assert_allclose(got, bank, rtol=1e-6, atol=1e-6)


def test_crd_gradients_and_where():
    with jax.enable_x64(True):
        s, t = (jnp.asarray(random(BATCH, n, seed=n), jnp.float64) for n in (SMALL, 4))
        fn = jax.jit(lambda s, p: d.crd(s, t, **{**CRD, "projectors": p}, temperature=0.5)[0])
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), CRD["projectors"])
        check_grads(fn, (s, wide), order=2, modes=["rev"])
    s, t = jnp.asarray(random(BATCH, SMALL)), jnp.asarray(random(BATCH, 4))
    where = jnp.array([True, False, True, False, True])
    loss, memory = d.crd(s, t, **CRD, where=where)
    everyone, _ = d.crd(s, t, **CRD)
    np.testing.assert_array_equal(loss, jnp.where(where, everyone, 0))
    np.testing.assert_array_equal(memory.student[0], CRD["memory"].student[0])
    assert bool(jnp.any(memory.student[4] != CRD["memory"].student[4]))
    to_teacher = jax.grad(lambda t: d.crd(s, t, **CRD)[0].sum())(t)
    np.testing.assert_array_equal(to_teacher, 0)
    to_memory = jax.grad(lambda m: d.crd(s, t, **{**CRD, "memory": m})[0].sum())(CRD["memory"])
    assert all(not bool(x.any()) for x in to_memory)


def test_crd_keeps_its_structure_in_a_scan():
    s, t = jnp.asarray(random(3, BATCH, SMALL)), jnp.asarray(random(3, BATCH, 4))

    def step(memory, batch):
        loss, memory = d.crd(*batch, **{**CRD, "memory": memory})
        return memory, loss

    memory, losses = jax.lax.scan(step, CRD["memory"], (s, t))
    assert losses.shape == (3, BATCH)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, CRD["memory"])


# Layer by layer.
def test_layerwise_is_the_sum_over_pairs():
    s, t = random(2, BATCH, SMALL), random(6, BATCH, LARGE, seed=1)
    projectors = [d.projector(jax.random.key(i), SMALL, LARGE) for i in range(2)]
    got = d.layerwise(d.fitnet, list(map(jnp.asarray, s)), jnp.asarray(t), projectors)
    want = sum(oracles.fitnet(s[i], t[j], projectors[i]) for i, j in ((0, 2), (1, 5)))
    assert_close(got, want)
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *projectors)
    again = d.layerwise(d.fitnet, jnp.asarray(s), jnp.asarray(t), stacked, layers=(2, 5))
    np.testing.assert_array_equal(got, again)


ONE, TWO = jnp.ones((2, 3)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: d.fitnet(ONE, TWO), ValueError, r"one shape.* \(2, 3\) and \(2, 4\)"),
        (lambda: d.fitnet(ONE.astype(int), ONE), TypeError, "student's features.*int32"),
        (lambda: d.attention_transfer(ONE, ONE, power=1.0), ValueError, "above 1; got 1.0"),
        (lambda: d.nst(ONE, ONE[:1]), ValueError, "same positions"),
        (lambda: d.vid_projector(jax.random.key(0), 2, 2, variance=0.0), ValueError, "variance"),
        (lambda: d.pkt(ONE, ONE[:1]), ValueError, "same examples"),
        (lambda: d.self_relation(TWO, ONE[:1], heads=1), ValueError, "same tokens"),
        (lambda: d.self_relation(TWO, ONE, heads=2), ValueError, "divide both 4 and 3; got 2"),
        (lambda: d.uniform_layers(3, 2), ValueError, "got 3 and 2"),
        (
            lambda: d.layerwise(d.fitnet, [ONE], [ONE], layers=(1,)),
            ValueError,
            r"1 layers, the teacher 1; got layers=\(1,\)",
        ),
        (
            lambda: d.layerwise(d.fitnet, [ONE], [ONE], [None, None]),
            ValueError,
            "2 more of something",
        ),
        (
            lambda: d.crd(ONE, TWO, **{**CRD, "index": jnp.zeros(3, int)}),
            ValueError,
            r"\(3,\)",
        ),
        (
            lambda: d.crd(ONE, ONE, **CRD, temperature=-1.0),
            ValueError,
            "positive and finite; got -1.0",
        ),
    ],
)
def test_errors_say_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
