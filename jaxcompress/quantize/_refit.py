"""Scales for codes that are known: those with which the outputs change least."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._matrices import Matrices
from jaxcompress.arrays._granularity import Axes, expand, reduce_groups

__all__ = ["refitted"]

_STEPS = 6  # of descent; the first is exact where each output has one scale


@functools.partial(jax.jit, static_argnames=("matrices", "axis", "group_size"))
def refitted(
    w: jax.Array,
    numbers: jax.Array,
    scale: jax.Array,
    hessian: jax.Array,
    *,
    matrices: Matrices,
    axis: Axes,
    group_size: Axes | None,
) -> jax.Array:
    """Scales `s` nearer to the least of `tr((w - s n)^T H (w - s n))`.

    Of `w` and `numbers`, `[batch, k, n]`; codes less zero points are `numbers`. Steps of
    descent, each to the minimum along its direction: never worse than `scale`.
    """
    spread = lambda part: matrices.split(expand(part, matrices.shape, axis, group_size))
    total = lambda part: reduce_groups(matrices.join(part), axis, group_size, jnp.sum, 0.0)
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
    times = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)[..., None]
    curvature = total(numbers**2 * diagonal)  # of each scale, as if features were independent

    def descend(_: jax.Array, scale: jax.Array) -> jax.Array:
        slope = total(numbers * times(hessian, w - numbers * spread(scale)))
        towards = ratio(slope, curvature)
        # To the minimum on the way there, for all scales of an output at once; outputs that
        # share scales go together.
        change = numbers * spread(towards)
        bend = matrices.outputs(jnp.sum(change * times(hessian, change), 1))
        bend = reduce_groups(bend, axis, group_size, jnp.sum, 0.0)
        gain = jnp.sum(slope * towards, matrices.contract, keepdims=True)
        return scale + ratio(gain, bend) * towards

    return lax.fori_loop(0, _STEPS, descend, scale)
