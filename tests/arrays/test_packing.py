"""Bit planes: the stored bytes are those of the format, for every width, size and axis."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from jaxcompress.arrays import _packing

pack = jax.jit(_packing.pack, static_argnums=(1, 2))
unpack = jax.jit(_packing.unpack, static_argnums=(1, 2, 3))

WIDTHS = range(2, 8)
# Around the block of 64, where padding begins and ends; one and none.
SIZES = (0, 1, 2, 63, 64, 65, 128, 130)


@st.composite
def problems(draw):
    bits = draw(st.sampled_from(WIDTHS))
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(-rank, rank - 1))
    shape = draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
    shape[axis] = draw(st.sampled_from(SIZES))
    seed = draw(st.integers(0, 2**16))
    low = -(2 ** (bits - 1))
    return bits, axis, np.random.default_rng(seed).integers(low, -low, shape).astype(np.int8)


@given(problems())
def test_bytes_are_those_of_the_format(problem):
    bits, axis, codes = problem
    packed = np.asarray(pack(codes, bits, axis))
    np.testing.assert_array_equal(packed, oracles.pack(codes, bits, axis))
    assert packed.dtype == np.uint8
    assert packed.shape[axis] == _packing.packed_size(codes.shape[axis], bits)
    back = unpack(packed, bits, codes.shape[axis], axis)
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == np.int8


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_a_width_survives_at_every_place_of_a_block(bits):
    everything = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    # Each code visits each of the 64 places, and two more in the padded block.
    codes = np.stack([np.resize(np.roll(everything, k), 66) for k in range(len(everything))])
    codes = codes.astype(np.int8)
    packed = pack(codes, bits, 1)
    np.testing.assert_array_equal(packed, oracles.pack(codes, bits, 1))
    np.testing.assert_array_equal(unpack(packed, bits, 66, 1), codes)


def test_a_byte_of_four_bit_codes_written_out_by_hand():
    codes = np.zeros(64, np.int8)
    codes[[0, 32]] = 3, -2  # byte j holds codes j and j + 32, the first in the low half
    assert int(pack(codes, 4, 0)[0]) == 0b1110_0011
    codes = np.zeros(64, np.int8)
    codes[[1, 17, 33, 49]] = 1, -1, -2, 0  # two bits: j, j + 16, j + 32, j + 48
    assert int(pack(codes, 2, 0)[1]) == 0b00_10_11_01


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = np.zeros(64, np.int8)
    codes[5] = -3  # 0b101: low two bits in byte 5 of the first plane, the third in the second
    packed = np.asarray(pack(codes, 3, 0))
    assert packed.size == 24
    assert {i: int(b) for i, b in enumerate(packed) if b} == {5: 0b01, 16 + 5: 0b1}


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_multiple_of_64_can_be_cut_for_sharding(bits):
    codes = np.random.default_rng(0).integers(-2, 2, (192, 3)).astype(np.int8)
    whole, cut = np.asarray(pack(codes, bits, 0)), _packing.packed_size(64, bits)
    np.testing.assert_array_equal(whole[:cut], pack(codes[:64], bits, 0))
    np.testing.assert_array_equal(whole[cut:], pack(codes[64:], bits, 0))


def test_bits_above_the_width_do_not_leak_into_neighbours():
    codes = np.full(64, -1, np.int8)  # all eight bits are set
    codes[1] = 0
    np.testing.assert_array_equal(unpack(pack(codes, 5, 0), 5, 64, 0), codes)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_axis_is_moved(axis):
    """A transposition costs several times the unpacking itself."""
    codes = np.zeros((64, 64, 64), np.int8)
    for fn in (
        functools.partial(_packing.pack, bits=3, axis=axis),
        lambda c: _packing.unpack(_packing.pack(c, 3, axis), 3, 64, axis),
    ):
        assert "transpose" not in str(jax.make_jaxpr(fn)(codes))
