"""`calibrate`: statistics of the activations that meet each weight."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._probe import probe
from jaxcompress._layout import Layout, is_weight, layout
from jaxcompress._max_dtype import from_max, to_max
from jaxcompress._paths import map_with_paths
from jaxcompress._rules import Patterns, matched
from jaxcompress.arrays import is_compressed

__all__ = ["Observed", "Statistic", "absmax", "calibrate", "second_moment"]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic of activations, of batches as they come.

    `of(rows)` maps `[..., m, k]` to `[..., *shape(k)]` in float32; the uses of a weight,
    and the batches, are joined by their sum, or by their maximum with `maximum`.

    Your own statistic is one of these, the mean square of each feature here:

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> squares = jc.statistics.Statistic(
    ...     "squares", lambda rows: jnp.sum(rows**2, -2), lambda k: (k,)
    ... )
    >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}
    >>> found = jc.calibrate(fn, params, [jnp.array([[1.0, 2.0], [3.0, 4.0]])], squares)["w"]
    >>> found.value[0, 0] / found.count[0, 0]
    Array([ 5., 10.], dtype=float32)
    """

    name: str
    of: Callable[[jax.Array], jax.Array]
    shape: Callable[[int], tuple[int, ...]]
    maximum: bool = False


def absmax() -> Statistic:
    """The largest magnitude of all activations that met a weight: `max |x|`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.statistics.absmax().of(jnp.array([[1.0, -3.0]]))
    Array(3., dtype=float32)
    """
    return _ABSMAX


def second_moment() -> Statistic:
    """The sum over rows of each row's outer product with itself: `X^T X`, `[k, k]`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.statistics.second_moment().of(jnp.array([[1.0, -3.0]]))
    Array([[ 1., -3.],
           [-3.,  9.]], dtype=float32)

    Frantar et al., 2023, GPTQ, arXiv:2210.17323.
    """
    return _SECOND_MOMENT


def _largest(rows: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(rows.astype(jnp.float32)), (-2, -1), initial=0.0)


