"""Ranges that clip outliers, chosen from a histogram: percentile, MSE, entropy, SNR."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._histogram import BINS, edges, histogram, noise, quantile, top
from jaxcompress._statistics import Statistic, signed

__all__ = ["entropy", "magnitudes", "mse", "percentile", "snr"]

_PER_OCTAVE = 16  # candidate ranges
_CANDIDATES = 8 * _PER_OCTAVE  # from the whole range down to 1/256 of it
_LINEAR = 2048  # bins of the entropy method, as published


@functools.cache
def percentile(percent: float = 99.99) -> Statistic:
    """The range that holds `percent` of the activations, as many left out on either side.

    Args:
      percent: of the activations, above 0, at most 100.

    Returns:
      A statistic with the value `[low, high]`, zero always within; from a histogram in
      bins of relative width 1/32, linear within a bin.

    Raises:
      ValueError: `percent` is not a percentage.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((1, 1))}, jnp.arange(1000.0)[:, None]
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, [x], jc.statistics.percentile(90.0))
    >>> found["w"].value.round(-1)
    Array([[[  0., 950.]]], dtype=float32)
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100; got {percent}")

    def one(counts: jax.Array) -> jax.Array:
        each_side = jnp.sum(counts) * jnp.float32((1 - percent / 100) / 2)
        if percent == 100:
            return top(counts)
        # Fewer than that are on a side: it is left out, up to zero.
        return quantile(counts, jnp.broadcast_to(each_side, 2))

    return _from_histogram(f"percentile({percent})", one)


@functools.cache
def magnitudes() -> Statistic:
    """How many activations have which magnitude, for thresholds of any sparsity.

    A histogram in bins of relative width 1/32, which is what static thresholds of
    `jaxcompress.prune.prune_activations` are read off.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, -1.0], [0.0, 3.0]])
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, [x], jc.statistics.magnitudes())
    >>> counts = found["w"].value
    >>> counts[counts > 0]
    Array([1., 2., 1.], dtype=float32)
    """
    return Statistic("magnitudes", lambda rows: jnp.sum(histogram(rows), -2), lambda k: (BINS,))


@functools.cache
def mse(bits: int = 8, *, symmetric: bool = True) -> Statistic:
    """The range with the least squared error of rounding and clipping at `bits` bits.

    `argmin_T sum (x - Q_T(x))^2`, `T` from the absolute maximum down to 1/256 of it in
    steps of 2^(1/16).

    Args:
      bits: of the activations, 2 to 8.
      symmetric: False shrinks both ends of the range alike instead.

    Returns:
      A statistic with the value `[low, high]`.

    Raises:
      ValueError: `bits` is out of range.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((64, 1))}, jax.random.normal(jax.random.key(0), (512, 64))
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, [x], jc.statistics.mse(4))
    >>> bool(2.2 < found["w"].value.max() < 2.9)    # a normal distribution wants about 2.6
    True

    Banner et al., 2019, Post training 4-bit quantization of convolutional networks for
    rapid-deployment, arXiv:1810.05723.
    """
    steps = _steps(bits, symmetric)

    def one(counts: jax.Array) -> jax.Array:
        largest = top(counts)
        whole = jnp.full(2, jnp.max(largest)) if symmetric else largest
        shrunk = 2.0 ** (-jnp.arange(_CANDIDATES) / _PER_OCTAVE)
        error = lax.map(lambda s: noise(counts, -s * whole[0], s * whole[1], steps), shrunk)
        return whole * shrunk[jnp.argmin(error)]

    return _from_histogram(f"mse({bits}, symmetric={symmetric})", one)


@functools.cache
def entropy(bits: int = 8) -> Statistic:
    """The symmetric range whose rounded distribution is nearest in Kullback-Leibler divergence.

    `argmin_T KL(P_T || Q_T)`: `P_T` is the histogram of magnitudes up to `T`, with what lies
    beyond added to its last bin; `Q_T` is the part within `T` in `2^(b-1)` bins, each spread
    over those of its bins of `P_T` that are not empty. 2048 bins up to the maximum.

    Args:
      bits: of the activations, 2 to 8.

    Returns:
      A statistic with the value `[-T, T]`.

    Raises:
      ValueError: `bits` is out of range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((1, 1))}, jnp.linspace(-1.0, 1.0, 5000)[:, None]
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, [x], jc.statistics.entropy())
    >>> bool(found["w"].value.max() > 0.9)    # nothing to gain by clipping an even distribution
    True

    Migacz, 2017, 8-bit Inference with TensorRT, GPU Technology Conference.
    """
    _steps(bits, True)
    levels = 2 ** (bits - 1)

    def one(counts: jax.Array) -> jax.Array:
        magnitudes = jnp.sum(counts, 0)
        largest = top(magnitudes)
        below = jnp.concatenate([jnp.zeros(1), jnp.cumsum(magnitudes)])
        grid = jnp.arange(_LINEAR + 1) * (largest / _LINEAR)
        linear = jnp.diff(jnp.interp(grid, edges(), below))
        index = jnp.arange(_LINEAR)

        def divergence(size: jax.Array) -> jax.Array:
            inside = index < size
            kept = jnp.where(inside, linear, 0.0)
            outside = jnp.sum(linear) - jnp.sum(kept)
            p = kept + jnp.where(index == size - 1, outside, 0.0)
            level = jnp.where(inside, index * levels // size, levels)
            sums = jax.ops.segment_sum(kept, level, levels + 1)
            filled = jax.ops.segment_sum((p > 0).astype(jnp.float32), level, levels + 1)
            q = jnp.where(p > 0, (sums / jnp.maximum(filled, 1.0))[level], 0.0)
            p, q = p / jnp.sum(p), q / jnp.sum(q)
            return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-12)), 0.0))

        step = _LINEAR // 128
        sizes = jnp.arange(max(levels, step), _LINEAR + 1, step)
        best = sizes[jnp.argmin(lax.map(divergence, sizes))]
        return jnp.full(2, largest * best / _LINEAR)

    return _from_histogram(f"entropy({bits})", one)


