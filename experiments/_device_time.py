"""Times of products on a device, as a network sees them: one layer after another.

One call of a product takes microseconds there and a hundred of them to start from Python, and
what is multiplied twice lies in the cache. So one program multiplies by several weights, the
same numbers in memory of their own, again and again, each time other rows of activations.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from _harness import interleaved

LAYERS, PASSES = 6, 12  # weights, and how often a program multiplies by all of them


def layered(run: Callable[..., Any], args: list[Any]) -> Callable[[], Any]:
    """A program of `run(rows, *weights)` for every layer's weights, again and again: compiled."""
    xs = jnp.stack([jnp.roll(jnp.asarray(args[0]), i, 0) for i in range(PASSES)])
    copies = [[jnp.array(a, copy=True) for a in args[1:]] for _ in range(LAYERS)]

    @jax.jit
    def program(xs: jax.Array, copies: Any) -> Any:
        def once(i: Any, before: Any) -> Any:
            # Behind its barrier every layer has rows of its own, else XLA merges products that
            # share them, with copies of both weights; and its weights are another pass's, else
            # what is made of them alone is made once, ahead of the loop.
            apart = (jax.lax.optimization_barrier((xs[i], weights)) for weights in copies)
            return [run(x, *weights) for x, weights in apart]

        shapes = jax.eval_shape(once, 0, None)
        start = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), shapes)
        return jax.lax.fori_loop(0, PASSES, once, start)

    compiled = program.lower(xs, copies).compile()
    return lambda: compiled(xs, copies)


def milliseconds(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Of one product of each program: medians of `repeats` rounds in turns."""
    times = interleaved(programs, repeats, budget=float("inf"))
    return {name: statistics.median(found) / (LAYERS * PASSES) for name, found in times.items()}
