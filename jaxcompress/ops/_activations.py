"""Activations as the numbers of a format, on their way into a product."""

import jax
import jax.numpy as jnp

from jaxcompress.arrays._fit import fit
from jaxcompress.arrays._formats import FloatType
from jaxcompress.arrays._granularity import expand
from jaxcompress.arrays._qtype import Activation
from jaxcompress.arrays._rounding import encode, range_scale, scale_of

__all__ = ["BLOCK", "encode_activations", "encode_blocks", "in_blocks"]

BLOCK = 32  # neighbours that share a power of two in the MX formats


def encode_activations(
    x: jax.Array,
    act: Activation,
    act_scale: jax.Array | None,
    act_offset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes of `x[..., m, k]` as whole floats, scales and offsets (or None) of each row.

    `x ~ codes * scale + offset`; both broadcast to `[..., m, 1]`. Numbers that share a scale
    in blocks of a row come with it multiplied in.
    """
    if in_blocks(act):
        numbers, powers = encode_blocks(x, act)
        powers = expand(powers.astype(jnp.float32), x.shape, (-1,), (BLOCK,))
        return numbers * powers, jnp.ones((1,) * x.ndim, jnp.float32), None
    scale, offset = act_scale, act_offset
    if act.static:
        if scale is None or (offset is None and not act.qtype.symmetric):
            raise ValueError(
                "static activations need an act_scale, and an act_offset if they are "
                "asymmetric; the array has none"
            )
        scale = scale.astype(jnp.float32)
        if act.clip_gradient:
            x, scale, offset = _clipped(x, scale, offset, act)
    else:
        axis, reals = -1 if act.per_token else None, x.astype(jnp.float32)
        largest = lambda v: jnp.max(v, axis, keepdims=True, initial=0.0)
        if act.qtype.symmetric:
            scale = scale_of(largest(jnp.abs(reals)), act.qtype.high)
        else:
            scale, offset = range_scale(-largest(-reals), largest(reals), act.qtype)
        scale, offset = jax.lax.stop_gradient((scale, offset))
    reals = x if offset is None else x.astype(jnp.float32) - offset
    return encode(reals, scale, None, act.qtype, (), None), scale, offset


def in_blocks(act: Activation) -> bool:
    """Whether neighbours in a row share a scale, which is not one of the row."""
    return isinstance(act.qtype, FloatType) and act.qtype.scales == "e8m0"


def encode_blocks(x: jax.Array, act: Activation) -> tuple[jax.Array, jax.Array]:
    """The numbers of `x[..., m, k]` as float32, and a power of two for every 32 of a row."""
    axis, group = (-1,), (BLOCK,)
    scale = fit(jax.lax.stop_gradient(x), axis, group, act.qtype).scale
    return encode(x, scale, None, act.qtype, axis, group), scale


def _clipped(
    x: jax.Array, scale: jax.Array, offset: jax.Array | None, act: Activation
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The range of PACT: what lies beyond an end gets its gradient, nothing else does."""
    ends = (act.qtype.low * scale, act.qtype.high * scale)
    low, high = ends if offset is None else (end + offset for end in ends)
    reals = x.astype(jnp.float32)
    reals = jnp.where(reals >= high, high, jnp.where(reals <= low, low, reals))
    return reals, *jax.lax.stop_gradient((scale, offset))
