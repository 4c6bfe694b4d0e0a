"""What the kernels in Triton share: the tile of a program, and the call from a JAX program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Blocks", "triton_call"]


class Blocks(NamedTuple):
    """The tile of a program, and how many warps and pipeline stages work on it."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def triton_call(name: str, chip: str | None) -> Callable[..., Any]:
    """`jax_triton.triton_call` for the chip; for the one at hand if that is None."""
    import jax_triton

    nvidia = chip is not None and not chip.startswith("gfx")
    capability = int(chip.replace(".", "")) if chip is not None and nvidia else None
    return functools.partial(jax_triton.triton_call, compute_capability=capability, name=name)
