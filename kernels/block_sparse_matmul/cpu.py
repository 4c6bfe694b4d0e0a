"""Floats times a block-sparse weight by the native library, for CPUs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import Epilogue, native_matmul

__all__ = ["block_sparse_matmul"]


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    columns: int,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    otherwise: Callable[..., Any],
) -> jax.Array:
    """`[b, m, columns]` in float32 from `x[b, m, k]`.

    Args:
      blocks: `[b, across, slots, height, width]`, the kept blocks of each column of blocks.
      rows: int32 `[b, across, slots]`, the row of blocks that each lies in.
      bias, residual, activation: what follows, `activation(y + bias[b, 1, n]) + residual`.
      otherwise: what an exported program does instead, of the same operands.
    """
    *_, height, width = blocks.shape
    then = Epilogue(
        activation=activation, has_bias=bias is not None, has_residual=residual is not None
    )
    call = _BlockCall(path=cpu.path(), n=columns, height=height, width=width, then=then)
    operands = [x.astype(jnp.float32), blocks.astype(jnp.float32), rows]
    if bias is not None:
        operands.append(jnp.broadcast_to(bias.astype(jnp.float32), (x.shape[0], 1, columns)))
    if residual is not None:
        operands.append(residual.astype(jnp.float32))
    return native_matmul(call, otherwise, *operands)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockCall:
    """A product with kept blocks."""

    path: str
    n: int
    height: int
    width: int
    then: Epilogue

    dtype = np.dtype(np.float32)

    @property
    def with_rows(self) -> list[int]:
        return self.then.with_rows

    def columns(self, *operands: Any) -> int:
        return self.n

    def columns_sharding(self, *operands: Any) -> None:
        return None

    def run(self, *operands: jax.Array) -> jax.Array:
        x, blocks, rows, *rest = operands
        more, activation = self.then.arguments(rest)
        out = jax.ShapeDtypeStruct((*x.shape[:2], self.n), jnp.float32)
        run = jax.ffi.ffi_call("jaxcompress_block_matmul", out)
        height, width = np.int64(self.height), np.int64(self.width)
        static = dict(height=height, width=width, path=self.path, **activation)
        return run(x, blocks, rows, *more, **static)

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[None, list[Any]]:
        own = [(batch, m, None), (batch, *[None] * 4), (batch, None, None)]
        return None, own + self.then.specs(batch, m, None)

    def rule(self, columns: int) -> str:
        terms = ["b m k", "b c s h w", "b d t", *self.then.rule("i")]
        return f"{', '.join(terms)} -> b m n"
