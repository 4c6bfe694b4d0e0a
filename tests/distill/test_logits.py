"""Losses on logits: one contract for all, against float64, and what is special to each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxcompress as jc
import oracles_distill as oracles

CLASSES, BATCH = 7, 6
LABELS = np.array([0, 3, 6, 3, 1, 2])
SHARES = np.array([0.3, 0.7])


def random(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


# Each as `loss(student, teacher, temperature=, axis=, where=)`, with its oracle, and whether
# it is zero where both are equal.
def _dkd(fn):
    return lambda s, t, **kw: fn(s, t, LABELS[: len(s) if kw.get("axis", -1) else len(s[0])], **kw)


def _no_temperature(fn):
    return lambda s, t, temperature=1.0, **kw: fn(s, t, **kw)


def _top_k(s, t, temperature=1.0, **kw):
    # Stored in float32 here: how far float16 is off has a test of its own.
    kept = jc.distill.top_k(t, min(3, CLASSES), temperature=float(temperature), dtype=t.dtype, **kw)
    return jc.distill.top_k_kl(s, kept, **kw)


def _two(fn):
    return lambda s, t, **kw: fn(s, np.stack([t, t[::-1]]), weights=SHARES, **kw)


def _two_jax(s, t, **kw):
    return jc.distill.multi_teacher_kl(s, jnp.stack([t, t[::-1]]), weights=SHARES, **kw)


d = jc.distill
LOSSES = {
    "kl": (d.kl, oracles.kl, True),
    "reverse_kl": (d.reverse_kl, oracles.reverse_kl, True),
    "jensen_shannon": (d.jensen_shannon, oracles.jensen_shannon, True),
    "soft_cross_entropy": (d.soft_cross_entropy, oracles.soft_cross_entropy, False),
    "mse": (_no_temperature(d.mse), oracles.mse, True),
    "dkd": (_dkd(d.dkd), _dkd(oracles.dkd), True),
    "dist": (d.dist, oracles.dist, True),
    "top_k_kl": (_top_k, lambda s, t, **kw: oracles.top_k_kl(s, t, 3, **kw), True),
    "multi_teacher_kl": (_two_jax, _two(oracles.multi_teacher_kl), False),
}
each = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def program(name):
    loss, _, _ = LOSSES[name]

    def total(s, t, where, temperature):
        losses = loss(s, t, temperature=temperature, where=where)
        return losses.sum(), losses

    run = jax.value_and_grad(total, (0, 1), has_aux=True)
    # What `top_k` keeps is of one temperature, a number.
    return jax.jit(run, static_argnums=(3,) if name == "top_k_kl" else ())


def compiled(name, temperature=1.0):
    """`(losses, gradient to the student, gradient to the teacher)`, compiled once a shape."""

    def run(s, t, where=None):
        where = np.ones(s.shape, bool) if where is None else where
        (_, losses), grads = program(name)(s, t, where, temperature)
        return losses, *grads

    return run


def assert_matches(name, s, t, *, rtol=1e-6, atol=1e-7, temperature=1.0, where=None):
    got, *_ = compiled(name, temperature)(s, t, where)
    want = LOSSES[name][1](s, t, temperature=temperature, where=where)
    assert got.shape == want.shape
    # A part in a million of the loss. Of a loss that is small because two large things
    # cancel, float32 logits hold no more than `atol` of T^2.
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * temperature**2)


@each
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_that_of_the_definition(name, temperature):
    s, t = random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1)
    assert_matches(name, s, t, temperature=temperature)


@each
def test_axis(name):
    s, t = random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1)
    kw = {"batch_axis": 1} if name == "dist" else {}
    loss, oracle, _ = LOSSES[name]
    if name == "multi_teacher_kl":  # turned over along the examples, not the classes
        loss = lambda s, t, **kw: d.multi_teacher_kl(
            s, jnp.stack([t, t[:, ::-1]]), weights=SHARES, **kw
        )
    got = jax.jit(functools.partial(loss, axis=0, temperature=2.0, **kw))(s.T, t.T)
    np.testing.assert_allclose(got, oracle(s, t, temperature=2.0), rtol=1e-6, atol=1e-6)


@each
def test_where_leaves_classes_out(name):
    s, t = random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1)
    where = np.random.default_rng(2).random((BATCH, CLASSES)) < 0.7
    where[0], where[1] = False, np.arange(CLASSES) == 2  # none, and a single one
    if name == "multi_teacher_kl":
        where[:] = where[2]
    assert_matches(name, s, t, where=where)
    losses, grad, _ = compiled(name)(s, t, where)
    spoilt = np.where(where, s, np.float32(1e30)), np.where(where, t, np.float32(-1e30))
    again, spoilt_grad, _ = compiled(name)(*spoilt, where)
    np.testing.assert_array_equal(again, losses)
    np.testing.assert_array_equal(spoilt_grad, grad)
    np.testing.assert_array_equal(np.asarray(grad)[~where], 0)


@each
def test_no_class_counts(name):
    s, t = random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1)
    for found in compiled(name)(s, t, np.zeros(s.shape, bool)):
        np.testing.assert_array_equal(found, 0)


@each
def test_one_class(name):
    loss, _, _ = LOSSES[name]
    if name == "top_k_kl":
        loss = lambda s, t: d.top_k_kl(s, d.top_k(t, 1))
    s, t = jnp.array([[3.0], [-1.0]]), jnp.array([[0.5], [2.0]])
    if name == "dkd":
        loss = lambda s, t: d.dkd(s, t, jnp.zeros(2, jnp.int32))
    total = lambda s: (loss(s, t).sum(), loss(s, t))
    (_, values), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(s)
    np.testing.assert_array_equal(values, [6.25, 9.0] if name == "mse" else [0, 0])
    np.testing.assert_array_equal(grad, [[5.0], [-6.0]] if name == "mse" else [[0], [0]])


@each
def test_student_equals_teacher(name):
    t = random(BATCH, CLASSES, scale=8)
    values, grad, _ = compiled(name)(t, t)
    if LOSSES[name][2]:  # the compiler may round the two sides differently: squares of 1e-7
        np.testing.assert_allclose(values, 0, atol=1e-12)
    if name != "multi_teacher_kl":
        np.testing.assert_allclose(grad, 0, atol=2e-7)


@each
def test_huge_logits(name):
    s, t = (1e4 * np.sign(random(BATCH, CLASSES, seed=i)) for i in (0, 1))
    s, t = s.astype(np.float32), t.astype(np.float32)
    losses, grad, _ = compiled(name)(s, t)
    np.testing.assert_allclose(losses, LOSSES[name][1](s, t), rtol=1e-6, atol=1e-6)
    assert np.isfinite(grad).all()


@each
def test_gradients_to_second_order(name):
    loss, _, _ = LOSSES[name]
    with jax.enable_x64(True):  # differences in float32 would say nothing of the second
        s, t = (random(3, 4, seed=i).astype(np.float64) for i in (3, 4))
        # Half of the examples are near the teacher, where another formula computes.
        s, t = np.concatenate([s, t + 0.01 * s]), jnp.asarray(np.concatenate([t, t]))
        fn = jax.jit(lambda s: loss(s, t, temperature=2.0))
        check_grads(fn, (jnp.asarray(s),), order=2, modes=["rev"])
        huge = jnp.sign(s) * 1e4
        curved = jax.jit(jax.grad(lambda s: jnp.sum(jax.grad(lambda s: fn(s).sum())(s) ** 2)))
        assert bool(jnp.isfinite(curved(huge)).all())


@each
def test_no_gradient_to_the_teacher(name):
    _, _, to_teacher = compiled(name)(random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1))
    np.testing.assert_array_equal(to_teacher, 0)


@each
def test_bfloat16_is_computed_in_float32(name):
    loss, oracle, _ = LOSSES[name]
    s, t = (jnp.asarray(random(BATCH, CLASSES, seed=i), jnp.bfloat16) for i in (5, 6))
    if name == "top_k_kl":
        loss = lambda s, t: d.top_k_kl(s, d.top_k(t, 3, dtype=jnp.float32))
    total = lambda s: (loss(s, t).sum(), loss(s, t))
    (_, got), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(s)
    assert got.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    want = oracle(np.asarray(s, np.float64), np.asarray(t, np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "factor"), [("kl", 0.5), ("reverse_kl", 0.5), ("jensen_shannon", 0.125)]
)
def test_a_high_temperature_is_the_squared_error(name, factor):
    """`1e4` of float32: what is left is the difference of the logits, to the last digits."""
    s, t = random(BATCH, CLASSES, scale=1), random(BATCH, CLASSES, seed=1, scale=1)
    gap = (s - t).astype(np.float64)
    gap -= gap.mean(-1, keepdims=True)
    got, *_ = compiled(name, temperature=1e4)(s, t)
    # The next term of the expansion is of the order of the largest gap over T.
    np.testing.assert_allclose(got, factor * np.mean(gap**2, -1), rtol=10 / 1e4)
    want = LOSSES[name][1](s.astype(np.float64), t, temperature=1e2)
    got, *_ = compiled(name, temperature=1e2)(s, t)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jensen_shannon", "mse"])
def test_a_small_difference_keeps_its_digits(name):
    t = random(BATCH, CLASSES)
    s = (t * np.float32(1.0001)).astype(np.float32)
    got, *_ = compiled(name)(s, t)
    np.testing.assert_allclose(got, LOSSES[name][1](s, t), rtol=1e-6)


def test_a_logit_of_minus_infinity_rules_a_class_out():
    s, t = random(2, 4), random(2, 4, seed=1)
    s[:, 1] = t[:, 1] = -np.inf
    where = np.arange(4) != 1
    for name in ("kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy"):
        got, *_ = compiled(name)(s, t)
        want = LOSSES[name][1](s, t, where=where)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert d.kl(jnp.array([0.0, -jnp.inf]), jnp.zeros(2)) == jnp.inf
    assert d.kl(jnp.zeros(2), jnp.array([0.0, -jnp.inf])).round(4) == np.float32(0.6931)


def test_jensen_shannon_tends_to_both_divergences():
    s, t = jnp.asarray(random(BATCH, CLASSES)), jnp.asarray(random(BATCH, CLASSES, seed=1))
    # Of the order of beta off, times the largest ratio of probabilities.
    low = d.jensen_shannon(s, t, beta=1e-6) / 1e-6
    np.testing.assert_allclose(low, d.kl(s, t), rtol=0.02)
    high = d.jensen_shannon(s, t, beta=1 - 1e-6) / 1e-6
    np.testing.assert_allclose(high, d.reverse_kl(s, t), rtol=0.02)


def test_dkd_is_kl_with_the_weights_that_kl_has():
    s, t = random(BATCH, CLASSES), random(BATCH, CLASSES, seed=1)
    for i in range(BATCH):
        one = jnp.asarray(s[i]), jnp.asarray(t[i])
        beta = 1 - float(jax.nn.softmax(one[1])[LABELS[i]])
        got = jax.jit(d.dkd)(*one, jnp.asarray(LABELS[i]), beta=beta)
        np.testing.assert_allclose(got, d.kl(*one), rtol=1e-5)


def test_top_k_is_a_bound_and_exact_with_all():
    s, t = jnp.asarray(random(BATCH, CLASSES)), jnp.asarray(random(BATCH, CLASSES, seed=1))
    full = d.kl(s, t, temperature=2.0)
    kept = lambda t, k: d.top_k(t, k, temperature=2.0, dtype=jnp.float32)
    loss = jax.jit(lambda s, t, k: d.top_k_kl(s, kept(t, k)), static_argnums=2)
    losses = [loss(s, t, k) for k in (1, 3, CLASSES)]
    assert all(bool(jnp.all(a <= b * (1 + 1e-5))) for a, b in itertools.pairwise(losses))
    np.testing.assert_allclose(losses[-1], full, rtol=1e-5)


def test_top_k_in_float16_is_a_thousandth_off():
    s, t = jnp.asarray(random(BATCH, 300)), jnp.asarray(random(BATCH, 300, seed=1))
    kept = d.top_k(t, 8)
    assert kept.log_probs.nbytes + kept.indices.nbytes + kept.rest.nbytes == BATCH * (4 * 8 + 4)
    exact = d.top_k_kl(s, d.top_k(t, 8, dtype=jnp.float32))
    np.testing.assert_allclose(d.top_k_kl(s, kept), exact, rtol=5e-3)


def test_top_k_is_a_pytree_that_goes_through_jit():
    t = jnp.asarray(random(BATCH, CLASSES))
    kept = jax.jit(lambda t: d.top_k(t, 2, temperature=3.0))(t)
    assert kept.temperature == 3.0
    assert jax.jit(d.top_k_kl)(t, kept).shape == (BATCH,)
    assert d.top_k(jnp.zeros(70_000), 2).indices.dtype == jnp.uint32


ONES = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: d.kl(ONES, ONES[:1]), ValueError, r"one shape; got \(2, 3\) and \(1, 3\)"),
        (lambda: d.kl(ONES, ONES, temperature=0.0), ValueError, "positive and finite; got 0.0"),
        (lambda: d.kl(ONES.astype(int), ONES), TypeError, "student's logits .* int32"),
        (lambda: d.mse(ONES, ONES[0]), ValueError, "one shape"),
        (lambda: d.jensen_shannon(ONES, ONES, beta=1.0), ValueError, "between 0 and 1"),
        (lambda: d.dkd(ONES, ONES, jnp.zeros(3, int)), ValueError, r"shape \(2,\); got \(3,\)"),
        (lambda: d.dkd(ONES, ONES, jnp.zeros(2)), TypeError, "integers; got float32"),
        (lambda: d.dist(ONES[0], ONES[0]), ValueError, "another of examples"),
        (lambda: d.top_k(ONES, 4), ValueError, "between 1 and the 3 classes; got 4"),
        (lambda: d.top_k_kl(ONES[:1], d.top_k(ONES, 2)), ValueError, r"examples \(2,\) of 3"),
        (lambda: d.multi_teacher_kl(ONES, ONES), ValueError, "teachers"),
        (
            lambda: d.multi_teacher_kl(ONES, ONES[None], weights=jnp.ones(2)),
            ValueError,
            r"\(1,\) or \(1, 2\); got \(2,\)",
        ),
    ],
)
def test_errors_say_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
