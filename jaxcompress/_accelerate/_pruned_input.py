"""Quax rules for `PrunedInputArray`: the activations are pruned, the rest goes to the array."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._accelerate._scaled import beside
from jaxcompress._quax import ragged_dot_general_p
from jaxcompress.arrays import CompressedArray, PrunedInputArray, RotatedArray, ScaledArray
from jaxcompress.arrays._activation_sparsity import prune_along, threshold_activations
from jaxcompress.arrays._quantized import replace

__all__: list[str] = []


def _pruned(
    primitive: Primitive, x: Any, w: PrunedInputArray, dims: Sequence[int], threshold: Any
) -> jax.Array:
    """What is left of `x`, whose features are `dims`, in the order of those of `w`."""
    if isinstance(x, CompressedArray):
        x = x.decoded_for(primitive, "the other operand is compressed too")
    why = f"{w.pruning.sparsity:.0%} become zero; the product skips none: not faster"
    w.note(primitive, "prune_activations", "reference", why)
    if w.threshold is None:
        return prune_along(x, dims, w.pruning)
    return threshold_activations(x, threshold)


def _run(primitive: Primitive, operands: list[Any], params: dict[str, Any]) -> Any:
    return quax.quaxify(lambda operands: primitive.bind(*operands, **params))(operands)


def _dot_general(operands: list[Any], which: int, params: dict[str, Any]) -> Any:
    w, x = operands[which], operands[1 - which]
    (lhs, rhs), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    w_contract, x_contract = (lhs, rhs) if which == 0 else (rhs, lhs)
    w_batch, x_batch = (lhs_batch, rhs_batch) if which == 0 else (rhs_batch, lhs_batch)
    w_dims, x_dims = (*w_contract, *w_batch), (*x_contract, *x_batch)
    met = [xd for _, xd in sorted(zip(w_contract, x_contract))]
    threshold = w.threshold
    if threshold is not None:
        outside = [d for d, size in enumerate(threshold.shape) if size > 1 and d not in w_dims]
        if outside:
            why = "its thresholds vary along output axes"
            operands[which] = w.decoded_for(lax.dot_general_p, why)
            return _run(lax.dot_general_p, operands, params)
        threshold = beside(x.ndim, threshold, x_dims, w_dims)
    operands[1 - which] = _pruned(lax.dot_general_p, x, w, met, threshold)
    operands[which] = w.array
    return _run(lax.dot_general_p, operands, params)


def _whole(
    x: Any,
    w: PrunedInputArray,
    dim: int,
    primitive: Primitive,
    rest: list[Any],
    params: dict[str, Any],
) -> Any:
    """A product that meets all of `w` at once, so that one threshold has to do."""
    threshold = w.threshold
    if threshold is not None and threshold.size > 1:
        dense = w.decoded_for(primitive, "it has a threshold for each layer or expert")
        return _run(primitive, [x, dense, *rest], params)
    if threshold is not None:
        threshold = threshold.reshape(())
    return _run(primitive, [_pruned(primitive, x, w, [dim], threshold), w.array, *rest], params)


@quax.register(lax.conv_general_dilated_p)
def _(x: Any, w: PrunedInputArray, **params: Any) -> Any:
    channels = params["dimension_numbers"].lhs_spec[1]  # a token is a pixel
    return _whole(x, w, channels, lax.conv_general_dilated_p, [], params)


@quax.register(ragged_dot_general_p)
def _(x: Any, w: PrunedInputArray, group_sizes: Any, **params: Any) -> Any:
    [feature], _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    return _whole(x, w, feature, ragged_dot_general_p, [group_sizes], params)


@quax.register(lax.gather_p)
def _(w: PrunedInputArray, indices: Any, **params: Any) -> Any:
    """Rows of a table have no activations; matrices, one expert's say, still prune theirs."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    found = _run(lax.gather_p, [w.array, indices], params)
    chosen = [d for d, (n, size) in enumerate(zip(sizes, w.shape)) if n != size]
    if w.ndim - len(chosen) < 2:
        return found
    if numbers.operand_batching_dims or sorted(numbers.collapsed_slice_dims) != chosen:
        return _run(lax.gather_p, [w.decoded_for(lax.gather_p), indices], params)
    threshold = w.threshold
    if threshold is not None:
        whole = [n if d in chosen else 1 for d, n in enumerate(w.shape)]
        params["slice_sizes"] = (1,) * w.ndim
        threshold = lax.gather_p.bind(jnp.broadcast_to(threshold, whole), indices, **params)
    return replace(w, array=found, threshold=threshold)


@quax.register(lax.dot_general_p)
def _(lhs: Any, rhs: PrunedInputArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: PrunedInputArray, rhs: Any, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: CompressedArray, rhs: PrunedInputArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: PrunedInputArray, rhs: CompressedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: PrunedInputArray, rhs: PrunedInputArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: ScaledArray | RotatedArray, rhs: PrunedInputArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: PrunedInputArray, rhs: ScaledArray | RotatedArray, **params: Any) -> Any:
    return _dot_general([lhs, rhs], 0, params)
