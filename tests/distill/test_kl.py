"""`kl` against its definition in float64: loss, gradient, and the corners of its domain."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles_pruning as oracles
from checks import random

RELATIVE = 1e-6
# The oracle subtracts logarithms of size 10 or more in float64: below this it is rounding.
ORACLE = 1e-14


@functools.partial(jax.jit, static_argnames="axis")
def compiled(student, teacher, temperature, where, axis):
    """The losses and their gradient to the student, from one program."""

    def total(student):
        losses = jc.distill.kl(student, teacher, temperature=temperature, where=where, axis=axis)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(student)
    return losses, gradient


def kl(student, teacher, temperature=1.0, where=None, axis=-1):
    return compiled(student, teacher, temperature, where, axis)[0]


def gradient(student, teacher, temperature=1.0, where=None, axis=-1):
    return compiled(student, teacher, temperature, where, axis)[1]


def assert_matches(student, teacher, temperature=1.0, **kwargs):
    want = oracles.kl(student, teacher, temperature, **kwargs)
    got = kl(student, teacher, temperature=temperature, **kwargs)
    np.testing.assert_allclose(got, want, rtol=RELATIVE, atol=ORACLE * temperature**2)
    slope = oracles.kl_gradient(student, teacher, temperature, **kwargs)
    got = gradient(student, teacher, temperature=temperature, **kwargs)
    # Relative to the largest of the example: a class of no probability has no digits.
    size = np.max(np.abs(slope), kwargs.get("axis", -1), keepdims=True)
    assert np.all(np.abs(got - slope) <= 3 * RELATIVE * size + ORACLE * temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0, 1e4])
@pytest.mark.parametrize("gap", [1e-3, 0.1, 1.0, 10.0])
def test_loss_and_gradient_near_the_teacher_and_far(temperature, gap):
    teacher = random(40, 10, seed=1) * 3
    student = teacher + random(40, 10, seed=2) * np.float32(gap)
    assert_matches(student, teacher, temperature)


@hypothesis.given(
    st.sampled_from([(1, 1), (3, 2), (2, 3, 5)]),
    st.sampled_from([0.3, 2.0, 50.0]),
    st.sampled_from([1e-2, 1.0, 10.0]),
    st.integers(0, 99),
)
def test_shapes_and_sizes(shape, temperature, size, seed):
    student, teacher = (random(*shape, seed=seed + i) * np.float32(size) for i in (0, 1))
    assert_matches(student, teacher, temperature)


@pytest.mark.parametrize(("axis", "left"), [(1, (4, 6)), (-3, (5, 6))])
def test_classes_along_any_axis(axis, left):
    student, teacher = random(4, 5, 6), random(4, 5, 6, seed=1)
    assert_matches(student, teacher, 2.0, axis=axis)
    assert kl(student, teacher, temperature=2.0, axis=axis).shape == left


@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e3, 1e5])
def test_logits_of_ten_thousand(temperature):
    signs = np.sign(random(200, 6, seed=3)), np.sign(random(200, 6, seed=4))
    student, teacher = (1e4 * s + random(200, 6, seed=5) for s in signs)
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    want = oracles.kl(student, teacher, temperature)
    got = kl(student, teacher, temperature=temperature)
    # A probability is off by the rounding of its logarithm, so those that are nearly zero are
    # not compared in relative terms.
    np.testing.assert_allclose(got, want, rtol=RELATIVE, atol=1e-5)
    slope = gradient(student, teacher, temperature=temperature)
    want = oracles.kl_gradient(student, teacher, temperature)
    np.testing.assert_allclose(slope, want, rtol=3 * RELATIVE, atol=RELATIVE * temperature)


def test_a_shift_of_all_logits_changes_nothing():
    student, teacher = random(40, 10), random(40, 10, seed=1)
    # Multiples of 2^-10 stay exact under a shift of 2^10.
    grid = lambda x: np.round(x * 1024) / 1024
    student, teacher = grid(student), grid(teacher)
    want = kl(student, teacher)
    np.testing.assert_allclose(kl(student + 1024, teacher), want, rtol=RELATIVE)
    np.testing.assert_allclose(kl(student, teacher - 1024), want, rtol=RELATIVE)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(scale, temperature):
    logits = random(40, 10) * np.float32(scale)
    assert not np.any(kl(logits, logits, temperature=temperature))
    assert not np.any(gradient(logits, logits, temperature=temperature))


def test_no_gradient_to_the_teacher_one_to_the_temperature():
    student, teacher = random(3, 4), random(3, 4, seed=1)
    assert not np.any(jax.jit(jax.grad(lambda t: jc.distill.kl(student, t).sum()))(teacher))
    total = lambda t: jc.distill.kl(student, teacher, temperature=t).sum()
    got = jax.jit(jax.grad(total))(2.0)
    step = 1e-5
    up, down = (oracles.kl(student, teacher, 2.0 + d).sum() for d in (step, -step))
    np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=1e-5)


def test_classes_that_do_not_count():
    student, teacher = random(8, 5), random(8, 5, seed=1)
    where = np.random.default_rng(0).random((8, 5)) < 0.6
    where[0], where[1], where[2] = False, True, [True, False, False, False, False]
    assert_matches(student, teacher, 3.0, where=where)
    got = np.asarray(kl(student, teacher, where=where))
    assert got[0] == got[2] == 0  # no class at all, and only one
    # What does not count may be anything.
    for junk in (np.nan, np.inf, -np.inf, 3e38):
        s, t = np.where(where, student, junk), np.where(where, teacher, junk)
        np.testing.assert_array_equal(kl(s, t, where=where), got)
        slope = np.asarray(gradient(s, t, where=where))
        assert not slope[~where].any()
        np.testing.assert_array_equal(slope, gradient(student, teacher, where=where))


def test_where_is_broadcast_along_any_axis():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    where = np.array([[True], [False], [True], [True]])
    assert_matches(student, teacher, axis=0, where=np.broadcast_to(where, (4, 3)))
    np.testing.assert_array_equal(
        kl(student, teacher, axis=0, where=where),
        kl(student, teacher, axis=0, where=np.broadcast_to(where, (4, 3))),
    )


def test_one_class_is_certain():
    assert not np.any(kl(random(5, 1), random(5, 1, seed=1)))
    assert not np.any(gradient(random(5, 1), random(5, 1, seed=1)))


def test_classes_that_are_ruled_out_by_infinite_logits():
    low = -np.inf
    student = np.float32([[1, 2, low], [1, 2, 3], [1, 2, low], [low, 2, 1]])
    teacher = np.float32([[2, 1, low], [2, 1, low], [2, 1, 3], [2, 1, 3]])
    want = oracles.kl(student[:2], teacher[:2])
    got = kl(student, teacher)
    np.testing.assert_allclose(got[:2], want, rtol=RELATIVE)
    assert np.all(np.isposinf(got[2:]))  # the student excludes what the teacher does not
    assert np.isfinite(gradient(student[:2], teacher[:2])).all()


def test_the_limit_of_high_temperature():
    """Half the squared difference of the centred logits over the number of classes."""
    student, teacher = random(40, 10), random(40, 10, seed=1)
    gap = student.astype(np.float64) - teacher
    gap = gap - gap.mean(-1, keepdims=True)
    want = (gap**2).sum(-1) / 20
    # The next term of the expansion is of the order of 1 / T.
    np.testing.assert_allclose(kl(student, teacher, temperature=1e6), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    student, teacher = (jnp.asarray(random(9, 6, seed=i), dtype) for i in (0, 1))
    got = kl(student, teacher, temperature=4.0)
    assert got.dtype == jnp.float32
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    np.testing.assert_array_equal(got, kl(*wide, temperature=4.0))
    assert gradient(student, teacher).dtype == dtype
    assert kl(student, wide[1]).dtype == jnp.float32


def test_it_is_never_negative_and_zero_for_no_examples():
    student = random(40, 10, seed=2)
    teacher = student + random(40, 10, seed=3) * np.float32(1e-4)
    assert np.all(np.asarray(kl(student, teacher, temperature=20.0)) >= 0)
    assert kl(student[:0], teacher[:0]).shape == (0,)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_mean_nothing(temperature):
    with pytest.raises(ValueError, match="positive and finite"):
        jc.distill.kl(jnp.ones(2), jnp.ones(2), temperature=temperature)


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3\) and \(3,\)"):
        jc.distill.kl(jnp.ones((2, 3)), jnp.ones(3))
