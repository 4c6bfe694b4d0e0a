"""One layer of `sparsegpt`: which weights go, and what the others become."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress._compensate import compensate, factors, in_steps, padded
from jaxcompress._matrices import Matrices
from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._granularity import Axes, expand
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._rounding import encode
from jaxcompress.prune._patterns import nm
from jaxcompress.prune._schedules import constant
from jaxcompress.prune._select import keep_largest
from jaxcompress.quantize._posttrain import Layer
from jaxcompress.quantize._scales import searched_scales

__all__ = ["Surgery", "operate"]


class Surgery(NamedTuple):
    """What decides which weights of a layer go; `ratio` is that of `nm`, or None."""

    sparsity: float
    ratio: tuple[int, int] | None
    separate: bool
    damping: float
    block_size: int


def operate(layer: Layer, surgery: Surgery) -> tuple[jax.Array | QuantizedArray, jax.Array]:
    """The weight, pruned and, if it has a spec, quantized; and which of it is kept."""
    sparsity, ratio, separate, damping, block_size = surgery
    matrices, static = layer.matrices, layer.static
    gram = layer.statistic(2)
    _, upper = factors(layer.name, gram, damping)
    w = matrices.split(layer.weight.astype(jnp.float32))
    experts, k, outputs = w.shape
    size = block_size if ratio is None else max(ratio[1], block_size // ratio[1] * ratio[1])
    size = min(size, k)
    blocks = -(-k // size)
    rivals = 1 if separate else outputs  # that share a competition
    ends = [min(k, size * (b + 1)) for b in range(blocks)]
    totals = [int(constant(sparsity).kept(jnp.int32(0), rivals * end)) for end in ends]
    kept = jnp.asarray(np.diff([0, *totals]), jnp.int32)
    seen = jnp.diagonal(gram, axis1=-2, axis2=-1)
    how: dict[str, Any] = dict(size=size, ratio=ratio, separate=separate, matrices=matrices)
    scale = None
    if static:
        grain = {name: static[name] for name in ("axis", "group_size", "qtype")}
        scale, _ = searched_scales(layer.weight, matrices.features(seen), **grain)
        how |= grain
    new = jnp.zeros(w.shape, jnp.float32 if scale is None else jnp.int8)
    state = w, new, jnp.zeros(w.shape, bool)
    for first, count in in_steps(blocks, experts * outputs * size * k, layer.tell):
        state = _blocks(state, first, count, upper, seen > 0, kept, scale, **how)
        jax.block_until_ready(state)
    numbers, mask = map(matrices.join, state[1:])
    if scale is None:
        return numbers.astype(layer.weight.dtype), mask
    return layer.stored(numbers, scale, None), mask


@functools.partial(
    jax.jit,
    static_argnames=("size", "ratio", "separate", "matrices", "axis", "group_size", "qtype"),
    donate_argnums=0,
)
def _blocks(
    state: tuple[jax.Array, jax.Array, jax.Array],
    first: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
    upper: jax.Array,
    seen: jax.Array,
    kept: jax.Array,
    scale: jax.Array | None,
    *,
    size: int,
    ratio: tuple[int, int] | None,
    separate: bool,
    matrices: Matrices,
    axis: Axes = (),
    group_size: Axes | None = None,
    qtype: IntType | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prunes `count` blocks of `size` inputs from block `first` on, `kept[b]` of each.

    `state` is `w[batch, k, n]`, what it has become, floats or codes, and its mask. Inputs
    that are not `seen`, always zero, are the first to go.
    """
    width = size if ratio is None else ratio[1]

    def masked(scores: jax.Array, number: jax.Array) -> jax.Array:
        """Of `scores[width, n]`."""
        if ratio is not None:
            return nm(*ratio, axis=-2).spread("", jnp.zeros((scores.shape[1], 1), bool), scores)
        if separate:
            return jax.vmap(lambda one: keep_largest([one], number)[0][0], 1, 1)(scores)
        return keep_largest([scores], number)[0][0]

    def one(args: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        (w, new, mask), upper, seen, scale = args
        lowest = padded(jnp.where(seen, 0.0, -1.0), size, -jnp.inf)[:, None]
        fill = lambda part: padded(part, size)
        scale = None if scale is None else padded(scale, size, 1.0)
        at = lambda array, i: lax.dynamic_index_in_dim(array, i, 0, keepdims=False)

        def fix(
            start: jax.Array, j: jax.Array, part: jax.Array, factor: jax.Array, made: Any
        ) -> tuple[jax.Array, Any]:
            new, mask = made

            def anew() -> jax.Array:
                scores = (part / jnp.diagonal(factor)[:, None]) ** 2
                floor = lax.dynamic_slice_in_dim(lowest, start, size)
                scores = jnp.where(floor < 0, floor, scores)
                return masked(lax.dynamic_slice_in_dim(scores, j, width), kept[start // size])

            # Of a mask of the whole layer, a branch that keeps it would make a copy.
            begin = start + j // width * width
            old = lambda: lax.dynamic_slice_in_dim(mask, begin, width)
            chosen = lax.cond(j % width == 0, anew, old)
            mask = lax.dynamic_update_slice_in_dim(mask, chosen, begin, 0)
            keep, row = at(mask, start + j), at(part, j)
            if scale is None or qtype is None:
                value = number = jnp.where(keep, row, 0.0)
            else:
                step = at(scale, start + j)
                number = jnp.where(keep, encode(row, step, None, qtype, (), None), 0)
                value = number * step
            return value, (new.at[start + j].set(number.astype(new.dtype)), mask)

        k, made = len(w), (fill(new), fill(mask))
        w, made = compensate(w, upper, fix, made, size=size, first=first, count=count)
        return w, made[0][:k], made[1][:k]

    if scale is not None:
        scale = matrices.split(expand(scale, matrices.shape, axis, group_size))
    return lax.map(one, (state, upper, seen, scale))
