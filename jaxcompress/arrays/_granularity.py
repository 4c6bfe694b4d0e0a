"""Which weights share a scale: per tensor, per channel, per group, per 2-D block.

Two static facts decide it. `axis` names the axes along which weights share a scale
(the contracting axes of the product), as negative numbers, so that they still hold
after a leading layer or expert axis is sliced off. `group_size`, one number for each
of those axes, cuts them into runs that have a scale each; without it a scale covers
the whole axis. Every other axis keeps a scale per index. A scale array has the rank
of its weights: size 1 along a shared axis, one entry a group along a grouped one.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

__all__ = ["expand", "grouped", "normalise", "reduce_groups", "scale_shape"]

Axes = tuple[int, ...]


def normalise(
    shape: Sequence[int],
    axis: int | Sequence[int],
    group_size: int | Sequence[int] | None,
    path: str = "",
) -> tuple[Axes, Axes | None]:
    """Negative `axis` and a `group_size` for each, checked against `shape`.

    A single `group_size` is a run along the last of several axes, and the others then
    keep a scale per index: a group is always that many neighbouring weights.
    """
    ndim, where = len(shape), f" of {path!r}" if path else ""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for the shape {tuple(shape)}{where}")
    axes = tuple(a if a < 0 else a - ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis} names an axis twice, for the shape {tuple(shape)}{where}")
    if group_size is None:
        return axes, None
    if not axes:
        raise ValueError(f"group_size {group_size} needs an axis to run along{where}; axis is ()")
    if isinstance(group_size, int):
        sizes = (1,) * (len(axes) - 1) + (group_size,)
    else:
        sizes = tuple(group_size)
    if len(sizes) != len(axes) or any(g < 1 for g in sizes):
        raise ValueError(
            f"group_size must be one positive number, or one for each of axis {axes}; "
            f"got {group_size}{where}"
        )
    return axes, sizes


def scale_shape(shape: Sequence[int], axis: Axes, group_size: Axes | None) -> tuple[int, ...]:
    """The shape of the scales of weights of `shape`."""
    out = list(shape)
    for i, a in enumerate(axis):
        out[a] = 1 if group_size is None else -(-shape[a] // group_size[i])
    return tuple(out)


def grouped(axis: Axes, group_size: Axes | None) -> dict[int, int]:
    """`{axis: size}` of the axes that are cut into groups of more than one weight."""
    return {} if group_size is None else {a: g for a, g in zip(axis, group_size) if g > 1}


def reduce_groups(
    x: jax.Array,
    axis: Axes,
    group_size: Axes | None,
    reduce: Callable[..., jax.Array],
    fill: float,
) -> jax.Array:
    """`reduce(values, axis=...)` of each group, in the shape of the scales.

    The last group of an axis that does not divide is filled up with `fill`, which the
    reduction must ignore (0 for the absolute maximum, say).
    """
    target = scale_shape(x.shape, axis, group_size)
    if math.prod(x.shape) == 0:
        return jnp.full(target, fill, x.dtype)
    if group_size is None:
        return reduce(x, axis=axis).reshape(target) if axis else reduce(x[None], axis=0)
    padding = [(0, 0)] * x.ndim
    for a, g in zip(axis, group_size):
        padding[a] = (0, -x.shape[a] % g)
    x = jnp.pad(x, padding, constant_values=fill)
    sizes = dict(zip((a % x.ndim for a in axis), group_size))
    split: list[int] = []
    inner: list[int] = []
    for i, n in enumerate(x.shape):
        if i in sizes:
            inner.append(len(split) + 1)
            split += [n // sizes[i], sizes[i]]
        else:
            split.append(n)
    return reduce(x.reshape(split), axis=tuple(inner)).reshape(target)


def expand(
    scale: jax.Array, shape: Sequence[int], axis: Axes, group_size: Axes | None
) -> jax.Array:
    """`scale` so that it broadcasts against weights of `shape`."""
    for a, g in grouped(axis, group_size).items():
        if scale.shape[a] != 1:
            scale = jnp.repeat(scale, g, axis=a)
            scale = jax.lax.slice_in_dim(scale, 0, shape[a], axis=a % scale.ndim)
    return scale
