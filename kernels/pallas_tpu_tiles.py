"""What the kernels in Pallas for TPUs share: sizes of blocks, tiles in them, zeros around them."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

__all__ = ["pad", "spread", "tile", "varying", "weight_blocks", "whole_tiles"]

_PACKED = 64  # codes in a block of bit planes


def whole_tiles(size: int, tile: int) -> int:
    """A dimension smaller than a tile as it is, a larger one up to a multiple of it."""
    return size if size <= tile else -(-size // tile) * tile


def weight_blocks(
    largest: tuple[int, int, int],
    tiles: tuple[int, int],
    m: int,
    n: int,
    k: int,
    group_size: int | None,
) -> tuple[int, int, int]:
    """The blocks of a product with a packed weight, whose `k` is cut between whole groups.

    `largest` are blocks of `(m, n, k)`, `tiles` what the program spells out of `m` and `n`.
    """
    block_m, block_n, block_k = largest
    unit = math.lcm(_PACKED, min(group_size or 1, block_k))
    if k <= block_k:
        block_k = -(-k // unit) * unit
    else:  # one that divides `k` needs no padding
        fits = [c for c in range(block_k, 255, -256) if k % c == 0 and c % unit == 0]
        block_k = fits[0] if fits else block_k
    rows, columns = tiles
    return min(whole_tiles(m, rows), block_m), min(whole_tiles(n, columns), block_n), block_k


def tile(i, size, whole=None):
    """The tile number `i`, of a size that the compiler may rely on; all of it if that is one."""
    if size == whole:
        return slice(None)
    return pl.ds(pl.multiple_of(i * size, size), size)


def spread(rows, count):
    """Each of the rows as often as it takes to make `count`; a single one will broadcast."""
    if rows.shape[0] == 1:
        return rows
    each = (rows.shape[0], count // rows.shape[0], rows.shape[1])
    return jnp.broadcast_to(rows[:, None, :], each).reshape(count, rows.shape[1])


def pad(a, axis, size):
    """Zeros behind `a` along `axis`, up to `size`."""
    if a.shape[axis] == size:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths)


def varying(*operands):
    """Within `shard_map`, the axes of the mesh over which any operand varies."""
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in operands))
    return jax.sharding.ManualAxisType(varying=axes)
