"""Quax rules for `RotatedArray`: the activations are rotated, the rest goes to the array."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import quax
from jax import lax

from jaxcompress._accelerate._scaled import scaled
from jaxcompress.arrays import CompressedArray, RotatedArray, ScaledArray
from jaxcompress.arrays._quantized import replace
from jaxcompress.arrays._rotated import mix

__all__: list[str] = []


@quax.register(lax.transpose_p)
def _(w: RotatedArray, *, permutation: Sequence[int]) -> Any:
    array = quax.quaxify(lambda a: lax.transpose(a, permutation))(w.array)
    axes = tuple(list(permutation).index(a % w.ndim) - w.ndim for a in w.axes)
    return RotatedArray(array, lax.transpose(w.signs, permutation), axes=axes, path=w.path)


@quax.register(lax.convert_element_type_p)
def _(w: RotatedArray, *, new_dtype: Any, **params: Any) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return lax.convert_element_type_p.bind(w.lowered(), new_dtype=new_dtype, **params)
    array = quax.quaxify(lambda a: lax.convert_element_type(a, new_dtype))(w.array)
    return replace(w, array=array)


def _dot_general(operands: list[Any], which: int, params: dict[str, Any]) -> Any:
    w, x = operands[which], operands[1 - which]
    (lhs, rhs), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    w_contract, x_contract = (lhs, rhs) if which == 0 else (rhs, lhs)
    w_batch, x_batch = (lhs_batch, rhs_batch) if which == 0 else (rhs_batch, lhs_batch)
    rotated = [a % w.ndim for a in w.axes]
    if sorted(rotated) != sorted(w_contract):
        why = "its features are rotated along other axes than the product contracts"
        operands[which] = w.decoded_for(lax.dot_general_p, why)
    else:
        if isinstance(x, CompressedArray):
            x = x.decoded_for(lax.dot_general_p, "the other operand is compressed too")
        flipped = scaled(x, w.signs, (*x_contract, *x_batch), (*w_contract, *w_batch))
        met = [x_contract[list(w_contract).index(d)] - x.ndim for d in rotated]
        operands[1 - which] = mix(flipped, tuple(met))
        operands[which] = w.array
    run = lambda operands: lax.dot_general_p.bind(*operands, **params)
    return quax.quaxify(run)(operands)


@quax.register(lax.dot_general_p)
def _(lhs: Any, rhs: RotatedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: RotatedArray, rhs: Any, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: CompressedArray, rhs: RotatedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: RotatedArray, rhs: CompressedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: RotatedArray, rhs: RotatedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: ScaledArray, rhs: RotatedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: RotatedArray, rhs: ScaledArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)
