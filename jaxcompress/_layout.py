"""`layout`: along which axes each weight is contracted, found by tracing."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._probe import Meeting, Probe, watch
from jaxcompress._paths import map_with_paths
from jaxcompress.arrays import is_compressed

__all__ = ["Layout", "layout"]

_tokens = itertools.count()


class Layout(NamedTuple):
    """The axes of a weight, as negative numbers: contracting, output, batch.

    Batch axes are those of experts and scanned layers. `contract` is None where the
    weight meets no product, or several that disagree; `why` then says which.
    """

    contract: tuple[int, ...] | None
    output: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    why: str = ""


def layout(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Which axes of each weight `fn(params, *args)` contracts, found by abstract tracing.

    Shapes alone cannot tell: Flax's `Dense` contracts axis -2 of its kernel, Equinox's
    `Linear` axis -1 of its weight, attention -3 of its query projection and (-3, -2) of
    its output projection. A table that is only looked up counts as contracted along its
    rows, so that each row has a scale of its own.

    Args:
      fn: the model, for instance `model.apply`.
      params: its parameters; floating leaves of two dimensions and more are looked at.
      *args: its other arguments; `jax.ShapeDtypeStruct`s will do.

    Returns:
      A tree like `params` with a `Layout` for each of those leaves, None for the others.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    >>> jc.layout(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 8)))["kernel"]
    Layout(contract=(-2,), output=(-1,), batch=(), why='')
    """

    # JAX and quax remember traced functions by their static fields, and a meeting that is
    # remembered is not noted again. A path that nobody has used before is.
    token = f"#{next(_tokens)}"

    def probe(path: str, leaf: Any) -> Any:
        if not is_weight(leaf):
            return leaf
        dense = leaf.materialise() if is_compressed(leaf) else leaf
        return Probe(dense, origin=tuple((a,) for a in range(-leaf.ndim, 0)), path=path + token)

    def call(params: Any, *args: Any) -> Any:
        return accelerate(fn)(map_with_paths(probe, params), *args)

    with watch() as meetings:
        eqx.filter_eval_shape(call, params, *args)
    by_path: dict[str, list[Meeting]] = {}
    for meeting in meetings:
        by_path.setdefault(meeting.path, []).append(meeting)

    def read(path: str, leaf: Any) -> Layout | None:
        return _combine(by_path.get(path + token, []), leaf.ndim) if is_weight(leaf) else None

    return map_with_paths(read, params)


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a floating array of two dimensions or more, compressed or not."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and leaf.ndim >= 2 and jnp.issubdtype(dtype, jnp.floating)


def _combine(meetings: list[Meeting], ndim: int) -> Layout:
    products = [m for m in meetings if m.contract and not m.lookup]
    products = products or [m for m in meetings if m.lookup]
    if not products:
        names = sorted({m.primitive for m in meetings})
        return Layout(None, why="it meets no product, only " + (", ".join(names) or "nothing"))
    contracts = sorted({m.contract for m in products})
    if len(contracts) > 1:
        return Layout(None, why=f"its products contract different axes: {contracts}")
    contract, output = contracts[0], set(products[0].output)
    batch = (set(range(-ndim, 0)) - set(contract)) - output
    return Layout(contract, tuple(sorted(output - set(contract))), tuple(sorted(batch)))
