"""Schedules: how sparse after how many updates, and when the mask may change."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["Schedule", "constant", "cosine", "geometric", "one_shot", "periodic", "polynomial"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sparsity as a function of training.

    The mask is chosen anew after the updates `begin, begin + every, ...` (counted from
    0), and after update `end - 1`, the last; then it stays. `end=None` never stops.
    `ramp(progress)` is the sparsity at `progress` in (0, 1], the share of the way from
    `begin` to `end` that is done; it ends at `final`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> linear = jc.prune.Schedule(final=0.5, ramp=lambda p: 0.5 * p, begin=0, end=2, every=1)
    >>> linear.kept(jnp.array(0), 100)
    Array(75, dtype=int32)
    """

    final: float
    ramp: Callable[[jax.Array], jax.Array]
    begin: int
    end: int | None
    every: int

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise ValueError(f"sparsity is the fraction of zeros, 0 to 1; got {self.final}")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(f"a schedule has 0 <= begin < end; got {self.begin}, {self.end}")
        if self.every < 1:
            raise ValueError(f"every is a number of updates, 1 or more; got {self.every}")

    def due(self, count: jax.Array) -> jax.Array:
        """Whether the mask is chosen anew after update `count`."""
        now = (count >= self.begin) & ((count - self.begin) % self.every == 0)
        return now if self.end is None else (now & (count < self.end)) | (count == self.end - 1)

    def kept(self, count: jax.Array, size: int, share: float = 1.0) -> jax.Array:
        """How many of `size` are kept after update `count`: the rest, rounded half up.

        `share` multiplies the sparsity. At the end of the schedule the number is exact
        whatever the size; on the way it is as exact as float32.
        """
        final = size - int(self.final * share * size + 0.5)
        if self.end is None:
            return jnp.int32(final)
        progress = (count + 1 - self.begin) / (self.end - self.begin)
        sparsity = share * self.ramp(jnp.clip(progress, 0.0, 1.0))
        ramped = size - jnp.floor(sparsity * size + 0.5).astype(jnp.int32)
        return jnp.where(progress >= 1, jnp.int32(final), ramped)


def constant(
    sparsity: float, *, begin: int = 0, end: int | None = None, every: int = 1
) -> Schedule:
    """The same sparsity from update `begin` on: `s(t) = sparsity`.

    `end=begin + 1` prunes once and keeps the mask; `end=None` chooses it anew for ever.

    Args:
      sparsity: the fraction of zeros, 0 to 1 (for `nm`, of groups that are constrained).
      begin: the first update after which the mask is chosen, from 0.
      end: the update before which it is chosen for the last time; None for never.
      every: how many updates from one choice to the next.

    Raises:
      ValueError: a number out of its range.

    >>> import jaxcompress as jc
    >>> jc.prune.constant(0.9, end=1).final
    0.9
    """
    return Schedule(
        final=sparsity, ramp=lambda p: jnp.full_like(p, sparsity), begin=begin, end=end, every=every
    )


def polynomial(
    final: float, *, begin: int, end: int, initial: float = 0.0, power: float = 3.0, every: int = 1
) -> Schedule:
    """Fast at first and slower towards the end, while the network recovers.

    `s(t) = final + (initial - final) (1 - (t - begin) / (end - begin))^power`

    Args:
      final: the sparsity after update `end - 1`, 0 to 1.
      begin, end: the updates from and before which the mask is chosen, counted from 0.
      initial: the sparsity at `begin`.
      power: 3 in the paper; 1 is linear.
      every: how many updates from one choice to the next.

    Raises:
      ValueError: a number out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> [int(jc.prune.polynomial(0.9, begin=0, end=4).kept(jnp.array(t), 100)) for t in range(4)]
    [48, 21, 11, 10]

    Zhu and Gupta, 2017, To prune, or not to prune, arXiv:1710.01878.
    """
    _check_initial(initial)
    return Schedule(
        final=final,
        ramp=lambda progress: final + (initial - final) * (1 - progress) ** power,
        begin=begin,
        end=end,
        every=every,
    )