def _gram(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return jax.lax.dot_general(
        rows,
        rows,
        (((rows.ndim - 2,),) * 2, (tuple(range(rows.ndim - 2)),) * 2),
        precision=jax.lax.Precision.HIGHEST,
    )


# One instance each, because compiled functions are remembered by their statistic.
_ABSMAX = Statistic("absmax", _largest, lambda k: (), maximum=True)
_SECOND_MOMENT = Statistic("second_moment", _gram, lambda k: (k, k))


class Observed(NamedTuple):
    """What a statistic found for one weight: its value, and of how many rows.

    `value` has the rank of the weight, size 1 or that of a layer or expert axis, and
    the axes of the statistic after it; `count` has the first part of that shape.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> seen = jc.statistics.Observed(jnp.array([[2.0]]), jnp.array([[0.0]]))
    >>> seen.of("layer/kernel")
    Traceback (most recent call last):
      ...
    ValueError: the statistic of 'layer/kernel' comes from no activations: calibration never
    ran through it, or its product does not lead to the function's output
    """

    value: jax.Array
    count: jax.Array  # type: ignore[assignment]

    def of(self, path: str) -> jax.Array:
        """The value; raises `ValueError` if any part of it comes from no rows at all."""
        if not isinstance(self.count, jax.core.Tracer) and not bool(jnp.all(self.count > 0)):
            raise ValueError(
                f"the statistic of {path!r} comes from no activations: calibration never "
                "ran through it, or its product does not lead to the function's output"
            )
        return self.value


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
    reaches (behind `stop_gradient` or `argmax`) are not seen.

    Args:
      fn: called as `fn(params, batch)`.
      params: floating leaves of two dimensions and more are observed; compressed leaves
        act as they do in `accelerate` and are not.
      batches: an iterable, read once, one batch in memory at a time.
      statistic: `jc.statistics.absmax()`, `jc.statistics.second_moment()`, or your own.
      rules: patterns of the paths to observe; all if None.

    Returns:
      A tree like `params` with an `Observed(value, count)` for each observed leaf, None
      for the others. A leaf that met no product has count 0, and using it raises.

    Raises:
      ValueError: no batches, or a pattern that matches nothing.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, batches = {"w": jnp.ones((3, 2))}, [jnp.ones((5, 3)), -2 * jnp.ones((5, 3))]
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, batches, jc.statistics.absmax())
    >>> found["w"].value, found["w"].count
    (Array([[2.]], dtype=float32), Array([[10.]], dtype=float32))
    """
    wanted = None if rules is None else matched(params, rules)
    total, step = None, None
    for batch in batches:
        if step is None:
            step = _step(fn, layout(fn, params, batch), statistic, wanted)
        new = step(params, batch)
        total = new if total is None else _join(total, new, statistic)
    if total is None:
        raise ValueError("calibrate got no batches")
    return total


def _step(fn: Callable, layouts: Any, statistic: Statistic, wanted: set[str] | None) -> Callable:
    """One batch: a tree like params of `Observed`, compiled once."""
    tie = _tie(statistic)

    def observed(path: str, leaf: Any, found: Layout | None) -> bool:
        if found is None or found.contract is None or is_compressed(leaf):
            return False
        return wanted is None or path in wanted

    def step(params: Any, batch: Any) -> Any:
        flags = map_with_paths(observed, params, layouts)

        def tap(path: str, leaf: Any, found: Layout | None, flag: bool) -> Any:
            if found is None or found.contract is None or not flag:
                return None
            k = math.prod(leaf.shape[a] for a in found.contract)
            lead = [leaf.shape[a] if a in found.batch else 1 for a in range(-leaf.ndim, 0)]
            value = jnp.zeros((*lead, *statistic.shape(k)), jnp.float32)
            return to_max(value) if statistic.maximum else value, jnp.zeros(lead, jnp.float32)

        def tapped(path: str, leaf: Any, tap: Any) -> Any:
            return leaf if tap is None else probe(path, leaf, (tap,), observe=tie)

        def floats(taps: Any) -> list[jax.Array]:
            out = accelerate(fn)(map_with_paths(tapped, params, taps), batch)
            return [x for x in jax.tree.leaves(out) if eqx.is_inexact_array(x)]

        taps = map_with_paths(tap, params, layouts, flags)
        out, backward = jax.vjp(floats, taps)
        if not out:
            raise TypeError("calibrate needs a function that returns floating arrays")
        [found] = backward([jnp.zeros_like(x) for x in out])

        def read(path: str, leaf: Any, tap: Any) -> Any:
            if tap is None:
                return Observed(jnp.zeros(()), jnp.zeros(())) if is_weight(leaf) else None
            value, count = tap
            return Observed(from_max(value) if statistic.maximum else value, count)

        return map_with_paths(read, params, found)

    return eqx.filter_jit(step)


def _join(old: Any, new: Any, statistic: Statistic) -> Any:
    def join(a: Observed, b: Observed) -> Observed:
        value = jnp.maximum(a.value, b.value) if statistic.maximum else a.value + b.value
        return Observed(value, a.count + b.count)

    return jax.tree.map(join, old, new, is_leaf=lambda x: isinstance(x, Observed))


@functools.cache
def _tie(statistic: Statistic) -> Callable[[jax.Array, Any], jax.Array]:
    """A zero that depends on rows and tap, and whose gradient to the tap is the statistic."""

    @jax.custom_vjp
    def tie(rows: jax.Array, tap: Any) -> jax.Array:
        return jnp.float32(0)

    def forward(rows: jax.Array, tap: Any) -> tuple[jax.Array, Any]:
        # The statistic, not the rows, waits for the backward pass.
        count = jnp.full(tap[1].shape, rows.shape[-2], jnp.float32)
        value = jnp.broadcast_to(statistic.of(rows), tap[0].shape)
        return jnp.float32(0), (value, count, jnp.zeros((0, *rows.shape), rows.dtype))

    def backward(residuals: Any, _: jax.Array) -> Any:
        value, count, like = residuals
        value = to_max(value) if statistic.maximum else value
        return jnp.zeros(like.shape[1:], like.dtype), (value, count)

    tie.defvjp(forward, backward)
    return tie
