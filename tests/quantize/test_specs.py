"""Specs are plain frozen values: what they say, and what they refuse."""

import dataclasses

import pytest

import jaxcompress as jc
from jaxcompress.arrays import Activation, IntType

Q = jc.quantize
WEIGHTS = {Q.int8: 8, Q.int4: 4, Q.int3: 3, Q.int2: 2, Q.w8a16: 8, Q.w4a16: 4}
BOTH = {Q.w8a8: (8, 8), Q.w4a8: (4, 8), Q.w4a4: (4, 4)}
NAMES = lambda f: f.__name__


@pytest.mark.parametrize(("make", "bits"), WEIGHTS.items(), ids=map(NAMES, WEIGHTS))
def test_weights_only(make, bits):
    assert make() == Q.Spec(qtype=IntType(bits))
    assert make(axis=-1, group_size=32) == Q.Spec(qtype=IntType(bits), axis=-1, group_size=32)
    assert make().act is None


@pytest.mark.parametrize("make", [Q.int8, Q.int4, Q.int3, Q.int2], ids=NAMES)
def test_asymmetric_weights(make):
    assert make(symmetric=False).qtype == IntType(make().qtype.bits, symmetric=False)


@pytest.mark.parametrize(("make", "bits"), BOTH.items(), ids=map(NAMES, BOTH))
def test_weights_and_activations(make, bits):
    weight, act = map(IntType, bits)
    dynamic = Activation(act, per_token=True, static=False)
    assert make() == Q.Spec(qtype=weight, act=dynamic)
    assert make(per_token=False).act == Activation(act, per_token=False)
    assert make(static=True).act == Activation(act, per_token=False, static=True)
    assert make(axis=(-2, -1), group_size=8) == Q.Spec(
        qtype=weight, axis=(-2, -1), group_size=8, act=dynamic
    )


@pytest.mark.parametrize("make", [*WEIGHTS, *BOTH], ids=NAMES)
def test_keyword_only_frozen_and_hashable(make):
    with pytest.raises(TypeError, match="positional"):
        make(-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().axis = -1
    assert len({make(), make(), make(axis=-1)}) == 2
    assert hash(make(axis=[-2, -1])) == hash(make(axis=(-2, -1)))


def test_widths_that_there_are_not():
    with pytest.raises(ValueError, match="2 to 8 bits; got 16"):
        Q.Spec(qtype=IntType(16))
