"""`LowRankArray`: a weight as the product of two thin ones."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._quantized import replace

__all__ = ["LowRankArray"]


class LowRankArray(CompressedArray):
    """An array of `w ~ u v`, of rank `r`: `u[..., *first, r]` and `v[..., r, *last]`.

    Its shape is `[..., *first, *last]`, of which the last `trailing` axes belong to `v`, one
    as a rule; axes in front (layers, experts) are axes of both factors, so slices are valid
    arrays. A product contracts all axes of one factor and goes through the rank, `(x u) v`,
    with `r (m + n)` multiplications a row instead of `m n`; it is never made dense. The
    factors are floats, and train as any other.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.outer(jnp.arange(8.0), jnp.ones(6))}
    >>> w = jc.prune.low_rank(params, ["w"], rank=1)["w"]
    >>> w, w.nbytes, params["w"].nbytes
    (LowRankArray(float32[8,6], rank 1, path='w'), 56, 192)
    """

    u: Any
    v: Any
    trailing: int = eqx.field(static=True, kw_only=True, default=1)
    path: str = eqx.field(static=True, kw_only=True, default="")

    @property
    def rank(self) -> int:
        return self.u.shape[-1]

    @property
    def leading(self) -> int:
        """How many axes, of layers and experts, both factors have."""
        return self.v.ndim - 1 - self.trailing

    def aval(self) -> jax.core.ShapedArray:
        shape = (*self.u.shape[:-1], *self.v.shape[self.leading + 1 :])
        return jax.core.ShapedArray(shape, self.u.dtype)

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        lead = tuple(range(self.leading))
        numbers = (((self.u.ndim - 1,), (self.leading,)), (lead, lead))
        return lax.dot_general(self.u, self.v, numbers)

    def lowered(self) -> jax.Array:
        self.note("expand", "-", "materialised", "no rule for two factors")
        return self.materialise()

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> "LowRankArray | None":
        if primitive is lax.convert_element_type_p:
            dtype = params["new_dtype"]
            if not jnp.issubdtype(dtype, jnp.floating):
                return None
            return replace(self, u=self.u.astype(dtype), v=self.v.astype(dtype))
        if primitive is lax.transpose_p:
            return self._transposed(tuple(params["permutation"]))
        return None

    def _transposed(self, order: tuple[int, ...]) -> "LowRankArray | None":
        """None unless axes in front stay there, and those of a factor together."""
        lead, ndim = self.leading, self.ndim
        middle = ndim - self.trailing
        front, rest = order[:lead], order[lead:]
        if any(d >= lead for d in front):
            return None
        first = tuple(d for d in rest if d < middle)
        last = tuple(d for d in rest if d >= middle)
        of_v = tuple(d - middle + lead + 1 for d in last)
        if rest == first + last:
            u = lax.transpose(self.u, (*front, *first, middle))
            return replace(self, u=u, v=lax.transpose(self.v, (*front, lead, *of_v)))
        if rest == last + first:
            u = lax.transpose(self.v, (*front, *of_v, lead))
            v = lax.transpose(self.u, (*front, middle, *first))
            return replace(self, u=u, v=v, trailing=len(first))
        return None

    def __repr__(self) -> str:
        if not hasattr(self.u, "shape"):  # a tree of labels or specs in its shape
            return f"LowRankArray(u={self.u}, v={self.v})"
        size = ",".join(map(str, self.shape))
        return f"LowRankArray({self.dtype.name}[{size}], rank {self.rank}, path={self.path!r})"
