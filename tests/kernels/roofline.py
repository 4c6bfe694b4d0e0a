"""How many bytes a kernel moves and how many products it makes, from its grid and blocks.

A bound, not a time: it says what a chip's memory and matrix unit allow at best. TPU: every
block that the pipeline fetches is counted, one that stays where it is is not fetched
again. GPU: every operand once, as long as both fit the second-level cache together; that
no program loads more than its share of the weight is a test in check_triton.py.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax._src.state.discharge import discharge_state

# Published: int8 and bfloat16 products (two operations each) in 10^12 a second, and bytes
# from memory in 10^9 a second; the second-level cache of GPUs in 10^6 bytes. For TPU7x no
# int8 rate is published: its bfloat16 rate stands for both.
PEAKS = {
    "v5e": (394, 197, 819, None),
    "v5p": (918, 459, 2765, None),
    "v6e": (1836, 918, 1640, None),
    "tpu7x": (2307, 2307, 7380, None),
    "sm_80": (624, 312, 2039, 40),
    "sm_90": (1979, 989, 3350, 50),
}


class Roofline(NamedTuple):
    """Bytes moved, the least there could be, operations, and operations a byte at the ridge."""

    moved: int
    least: int
    operations: int
    ridge: float

    @property
    def intensity(self) -> float:
        return self.operations / self.moved


def of_pallas(fn, args, operations, chip, kind, known=()):
    """The roofline of the one `pallas_call` in `fn(*args)`.

    `known` are the numbers that its blocks are chosen by, if there are such.
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    [mapping] = _grid_mappings(jaxpr.jaxpr)
    moved = least = 0
    for block in mapping.block_mappings:
        aval = block.array_aval
        itemsize = aval.dtype.itemsize
        least += math.prod(aval.shape) * itemsize
        last = None
        for index in _indices(block.index_map_jaxpr, mapping.grid, len(block.block_shape), known):
            if index != last:
                moved += itemsize * _elements(block.block_shape, index, aval.shape)
            last = index
    return Roofline(moved, least, operations, _ridge(chip, kind))


def _indices(index_map, grid, dimensions, known):
    """Which block of an operand each point of the grid has."""
    pure = discharge_state(index_map)  # the numbers that it reads are arguments

    def place(*point):
        return jax.core.eval_jaxpr(pure.jaxpr, pure.consts, *point, *known)[:dimensions]

    points = np.array(list(_points(grid)), np.int32)
    found = jax.jit(jax.vmap(place))(*points.T)
    whole = [np.broadcast_to(i, len(points)).tolist() for i in found]
    return zip(*whole)


def of_triton(operands, out, operations, chip, kind):
    """The roofline of a kernel whose tiles meet in the second-level cache."""
    size = lambda *arrays: sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    if size(*operands) > PEAKS[chip][3] * 10**6:
        raise ValueError(f"{size(*operands)} bytes do not fit the cache of {chip}")
    least = size(*operands, out)
    return Roofline(least, least, operations, _ridge(chip, kind))


def _ridge(chip, kind):
    int8, bfloat16, bandwidth, _ = PEAKS[chip]
    return 1e3 * (int8 if kind == "int8" else bfloat16) / bandwidth


def _points(grid):
    """The grid in the order of the pipeline: the last dimension runs fastest."""
    for linear in range(math.prod(grid)):
        point = []
        for size in reversed(grid):
            linear, here = divmod(linear, size)
            point.append(here)
        yield tuple(reversed(point))


def _elements(block_shape, index, shape):
    """Elements of a block that lie within the array."""
    count = 1
    for size, at, whole in zip(block_shape, index, shape):
        size = getattr(size, "block_size", size)
        if isinstance(size, int):
            count *= min(size, whole - at * size)
    return count


def _grid_mappings(jaxpr):
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(eqn.params["grid_mapping"])
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and eqn.primitive.name != "pallas_call":
                found += _grid_mappings(inner)
    return found
