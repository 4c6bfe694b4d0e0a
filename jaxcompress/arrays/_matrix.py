"""What the prepacked containers share: each is the matrix of one product."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._quax import stop_gradient_p
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._quantized import replace

__all__ = ["Form", "MatrixArray", "form"]


class MatrixArray(CompressedArray):
    """Base of the arrays that are stored for a product over exactly one `k`.

    `dims` is the logical shape without the layers and experts that lead, `contracted` the
    number of its axes that are `k`: the last ones with `transpose_w`, else the first.
    """

    dims: eqx.AbstractVar[tuple[int, ...]]
    contracted: eqx.AbstractVar[int]
    transpose_w: eqx.AbstractVar[bool]
    float_dtype: eqx.AbstractVar[np.dtype]

    @property
    def lead(self) -> tuple[int, ...]:
        """The layer and expert axes."""
        raise NotImplementedError

    def transposed(self) -> Self:
        """A matrix the other way round."""
        raise NotImplementedError

    @property
    def contracted_dims(self) -> tuple[int, ...]:
        """The axes of the logical shape that are `k`."""
        first = len(self.lead)
        if self.transpose_w:
            first += len(self.dims) - self.contracted
        return tuple(range(first, first + self.contracted))

    @property
    def k(self) -> int:
        """The length of the sums."""
        return math.prod((*self.lead, *self.dims)[d] for d in self.contracted_dims)

    @property
    def n(self) -> int:
        """The number of columns."""
        return math.prod(self.dims) // self.k

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray((*self.lead, *self.dims), self.float_dtype)

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> Self | None:
        if primitive is lax.convert_element_type_p:
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return replace(self, float_dtype=np.dtype(params["new_dtype"]))
        elif primitive is lax.transpose_p:
            if tuple(params["permutation"]) == (1, 0):
                return self.transposed()
        elif primitive is lax.copy_p:
            return self
        elif primitive is stop_gradient_p:
            floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
            return jax.tree.map(lambda a: lax.stop_gradient(a) if floating(a) else a, self)
        return None


class Form(NamedTuple):
    """A shape as matrices: how many axes lead, are `k`, and whether it is `[n, k]`."""

    lead: int
    contracted: int
    k: int
    n: int
    transpose_w: bool

    @property
    def matrix(self) -> tuple[int, int]:
        return (self.n, self.k) if self.transpose_w else (self.k, self.n)


def form(shape: Sequence[int], contract: Sequence[int]) -> Form | str:
    """The matrices of `shape` in a product over the axes `contract`, or why there are none."""
    axes = sorted(a % len(shape) for a in contract)
    if axes != list(range(axes[0], axes[-1] + 1)):
        return "the axes that are contracted are not neighbours"
    first, last = axes[0], axes[-1]
    transpose_w = last == len(shape) - 1
    free = range(first - 1, first) if transpose_w else range(last + 1, len(shape))
    if free.start < 0:
        return "it has no columns: every axis is contracted"
    k = math.prod(shape[first : last + 1])
    n = math.prod(shape[d] for d in free)
    return Form(min(first, free.start), len(axes), k, n, transpose_w)
