"""Floats times a block-sparse weight by the native library, for CPUs: floats, or codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import Epilogue, aligned, native_matmul

__all__ = ["block_sparse_matmul", "quantized_block_matmul"]


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    counts: jax.Array | None,
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
      counts: int32 `[b, across]`, how many of the slots are used; None for all.
      bias, residual, activation: what follows, `activation(y + bias[b, 1, n]) + residual`.
      otherwise: what an exported program does instead, of the operands that there are.
    """
    *_, height, width = blocks.shape
    then = Epilogue(
        activation=activation, has_bias=bias is not None, has_residual=residual is not None
    )
    call = _BlockCall(
        path=cpu.path(),
        n=columns,
        height=height,
        width=width,
        then=then,
        has_counts=counts is not None,
    )
    operands = [x.astype(jnp.float32), blocks.astype(jnp.float32), rows]
    if counts is not None:
        operands.append(counts)
    if bias is not None:
        operands.append(jnp.broadcast_to(bias.astype(jnp.float32), (x.shape[0], 1, columns)))
    if residual is not None:
        operands.append(residual.astype(jnp.float32))
    return native_matmul(call, otherwise, *operands)


def quantized_block_matmul(
    x: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    counts: jax.Array | None,
    scale: jax.Array,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None,
    otherwise: Callable[..., Any],
    height: int,
    width: int,
    panels: bool,
    high: int,
) -> jax.Array:
    """`[b, m, n]` in float32 from `x[b, m, k]`, whose rows become int8 codes.

    Args:
      values: int8 `[b, across, slots, height, width]`; or with `panels` uint8 `[b, across, ...]`,
        of each column of blocks `[width / 16, slots * height / 4, 16, 4]`, codes plus 128.
      rows: int32 `[b, across, slots]`, the row of blocks that each lies in.
      counts: int32 `[b, across]`, how many of the slots are used; None for all.
      scale: `[b, 1, n]`, of the columns.
      x_scale: `[b, 1, 1]`, a static scale of the activations; None for one of each row.
      bias, residual, activation: what follows, `activation(y + bias[b, 1, n]) + residual`.
      otherwise: what an exported program does instead, of the operands that there are.
      high: the largest code of an activation.
    """
    b, n = x.shape[0], scale.shape[-1]
    call = _BlockCall(
        path=cpu.path(),
        n=n,
        height=height,
        width=width,
        then=Epilogue(
            activation=activation, has_bias=bias is not None, has_residual=residual is not None
        ),
        high=high,
        panels=panels,
        has_counts=counts is not None,
        has_x_scale=x_scale is not None,
    )
    operands = [x.astype(jnp.float32), values, rows, *([] if counts is None else [counts]), scale]
    if x_scale is not None:
        operands.append(jnp.broadcast_to(x_scale.astype(jnp.float32), (b, 1, 1)))
    if bias is not None:
        operands.append(jnp.broadcast_to(bias.astype(jnp.float32), (b, 1, n)))
    if residual is not None:
        operands.append(residual.astype(jnp.float32))
    return native_matmul(call, otherwise, *operands)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockCall:
    """A product with kept blocks: floats, or with `high` codes, `scale[b, 1, n]` and, if it has
    one, `x_scale[b, 1, 1]`.
    """

    path: str
    n: int
    height: int
    width: int
    then: Epilogue
    high: int = 0
    panels: bool = False
    has_counts: bool = False
    has_x_scale: bool = False

    dtype = np.dtype(np.float32)

    @property
    def with_rows(self) -> list[int]:
        return self.then.with_rows

    def columns(self, *operands: Any) -> int:
        return self.n

    def columns_sharding(self, *operands: Any) -> None:
        return None

    def run(self, *operands: jax.Array) -> jax.Array:
        x, values, rows, *rest = operands
        b, m, k = x.shape
        counts = rest.pop(0) if self.has_counts else jnp.zeros(0, jnp.int32)
        static: dict[str, Any] = dict(height=np.int64(self.height), width=np.int64(self.width))
        static["path"] = self.path
        out = jax.ShapeDtypeStruct((b, m, self.n), jnp.float32)
        if not self.high:
            more, activation = self.then.arguments(rest)
            run = jax.ffi.ffi_call("jaxcompress_block_matmul", out)
            return run(x, values, rows, counts, *more, **static, **activation)
        scale, *rest = rest
        x_scale = rest.pop(0) if self.has_x_scale else jnp.zeros(0, jnp.float32)
        more, activation = self.then.arguments(rest)
        # As BlockCodes::scratch_bytes has it: codes of the rows, sums of rows of blocks, scales.
        down = -(-k // self.height)
        sizes = (b * m * (aligned(down * self.height) + 64), 4 * b * m * down, 4 * b * m)
        scratch = jax.ShapeDtypeStruct((sum(map(aligned, sizes)),), jnp.uint8)
        name = "jaxcompress_quantized_block_matmul"
        static |= dict(by_rows=np.int64(not self.panels), high=np.int64(self.high))
        operands = (x, values, rows, counts, scale, x_scale, *more)
        return jax.ffi.ffi_call(name, (out, scratch))(*operands, **static, **activation)[0]

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[None, list[Any]]:
        own = [(batch, m, None), (batch, *[None] * (2 if self.panels else 4)), (batch, None, None)]
        own += [(batch, None)] * self.has_counts
        own += [(batch, None, None)] * (bool(self.high) + self.has_x_scale)
        return None, own + self.then.specs(batch, m, None)

    def rule(self, columns: int) -> str:
        terms = ["b m k", "b c v" if self.panels else "b c s h w", "b d t"]
        terms += (
            ["b y"] * self.has_counts + ["b e f"] * bool(self.high) + ["b g q"] * self.has_x_scale
        )
        return f"{', '.join(terms + self.then.rule('i'))} -> b m n"
