"""`pack` by pattern: which container, and a mask that does not fit is refused with its place."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import random
from jaxcompress.arrays import BitmapSparseArray, BlockSparseArray, NMSparseArray

HALF = jc.prune.nm(2, 4, axis=-2)


@pytest.mark.parametrize(
    ("pattern", "container"),
    [
        (None, BitmapSparseArray),
        (jc.prune.unstructured(), BitmapSparseArray),
        (jc.prune.channel(), BitmapSparseArray),
        (HALF, NMSparseArray),
        (jc.prune.block(4, 4), BlockSparseArray),
    ],
)
def test_the_pattern_picks_the_container(pattern, container):
    params = {"w": jnp.asarray(random(16, 8)), "b": jnp.ones(8)}
    masks = jc.prune.mask(
        params, HALF if pattern is None else pattern, 1.0 if pattern is HALF else 0.5
    )
    packed = jc.prune.pack(params, masks, pattern=pattern)
    assert type(packed["w"]) is container
    np.testing.assert_array_equal(packed["w"].materialise(), np.where(masks["w"], params["w"], 0))
    assert packed["b"] is params["b"]


def test_a_group_that_keeps_too_many_is_named():
    mask = np.zeros((8, 3), bool)
    mask[4:7, 2] = True
    with pytest.raises(
        ValueError,
        match=r"'net/w' does not fit 2:4 along axis -2: it keeps 3 of "
        r"the 4 from index 4 on, at \(2,\) of the other axes",
    ):
        jc.prune.pack(
            {"net": {"w": jnp.ones((8, 3))}}, {"net": {"w": jnp.asarray(mask)}}, pattern=HALF
        )


def test_a_group_that_keeps_fewer_is_filled_with_zeros():
    mask = np.zeros((8, 3), bool)
    mask[5, 1] = True
    w = jnp.asarray(random(8, 3))
    packed = jc.prune.pack({"w": w}, {"w": jnp.asarray(mask)}, pattern=HALF)["w"]
    np.testing.assert_array_equal(packed.materialise(), np.where(mask, w, 0))


def test_an_axis_that_m_does_not_divide():
    with pytest.raises(ValueError, match="'w' has 6 weights along axis -2; 4 does not divide it"):
        jc.prune.pack({"w": jnp.ones((6, 4))}, {"w": jnp.ones((6, 4), bool)}, pattern=HALF)


def test_a_block_that_is_kept_in_part_is_named():
    mask = np.ones((2, 8, 10), bool)
    mask[1, 5, 9] = False
    match = (
        r"'w' does not fit blocks of 4x4: it keeps 7 of 8 weights of the block \(1, 2\) at \(1,\)"
    )
    with pytest.raises(ValueError, match=match):
        jc.prune.pack(
            {"w": jnp.ones((2, 8, 10))}, {"w": jnp.asarray(mask)}, pattern=jc.prune.block(4, 4)
        )


def test_a_fake_quant_array_is_converted():
    params = jc.quantize.prepare_qat({"w": jnp.asarray(random(16, 8))}, {"w": jc.quantize.int4()})
    masks = jc.prune.mask({"w": jnp.abs(params["w"].weight)}, HALF, 1.0)
    packed = jc.prune.pack(params, masks, pattern=HALF)["w"]
    assert isinstance(packed, NMSparseArray)
    assert packed.qtype.bits == 4
    want = jc.quantize.convert(params)["w"].materialise()
    np.testing.assert_array_equal(packed.materialise(), np.where(masks["w"], want, 0))
