"""Reshape against numpy on the decoded array; None only where no common scales exist."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from checks import assert_valid, made
from jaxcompress.arrays import _reshape
from jaxcompress.arrays._reshape import blocks_of

reshape = jax.jit(_reshape.reshape, static_argnums=1)


def check(q, shape):
    view = reshape(q, tuple(shape))
    if view is None:
        return False
    assert_valid(view)
    assert view.shape == tuple(shape)
    np.testing.assert_array_equal(oracles.dense(view), oracles.dense(q).reshape(shape))
    return True


MUST_STAY = [
    # shape, axis, group sizes, new shape
    ((8, 6), (-2,), None, (8, 2, 3)),  # heads: the output axis splits
    ((8, 2, 3), (-3,), None, (8, 6)),  # and merges
    ((2, 3, 8), (-3, -2), None, (6, 8)),  # attention's output: two contracted axes merge
    ((6, 8), (-2,), None, (2, 3, 8)),
    ((5, 8, 6), (-2,), None, (1, 5, 8, 6)),
    ((5, 1, 6), (-1,), None, (5, 6)),
    ((128, 6), (-2,), (64,), (2, 64, 6)),  # a group is never cut
    ((2, 64, 6), (-2,), (32,), (128, 6)),
    ((2, 64, 6), (-3, -2), (1, 32), (128, 6)),
    ((2, 3, 8, 6), (-2,), None, (6, 8, 6)),  # layers and experts merge
    ((3, 5), (-2, -1), None, (15,)),  # per tensor
    ((4, 6), (), None, (24,)),  # a scale for each weight
]


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (3, False)])
@pytest.mark.parametrize(("shape", "axis", "sizes", "new"), MUST_STAY)
def test_it_stays_compressed(shape, axis, sizes, new, bits, symmetric):
    assert check(made(shape, axis, sizes, bits, symmetric), new)


@pytest.mark.parametrize(
    ("shape", "axis", "sizes", "new"),
    [
        ((8, 6), (-2,), None, (48,)),  # a shared axis and one that is not
        ((12, 6), (-2,), (4,), (2, 6, 6)),  # groups of 4 in runs of 6
        ((2, 6, 5), (-3, -2), (1, 4), (12, 5)),  # six are one and a half groups
        ((0, 4), (-1,), None, (4, 0)),  # nothing to keep
    ],
)
def test_it_is_decoded_where_there_are_no_common_scales(shape, axis, sizes, new):
    assert reshape(made(shape, axis, sizes), new) is None


def test_whole_blocks_stay_packed():
    q = made((128, 3), (-2,), None, bits=4)
    view = reshape(q, (2, 64, 3))
    assert view.packed == 64
    assert reshape(view, (128, 3)).packed == 128
    assert reshape(q, (4, 32, 3)).packed is None


@st.composite
def reshapes(draw):
    """Factors, grouped into an old shape and a new one."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 65]), max_size=4))

    def group():
        shape, i = [], 0
        while i < len(factors):
            take = draw(st.integers(0, 2))
            shape.append(math.prod(factors[i : i + take]))
            i += take
        return tuple(shape)

    old, new = group(), group()
    axes = draw(st.lists(st.sampled_from(range(-len(old), 0)), unique=True)) if old else []
    sizes = None
    if axes and draw(st.booleans()):
        sizes = tuple(draw(st.sampled_from([1, 2, 4, 64])) for _ in axes)
    return made(old, tuple(axes), sizes, *draw(st.sampled_from([(8, True), (4, False)]))), new


@given(reshapes())
def test_any_reshape_keeps_the_numbers_or_gives_up(problem):
    check(*problem)


def test_blocks_are_the_shortest_runs_of_equal_products():
    assert blocks_of((2, 3, 4), (6, 4)) == [((2, 3), (6,)), ((4,), (4,))]
    assert blocks_of((6, 4), (2, 3, 2, 2)) == [((6,), (2, 3)), ((4,), (2, 2))]
    assert blocks_of((4, 6), (6, 4)) == [((4, 6), (6, 4))]
    assert blocks_of((), ()) == []
