"""Scales for rounding: from the largest weight, or from a search for a smaller range."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import IntType, QType
from jaxcompress.arrays._rounding import absmax_scale, encode, minmax_scale

__all__ = ["full_scales", "integers_only", "searched_scales"]

# Parts of the full range that are tried. Two bits of Gaussian weights want about 0.4.
_SHRINK = tuple(1 - 0.02 * i for i in range(41))


def integers_only(method: str, path: str, qtype: QType) -> None:
    """Raises unless the codes are the integers themselves."""
    if not isinstance(qtype, IntType):
        raise TypeError(f"{method} rounds to integers; the spec of {path!r} is {qtype.name}")


def full_scales(
    w: jax.Array, axis: Axes, group_size: Axes | None, qtype: IntType
) -> tuple[jax.Array, jax.Array | None]:
    """Scales, and zero points or None, that clip nothing."""
    if qtype.symmetric:
        return absmax_scale(w, axis, group_size, qtype), None
    return minmax_scale(w, axis, group_size, qtype)


@functools.partial(jax.jit, static_argnames=("axis", "group_size", "qtype"))
def searched_scales(
    w: jax.Array,
    importance: Any,
    *,
    axis: Axes,
    group_size: Axes | None,
    qtype: IntType,
) -> tuple[jax.Array, jax.Array | None]:
    """The scales, among parts of the full ones, of least `sum importance (w - w_hat)^2`.

    `importance` broadcasts against `w`. Each group chooses for itself.
    """
    scale, zero = full_scales(w, axis, group_size, qtype)
    spread = lambda part: expand(part.astype(jnp.float32), w.shape, axis, group_size)
    offset = 0.0 if zero is None else spread(zero)

    def attempt(best: Any, shrink: jax.Array) -> Any:
        tried = scale * shrink
        codes = encode(w, tried, zero, qtype, axis, group_size)
        back = (codes - offset) * spread(tried)
        error = importance * (w.astype(jnp.float32) - back) ** 2
        error = reduce_groups(error, axis, group_size, jnp.sum, 0.0)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, tried, best[1])), None

    start = (jnp.full(scale.shape, jnp.inf), scale)
    (_, found), _ = jax.lax.scan(attempt, start, jnp.asarray(_SHRINK, jnp.float32))
    return found, zero
