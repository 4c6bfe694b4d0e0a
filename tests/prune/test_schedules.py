"""Schedules: the count that is kept, and when; against exact fractions and a plain loop."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles_pruning as oracles
from jaxcompress.prune import constant, polynomial

STEPS = jnp.arange(64)

# A sparsity as people write it, with at most four digits.
DECIMALS = st.integers(0, 1000).map(lambda i: f"{i / 1000:.3f}")


@hypothesis.settings(max_examples=300)
@hypothesis.given(DECIMALS, st.integers(0, 10**7))
def test_constant_keeps_the_stated_count(sparsity, size):
    got = int(constant(float(sparsity)).kept(jnp.int32(0), size))
    # The number is rounded to a float64 on the way: where the exact one ends in 1/2, and only
    # there, that may decide. What is exact in float64 decides every other case.
    assert got == size - int(np.floor(np.float64(sparsity) * size + 0.5))
    if (int(float(sparsity) * 1000 + 0.5) * size) % 1000 != 500:
        assert got == oracles.kept(sparsity, size)


@pytest.mark.parametrize(
    ("sparsity", "size", "kept"),
    [(0.9, 5, 0), (0.5, 3, 1), (0.5, 1, 0), (0.49, 1, 1), (0.7, 5, 1), (0.0, 9, 9), (1.0, 9, 0)]
    + [(0.9, 2**31 - 1, 214748365), (0.9, 2**24 + 1, 1677722), (0.99, 0, 0)],
)
def test_half_a_weight_is_dropped(sparsity, size, kept):
    assert int(constant(sparsity).kept(jnp.int32(3), size)) == kept


SPANS = st.tuples(st.integers(0, 20), st.none() | st.integers(1, 40), st.integers(1, 50))


@hypothesis.settings(max_examples=150)
@hypothesis.given(SPANS)
def test_masks_are_chosen_when_the_schedule_says(span):
    begin, length, every = span
    end = None if length is None else begin + length
    due = constant(0.5, begin=begin, end=end, every=every).due(STEPS)
    want = oracles.updates_that_choose(begin, end, every, STEPS.size)
    assert np.flatnonzero(due).tolist() == want


@hypothesis.given(SPANS.filter(lambda span: span[1] is not None), DECIMALS)
def test_final_sparsity_is_reached_by_the_last_update_whatever_every_is(span, sparsity):
    begin, length, every = span
    schedule = polynomial(float(sparsity), begin=begin, end=begin + length, every=every)
    due, kept = np.asarray(schedule.due(STEPS)), np.asarray(schedule.kept(STEPS, 1_000))
    assert due[begin + length - 1]
    assert not due[begin + length :].any()
    assert kept[begin + length - 1] == oracles.kept(sparsity, 1_000)


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_final_count_is_exact_after_any_number_of_updates(power):
    # Compiled, a division by a constant may become a product with its rounded inverse.
    for length in [*range(1, 50), 97, 1000, 4999, 10**6 + 3]:
        schedule = polynomial(0.9, begin=7, end=7 + length, power=power)
        kept = jax.jit(lambda t, schedule=schedule: schedule.kept(t, 10_007))
        assert int(kept(6 + length)) == oracles.kept("0.9", 10_007)


@hypothesis.given(
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 30), st.integers(1, 30), st.floats(0.5, 4)
)
def test_polynomial_follows_its_formula(final, initial, begin, length, power):
    schedule = polynomial(final, begin=begin, end=begin + length, initial=initial, power=power)
    size = 1000
    kept = np.asarray(schedule.kept(STEPS, size))
    done = np.clip((np.asarray(STEPS, np.float64) + 1 - begin) / length, 0, 1)
    dropped = (final + (initial - final) * (1 - done) ** power) * size
    # On the way the sparsity is a float32 number: 1,000 times a few of its roundings of 2^-24
    # is 2e-4 of a weight, which decides only next to a half.
    ends = [size - np.floor(dropped + 0.5 + slack) for slack in (2e-4, -2e-4)]
    assert ((ends[0] <= kept) & (kept <= ends[1])).all()


def test_polynomial_is_that_of_the_paper():
    # Zhu and Gupta, 2017, equation 1: s_f + (s_i - s_f) (1 - t / n)^3, after update t.
    schedule = polynomial(0.8, initial=0.2, begin=0, end=4)
    kept = [int(schedule.kept(jnp.int32(t), 64_000)) for t in range(4)]
    assert kept == [64_000 - int(64_000 * s) for s in (0.546875, 0.725, 0.790625, 0.8)]


def test_ends_of_the_schedule():
    one = constant(0.9, begin=2, end=3)
    assert np.flatnonzero(one.due(STEPS)).tolist() == [2]
    rare = polynomial(0.9, begin=2, end=8, every=100)
    assert np.flatnonzero(rare.due(STEPS)).tolist() == [2, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(-0.1), "0 to 1"),
        (lambda: constant(1.1), "0 to 1"),
        (lambda: constant(float("nan")), "0 to 1"),
        (lambda: constant(90), "fraction of zeros"),
        (lambda: polynomial(1.5, begin=0, end=1), "0 to 1"),
        (lambda: polynomial(0.5, initial=-1.0, begin=0, end=1), "0 to 1"),
        (lambda: polynomial(0.5, begin=5, end=5), "0 <= begin < end"),
        (lambda: polynomial(0.5, begin=-1, end=5), "0 <= begin < end"),
        (lambda: constant(0.5, begin=3, end=2), "0 <= begin < end"),
        (lambda: constant(0.5, every=0), "every"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
