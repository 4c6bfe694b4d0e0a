"""Times of products on a device, as a network sees them: one layer after another.

One call of a product takes microseconds there and a hundred of them to start from Python, and
what is multiplied twice lies in the cache. So one program multiplies by several weights, the
same numbers in memory of their own, again and again, each time other rows of activations.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LAYERS, PASSES = 6, 12  # weights, and how often a program multiplies by all of them


def layered(
    run: Callable[..., Any], args: list[Any], layers: int = LAYERS, passes: int = PASSES
) -> Callable[[], Any]:
    """A function that starts `passes` times `run(rows, *weights)` with every layer's copies.

    It is compiled already.
    """
    xs = jnp.stack([jnp.roll(jnp.asarray(args[0]), i, 0) for i in range(passes)])
    copies = [[jnp.array(a, copy=True) for a in args[1:]] for _ in range(layers)]

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
        return jax.lax.fori_loop(0, passes, once, start)

    compiled = program.lower(xs, copies).compile()
    return lambda: compiled(xs, copies)


def milliseconds(
    programs: dict[str, Callable[[], Any]], repeats: int, layers: int = LAYERS, passes: int = PASSES
) -> dict[str, list[float]]:
    """Of one product of each program, in turns: `repeats` numbers each."""
    for program in programs.values():
        jax.block_until_ready(program())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append((time.perf_counter() - begin) * 1e3 / (layers * passes))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}
