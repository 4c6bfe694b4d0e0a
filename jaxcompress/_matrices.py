"""Weights of any shape as the matrices that their product contracts: `[batch, k, n]`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._layout import Layout

__all__ = ["Matrices"]

Axes = tuple[int, ...]


class Matrices(NamedTuple):
    """How to see a weight as `batch` matrices with the contracted axes, merged, first.

    The merged axes keep the order that they have in the weight, which is that of the
    features in a statistic of `jaxcompress.calibrate`.
    """

    shape: tuple[int, ...]
    contract: Axes
    batch: Axes

    @classmethod
    def of(cls, shape: Sequence[int], found: Layout) -> "Matrices":
        """Of a weight, or of one of its stacked layers: axes that are not there are gone."""
        ndim = len(shape)
        there = lambda axes: tuple(sorted(a for a in axes or () if a >= -ndim))
        return cls(tuple(shape), there(found.contract), there(found.batch))

    @property
    def _order(self) -> list[int]:
        ndim = len(self.shape)
        output = [a for a in range(-ndim, 0) if a not in self.contract and a not in self.batch]
        return [a % ndim for a in (*self.batch, *self.contract, *output)]

    @property
    def k(self) -> int:
        return math.prod(self.shape[a] for a in self.contract)

    @property
    def experts(self) -> int:
        return math.prod(self.shape[a] for a in self.batch)

    def split(self, w: jax.Array) -> jax.Array:
        """`[batch, k, n]` of the weight, or of anything that broadcasts to its shape."""
        w = jnp.broadcast_to(w, self.shape)
        return w.transpose(self._order).reshape(self.experts, self.k, -1)

    def join(self, matrices: jax.Array) -> jax.Array:
        """The weight of which `split` made the matrices."""
        order = self._order
        turned = matrices.reshape([self.shape[d] for d in order])
        return turned.transpose([order.index(d) for d in range(len(order))])

    def statistic(self, value: jax.Array, own: int) -> jax.Array:
        """A statistic with `own` axes of its own, as `[batch, ...]`."""
        shape = value.shape[value.ndim - own :]
        lead = [self.shape[a] if a in self.batch else 1 for a in range(-len(self.shape), 0)]
        return jnp.broadcast_to(value, (*lead, *shape)).reshape(self.experts, *shape)

    def outputs(self, columns: jax.Array) -> jax.Array:
        """`[batch, n]`, one number an output, with the rank of the weight."""
        order = self._order
        first = len(self.batch)
        sizes = [
            1 if first <= i < first + len(self.contract) else self.shape[d]
            for i, d in enumerate(order)
        ]
        return columns.reshape(sizes).transpose([order.index(d) for d in range(len(order))])

    def features(self, rows: jax.Array) -> Any:
        """`[batch, k]`, one number a feature, so that it broadcasts against the weight."""
        order = self._order
        sizes = [self.shape[a] for a in (*self.batch, *self.contract)]
        sizes += [1] * (len(order) - len(sizes))
        return rows.reshape(sizes).transpose([order.index(d) for d in range(len(order))])
