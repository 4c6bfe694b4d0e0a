"""Products that meet a block-sparse weight: brought to the form that the op takes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._accelerate._products import shaped
from jaxcompress.arrays import BlockSparseArray
from jaxcompress.arrays._uses import listener
from jaxcompress.ops import _block_linear
from jaxcompress.ops._activations import encode_activations
from jaxcompress.ops._block_sparse import multiply_blocks, plan
from jaxcompress.ops._choice import Choice

__all__ = ["block_sparse"]


def block_sparse(
    x: jax.Array, w: BlockSparseArray, dimension_numbers: Any, weight_first: bool, dtype: Any
) -> jax.Array | None:
    """`lax.dot_general` of `x` and `w`, in this order or with `weight_first`.

    None unless the product contracts the rows of its matrices and nothing else, each
    leading axis is a batch axis, a scale does not vary along the rows, and activations have
    no offset.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    row = w.ndim - 1 if w.transposed else w.ndim - 2
    plain = list(w_contract) == [row] and list(w_batch) == list(range(w.ndim - 2))
    if not plain or x.size == 0 or w.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if w.qtype is not None and w.scale.shape[row] != 1:
        return None
    if w.act is not None and not w.act.qtype.symmetric:
        return None
    x_free = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    batch, k = w.rows.shape[:-2], w.matrix[0]
    rows = lax.transpose(x, [*x_batch, *x_free, *x_contract]).reshape(*batch, -1, k)
    free, here, m = [x.shape[d] for d in x_free], listener(), rows.shape[-2]
    if w.act is not None and w.qtype is not None and w.act.qtype.integer:
        if here is not None:
            _note(w, _block_linear.plan(w, m, rows.dtype.name, here.platform))
        multiply = lambda rows, w, *then: _block_linear.block_linear(rows, w, dtype, *then)
        out = shaped(multiply, (rows, w), batch, free, [w.matrix[1]])
    else:
        out = _floats(rows, w, dtype, batch, free)
    return jnp.moveaxis(out, -1, len(batch)) if weight_first else out


def _floats(
    rows: jax.Array, w: BlockSparseArray, dtype: Any, batch: Sequence[int], free: Sequence[int]
) -> jax.Array:
    """A product on floats, `[*batch, *free, columns]`: scales of codes come after it."""
    x_scale = None
    if w.act is not None:
        static = None if w.act_scale is None else w.act_scale.reshape(*batch, 1, 1)
        rows, x_scale, _ = encode_activations(rows, w.act, static)
    is_scaled = w.qtype is not None or x_scale is not None
    here = listener()
    if here is not None:
        kinds = w.blocks().dtype.name, rows.dtype.name
        _note(w, plan(rows.shape[-2], *w.matrix, w.block, *kinds, here.platform))

    def multiply(rows, w, bias=None, activation=None, residual=None):
        return multiply_blocks(
            rows,
            w.blocks(),
            w.rows,
            columns=w.matrix[1],
            counts=w.counts,
            dtype=None if is_scaled else dtype,
            bias=bias,
            activation=activation,
            residual=residual,
        )

    if not is_scaled:
        return shaped(multiply, (rows, w), batch, free, [w.matrix[1]])
    out = multiply(rows, w)
    if x_scale is not None:
        out = out * x_scale
    if w.qtype is not None:
        scale = w.scale.astype(jnp.float32)
        out = out * (jnp.swapaxes(scale, -1, -2) if w.transposed else scale)
    return out.astype(dtype).reshape(*batch, *free, w.matrix[1])


def _note(w: BlockSparseArray, choice: Choice) -> None:
    name = choice.implementation.name
    w.note(lax.dot_general_p, "block_sparse_matmul", name, choice.why)
