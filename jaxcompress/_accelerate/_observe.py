"""The rows of activations that each part of a weight under observation is multiplied with."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["observe_convolution", "observe_product", "observe_ragged"]


def observe_product(p: Any, x: Any, which: int, dimension_numbers: Any) -> Any:
    """`x`, tied to the statistic of what the probe `p`, operand `which`, meets in a product."""
    contract, batch = dimension_numbers
    if not _is_whole(p, contract[which]):
        p.missed("a product contracts a part of it, or more than it")
        return x
    # The contracted axes in the weight's original order, whatever this product's is.
    pairs = sorted(zip(contract[which], contract[1 - which]), key=lambda c: p.origin_of(c[:1]))
    inner = [c[1] for c in pairs]
    if p.picked is None:
        rows = _rows(x, batch[1 - which], inner)
        k = rows.shape[-1]
        rows = rows.reshape(*(x.shape[d] for d in batch[1 - which]), -1, k)
        return _tied(p, x, rows, batch[which])
    if set(batch[which]) != set(p.picked.places):
        p.missed("matrices of it are looked up and not each meets activations of its own")
        return x
    order = [batch[1 - which][list(batch[which]).index(d)] for d in p.picked.places]
    rows = _rows(x, order, inner)
    each = rows.size // max(rows.shape[-1] * p.picked.indices.size, 1)
    owner = jnp.repeat(p.picked.indices.reshape(-1), each)
    rows = rows.reshape(-1, rows.shape[-1])
    return _tied_apart(p, x, rows, owner, p.picked.axis, p.picked.rank)


def observe_convolution(p: Any, x: Any, params: dict[str, Any]) -> Any:
    """The patches of a convolution; those of all groups, if there are several."""
    numbers = params["dimension_numbers"]
    contract = [d for d in range(p.ndim) if d != numbers.rhs_spec[0]]
    if params["batch_group_count"] != 1:
        p.missed("a convolution takes apart its batch")
        return x
    if p.picked is not None or not _is_whole(p, contract):
        p.missed("a convolution contracts a part of it")
        return x
    return _tied(p, x, _patches(x, p, contract, params), ())


def observe_ragged(p: Any, x: Any, group_sizes: Any, numbers: Any) -> Any:
    """Of `ragged_dot`: the rows of each group, for the matrix of that group."""
    (contract, batch), [group] = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    [ragged] = numbers.lhs_ragged_dimensions
    plain = p.picked is None and not batch[0] and ragged not in contract[0]
    if not plain or not _is_whole(p, contract[1]):
        p.missed("a ragged product contracts along its groups, or a part of it")
        return x
    pairs = sorted(zip(*contract), key=lambda c: p.origin_of(c[1:]))
    rows = _rows(x, [ragged], [c[0] for c in pairs])
    each = rows.size // max(rows.shape[-1] * x.shape[ragged], 1)
    owner = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[ragged]), side="right")
    rows = rows.reshape(-1, rows.shape[-1])
    return _tied_apart(p, x, rows, jnp.repeat(owner, each), group, p.ndim)


def _is_whole(p: Any, contract: Sequence[int]) -> bool:
    """Whether a product contracts the axes as the parameter has them, no part, no more."""
    return math.prod(p.shape[d] for d in contract) == math.prod(
        p.sizes[a] for a in p.origin_of(contract)
    )


def _rows(x: Any, first: Sequence[int], inner: Sequence[int]) -> Any:
    """`[*first, *others, k]`, with the dimensions `inner` merged."""
    others = [d for d in range(x.ndim) if d not in first and d not in inner]
    turned = lax.transpose(x, [*first, *others, *inner])
    k = math.prod(x.shape[d] for d in inner)
    return turned.reshape(*turned.shape[: x.ndim - len(inner)], k)


def _tied(p: Any, x: Any, rows: Any, batch: Sequence[int]) -> Any:
    """`x` and the statistic of `rows[batch, m, k]`, for every tap: its batch axes, then its own."""
    for tap in p.taps:
        x = x + p.observe(rows, _turned(tap, batch, p.ndim), None).astype(x.dtype)
    return x


def _tied_apart(p: Any, x: Any, rows: Any, owner: Any, axis: int, rank: int) -> Any:
    """`x` and the statistic of those of `rows[m, k]` that each index of an axis owns.

    `rank` is that of the weight that the taps were made for, `axis` one of its dimensions.
    """
    for tap in p.taps:
        if tap[1].size != tap[1].shape[axis]:
            p.missed("more than one of its axes tells its matrices apart")
            return x
        mine = owner == jnp.arange(tap[1].shape[axis])[:, None]
        x = x + p.observe(rows, _turned(tap, [axis], rank), mine).astype(x.dtype)
    return x


def _turned(tap: Any, batch: Sequence[int], rank: int) -> Any:
    """A tap with its batch axes, then its own."""
    others = [d for d in range(rank) if d not in batch]

    def turn(part: Any) -> Any:
        own = range(rank, part.ndim)
        turned = lax.transpose(part, [*batch, *others, *own])
        return turned.reshape(*turned.shape[: len(batch)], *(part.shape[d] for d in own))

    return jax.tree.map(turn, tap)


def _patches(x: Any, p: Any, contract: Sequence[int], params: dict[str, Any]) -> Any:
    """What each output of a convolution sees, `[m, k]`, `k` in the order of the weight."""
    numbers = params["dimension_numbers"]
    _, in_dim, *spatial = numbers.rhs_spec
    seen = lax.conv_general_dilated_patches(
        x,
        [p.shape[d] for d in spatial],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        ),
    )
    seen = jnp.moveaxis(seen, numbers.out_spec[1], -1)
    # Input channels come before the window: a row for each group of them.
    seen = seen.reshape(-1, *(p.shape[d] for d in (in_dim, *spatial)))
    order = [1 + (in_dim, *spatial).index(d) for d in contract]
    return lax.transpose(seen, [0, *order]).reshape(seen.shape[0], -1)
