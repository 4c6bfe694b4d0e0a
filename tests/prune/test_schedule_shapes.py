"""The other schedules: cosine, geometric, periodic, one shot, and a share of them."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import oracles_pruning as oracles
from jaxcompress.prune import constant, cosine, geometric, one_shot, periodic

STEPS = jnp.arange(60)
SIZE = 1000


def done(begin, length):
    return np.clip((np.asarray(STEPS, np.float64) + 1 - begin) / length, 0, 1)


def assert_dropped(kept, dropped):
    """`kept` follows from a sparsity that is a float32: 2e-4 of 1,000 weights at a half."""
    low, high = (SIZE - np.floor(dropped * SIZE + 0.5 + slack) for slack in (2e-4, -2e-4))
    assert ((low <= kept) & (kept <= high)).all()


@hypothesis.given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 30), st.integers(1, 30))
def test_cosine_follows_its_formula(final, initial, begin, length):
    schedule = cosine(final, begin=begin, end=begin + length, initial=initial)
    half = (1 + np.cos(np.pi * done(begin, length))) / 2
    assert_dropped(schedule.kept(STEPS, SIZE), final + (initial - final) * half)


@hypothesis.given(st.floats(0, 1), st.integers(0, 30), st.integers(1, 30))
def test_geometric_prunes_the_same_share_of_what_is_left(final, begin, length):
    schedule = geometric(final, begin=begin, end=begin + length, every=1)
    left = np.asarray([1 - final], np.float64) ** done(begin, length)
    assert_dropped(schedule.kept(STEPS, SIZE), 1 - left)


@hypothesis.given(st.integers(0, 9), st.integers(1, 50), st.integers(1, 12))
def test_periodic_is_sparse_and_dense_in_turns(begin, length, every):
    end = begin + length
    schedule = periodic(0.9, begin=begin, end=end, every=every)
    kept, due = np.asarray(schedule.kept(STEPS, SIZE)), np.asarray(schedule.due(STEPS))
    sparse = True
    for count in range(begin, end - 1):
        if (count - begin) % every == 0:
            assert due[count]
            assert kept[count] == (100 if sparse else 1000)
            sparse = not sparse
        else:
            assert not due[count]
    assert due[end - 1]
    assert (kept[end - 1 :] == 100).all()


def test_one_shot_prunes_once():
    schedule = one_shot(0.9, at=7)
    assert np.flatnonzero(schedule.due(STEPS)).tolist() == [7]
    assert schedule.kept(STEPS, 10).tolist()[7:] == [1] * 53


@hypothesis.given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10**6))
def test_a_share_multiplies_the_sparsity(sparsity, share, size):
    got = int(constant(sparsity / 1000).kept(jnp.int32(0), size, share / 1000))
    exact = oracles.kept(f"{sparsity * share}/1000000", size)
    # Rounded to float64 on the way, which decides only where the exact number ends in 1/2.
    if sparsity * share * size % 10**6 == 5 * 10**5:
        assert abs(got - exact) <= 1
    else:
        assert got == exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0.5, begin=0, end=1, initial=2.0), "0 to 1"),
        (lambda: cosine(1.5, begin=0, end=1), "0 to 1"),
        (lambda: geometric(0.5, begin=3, end=3, every=1), "0 <= begin < end"),
        (lambda: periodic(0.5, begin=0, end=5, every=0), "every"),
        (lambda: one_shot(90), "fraction of zeros"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
