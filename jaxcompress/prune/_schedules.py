"""Schedules: how sparse after how many updates, and when the mask may change."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["Schedule", "constant", "polynomial"]


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

    def kept(self, count: jax.Array, size: int) -> jax.Array:
        """How many of `size` are kept after update `count`: the rest, rounded half up.

        At the end of the schedule the number is exact whatever the size; on the way it
        is as exact as float32.
        """
        final = size - int(self.final * size + 0.5)
        if self.end is None:
            return jnp.int32(final)
        progress = (count + 1 - self.begin) / (self.end - self.begin)
        sparsity = self.ramp(jnp.clip(progress, 0.0, 1.0))
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
    if not 0 <= initial <= 1:
        raise ValueError(f"sparsity is the fraction of zeros, 0 to 1; got {initial}")
    return Schedule(
        final=final,
        ramp=lambda progress: final + (initial - final) * (1 - progress) ** power,
        begin=begin,
        end=end,
        every=every,
    )
