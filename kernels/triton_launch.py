"""What the kernels in Triton share: the tile of a program, its part of a sum, and the call."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["FEW", "Blocks", "added", "by_rows", "split", "splits", "triton_call"]

FEW = 64  # rows, of which one tile has all


class Blocks(NamedTuple):
    """The tile of a program, and how many warps and pipeline stages work on it.

    Where that makes fewer `programs` than it takes to keep the GPU busy, several share a sum.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    programs: int = 1


def by_rows(few: Blocks, many: Blocks, m: int) -> Blocks:
    """The tile for few rows, as high as they need, or the one for many."""
    return few._replace(m=max(few.m, 1 << (m - 1).bit_length())) if m <= FEW else many


def splits(tile: Blocks, b: int, m: int, n: int, k: int) -> int:
    """How many programs share a sum: a power of two, each with two steps of `k` at least.

    A row takes as long as its longest sum, and a few tiles leave most of a GPU idle. What the
    programs of a sum find is added afterwards, so it is no more bytes than the weight in
    bfloat16.
    """
    tiles = b * -(-m // tile.m) * -(-n // tile.n)
    wanted = min(tile.programs // max(1, tiles), -(-k // tile.k) // 2, k // (2 * m))
    return 1 << max(0, wanted.bit_length() - 1)


def split(out: jax.ShapeDtypeStruct, parts: int, kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """What a kernel writes whose sums are in so many parts: those parts, if there are several."""
    return out if parts == 1 else jax.ShapeDtypeStruct((parts, *out.shape), kind)


def added(found: jax.Array, out: jax.ShapeDtypeStruct, *scales: jax.Array | None) -> jax.Array:
    """`out` of what such a kernel has `found`; parts are added, and multiplied by `scales`."""
    if found.ndim == len(out.shape):
        return found
    total = jnp.sum(found, 0, dtype=found.dtype)
    for scale in scales:
        total = total if scale is None else total.astype(jnp.float32) * scale
    return total.astype(out.dtype)


def triton_call(name: str, chip: str | None) -> Callable[..., Any]:
    """`jax_triton.triton_call` for the chip; for the one at hand if that is None."""
    import jax_triton

    nvidia = chip is not None and not chip.startswith("gfx")
    capability = int(chip.replace(".", "")) if chip is not None and nvidia else None
    return functools.partial(jax_triton.triton_call, compute_capability=capability, name=name)
