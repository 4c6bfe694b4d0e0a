"""Floats times a block-sparse weight by the native library, for CPUs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import native_matmul

__all__ = ["block_sparse_matmul"]


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    columns: int,
    *,
    otherwise: Callable[..., Any],
) -> jax.Array:
    """`[b, m, columns]` in float32 from `x[b, m, k]`.

    Args:
      blocks: `[b, across, slots, height, width]`, the kept blocks of each column of blocks.
      rows: int32 `[b, across, slots]`, the row of blocks that each lies in.
      otherwise: what an exported program does instead, of the same operands.
    """
    *_, height, width = blocks.shape
    call = _BlockCall(path=cpu.path(), n=columns, height=height, width=width)
    operands = x.astype(jnp.float32), blocks.astype(jnp.float32), rows
    return native_matmul(call, otherwise, *operands)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockCall:
    """A product with kept blocks."""

    path: str
    n: int
    height: int
    width: int

    dtype = np.dtype(np.float32)

    def columns(self, *operands: Any) -> int:
        return self.n

    def columns_sharding(self, *operands: Any) -> None:
        return None

    def run(self, *operands: jax.Array) -> jax.Array:
        x = operands[0]
        out = jax.ShapeDtypeStruct((*x.shape[:2], self.n), jnp.float32)
        run = jax.ffi.ffi_call("jaxcompress_block_matmul", out)
        height, width = np.int64(self.height), np.int64(self.width)
        return run(*operands, height=height, width=width, path=self.path)

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[None, list[Any]]:
        return None, [(batch, m, None), (batch, *[None] * 4), (batch, None, None)]

    def rule(self, columns: int) -> str:
        return "b m k, b c s h w, b d t -> b m n"
