"""The one place where reals become codes, in training and after it.

`encode` returns codes as whole floats and carries the straight-through gradient;
`QuantizedArray` stores its result as integers, `FakeQuantArray` keeps it as floats.
Both therefore round alike, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp

from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import QType

__all__ = [
    "absmax_scale",
    "encode",
    "encode_through",
    "minmax_scale",
    "range_scale",
    "scale_gradient",
    "scale_of",
]

# An absolute maximum divided by a scale that was computed from it may come out a few
# units in the last place above the largest code; it still counts as inside the range.
_AT_BOUND = 1 + 2.0**-20


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nearest_ste(qtype: QType, x: jax.Array) -> jax.Array:
    """The nearest number of the format; the gradient is that of the identity (Bengio et
    al., 2013, arXiv:1308.3432)."""
    return qtype.nearest(x)


# The rules call what they belong to, whose derivative the next order needs too.
@_nearest_ste.defjvp
def _(qtype, primals, tangents):
    return _nearest_ste(qtype, primals[0]), tangents[0]


@jax.custom_jvp
def _clip_ste(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips; the gradient to `x` is 1 inside and at the bounds, 0 outside.

    `jnp.clip` has gradient 1/2 at a bound, where every absolute maximum sits.
    """
    return jnp.clip(x, low, high)


@_clip_ste.defjvp
def _(primals, tangents):
    x, low, high = primals
    inside = (x <= high * _AT_BOUND) & (x >= low * _AT_BOUND)
    change = jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
    return _clip_ste(x, low, high), change


def scale_of(largest: jax.Array, steps: float) -> jax.Array:
    """`largest / steps`, 1 where that is zero or denormal, NaN where it is not finite.

    `largest` is a magnitude in float32. The reciprocal is multiplied, not divided by,
    because XLA rewrites division by a constant, and codes must not depend on `jit`.
    """
    scale = largest * jnp.float32(1 / steps)
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def absmax_scale(w: jax.Array, axis: Axes, group_size: Axes | None, qtype: QType) -> jax.Array:
    """Float32 scales that put each group's absolute maximum on the largest code."""
    largest = reduce_groups(jnp.abs(w.astype(jnp.float32)), axis, group_size, jnp.max, 0.0)
    return scale_of(largest, qtype.high)


def minmax_scale(
    w: jax.Array, axis: Axes, group_size: Axes | None, qtype: QType
) -> tuple[jax.Array, jax.Array]:
    """Scales and int8 zero points that fit each group's range, zero always included."""
    w = w.astype(jnp.float32)
    top = jnp.maximum(reduce_groups(w, axis, group_size, jnp.max, -jnp.inf), 0.0)
    bottom = jnp.minimum(reduce_groups(w, axis, group_size, jnp.min, jnp.inf), 0.0)
    # Halved before subtracting: the width of a finite range may overflow.
    scale = scale_of(top / 2 - bottom / 2, (qtype.high - qtype.low) / 2)
    zero = jnp.clip(jnp.round(qtype.low - bottom / scale), qtype.low, qtype.high)
    return scale, jnp.where(jnp.isfinite(zero), zero, 0.0).astype(jnp.int8)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """`x`, whose gradient is multiplied by `factor`."""
    return x


@scale_gradient.defjvp
def _(factor, primals, tangents):
    return scale_gradient(primals[0], factor), tangents[0] * factor


@jax.custom_jvp
def _through(numbers: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """`numbers`, with the gradient of `w / scale`: none where the scale is not finite."""
    return numbers


@_through.defjvp
def _(primals, tangents):
    scale = primals[2]
    change = tangents[1].astype(jnp.float32) / jnp.where(jnp.isfinite(scale), scale, jnp.inf)
    return _through(*primals), change


def encode_through(
    w: jax.Array,
    divisor: jax.Array,
    scale: jax.Array,
    qtype: QType,
    axis: Axes,
    group_size: Axes | None,
) -> jax.Array:
    """Numbers of `w / divisor` whose gradient, times `scale`, is 1 for every weight.

    For scales that no weight exceeds, where the gradient of clipping is 1 anyway and takes
    a pass over the weights to find out; and for formats of two or three numbers, where most
    weights lie beyond the ends, and would never move again (Courbariaux et al., 2015; Li et
    al., 2016).
    """
    frozen = jax.lax.stop_gradient((w, divisor))
    numbers = encode(*frozen, None, qtype, axis, group_size)
    scale = jax.lax.stop_gradient(expand(scale, w.shape, axis, group_size))
    return _through(numbers, w, scale)


def range_scale(low: jax.Array, high: jax.Array, qtype: QType) -> tuple[jax.Array, jax.Array]:
    """Scale and offset of activations in `low <= 0 <= high`: `x ~ codes * scale + offset`.

    The offset is a multiple of the scale, so that zero stays exactly zero.
    """
    scale = scale_of(high / 2 - low / 2, (qtype.high - qtype.low) / 2)
    zero = jnp.clip(jnp.round(qtype.low - low / scale), qtype.low, qtype.high)
    return scale, -zero * scale


def encode(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    qtype: QType,
    axis: Axes,
    group_size: Axes | None,
) -> jax.Array:
    """Numbers of the format as float32: `nearest(clip(w / scale + zero_point))`.

    They are whole for integers, where they are the codes too.

    Straight through: the gradient to `w / scale` is 1 inside the range and at its
    bounds, 0 outside; the gradient that reaches `scale` is then that of LSQ (Esser et
    al., 2020). A scale of NaN gives code 0, so that the channel decodes to NaN.
    """
    codes = w.astype(jnp.float32) / expand(scale.astype(jnp.float32), w.shape, axis, group_size)
    if zero_point is not None:
        zero = expand(zero_point.astype(jnp.float32), w.shape, axis, group_size)
        codes = codes + zero
    codes = _nearest_ste(qtype, _clip_ste(codes, float(qtype.low), float(qtype.high)))
    return jnp.where(jnp.isnan(codes), 0.0, codes)
