"""Reshaping a `QuantizedArray`: axes merge and split together with their scales."""

import math
from collections.abc import Sequence

from jaxcompress.arrays._packing import BLOCK, packed_size
from jaxcompress.arrays._quantized import QuantizedArray, replace
from jaxcompress.arrays._views import broadcast_in_dim, groups, map_scales, squeeze

__all__ = ["blocks_of", "reshape"]


def reshape(q: QuantizedArray, new_sizes: Sequence[int]) -> QuantizedArray | None:
    """`q` in another shape; None where merged or split axes have no common scales."""
    if q.size == 0:
        return None
    q = q if q.outer_scale is None else q.widened()  # it has fewer entries than the scale
    ones = [d for d, n in enumerate(q.shape) if n == 1]
    core = squeeze(q, ones) if ones else q
    end = core.ndim
    # Axes of size one aside, a reshape is merges and splits; from the right, so that
    # the positions still to come stay what they were.
    for old, new in reversed(blocks_of(core.shape, [n for n in new_sizes if n != 1])):
        end -= len(old)
        merged = _merge(core, end, len(old)) if len(old) > 1 else core
        split = _split(merged, end, new) if merged is not None and len(new) > 1 else merged
        if split is None:
            return None
        core = split
    return broadcast_in_dim(core, new_sizes, [d for d, n in enumerate(new_sizes) if n != 1])


def blocks_of(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple, tuple]]:
    """The shortest runs of old and new sizes (none is 1) that have equal products."""
    out, i, j = [], 0, 0
    while i < len(old):
        i0, j0, a, b = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        out.append((tuple(old[i0:i]), tuple(new[j0:j])))
    return out


def _merge(q: QuantizedArray, first: int, count: int) -> QuantizedArray | None:
    """Dimensions `first .. first + count - 1` as one, in row-major order."""
    dims, last, kinds = range(first, first + count), first + count - 1, groups(q)
    inner = kinds.get(last)
    if q.group_size is None:  # all keep their scales, or all share them
        if len({d in kinds for d in dims}) > 1:
            return None
        group = inner
    else:
        if any(kinds.get(d, 1) > 1 for d in dims if d != last):
            return None
        group = inner
        if inner is not None and inner > 1:
            group = min(inner, q.shape[last])
            if q.shape[last] % group:
                return None
        elif any(d in kinds for d in dims):
            group = 1
    if q.packed is not None and q.packed_axis % q.ndim in dims:
        whole_blocks = q.packed_axis % q.ndim == last and q.packed % BLOCK == 0
        q = q if whole_blocks else q.unpacked()
    total = math.prod(q.shape[d] for d in dims)
    packed = q.packed
    if packed is not None and q.packed_axis % q.ndim == last:
        packed = total

    def part(leaf):
        size = math.prod(leaf.shape[d] for d in dims)
        return leaf.reshape(*leaf.shape[:first], size, *leaf.shape[first + count :])

    merged_scale = part(q.scale).shape[first]
    if q.act_scale is not None and part(q.act_scale).shape[first] not in (1, merged_scale):
        return None
    axes = _renumber(q, first, count, 1, {} if group is None else {0: group})
    return replace(q, values=part(q.values), packed=packed, **map_scales(q, part), **axes)


def _split(q: QuantizedArray, first: int, sizes: tuple[int, ...]) -> QuantizedArray | None:
    """Dimension `first` as several of `sizes`, in row-major order."""
    group, inner = groups(q).get(first), sizes[-1]
    new: dict[int, int] = {}
    if group is not None:
        new = dict.fromkeys(range(len(sizes)), min(group, 1))
        if group > 1:
            if inner % group:
                return None
            new[len(sizes) - 1] = group
    if q.packed is not None and q.packed_axis % q.ndim == first and inner % BLOCK:
        q = q.unpacked()
    packed, stored = q.packed, sizes
    if packed is not None and q.packed_axis % q.ndim == first:
        packed, stored = inner, (*sizes[:-1], packed_size(inner, q.qtype.bits))

    def part(leaf):
        if leaf.shape[first] == 1:
            middle = (1,) * len(sizes)
        else:
            middle = (*sizes[:-1], leaf.shape[first] // math.prod(sizes[:-1]))
        return leaf.reshape(*leaf.shape[:first], *middle, *leaf.shape[first + 1 :])

    values = q.values.reshape(*q.values.shape[:first], *stored, *q.values.shape[first + 1 :])
    axes = _renumber(q, first, 1, len(sizes), new)
    return replace(q, values=values, packed=packed, **map_scales(q, part), **axes)


def _renumber(q: QuantizedArray, first: int, old: int, new: int, kinds: dict[int, int]) -> dict:
    """`axis` and `group_size` when `old` dimensions from `first` on become `new` ones.

    `kinds` gives the group size (0: shared) of those of the new ones that are in `axis`;
    they take the place of the last old one, so that the packed axis stays the last.
    """
    ndim = q.ndim - old + new
    axis: list[int] = []
    group: list[int] = []
    inside = [a % q.ndim for a in q.axis if first <= a % q.ndim < first + old]
    for d, size in groups(q).items():
        if d in inside:
            if d == inside[-1]:
                axis += [first + k - ndim for k in kinds]
                group += kinds.values()
        else:
            axis.append((d if d < first else d + new - old) - ndim)
            group.append(size)
    return dict(axis=tuple(axis), group_size=tuple(group) if q.group_size and axis else None)
