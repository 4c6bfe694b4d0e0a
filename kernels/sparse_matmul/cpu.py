"""Floats times an unstructured sparse weight by the native library, for CPUs.

The weight comes as runs: the values of one column in one part of `k`. The parts of a group of
64 columns follow each other, in each of them the columns, `columns[b, n * parts]` in any order.
`values[b, kept]` are the runs, filled up with zeros to multiples of four, `places[b, kept]` are
their indices along `k`, and `starts[b, n * parts + 1]` where runs begin.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import Epilogue, aligned, native_matmul

__all__ = ["sparse_matmul"]


def sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    places: jax.Array,
    starts: jax.Array,
    columns: jax.Array,
    scale: jax.Array | None,
    x_scale: jax.Array | None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    otherwise: Callable[..., Any],
    part: int,
    high: int | None,
) -> jax.Array:
    """`[..., m, n]` in float32 from `x[..., m, k]`; everything else leads with the same axes.

    Args:
      values: float32, or int8 codes with a `scale[..., n]`.
      places: uint16; starts: int32; columns: uint8.
      x_scale: `[..., 1, 1]`, a static scale of the activations; None for one of each row.
      bias, residual, activation: what follows, `activation(y + bias[..., 1, n]) + residual`.
      otherwise: what an exported program does instead, of the operands that there are.
      part: the indices along `k` of a part.
      high: the largest code of an activation; None multiplies floats.
    """
    lead, b = x.shape[:-2], math.prod(x.shape[:-2])
    flat = lambda a: a.reshape(b, *a.shape[len(lead) :])
    call = _SparseCall(
        path=cpu.path(),
        part=part,
        high=high or 0,
        has_scale=scale is not None,
        has_x_scale=x_scale is not None,
        then=Epilogue(
            activation=activation, has_bias=bias is not None, has_residual=residual is not None
        ),
    )
    operands = [flat(x.astype(jnp.float32)), flat(values), flat(places)]
    operands += [flat(starts), flat(columns)]
    if scale is not None:
        operands.append(flat(scale.astype(jnp.float32)))
    if x_scale is not None:
        operands.append(flat(jnp.broadcast_to(x_scale.astype(jnp.float32), (*lead, 1, 1))))
    if bias is not None:
        n = call.columns(*operands)
        operands.append(flat(jnp.broadcast_to(bias.astype(jnp.float32), (*lead, 1, n))))
    if residual is not None:
        operands.append(flat(residual.astype(jnp.float32)))
    out = native_matmul(call, otherwise, *operands)
    return out.reshape(*lead, *out.shape[-2:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SparseCall:
    """A product with runs of columns; `scale[b, n]` and `x_scale[b, 1, 1]` if it has them."""

    path: str
    part: int
    high: int
    has_scale: bool
    has_x_scale: bool
    then: Epilogue

    dtype = np.dtype(np.float32)

    @property
    def with_rows(self) -> list[int]:
        return self.then.with_rows

    def columns(self, *operands: Any) -> int:
        return (operands[3].shape[-1] - 1) // -(-operands[0].shape[-1] // self.part)

    def columns_sharding(self, *operands: Any) -> None:
        return None

    def run(self, *operands: jax.Array) -> jax.Array:
        x, values, places, starts, columns, *rest = operands
        b, m, k = x.shape
        scale = rest.pop(0) if self.has_scale else jnp.zeros(0, jnp.float32)
        x_scale = rest.pop(0) if self.has_x_scale else jnp.zeros(0, jnp.float32)
        more, activation = self.then.arguments(rest)
        out = jax.ShapeDtypeStruct((b, m, self.columns(*operands)), jnp.float32)
        scratch = jax.ShapeDtypeStruct((_scratch_bytes(b, m, k, self.high > 0),), jnp.uint8)
        run = jax.ffi.ffi_call("jaxcompress_sparse_matmul", (out, scratch))
        return run(
            x,
            values,
            places,
            starts,
            columns,
            scale,
            x_scale,
            *more,
            **activation,
            part=np.int64(self.part),
            high=np.int64(self.high),
            path=self.path,
        )[0]

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[None, list[Any]]:
        whole: list[Any] = [(batch, None)] * (4 + self.has_scale)
        whole += [(batch, None, None)] * self.has_x_scale
        return None, [(batch, m, None), *whole, *self.then.specs(batch, m, None)]

    def rule(self, columns: int) -> str:
        terms = ["b m k", "b v", "b w", "b u", "b y"] + ["b c"] * self.has_scale
        terms += ["b s t"] * self.has_x_scale
        return f"{', '.join(terms + self.then.rule('i'))} -> b m n"


@functools.cache
def _scratch_bytes(b: int, m: int, k: int, quantized: bool) -> int:
    """As SparseProblem::scratch_bytes has it: the rows turned, and before that their codes."""
    turned = 0
    if m > 0 and (m > 1 or quantized):
        tile = 32 if 32 < m % 64 <= 48 else 64
        whole = (m - 1) // tile * tile
        last = 1 if m == 1 else max(4, 1 << (m - whole - 1).bit_length())
        turned = aligned(4 * b * k * (whole + last))
    codes = aligned(b * m * k) + aligned(4 * b * m) if quantized else 0
    return turned + codes
