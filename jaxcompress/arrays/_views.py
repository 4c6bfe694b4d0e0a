"""Views of a `QuantizedArray`: what moves indices about without decoding a weight.

Each function does to every leaf what its `jax.lax` namesake does to a dense array, and
returns None where the result would have no scales of the array's form (half a group,
say); the caller then decodes. Where only the bit planes are in the way, the codes are
unpacked to one byte each, which is still no float.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays._packing import BLOCK, packed_size
from jaxcompress.arrays._quantized import QuantizedArray, replace

__all__ = [
    "SCALES",
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "groups",
    "map_scales",
    "slice_",
    "squeeze",
    "transpose",
]


SCALES = ("scale", "zero_point", "act_scale", "act_offset", "outer_scale")


def map_scales(q: QuantizedArray, fn: Callable[[Any], Any]) -> dict[str, Any]:
    """`fn` of each scale-like leaf that is there."""
    leaves = {name: getattr(q, name) for name in SCALES}
    return {name: leaf if leaf is None else fn(leaf) for name, leaf in leaves.items()}


def _axes(q: QuantizedArray, new: Sequence[int | None], ndim: int) -> dict[str, Any]:
    """`axis` and `group_size` after old axis `i` became `new[i]` (None: it is gone)."""
    axis, group = [], []
    for k, a in enumerate(q.axis):
        position = new[a % q.ndim]
        if position is not None:
            axis.append(position - ndim)
            group.append(q.group_size[k] if q.group_size else 0)
    kept = tuple(group) if q.group_size and axis else None
    return dict(axis=tuple(axis), group_size=kept)


def groups(q: QuantizedArray) -> dict[int, int]:
    """`{dimension: group size}` of those in `axis`, in its order; 0 where one is shared."""
    sizes = q.group_size or (0,) * len(q.axis)
    return {a % q.ndim: g for a, g in zip(q.axis, sizes)}


def _is_packed(q: QuantizedArray, dim: int) -> bool:
    return q.packed is not None and q.packed_axis % q.ndim == dim


def transpose(q: QuantizedArray, permutation: Sequence[int]) -> QuantizedArray:
    where = {old: new for new, old in enumerate(permutation)}
    return replace(
        q,
        values=lax.transpose(q.values, permutation),
        **map_scales(q, lambda part: lax.transpose(part, permutation)),
        **_axes(q, [where[i] for i in range(q.ndim)], q.ndim),
    )


def broadcast_in_dim(
    q: QuantizedArray, shape: Sequence[int], dimensions: Sequence[int]
) -> QuantizedArray | None:
    """Only new axes of size one: anything else repeats weights."""
    same = [1] * len(shape)
    for size, to in zip(q.shape, dimensions):
        same[to] = size
    if list(shape) != same:
        return None

    def place(part):
        sizes = [1] * len(shape)
        for size, to in zip(part.shape, dimensions):
            sizes[to] = size
        return lax.broadcast_in_dim(part, sizes, dimensions)

    return replace(
        q, values=place(q.values), **map_scales(q, place), **_axes(q, dimensions, len(shape))
    )


def squeeze(q: QuantizedArray, dimensions: Sequence[int]) -> QuantizedArray:
    gone = {d % q.ndim for d in dimensions}
    if any(_is_packed(q, d) for d in gone):
        q = q.unpacked()
    left = [d for d in range(q.ndim) if d not in gone]
    new = [left.index(d) if d in left else None for d in range(q.ndim)]
    return replace(
        q,
        values=lax.squeeze(q.values, tuple(gone)),
        **map_scales(q, lambda part: lax.squeeze(part, tuple(gone))),
        **_axes(q, new, len(left)),
    )


def slice_(
    q: QuantizedArray, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None
) -> QuantizedArray | None:
    steps = strides or (1,) * q.ndim
    cut = [d for d in range(q.ndim) if (start[d], limit[d], steps[d]) != (0, q.shape[d], 1)]
    for d in cut:
        group = groups(q).get(d, 0)
        if group > 1 and not _aligned(start[d], limit[d], steps[d], q.shape[d], group):
            return None
        if _is_packed(q, d) and not _aligned(start[d], limit[d], steps[d], q.shape[d], BLOCK):
            q = q.unpacked()

    shared = [d for d, group in groups(q).items() if group == 0]

    def cut_part(part, per_entry):
        for d in cut:
            if part.shape[d] != 1 or (q.shape[d] == 1 and d not in shared):
                lo, hi = start[d] // per_entry(d), -(-limit[d] // per_entry(d))
                part = lax.slice_in_dim(part, lo, hi, steps[d], d)
        return part

    values = q.values
    for d in cut:
        lo, hi = start[d], limit[d]
        if _is_packed(q, d):
            lo, hi = packed_size(lo, q.qtype.bits), packed_size(hi, q.qtype.bits)
        values = lax.slice_in_dim(values, lo, hi, steps[d], d)
    packed = q.packed
    if packed is not None and q.packed_axis % q.ndim in cut:
        d = q.packed_axis % q.ndim
        packed = limit[d] - start[d]
    parts = map_scales(q, lambda part: cut_part(part, lambda d: max(groups(q).get(d, 1), 1)))
    return replace(q, values=values, packed=packed, **parts)


def _aligned(start: int, limit: int, step: int, size: int, unit: int) -> bool:
    return step == 1 and start % unit == 0 and (limit % unit == 0 or limit == size)


def dynamic_slice(
    q: QuantizedArray, start: Sequence[Any], sizes: Sequence[int]
) -> QuantizedArray | None:
    cut = [d for d in range(q.ndim) if sizes[d] != q.shape[d]]
    if any(groups(q).get(d, 0) > 1 for d in cut):
        return None
    if any(_is_packed(q, d) for d in cut):
        q = q.unpacked()

    def cut_part(part):
        for d in cut:
            if part.shape[d] != 1:  # indices that were meant from the end are positive by now
                part = lax.dynamic_slice_in_dim(
                    part, start[d], sizes[d], d, allow_negative_indices=False
                )
        return part

    return replace(q, values=cut_part(q.values), **map_scales(q, cut_part))


def concatenate(arrays: Sequence[QuantizedArray], dimension: int) -> QuantizedArray | None:
    """Along an axis that keeps a scale per index, of arrays that are alike otherwise."""
    first = arrays[0]
    same = ("qtype", "axis", "group_size", "act", "float_dtype")
    alike = all(getattr(a, f) == getattr(first, f) for a in arrays for f in same)
    simulated = [jnp.issubdtype(a.values.dtype, jnp.floating) for a in arrays]
    whole = {
        (a.zero_point is None, a.outer_scale is None, a.scale.dtype, s)
        for a, s in zip(arrays, simulated)
    }
    static_act = any(a.act_scale is not None for a in arrays)
    if not alike or len(whole) > 1 or static_act or dimension - first.ndim in first.axis:
        return None
    if len({a.packed for a in arrays}) > 1:
        arrays = [a.unpacked() for a in arrays]
    joined = {
        name: None
        if getattr(first, name) is None
        else lax.concatenate([getattr(a, name) for a in arrays], dimension)
        for name in ("values", "scale", "zero_point", "outer_scale")
    }
    return replace(arrays[0], **joined, path="+".join(a.path for a in arrays))