def one_shot(sparsity: float, *, at: int = 0) -> Schedule:
    """Prunes once, after update `at`, and keeps that mask.

    Args:
      sparsity: the fraction of zeros, 0 to 1.
      at: the update after which the mask is chosen, from 0.

    Raises:
      ValueError: a number out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.one_shot(0.9, at=2).due(jnp.arange(4)).tolist()
    [False, False, True, False]
    """
    return constant(sparsity, begin=at, end=at + 1)


def cosine(final: float, *, begin: int, end: int, initial: float = 0.0, every: int = 1) -> Schedule:
    """Slow at both ends, fast between them.

    `s(t) = final + (initial - final) (1 + cos(pi (t - begin) / (end - begin))) / 2`

    Args:
      final: the sparsity after update `end - 1`, 0 to 1.
      begin, end: the updates from and before which the mask is chosen, counted from 0.
      initial: the sparsity at `begin`.
      every: how many updates from one choice to the next.

    Raises:
      ValueError: a number out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> [int(jc.prune.cosine(0.8, begin=0, end=4).kept(jnp.array(t), 100)) for t in range(4)]
    [88, 60, 32, 20]

    Dettmers and Zettlemoyer, 2019, Sparse Networks from Scratch, arXiv:1907.04840.
    """
    _check_initial(initial)
    return Schedule(
        final=final,
        ramp=lambda p: final + (initial - final) * (1 + jnp.cos(jnp.pi * p)) / 2,
        begin=begin,
        end=end,
        every=every,
    )


def geometric(final: float, *, begin: int, end: int, every: int) -> Schedule:
    """The same share of what is left goes each time: `s(t) = 1 - (1 - final)^progress`.

    Iterative pruning, where `every` leaves time to recover between two prunings.

    Args:
      final: the sparsity after update `end - 1`, 0 to 1.
      begin, end: the updates from and before which the mask is chosen, counted from 0.
      every: how many updates from one choice to the next.

    Raises:
      ValueError: a number out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> schedule = jc.prune.geometric(0.75, begin=0, end=2, every=1)
    >>> [int(schedule.kept(jnp.array(t), 100)) for t in range(2)]
    [50, 25]

    Han et al., 2015, Learning both Weights and Connections, arXiv:1506.02626.
    """
    return Schedule(
        final=final,
        ramp=lambda p: 1 - jnp.asarray(1 - final, jnp.float32) ** p,
        begin=begin,
        end=end,
        every=every,
    )


def periodic(sparsity: float, *, begin: int, end: int, every: int) -> Schedule:
    """Sparse and dense in turns: from `begin` sparse for `every` updates, then dense, ...

    After update `end - 1` it is sparse for good. With `magnitude` in `sparsify` this is
    AC/DC: weights that a sparse phase left out start again from zero in a dense one.

    Args:
      sparsity: of the sparse phases, 0 to 1.
      begin: the update after which the first sparse phase begins.
      end: the update before which the last one does.
      every: the length of a phase.

    Raises:
      ValueError: a number out of its range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> schedule = jc.prune.periodic(0.9, begin=1, end=8, every=2)
    >>> [int(schedule.kept(jnp.array(t), 10)) for t in (1, 3, 5, 7)]
    [1, 10, 1, 1]

    Peste et al., 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks, arXiv:2106.12379.
    """
    length = end - begin

    def ramp(progress: jax.Array) -> jax.Array:
        phase = (jnp.round(progress * length).astype(jnp.int32) - 1) // every
        return jnp.where(phase % 2 == 0, jnp.float32(sparsity), 0.0)

    return Schedule(final=sparsity, ramp=ramp, begin=begin, end=end, every=every)


def _check_initial(initial: float) -> None:
    if not 0 <= initial <= 1:
        raise ValueError(f"sparsity is the fraction of zeros, 0 to 1; got {initial}")
