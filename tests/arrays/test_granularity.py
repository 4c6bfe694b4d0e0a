"""Which weights share a scale: per tensor, channel, group, block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from jaxcompress.arrays import _granularity as granularity

reduce_groups = jax.jit(granularity.reduce_groups, static_argnums=(1, 2, 3, 4))
expand = jax.jit(granularity.expand, static_argnums=(1, 2, 3))


@st.composite
def layouts(draw):
    """A shape of rank 0 to 4 with sizes 0, 1 and odd, some shared axes, maybe groups."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5, 7]), max_size=4)))
    axes = draw(st.lists(st.sampled_from(range(-len(shape), 0)), unique=True)) if shape else []
    sizes = None
    if axes and draw(st.booleans()):
        sizes = tuple(draw(st.sampled_from([1, 2, 3, 8])) for _ in axes)
    values = np.random.default_rng(draw(st.integers(0, 2**16))).normal(size=shape)
    return values.astype(np.float32), tuple(axes), sizes


@given(layouts())
def test_reduce_groups_is_a_loop_over_groups(layout):
    x, axis, sizes = layout
    got = np.asarray(reduce_groups(x, axis, sizes, jnp.max, -jnp.inf))
    assert got.shape == granularity.scale_shape(x.shape, axis, sizes)
    want = oracles.group_extremes(x, axis, sizes)[1]
    np.testing.assert_array_equal(got, want)  # -inf where a group is empty: the fill


@given(layouts())
def test_expand_repeats_each_scale_over_its_group(layout):
    x, axis, sizes = layout
    shape = granularity.scale_shape(x.shape, axis, sizes)
    scale = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = np.broadcast_to(expand(scale, x.shape, axis, sizes), x.shape)
    np.testing.assert_array_equal(got, oracles.spread(scale, x.shape, axis, sizes))


@pytest.mark.parametrize(
    ("axis", "group_size", "expected"),
    [
        (-2, None, ((-2,), None)),
        (1, None, ((-2,), None)),  # positive axes become negative ones
        ((0, 2), None, ((-3, -1), None)),
        ((), None, ((), None)),
        (-2, 32, ((-2,), (32,))),
        ((-2, -1), 32, ((-2, -1), (1, 32))),  # a run along the last; a scale per other index
        ((-2, -1), (2, 3), ((-2, -1), (2, 3))),  # two-dimensional blocks
    ],
)
def test_normalise(axis, group_size, expected):
    assert granularity.normalise((4, 5, 6), axis, group_size) == expected


@pytest.mark.parametrize(
    ("axis", "group_size", "message"),
    [
        (3, None, r"axis 3 is out of range for the shape \(4, 5, 6\) of 'a/kernel'"),
        (-4, None, r"axis -4 is out of range"),
        ((0, -3), None, r"names an axis twice"),
        ((), 4, r"group_size 4 needs an axis to run along of 'a/kernel'"),
        (-1, 0, r"group_size must be one positive number, or one for each of axis \(-1,\); got 0"),
        (-1, (2, 3), r"one for each of axis"),
        ((-2, -1), (2, 0), r"got \(2, 0\)"),
    ],
)
def test_normalise_refuses(axis, group_size, message):
    with pytest.raises(ValueError, match=message):
        granularity.normalise((4, 5, 6), axis, group_size, "a/kernel")


def test_a_scalar_has_no_axis_to_share():
    assert granularity.normalise((), (), None) == ((), None)
    with pytest.raises(ValueError, match=r"axis -1 is out of range for the shape \(\)"):
        granularity.normalise((), -1, None)


def test_grouped_names_only_runs_of_more_than_one_weight():
    assert granularity.grouped((-2, -1), (1, 8)) == {-1: 8}
    assert granularity.grouped((-2,), None) == {}
