"""Scales from weights: what each format takes for the weights that share one."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.arrays._formats import FloatType, OddType, TernaryType, exponent_of, power_of_two
from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import QType
from jaxcompress.arrays._rounding import absmax_scale, minmax_scale, scale_of

__all__ = ["Fit", "covers", "fit", "mean_magnitude"]

_E4M3 = FloatType(4, 3, 448.0)


class Fit(NamedTuple):
    """Scales as they are stored, and what a weight is divided by where that is another."""

    scale: jax.Array
    zero_point: jax.Array | None = None
    outer_scale: jax.Array | None = None
    divisor: jax.Array | None = None

    def full(self) -> jax.Array:
        """The scales in float32, the outer ones multiplied in."""
        scale = self.scale.astype(jnp.float32)
        return scale if self.outer_scale is None else scale * self.outer_scale


def fit(w: jax.Array, axis: Axes, group_size: Axes | None, qtype: QType) -> Fit:
    """The scales (and zero points) of `w` in the format `qtype`."""
    if isinstance(qtype, OddType) and qtype.bits == 1:
        return Fit(mean_magnitude(w, axis, group_size))
    if isinstance(qtype, TernaryType):
        return _ternary(w, axis, group_size, qtype)
    if not qtype.symmetric:
        return Fit(*minmax_scale(w, axis, group_size, qtype))
    if isinstance(qtype, FloatType) and qtype.scales != "float32":
        largest = reduce_groups(jnp.abs(w.astype(jnp.float32)), axis, group_size, jnp.max, 0.0)
        return (
            _shared_exponent(largest, qtype)
            if qtype.scales == "e8m0"
            else _two_level(largest, w, axis, group_size, qtype)
        )
    return Fit(absmax_scale(w, axis, group_size, qtype))


def covers(qtype: QType) -> bool:
    """Whether `fit` puts the absolute maximum on the largest number, so that nothing is clipped.

    Scales of eight bits are rounded, and so may be too small; so may zero points.
    """
    mean = isinstance(qtype, TernaryType) or qtype.bits == 1
    return qtype.symmetric and not mean and getattr(qtype, "scales", "float32") == "float32"


def mean_magnitude(w: jax.Array, axis: Axes, group_size: Axes | None) -> jax.Array:
    """`mean |w|` of each group, in float32; 1 where it is zero."""
    x = jnp.abs(w.astype(jnp.float32))
    count = reduce_groups(jnp.ones_like(x), axis, group_size, jnp.sum, 0.0)
    total = reduce_groups(x, axis, group_size, jnp.sum, 0.0)
    return scale_of(total / jnp.maximum(count, 1.0), 1.0)


def _ternary(w: jax.Array, axis: Axes, group_size: Axes | None, qtype: TernaryType) -> Fit:
    """`|w| > d` is kept, `d = threshold mean |w|`; the scale is the mean of what is kept."""
    size = jnp.abs(w.astype(jnp.float32))
    limit = qtype.threshold * mean_magnitude(w, axis, group_size)
    kept = size > expand(limit, w.shape, axis, group_size)
    count = reduce_groups(kept.astype(jnp.float32), axis, group_size, jnp.sum, 0.0)
    total = reduce_groups(jnp.where(kept, size, 0.0), axis, group_size, jnp.sum, 0.0)
    scale = scale_of(total / jnp.maximum(count, 1.0), 1.0)
    # Rounding w / (2 d) to -1, 0 and 1 has its steps at d.
    return Fit(jnp.where(jnp.isfinite(limit), scale, jnp.nan), divisor=2 * limit)


def _shared_exponent(largest: jax.Array, qtype: FloatType) -> Fit:
    """`2^(floor(log2 max) - floor(log2 high))`, as MX has it: the largest may saturate."""
    high = math.frexp(qtype.largest)[1] - 1
    power = power_of_two(jnp.clip(exponent_of(largest) - high, -126, 127))
    scale = jnp.where(largest > 0, power, 1.0)
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
    return Fit(scale.astype(jnp.float8_e8m0fnu))


def _two_level(
    largest: jax.Array, w: jax.Array, axis: Axes, group_size: Axes | None, qtype: FloatType
) -> Fit:
    """`s = e4m3(max / (high o))` for each group, `o = max / (448 high)` over all of `axis`."""
    whole = reduce_groups(jnp.abs(w.astype(jnp.float32)), axis, None, jnp.max, 0.0)
    outer = scale_of(whole, qtype.largest * _E4M3.largest)
    scale = jnp.minimum(largest / outer * jnp.float32(1 / qtype.largest), _E4M3.largest)
    # No group has scale zero: the smallest number of the format stands for it.
    scale = jnp.maximum(_E4M3.nearest(scale), 2.0**-9)
    return Fit(scale.astype(jnp.float8_e4m3fn), outer_scale=outer)
