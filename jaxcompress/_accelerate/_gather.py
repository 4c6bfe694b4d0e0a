"""Rows of a quantized table: looked up in bytes, decoded after."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._quantized import replace

__all__ = ["gather"]


def gather(
    q: QuantizedArray,
    indices: jax.Array,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    fill_value: Any,
    **params: Any,
) -> QuantizedArray | jax.Array | None:
    """`lax.gather` of whole rows (or matrices) of `q`; None for anything else.

    Rows are decoded at once, there are few of them. Matrices, one expert of several
    say, stay compressed: the product that they were looked up for is still to come.
    """
    q = q.widened() if q.scale.dtype != jnp.float32 else q
    looked_up = [d for d in range(q.ndim) if slice_sizes[d] != q.shape[d]]
    if sorted(dimension_numbers.collapsed_slice_dims) != looked_up:
        return None
    kept = q.ndim - len(looked_up)
    if dimension_numbers.operand_batching_dims or kept == 0:
        return None
    if any(d - q.ndim in q.axis for d in looked_up):  # groups or planes run along it
        grouped = q.group_size is not None or q.packed_axis % q.ndim in looked_up
        q = q.unpacked() if grouped else q
        if q.group_size is not None:
            return None
    # Rows are kept whole and in order, at the end of the result.
    out_ndim = indices.ndim - 1 + kept
    if tuple(dimension_numbers.offset_dims) != tuple(range(out_ndim - kept, out_ndim)):
        return None

    def rows(leaf, fill):
        sizes = [1 if d in looked_up else n for d, n in enumerate(leaf.shape)]
        whole = [q.shape[d] if d in looked_up else n for d, n in enumerate(leaf.shape)]
        return lax.gather_p.bind(
            jnp.broadcast_to(leaf, whole),
            indices,
            dimension_numbers=dimension_numbers,
            slice_sizes=tuple(sizes),
            fill_value=fill,
            **params,
        )

    # What is out of bounds gets a scale of NaN where dense rows would be NaN.
    fill = None if fill_value is None else 0
    axis = tuple(a for a in q.axis if a % q.ndim not in looked_up)
    found = replace(
        q,
        values=rows(q.values, fill),
        scale=rows(q.scale, fill_value),
        zero_point=None if q.zero_point is None else rows(q.zero_point, fill),
        act_scale=None if q.act_scale is None else rows(q.act_scale, fill_value),
        act_offset=None if q.act_offset is None else rows(q.act_offset, fill_value),
        axis=axis,
        group_size=q.group_size and tuple(g for a, g in zip(q.axis, q.group_size) if a in axis),
    )
    if kept > 1:
        return found
    q.note(lax.gather_p, "gather", "reference", "rows are decoded after the lookup")
    return found.materialise()
