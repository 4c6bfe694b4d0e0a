"""Quax rules for `ScaledArray`: the scale goes to the activations, the rest to the array."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import quax
from jax import lax

from jaxcompress.arrays import CompressedArray, ScaledArray

__all__ = ["beside", "scaled"]


@quax.register(lax.transpose_p)
def _(w: ScaledArray, *, permutation: Sequence[int]) -> Any:
    array = quax.quaxify(lambda a: lax.transpose(a, permutation))(w.array)
    return ScaledArray(array, lax.transpose(w.scale, permutation), path=w.path)


@quax.register(lax.convert_element_type_p)
def _(w: ScaledArray, *, new_dtype: Any, **params: Any) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return lax.convert_element_type_p.bind(w.lowered(), new_dtype=new_dtype, **params)
    array = quax.quaxify(lambda a: lax.convert_element_type(a, new_dtype))(w.array)
    return ScaledArray(array, w.scale, path=w.path)


def scaled(x: Any, scale: Any, x_dims: Sequence[int], w_dims: Sequence[int]) -> Any:
    """`x` times a scale of size 1 outside `w_dims`, each of which meets one of `x_dims`."""
    return x * beside(x.ndim, scale, x_dims, w_dims).astype(x.dtype)


def beside(ndim: int, scale: Any, x_dims: Sequence[int], w_dims: Sequence[int]) -> Any:
    """The scale as it broadcasts to activations of `ndim` axes."""
    pairs = sorted(zip(x_dims, w_dims))
    order = [wd for _, wd in pairs]
    turned = lax.transpose(scale, [*order, *(d for d in range(scale.ndim) if d not in order)])
    sizes = [1] * ndim
    for xd, wd in pairs:
        sizes[xd] = scale.shape[wd]
    return turned.reshape(sizes)


def _dot_general(operands: list[Any], which: int, params: dict[str, Any]) -> Any:
    w, x = operands[which], operands[1 - which]
    (lhs, rhs), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    w_dims, x_dims = (*lhs, *lhs_batch), (*rhs, *rhs_batch)
    if which == 1:
        w_dims, x_dims = x_dims, w_dims
    if any(size != 1 for d, size in enumerate(w.scale.shape) if d not in w_dims):
        operands[which] = w.decoded_for(lax.dot_general_p, "its scales vary along output axes")
    else:
        if isinstance(x, CompressedArray):
            x = x.decoded_for(lax.dot_general_p, "the other operand is compressed too")
        operands[1 - which] = scaled(x, w.scale, x_dims, w_dims)
        operands[which] = w.array
    run = lambda operands: lax.dot_general_p.bind(*operands, **params)
    return quax.quaxify(run)(operands)


@quax.register(lax.dot_general_p)
def _(lhs: Any, rhs: ScaledArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: ScaledArray, rhs: Any, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: CompressedArray, rhs: ScaledArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: ScaledArray, rhs: CompressedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: ScaledArray, rhs: ScaledArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)
