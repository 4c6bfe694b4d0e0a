"""`calibrate`: statistics of the activations that meet each weight."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._probe import Log, probe
from jaxcompress._layout import Layout, is_weight, layout
from jaxcompress._max_dtype import from_max, to_max
from jaxcompress._paths import map_with_paths
from jaxcompress._rules import Patterns, matched
from jaxcompress._statistics import Observed, Statistic
from jaxcompress.arrays import is_compressed

__all__ = ["calibrate"]


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    rules: Patterns | None = None,
) -> Any:
    """A statistic of the activations that meet each weight of `fn(params, batch)`.

    A tap of zeros is laid beside each weight, whose cotangent is defined as the
    statistic of what the weight is multiplied with; one backward pass per batch returns
    them all. The function is not touched, and what is true of gradients is true of the
    statistics: they are found under `jit`, stacked per layer under `lax.scan`, per
    expert under `vmap`, summed over devices under sharding. Activations that no gradient
    reaches (behind `stop_gradient` or `argmax`) are not seen. Experts have a statistic each,
    in `ragged_dot` and looked up (`params[index]`) too; the groups of a convolution one.

    Args:
      fn: called as `fn(params, batch)`.
      params: floating leaves of two dimensions and more are observed; compressed leaves
        act as they do in `accelerate` and are not.
      batches: an iterable, read once, one batch in memory at a time.
      statistic: one of `jc.statistics`: `absmax()`, `minmax()`, `moving_average()`, `mse()`,
        `percentile()`, `entropy()`, `snr()` for static activations, `second_moment()`, or your
        own. What it keeps between batches does not grow with them.
      rules: patterns of the paths to observe; all if None.

    Returns:
      A tree like `params` with an `Observed(value, count)` for each observed leaf, None
      for the others. A leaf that met no product, or one that cannot be observed, has count
      0, and using it raises.

    Raises:
      ValueError: no batches; a pattern that matches nothing; a leaf that `rules` name is in
        a product that cannot be observed, with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, batches = {"w": jnp.ones((3, 2))}, [jnp.ones((5, 3)), -2 * jnp.ones((5, 3))]
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, batches, jc.statistics.absmax())
    >>> found["w"].value, found["w"].count
    (Array([[2.]], dtype=float32), Array([[10.]], dtype=float32))
    """
    wanted = None if rules is None else matched(params, rules)
    total, step, log = None, None, Log()
    for batch in batches:
        if step is None:
            taps, step = _step(fn, layout(fn, params, batch), statistic, wanted, params, log)
            total = _map(lambda tap: Observed(statistic.init(tap[0]), tap[1]), params, taps())
        total = step(params, batch, total)
        for path, why in log.missed.items():
            if wanted is not None:
                raise ValueError(f"the activations that meet {path!r} cannot be observed: {why}")
    if total is None:
        raise ValueError("calibrate got no batches")
    finalize = jax.jit(statistic.finalize)
    found = _map(lambda seen: Observed(finalize(seen.value), seen.count), params, total)
    nothing = lambda leaf: Observed(jnp.zeros(()), jnp.zeros(())) if is_weight(leaf) else None
    unseen = lambda path, seen: seen is None or path in log.missed
    return map_with_paths(
        lambda path, leaf, seen: nothing(leaf) if unseen(path, seen) else seen, params, found
    )


def _map(fn: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """`fn` of what the trees have at each leaf of `params` that is observed, None elsewhere."""
    return map_with_paths(
        lambda _, leaf, first, *rest: None if first is None else fn(first, *rest), params, *trees
    )


def _step(
    fn: Callable,
    layouts: Any,
    statistic: Statistic,
    wanted: set[str] | None,
    params: Any,
    log: Log,
) -> tuple[Callable[[], Any], Callable]:
    """Makes the taps; and one batch: `(params, batch, total) -> total`, compiled once."""
    tie = _tie(statistic)

    def tap(path: str, leaf: Any, found: Layout | None) -> Any:
        if found is None or found.contract is None or is_compressed(leaf):
            return None
        if wanted is not None and path not in wanted:
            return None
        k = math.prod(leaf.shape[a] for a in found.contract)
        lead = [leaf.shape[a] if a in found.batch else 1 for a in range(-leaf.ndim, 0)]
        shapes = (*lead, *statistic.shape(k)), tuple(lead)
        own = tuple(sorted(_devices(leaf)))  # within `shard_map`: as many statistics as weights
        zeros = lambda shape: jax.lax.pcast(jnp.zeros(shape, jnp.float32), own, to="varying")
        return zeros(shapes[0]), zeros(shapes[1])

    def tapped(path: str, leaf: Any, tap: Any) -> Any:
        if (
            not is_weight(leaf)
            or is_compressed(leaf)
            or (wanted is not None and path not in wanted)
        ):
            return leaf
        return probe(path, leaf, () if tap is None else (tap,), observe=tie, log=log)

    # Made anew within the step too: a compiled function would keep those that it closes over.
    taps = lambda: map_with_paths(tap, params, layouts)

    def step(params: Any, batch: Any, total: Any) -> Any:
        def floats(taps: Any) -> list[jax.Array]:
            out = accelerate(fn)(map_with_paths(tapped, params, taps), batch)
            return [x for x in jax.tree.leaves(out) if eqx.is_inexact_array(x)]

        wrap = lambda tap: (to_max(tap[0]) if statistic.maximum else tap[0], tap[1])
        out, backward = jax.vjp(floats, _map(wrap, params, taps()))
        if not out:
            raise TypeError("calibrate needs a function that returns floating arrays")
        [found] = backward([jnp.zeros_like(x) for x in out])

        def join(seen: Observed, new: Any) -> Observed:
            value = from_max(new[0]) if statistic.maximum else new[0]
            return _join(statistic, seen, value, new[1])

        return _map(join, params, total, found)

    return taps, eqx.filter_jit(step)


def _join(statistic: Statistic, seen: Observed, value: jax.Array, count: jax.Array) -> Observed:
    """A layer or expert that a batch did not reach keeps its state."""
    joined = statistic.join(seen.value, value, count)

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        met = (count > 0).reshape(*count.shape, *(1,) * (new.ndim - count.ndim))
        return jnp.where(met, new, old)

    return Observed(jax.tree.map(keep, seen.value, joined), seen.count + count)


@functools.cache
def _tie(statistic: Statistic) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """A zero that depends on rows and tap, and whose gradient to the tap is the statistic."""

    @jax.custom_vjp
    def tie(rows: jax.Array, tap: Any, mine: Any) -> jax.Array:
        return jnp.float32(0)

    def forward(rows: jax.Array, tap: Any, mine: Any) -> tuple[jax.Array, Any]:
        # The statistic, not the rows, waits for the backward pass.
        if mine is None:
            count = jnp.full(tap[1].shape, rows.shape[-2], jnp.float32)
            value = jnp.broadcast_to(statistic.of(rows), tap[0].shape)
        else:
            count = jnp.sum(mine, -1, dtype=jnp.float32)
            value = jax.lax.map(lambda one: _of_some(statistic, rows, one), mine)
        none = rows[None][:0]
        count += jnp.sum(none, dtype=jnp.float32)  # nothing, but of the devices of the rows
        return jnp.float32(0), (value, count, none)

    def backward(residuals: Any, _: jax.Array) -> Any:
        value, count, like = residuals
        value = to_max(value) if statistic.maximum else value
        return jnp.sum(like, 0), (value, count), None  # zeros, of the type of the rows

    tie.defvjp(forward, backward)

    def observe(rows: jax.Array, tap: Any, mine: Any) -> jax.Array:
        apart = _devices(rows) - _devices(tap[0])
        if apart:
            tap = _spread(tap, tuple(sorted(apart)), statistic.maximum)
        return tie(rows, tap, mine)

    return observe


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(tap: Any, devices: tuple[str, ...], maximum: bool) -> Any:
    """A tap for each device, within `shard_map`: JAX knows how to add up, not the largest."""
    return jax.tree.map(lambda part: jax.lax.pcast(part, devices, to="varying"), tap)


def _spread_forward(tap: Any, devices: tuple[str, ...], maximum: bool) -> tuple[Any, None]:
    return _spread(tap, devices, maximum), None


def _spread_backward(devices: tuple[str, ...], maximum: bool, _: None, found: Any) -> Any:
    value, count = found
    if maximum:
        value = to_max(jax.lax.pmax(from_max(value), devices))
    else:
        value = jax.lax.psum(value, devices)
    return ((value, jax.lax.psum(count, devices)),)


_spread.defvjp(_spread_forward, _spread_backward)


def _devices(x: jax.Array) -> frozenset[str]:
    """The axes of devices, within `shard_map`, along which `x` differs."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _of_some(statistic: Statistic, rows: jax.Array, mine: jax.Array) -> jax.Array:
    """The statistic of some of `rows[m, k]`: of the others as zeros, which are taken off a sum."""
    value = statistic.of(jnp.where(mine[:, None], rows, jnp.zeros_like(rows)))
    if statistic.maximum:
        return value
    return value - statistic.of(jnp.zeros_like(rows[:1])) * jnp.sum(~mine, dtype=jnp.float32)
