"""XLA's own product of uint8 and int8 into int32, exact, for CPUs.

`jax.lax.dot_general` widens mixed operands to int32 before it multiplies. StableHLO
takes them as they are, and XLA:CPU has a fast product for exactly this pair (VNNI on
x86). The primitive here lowers to that one operation; partitioning, layouts and fusion
are XLA's, as for any other `dot_general`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir

__all__ = ["int8_matmul"]

# Activations are moved from -128 .. 127 to 0 .. 255; each output is then too large by
# 128 times a column sum of the weights.
_SHIFT = 128
_ENOUGH_ROWS = 16


def int8_matmul(x: jax.Array, w: jax.Array, *, transpose_w: bool = False) -> jax.Array:
    """`x @ w` for int8 `x[..., m, k]` and `w[..., k, n]`, as int32, modulo 2^32.

    With `transpose_w`, `w[..., n, k]`. Leading dimensions are batch dimensions.
    """
    batch = tuple(range(x.ndim - 2))
    contract = ((x.ndim - 1,), (w.ndim - 1 if transpose_w else w.ndim - 2,))
    shifted = (x.astype(jnp.int32) + _SHIFT).astype(jnp.uint8)
    if jax.typeof(x).sharding.spec[-2] is not None:  # no row can be added to sharded rows
        sums = jnp.sum(w, -1 if transpose_w else -2, dtype=jnp.int32)[..., None, :]
        return u8s8_dot_general(shifted, w, (contract, (batch, batch))) - _SHIFT * sums
    # A row of ones yields the column sums from the same product, for almost nothing; and
    # more of them lift a few rows to where XLA blocks its product (ten times, for one row).
    more = max(1, _ENOUGH_ROWS - x.shape[-2])
    shifted = jnp.pad(shifted, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)], constant_values=1)
    product = u8s8_dot_general(shifted, w, (contract, (batch, batch)))
    sums = lax.slice_in_dim(product, x.shape[-2], x.shape[-2] + 1, axis=-2)
    return lax.slice_in_dim(product, 0, x.shape[-2], axis=-2) - _SHIFT * sums


_dot_p = Primitive("u8s8_dot_general")


def u8s8_dot_general(x: jax.Array, w: jax.Array, dimension_numbers: Any) -> jax.Array:
    """`jax.lax.dot_general` of a uint8 and an int8 array, accumulated in int32."""
    contract, batch = dimension_numbers
    freeze = lambda pair: tuple(tuple(map(int, axes)) for axes in pair)
    x, w = _vary_alike(x, w)
    return _dot_p.bind(x, w, dimension_numbers=(freeze(contract), freeze(batch)))


def _vary_alike(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Within `shard_map`, both as varying as either; `jax.lax` does this around its primitives."""
    x_axes, w_axes = (jax.typeof(a).mat.varying for a in (x, w))
    if w_axes - x_axes:
        x = lax.pcast(x, tuple(w_axes - x_axes), to="varying")
    if x_axes - w_axes:
        w = lax.pcast(w, tuple(x_axes - w_axes), to="varying")
    return x, w


@functools.cache
def _compiled(dimension_numbers):
    return jax.jit(functools.partial(_dot_p.bind, dimension_numbers=dimension_numbers))


@_dot_p.def_impl
def _impl(x, w, *, dimension_numbers):
    with jax.disable_jit(False):  # where it is disabled, this would be the same call again
        return _compiled(dimension_numbers)(x, w)


def _abstract(x, w, *, dimension_numbers):
    # The rules of dot_general for shapes, explicit shardings and varying axes, with an
    # int8 stand-in for the unsigned side.
    out, _ = lax.dot_general_p.abstract_eval(
        x.update(dtype=jnp.dtype(jnp.int8)),
        w,
        dimension_numbers=dimension_numbers,
        precision=None,
        preferred_element_type=jnp.dtype(jnp.int32),
        out_sharding=None,
    )
    return out


_dot_p.def_abstract_eval(_abstract)


def _batch(operands, axes, *, dimension_numbers):
    """A batched side gives a batch dimension if both are, else one more free one."""
    (x, w), (x_axis, w_axis) = operands, axes
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if x_axis is not None:
        x = jnp.moveaxis(x, x_axis, 0)
        x_contract, x_batch = _shift(x_contract), _shift(x_batch)
    if w_axis is not None:
        w = jnp.moveaxis(w, w_axis, 0)
        w_contract, w_batch = _shift(w_contract), _shift(w_batch)
    if x_axis is not None and w_axis is not None:
        x_batch, w_batch, out_axis = (0, *x_batch), (0, *w_batch), 0
    elif x_axis is not None:  # the first of the free dimensions of x
        out_axis = len(x_batch)
    else:  # the first of those of w, which come after those of x
        out_axis = x.ndim - len(x_contract)
    numbers = ((x_contract, w_contract), (x_batch, w_batch))
    return u8s8_dot_general(x, w, numbers), out_axis


def _shift(axes):
    return tuple(a + 1 for a in axes)


batching.primitive_batchers[_dot_p] = _batch


def _lower(ctx, x, w, *, dimension_numbers):
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=x_batch,
        rhs_batching_dimensions=w_batch,
        lhs_contracting_dimensions=x_contract,
        rhs_contracting_dimensions=w_contract,
    )
    kind = ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(kind, x, w, numbers)]


mlir.register_lowering(_dot_p, _lower)
