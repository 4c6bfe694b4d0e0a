"""Products that meet an N:M sparse weight: brought to the form that the op takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._accelerate._products import note_product, shaped
from jaxcompress.arrays import NMSparseArray
from jaxcompress.arrays._uses import listener
from jaxcompress.ops import _nm_linear
from jaxcompress.ops._nm_matmul import nm_matmul, plan

__all__ = ["nm"]


def nm(
    x: jax.Array, w: NMSparseArray, dimension_numbers: Any, weight_first: bool, dtype: Any
) -> jax.Array | None:
    """`lax.dot_general` of `x` and `w`, in this order or with `weight_first`.

    None unless the product contracts the rows of its matrices, in which the groups lie, and
    nothing else, each leading axis is a batch axis, and activations are floats or integers.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    plain = list(w_contract) == [w.ndim - 2] and list(w_batch) == list(range(w.ndim - 2))
    if not plain or w.along != -2:
        return None
    if x.size == 0 or w.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    group = None if w.qtype is None else _group_size(w)
    if isinstance(group, str):
        return None
    x_free = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    batch, k = w.shape[:-2], w.shape[-2]
    rows = lax.transpose(x, [*x_batch, *x_free, *x_contract]).reshape(*batch, -1, k)
    free = [x.shape[d] for d in x_free]
    if w.act is None:
        out = _floats(rows, w, group, dtype)
        out = out.reshape(*batch, *free, w.shape[-1])
    elif w.qtype is not None and w.act.qtype.integer:
        out = _integers(rows, w, group, dtype, free)
    else:
        return None
    return jnp.moveaxis(out, -1, len(batch)) if weight_first else out


def _floats(rows: jax.Array, w: NMSparseArray, group: int | None, dtype: Any) -> jax.Array:
    values, scale, bits = w.values, None, 8
    if w.qtype is None:
        values = values.astype(w.dtype)
    else:
        scale, bits = w.scale.astype(jnp.float32), w.qtype.bits
    out = nm_matmul(
        rows,
        values,
        w.indices,
        scale,
        n=w.n,
        m=w.m,
        bits=bits,
        group_size=group,
        dtype=dtype,
    )
    here = listener()
    if here is not None:
        kinds = "int8" if w.qtype else values.dtype.name, rows.dtype.name
        (m, k), columns = rows.shape[-2:], w.shape[-1]
        choice = plan(m, k, columns, w.n, w.m, *kinds, here.platform, group)
        w.note(lax.dot_general_p, "nm_matmul", choice.implementation.name, choice.why)
    return out


def _integers(
    rows: jax.Array, w: NMSparseArray, group: int | None, dtype: Any, free: list[int]
) -> jax.Array:
    """`[*batch, *free, columns]` of activations that are quantized on the way."""
    batch, m, here = w.shape[:-2], rows.shape[-2], listener()
    if here is not None:
        choice = _nm_linear.plan(w, group, m, here.platform)
        name = choice.implementation.name
        if name == "reference":
            w.note("expand", "nm", name, choice.why)
            k, columns = w.shape[-2:]
            note_product(w, w.expanded(), False, lax.dot_general_p, m, k, columns, rows.dtype.name)
        else:
            why = f"rows quantized, then {choice.why}"
            w.note(lax.dot_general_p, "nm_matmul", name, why)
    one_batch = [math.prod(batch)] if batch else []

    def merged(a: jax.Array) -> jax.Array:
        last = a.shape[len(batch) :]  # a scale may be one for all matrices
        return jnp.broadcast_to(a, (*batch, *last)).reshape(*one_batch, *last)

    flat = jax.tree.map(merged, w)
    rows = rows.reshape(*one_batch, *rows.shape[-2:])
    multiply = lambda rows, flat, *then: _nm_linear.nm_linear(rows, flat, group, dtype, *then)
    return shaped(multiply, (rows, flat), batch, free, [w.shape[-1]])


def _group_size(w: NMSparseArray) -> int | str | None:
    """The rows that share a scale, None for all; in words why the op has no such scales."""
    down, across = w.scale.shape[-2:]
    if across not in (1, w.shape[-1]):
        return "a scale for some columns"
    if down == 1:
        return None
    size = dict(zip(w.axis, w.group_size or ())).get(-2, 1)
    return size if size % w.m == 0 else "a scale for a part of a group"
