"""Products that meet an N:M sparse weight: brought to the form that the op takes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import NMSparseArray
from jaxcompress.arrays._uses import listener
from jaxcompress.ops._nm_matmul import nm_matmul, plan

__all__ = ["nm"]


def nm(
    x: jax.Array, w: NMSparseArray, dimension_numbers: Any, weight_first: bool, dtype: Any
) -> jax.Array | None:
    """`lax.dot_general` of `x` and `w`, in this order or with `weight_first`.

    None unless the product contracts the rows of its matrices, in which the groups lie, and
    nothing else, each leading axis is a batch axis, and activations stay floats.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    plain = list(w_contract) == [w.ndim - 2] and list(w_batch) == list(range(w.ndim - 2))
    if not plain or w.along != -2 or w.act is not None:
        return None
    if x.size == 0 or w.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    x_free = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    batch, (k, columns) = w.shape[:-2], w.shape[-2:]
    rows = lax.transpose(x, [*x_batch, *x_free, *x_contract]).reshape(*batch, -1, k)
    values, scale, bits, group = w.values, None, 8, None
    if w.qtype is None:
        values = values.astype(w.dtype)
    else:
        scale, bits, found = w.scale.astype(jnp.float32), w.qtype.bits, _group_size(w)
        if isinstance(found, str):
            return None
        group = found
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
        choice = plan(
            rows.shape[-2],
            k,
            columns,
            w.n,
            w.m,
            *kinds,
            here.platform,
            group,
        )
        w.note(lax.dot_general_p, "nm_matmul", choice.implementation.name, choice.why)
    out = out.reshape(*batch, *(x.shape[d] for d in x_free), columns)
    return jnp.moveaxis(out, -1, len(batch)) if weight_first else out


def _group_size(w: NMSparseArray) -> int | str | None:
    """The rows that share a scale, None for all; in words why the op has no such scales."""
    down, across = w.scale.shape[-2:]
    if across not in (1, w.shape[-1]):
        return "a scale for some columns"
    if down == 1:
        return None
    size = dict(zip(w.axis, w.group_size or ())).get(-2, 1)
    return size if size % w.m == 0 else "a scale for a part of a group"