@functools.cache
def snr(bits: int = 8) -> Statistic:
    """The symmetric range with the highest signal-to-noise ratio, averaged over batches.

    `argmax_T mean_batches 10 log10(sum x^2 / sum (x - Q_T(x))^2)`. For one batch it is the
    range of `mse`; over several each batch counts the same, however large its numbers are.

    Args:
      bits: of the activations, 2 to 8.

    Returns:
      A statistic with the value `[-T, T]`, `T` a power of 2^(1/8).

    Raises:
      ValueError: `bits` is out of range.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((64, 1))}, jax.random.normal(jax.random.key(0), (512, 64))
    >>> batches = [x, x, 100 * x[:8]]
    >>> found = jc.calibrate(lambda p, x: x @ p["w"], params, batches, jc.statistics.snr(4))
    >>> bool(found["w"].value.max() < 10)    # two batches of three are small
    True
    """
    steps = _steps(bits, True)
    ranges = edges()[4::4]  # eight an octave

    def decibels(counts: jax.Array) -> jax.Array:
        # The signal in the same terms: what rounding to nothing but zero would lose.
        middle = (edges()[1:] + edges()[:-1]) / 2
        signal = jnp.sum(jnp.where(counts > 0, counts * middle**2, 0.0))
        error = lax.map(lambda high: noise(counts, -high, high, steps), ranges)
        ratio = signal / jnp.maximum(error, 1e-30)
        return jnp.where(signal > 0, 10 * jnp.log10(jnp.maximum(ratio, 1e-30)), 0.0)

    def init(zeros: jax.Array) -> Any:
        return zeros[..., 0, : ranges.size], zeros[..., 1, :1]

    def update(state: Any, counts: jax.Array, _: jax.Array) -> Any:
        total, largest = state
        new = jnp.max(top(counts), -1, keepdims=True)
        return total + _over_layers(decibels)(counts), jnp.maximum(largest, new)

    def finalize(state: Any) -> jax.Array:
        total, largest = state
        best = jnp.asarray(ranges)[jnp.argmax(total, -1)][..., None]
        # Where nothing but zeros came, no range is better than another.
        best = jnp.where(largest > edges()[1], jnp.minimum(best, largest), 0.0)
        best = jnp.where(largest < edges()[-1], best, jnp.nan)
        return signed(jnp.concatenate([best, best], -1))

    return Statistic(
        f"snr({bits})", histogram, _histogram_shape, init=init, update=update, finalize=finalize
    )


def _steps(bits: int, symmetric: bool) -> int:
    """The number of steps between the smallest and the largest code."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8; got {bits}")
    return 2**bits - (2 if symmetric else 1)


def _histogram_shape(k: int) -> tuple[int, ...]:
    return (2, BINS)


def _over_layers(one: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`one` of each `[2, BINS]`, in turn: side by side they would need memory."""

    def every(counts: jax.Array) -> jax.Array:
        lead = counts.shape[:-2]
        found = lax.map(one, counts.reshape(-1, 2, BINS))
        return found.reshape(*lead, *found.shape[1:])

    return every


def _from_histogram(name: str, one: Callable[[jax.Array], jax.Array]) -> Statistic:
    """A statistic that adds histograms up; `one(counts) -> [below, above]`, both positive."""

    def finite(counts: jax.Array) -> jax.Array:
        size = jnp.where(jnp.any(counts[:, -1] > 0), jnp.nan, one(counts))
        return signed(jnp.where(size <= edges()[1], 0.0, size))  # the first bin is zero

    return Statistic(name, histogram, _histogram_shape, finalize=_over_layers(finite))
