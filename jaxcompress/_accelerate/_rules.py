"""What each JAX primitive does to a compressed array: quax rules, and nothing else.

Views keep the array compressed, products go to `jc.ops`; where neither is possible the
array is decoded and `explain` is told why. A primitive that is not named here decodes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._accelerate import _probe, _products
from jaxcompress._accelerate._block_sparse import block_sparse
from jaxcompress._accelerate._gather import gather
from jaxcompress._accelerate._low_rank import low_rank
from jaxcompress._accelerate._named import mark
from jaxcompress._accelerate._nm import nm
from jaxcompress._quax import pvary_p, ragged_dot_general_p, stop_gradient_p
from jaxcompress.arrays import (
    BlockSparseArray,
    CompressedArray,
    LowRankArray,
    NMSparseArray,
    PrepackedArray,
    PrepackedSparseArray,
    QuantizedArray,
    _views,
)
from jaxcompress.arrays._quantized import replace
from jaxcompress.arrays._reshape import reshape

__all__: list[str] = []

_NO_SCALES = "its scales do not follow the axes"


def _view(primitive: Primitive, move: Callable[..., Any]) -> None:
    """A primitive that moves the indices of one array about."""

    def rule(x: CompressedArray, *rest: Any, **params: Any) -> Any:
        same = x.viewed(primitive, params)
        if same is not None:
            return same
        small = x.lowered()
        if isinstance(small, QuantizedArray):
            moved = move(small, *rest, **params)
            if moved is not None:
                return moved
            small = small.decoded_for(primitive, _NO_SCALES)
        return primitive.bind(small, *rest, **params)

    quax.register(primitive)(rule)


def _slices(q: QuantizedArray, *, axis: int, sizes: Any) -> list[QuantizedArray] | None:
    parts: list[QuantizedArray] = []
    start = 0
    for size in sizes:
        begin, end = [0] * q.ndim, list(q.shape)
        begin[axis], end[axis] = start, start + int(size)
        part = _views.slice_(q, begin, end, None)
        if part is None:
            return None
        parts.append(part)
        start += int(size)
    return parts


def _cast(q: QuantizedArray, *, new_dtype: Any, **_: Any) -> QuantizedArray | None:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    return replace(q, float_dtype=jnp.dtype(new_dtype))


def _stop(q: QuantizedArray) -> QuantizedArray:
    return jax.tree.map(
        lambda a: lax.stop_gradient(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, q
    )


_view(lax.transpose_p, lambda q, *, permutation: _views.transpose(q, permutation))
_view(lax.squeeze_p, lambda q, *, dimensions: _views.squeeze(q, dimensions))
_view(lax.split_p, _slices)
_view(lax.convert_element_type_p, _cast)
_view(lax.copy_p, lambda q: q)
_view(stop_gradient_p, _stop)
_view(
    lax.reshape_p,
    lambda q, *, new_sizes, dimensions, **_: None if dimensions else reshape(q, new_sizes),
)
_view(
    lax.broadcast_in_dim_p,
    lambda q, *, shape, broadcast_dimensions, **_: _views.broadcast_in_dim(
        q, shape, broadcast_dimensions
    ),
)
_view(
    lax.slice_p,
    lambda q, *, start_indices, limit_indices, strides: _views.slice_(
        q, start_indices, limit_indices, strides
    ),
)
_view(
    lax.dynamic_slice_p,
    lambda q, *start, slice_sizes: _views.dynamic_slice(q, start, slice_sizes),
)
_view(lax.gather_p, gather)


@quax.register(lax.sharding_constraint_p)
def _constrain(x: CompressedArray, **params: Any) -> Any:
    """The constraint goes to the codes, which have the axes that it was written for."""
    small = x.lowered()
    if not isinstance(small, QuantizedArray):
        return lax.sharding_constraint_p.bind(small, **params)
    return replace(small, values=lax.sharding_constraint_p.bind(small.values, **params))


@quax.register(pvary_p)
def _vary(x: CompressedArray, **params: Any) -> Any:
    return jax.tree.map(lambda leaf: pvary_p.bind(leaf, **params), x)


@quax.register(lax.optimization_barrier_p)
def _barrier(*args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    return jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))


@quax.register(lax.concatenate_p)
def _concatenate(*arrays: Any, dimension: int) -> Any:
    if any(isinstance(a, _probe.Probe) for a in arrays):
        return _probe.concatenate(arrays, dimension)
    small = [a.lowered() if isinstance(a, CompressedArray) else a for a in arrays]
    quantized = [a for a in small if isinstance(a, QuantizedArray)]
    if len(quantized) == len(small):
        joined = _views.concatenate(quantized, dimension)
        if joined is not None:
            return joined
    why = "joined with an array of other scales"
    dense = [
        a.decoded_for(lax.concatenate_p, why) if isinstance(a, QuantizedArray) else a for a in small
    ]
    return lax.concatenate_p.bind(*dense, dimension=dimension)


def _product(primitive: Primitive, operands: list, which: int, run: Callable, params: dict) -> Any:
    """A primitive that multiplies `operands[which]`, compressed, with a dense `x`.

    `run(x, w, dtype)` does it for a quantized `w`, or says in words why it cannot.
    """
    other = operands[1 - which]
    if isinstance(other, CompressedArray):
        operands[1 - which] = other.decoded_for(primitive, "the other operand is compressed too")
    x, path = operands[1 - which], operands[which].path
    w = operands[which].lowered()
    if isinstance(w, QuantizedArray):
        out = run(x, w, params["preferred_element_type"] or x.dtype)
        if not isinstance(out, str):
            return mark(path, x, out)
        w = w.decoded_for(primitive, out)
    operands[which] = w
    return mark(path, x, primitive.bind(*operands, **params))


def _dot_general(operands: list, which: int, params: dict) -> Any:
    w: CompressedArray = operands[which]
    x = operands[1 - which]
    dtype = params["preferred_element_type"] or x.dtype
    # Those that have a product of their own, for the form that they are stored in.
    products: dict[type[CompressedArray], Callable] = {
        BlockSparseArray: block_sparse,
        LowRankArray: low_rank,
        NMSparseArray: nm,
        PrepackedArray: _products.prepacked,
        PrepackedSparseArray: _products.prepacked,
    }
    for container, product in products.items():
        if isinstance(w, container) and not isinstance(x, CompressedArray):
            out = product(x, w, params["dimension_numbers"], which == 0, dtype)
            if out is not None:
                return mark(w.path, x, out)

    def run(x, w, dtype):
        return _products.dot_general(x, w, params["dimension_numbers"], which == 0, dtype)

    return _product(lax.dot_general_p, operands, which, run, params)


@quax.register(lax.dot_general_p)
def _(lhs: Any, rhs: CompressedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: CompressedArray, rhs: Any, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: CompressedArray, rhs: CompressedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.conv_general_dilated_p)
def _(x: Any, w: CompressedArray, **params: Any) -> Any:
    run = lambda x, w, dtype: _products.convolution(x, w, params, dtype)
    return _product(lax.conv_general_dilated_p, [x, w], 1, run, params)


@quax.register(ragged_dot_general_p)
def _(x: Any, w: CompressedArray, group_sizes: Any, **params: Any) -> Any:
    run = lambda x, w, dtype: _products.ragged_dot(x, w, group_sizes, params, dtype)
    return _product(ragged_dot_general_p, [x, w, group_sizes], 1, run, params)
