"""Statistics of activations: what is seen of a batch, and how batches are joined."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Observed", "Statistic", "absmax", "minmax", "moving_average", "second_moment"]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic of activations, of batches as they come.

    `of(rows)` maps `[..., m, k]` to `[..., *shape(k)]` in float32, which is all that is
    kept of a batch; the uses of a weight within it are joined by their sum, or by their
    maximum with `maximum` (`of` must then not be negative).

    Batches are joined by a pure triple: `state = init(zeros)`, `state = update(state,
    value, count)` after each batch that the weight was met in, `value = finalize(state)`.
    By default the state is the value, joined as the uses are. `zeros` has the shape of a
    value, with the axes of layers and experts in front; `count`, the rows that were seen,
    the first part of it.

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
    init: Callable[[jax.Array], Any] = lambda zeros: zeros
    update: Callable[[Any, jax.Array, jax.Array], Any] | None = None
    finalize: Callable[[Any], jax.Array] = lambda state: state

    def join(self, state: Any, value: jax.Array, count: jax.Array) -> Any:
        """`update`, or what stands for it where there is none."""
        if self.update is not None:
            return self.update(state, value, count)
        return jnp.maximum(state, value) if self.maximum else state + value


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
        # In NumPy: within a trace, jnp would make even known numbers abstract.
        if not isinstance(self.count, jax.core.Tracer) and not (np.asarray(self.count) > 0).all():
            raise ValueError(
                f"the statistic of {path!r} comes from no activations: calibration never "
                "ran through it, or its product does not lead to the function's output"
            )
        return self.value


# Each of these returns one instance for its arguments, because compiled functions are
# remembered by their statistic.


@functools.cache
def absmax() -> Statistic:
    """The largest magnitude of all activations that met a weight: `max |x|`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.statistics.absmax().of(jnp.array([[1.0, -3.0]]))
    Array(3., dtype=float32)
    """

    def of(rows: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(rows.astype(jnp.float32)), (-2, -1), initial=0.0)

    return Statistic("absmax", of, lambda k: (), maximum=True)


@functools.cache
def minmax() -> Statistic:
    """The range of all activations and zero: `[min(x, 0), max(x, 0)]`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, batches = {"w": jnp.ones((2, 3))}, [jnp.array([[1.0, -3.0]]), jnp.ones((1, 2))]
    >>> jc.calibrate(lambda p, x: x @ p["w"], params, batches, jc.statistics.minmax())["w"].value
    Array([[[-3.,  1.]]], dtype=float32)
    """
    return Statistic(
        "minmax",
        _extremes,
        lambda k: (2,),
        maximum=True,
        finalize=signed,
    )


@functools.cache
def moving_average(decay: float = 0.9) -> Statistic:
    """The range of a batch, averaged over batches with weights that fade.

    `r_t = decay r_(t-1) + (1 - decay) [min(x, 0), max(x, 0)]`, divided by `1 - decay^t`, so
    that it does not start at zero. Where a few batches have outliers, it forgets them.

    Args:
      decay: what a batch later is left of a batch, 0 to 1.

    Raises:
      ValueError: `decay` is not in [0, 1).

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, batches = {"w": jnp.ones((1, 3))}, [jnp.full((1, 1), x) for x in (1.0, 3.0)]
    >>> average = jc.statistics.moving_average(0.5)
    >>> jc.calibrate(lambda p, x: x @ p["w"], params, batches, average)["w"].value.round(4)
    Array([[[0.       , 2.3332999]]], dtype=float32)

    Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1; got {decay}")

    def update(state: Any, value: jax.Array, count: jax.Array) -> Any:
        # Of the values and of ones: their quotient is the average so far.
        return jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state, (value, jnp.ones_like(value))
        )

    def finalize(state: Any) -> jax.Array:
        average, weight = state
        return signed(jnp.where(weight > 0, average / weight, 0.0))

    return Statistic(
        f"moving_average({decay})",
        _extremes,
        lambda k: (2,),
        maximum=True,
        init=lambda zeros: (zeros, zeros),
        update=update,
        finalize=finalize,
    )


@functools.cache
def second_moment() -> Statistic:
    """The sum over rows of each row's outer product with itself: `X^T X`, `[k, k]`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.statistics.second_moment().of(jnp.array([[1.0, -3.0]]))
    Array([[ 1., -3.],
           [-3.,  9.]], dtype=float32)

    Frantar et al., 2023, GPTQ, arXiv:2210.17323.
    """

    def of(rows: jax.Array) -> jax.Array:
        rows = rows.astype(jnp.float32)
        return jax.lax.dot_general(
            rows,
            rows,
            (((rows.ndim - 2,),) * 2, (tuple(range(rows.ndim - 2)),) * 2),
            precision=jax.lax.Precision.HIGHEST,
        )

    return Statistic("second_moment", of, lambda k: (k, k))


def signed(size: jax.Array) -> jax.Array:
    """`[..., 2]`, how far a range reaches below and above zero, as its two ends."""
    return jnp.where(size == 0, 0.0, size * np.array([-1.0, 1.0], np.float32))


def _extremes(rows: jax.Array) -> jax.Array:
    """`[max(-x, 0), max(x, 0)]`: both are joined by a maximum."""
    rows = rows.astype(jnp.float32)
    largest = lambda x: jnp.max(x, (-2, -1), initial=0.0)
    return jnp.stack([largest(-rows), largest(rows)], -1)
