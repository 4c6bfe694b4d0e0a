"""Histograms of floats whose bins are fixed, so that two of them add up exactly.

The bin of a number is its sign and the top bits of its magnitude as a float32: the
exponent and five bits of the fraction. A bin is therefore at most 1/32 of its numbers
wide, whatever their scale, no range has to be known before the data, and batches, uses
of a weight and devices are joined by a sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["BINS", "edges", "histogram", "noise", "quantile", "top"]

_FRACTION = 5
_OCTAVES = 64  # 2^-32 to 2^32; what is smaller counts as the first bin, zero included
BINS = _OCTAVES << _FRACTION
_SHIFT = 23 - _FRACTION
_FIRST = (127 - _OCTAVES // 2) << _FRACTION


def histogram(rows: jax.Array) -> jax.Array:
    """How many of `rows[..., m, k]` fall into each bin: float32 `[..., 2, BINS]`.

    `[..., 0, :]` are the negative numbers, by magnitude, `[..., 1, :]` the others. What
    is not below 2^32, not finite included, is in the last bin.
    """
    lead = rows.shape[:-2]
    x = rows.astype(jnp.float32).reshape(*lead, -1)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> _SHIFT
    index = jnp.clip(bits - _FIRST, 0, BINS - 1) + jnp.where(x < 0, 0, BINS)
    # Counted in integers: adding ones to a float stops at 2^24.
    count = lambda index: jnp.zeros(2 * BINS, jnp.int32).at[index].add(1)
    for _ in lead:
        count = jax.vmap(count)
    return count(index).astype(jnp.float32).reshape(*lead, 2, BINS)


@functools.cache
def edges() -> np.ndarray:
    """The bins' borders, float32 `[BINS + 1]`; the first is 0."""
    borders = ((np.arange(BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT).view(np.float32)
    return np.concatenate([np.zeros(1, np.float32), borders[1:]])


def top(counts: jax.Array) -> jax.Array:
    """The upper border of the largest bin that holds anything, `[..., BINS] -> [...]`."""
    return jnp.max(jnp.where(counts > 0, edges()[1:], 0.0), -1)


def quantile(counts: jax.Array, above: jax.Array) -> jax.Array:
    """The magnitude that `above` of the numbers exceed; linear within a bin, 0 if fewer do."""
    # From the top down, because the tail is where a sum from below has no digits left.
    over = jnp.cumsum(counts[..., ::-1], -1)[..., ::-1]  # in this bin and those above it
    above = jnp.asarray(above, jnp.float32)[..., None]
    found = jnp.sum(over > above, -1, keepdims=True) - 1  # the last bin where more do
    bin_ = jnp.maximum(found, 0)
    take = lambda a: jnp.take_along_axis(a, bin_, -1)
    low, high = (jnp.asarray(e)[bin_] for e in (edges()[:-1], edges()[1:]))
    part = jnp.clip((take(over) - above) / jnp.maximum(take(counts), 1.0), 0.0, 1.0)
    return jnp.where(found < 0, 0.0, low + part * (high - low))[..., 0]


def noise(counts: jax.Array, low: jax.Array, high: jax.Array, steps: int) -> jax.Array:
    """The sum of squared errors of rounding to `steps + 1` even steps from `low` to `high`.

    `counts[2, BINS]`, taken as even within each bin; `low <= 0 <= high` are scalars, zero is
    one of the steps, and numbers beyond the ends are clipped. Exact for such a density:
    the squared distance to the nearest whole number has an integral in closed form.
    """
    scale = (high - low) / steps
    # In units of a step; zero is a code, so the ends are moved to whole numbers.
    low = jnp.round(low / scale)
    high = low + steps
    magnitudes = edges() / scale
    start = jnp.stack([-magnitudes[1:], magnitudes[:-1]])
    stop = jnp.stack([-magnitudes[:-1], magnitudes[1:]])
    inside = lambda u: jnp.clip(u, low, high)
    width, middle = stop - start, (start + stop) / 2
    within = _integral(inside(stop)) - _integral(inside(start))
    over = jnp.maximum(stop - high, 0.0) ** 3 - jnp.maximum(start - high, 0.0) ** 3
    under = jnp.maximum(low - start, 0.0) ** 3 - jnp.maximum(low - stop, 0.0) ** 3
    mean = (within + (over + under) / 3) / jnp.maximum(width, 1e-30)
    # The difference of two integrals loses its digits in a narrow bin and leaves float32
    # far outside; there the middle stands for all of the bin.
    point = middle - jnp.round(inside(middle))
    narrow = (width < 2.0**-6) | (jnp.abs(middle) > 4 * steps)
    error = jnp.where(narrow, point**2, mean)
    return jnp.sum(jnp.where(counts > 0, counts * error, 0.0)) * scale**2


def _integral(u: jax.Array) -> jax.Array:
    """Of the squared distance to the nearest whole number, from 0 to `u`."""
    whole = jnp.round(u)
    return whole / 12 + (u - whole) ** 3 / 3
