"""Floats times an unstructured sparse weight by the native library, for CPUs.

The weight comes as the runs of its columns: `values[b, kept]`, the index along `k` of each in
`places[b, kept]`, and where the run of each column begins in `starts[b, n + 1]`.
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
from jaxcompress.kernels.cpu.call import aligned, native_matmul

__all__ = ["sparse_matmul"]


def sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    places: jax.Array,
    starts: jax.Array,
    scale: jax.Array | None,
    x_scale: jax.Array | None,
    *,
    otherwise: Callable[..., Any],
    high: int | None,
) -> jax.Array:
    """`[..., m, n]` in float32 from `x[..., m, k]`; everything else leads with the same axes.

    Args:
      values: float32, or int8 codes with a `scale[..., n]`.
      places: uint16; starts: int32.
      x_scale: `[..., 1, 1]`, a static scale of the activations; None for one of each row.
      otherwise: what an exported program does instead, of the operands that there are.
      high: the largest code of an activation; None multiplies floats.
    """
    lead, b = x.shape[:-2], math.prod(x.shape[:-2])
    flat = lambda a: a.reshape(b, *a.shape[len(lead) :])
    call = _SparseCall(
        path=cpu.path(),
        high=high or 0,
        has_scale=scale is not None,
        has_x_scale=x_scale is not None,
    )
    operands = [flat(x.astype(jnp.float32)), flat(values), flat(places), flat(starts)]
    if scale is not None:
        operands.append(flat(scale.astype(jnp.float32)))
    if x_scale is not None:
        operands.append(flat(jnp.broadcast_to(x_scale.astype(jnp.float32), (*lead, 1, 1))))
    out = native_matmul(call, otherwise, *operands)
    return out.reshape(*lead, *out.shape[-2:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SparseCall:
    """A product with runs of columns; `scale[b, n]` and `x_scale[b, 1, 1]` if it has them."""

    path: str
    high: int
    has_scale: bool
    has_x_scale: bool

    dtype = np.dtype(np.float32)

    def columns(self, *operands: Any) -> int:
        return operands[3].shape[-1] - 1

    def columns_sharding(self, *operands: Any) -> None:
        return None

    def run(self, *operands: jax.Array) -> jax.Array:
        x, values, places, starts, *rest = operands
        b, m, k = x.shape
        scale = rest.pop(0) if self.has_scale else jnp.zeros(0, jnp.float32)
        x_scale = rest.pop(0) if self.has_x_scale else jnp.zeros(0, jnp.float32)
        out = jax.ShapeDtypeStruct((b, m, self.columns(*operands)), jnp.float32)
        scratch = jax.ShapeDtypeStruct((_scratch_bytes(b, m, k, self.high > 0),), jnp.uint8)
        run = jax.ffi.ffi_call("jaxcompress_sparse_matmul", (out, scratch))
        high = np.int64(self.high)
        return run(x, values, places, starts, scale, x_scale, high=high, path=self.path)[0]

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[None, list[Any]]:
        whole = [(batch, None)] * (3 + self.has_scale)
        return None, [(batch, m, None), *whole, *[(batch, None, None)] * self.has_x_scale]

    def rule(self, columns: int) -> str:
        terms = ["b m k", "b v", "b w", "b u"] + ["b c"] * self.has_scale
        return f"{', '.join(terms + ['b s t'] * self.has_x_scale)} -> b m n"


@functools.cache
def _scratch_bytes(b: int, m: int, k: int, quantized: bool) -> int:
    """As SparseProblem::scratch_bytes has it: the rows turned, and before that their codes."""
    turned = 0
    if m > 0 and (m > 1 or quantized):
        tile = 64 if k <= 2048 else 32 if k <= 4096 else 16
        whole = (m - 1) // tile * tile
        last = 1 if m == 1 else max(4, 1 << (m - whole - 1).bit_length())
        turned = aligned(4 * b * k * (whole + last))
    codes = aligned(b * m * k) + aligned(4 * b * m) if quantized else 0
    return turned + codes
