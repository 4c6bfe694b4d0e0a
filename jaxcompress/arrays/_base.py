"""What every compressed array is: an array to JAX, fewer bytes in memory."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.extend.core import Primitive
from jax.typing import DTypeLike

from jaxcompress.arrays._uses import Use, listener

__all__ = ["CompressedArray", "is_compressed"]


class CompressedArray(quax.ArrayValue):
    """Base of the containers: an array of logical `shape` and `dtype`, stored smaller.

    A container is a pytree whose leaves are the arrays that are really stored, so it
    passes through `jax.jit`, `jax.tree.map`, sharding and checkpoints like any other
    part of a params tree. Inside `jaxcompress.accelerate` it stands for the dense
    array that `materialise` would return. Its static `path` says which parameter it
    came from.

    A container met by JAX outside `accelerate` raises `TypeError`: turning it into a
    dense array there would silently undo the compression.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jc.quantize.quantize({"w": jnp.ones((64, 8))}, {"w": jc.quantize.int4()})["w"]
    >>> isinstance(w, jc.arrays.CompressedArray), w.shape, w.nbytes
    (True, (64, 8), 288)
    """

    path: eqx.AbstractVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes that are really stored: every leaf, scales and masks included."""
        return sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self)
        )

    def lowered(self) -> "CompressedArray | jax.Array":
        """The next simpler form that rules know: a `QuantizedArray`, or a dense array."""
        return self

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> "CompressedArray | None":
        """This array through a primitive that moves its axes, still in its own form.

        None where it would lose that form; `lowered` then has its say.
        """
        return None

    def planes(self) -> dict[str, tuple[int, int]]:
        """Which fields are bit planes: how many bits a code has, and along which axis they lie."""
        return {}

    def stored(self) -> "CompressedArray":
        """What files hold: this array, or the same values in the canonical order."""
        return self

    def note(self, primitive: Primitive | str, op: str, implementation: str, why: str) -> None:
        """Tells `jaxcompress.explain` what becomes of this array."""
        here = listener()
        if here is not None:
            name = primitive if isinstance(primitive, str) else primitive.name
            kind = type(self).__name__
            here.uses.append(Use(self.path, kind, name, op, implementation, why, self.nbytes))

    def decoded_for(self, primitive: Primitive, why: str = "no rule for it") -> jax.Array:
        """The dense array, for a primitive that cannot take this one as it is."""
        self.note(primitive, "-", "materialised", why)
        return jnp.asarray(self.materialise())

    @staticmethod
    def default(primitive: Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """What quax does without a rule: decode, tell `explain`, go on with dense arrays."""
        dense = [
            v.decoded_for(primitive)
            if isinstance(v, CompressedArray)
            else v.materialise()
            if isinstance(v, quax.Value)
            else v
            for v in values
        ]
        return primitive.bind(*dense, **params)

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} ({self.path or 'no path'}) met "
            "JAX or NumPy outside jaxcompress.accelerate. Wrap the function, "
            "jc.accelerate(fn)(params, ...), or ask for the dense array with "
            ".materialise()."
        )

    # No __jax_array__: quax would take the container for a dense array.
    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NoReturn:
        self._refuse()

    def __matmul__(self, other: Any) -> NoReturn:
        self._refuse()

    def __rmatmul__(self, other: Any) -> NoReturn:
        self._refuse()


def is_compressed(x: Any) -> bool:
    """True for the containers; the `is_leaf` of every tree walk in this library.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.quantize({"w": jnp.ones((64, 8))}, {"w": jc.quantize.int4()})
    >>> len(jax.tree.leaves(params)), len(jax.tree.leaves(params, is_leaf=jc.arrays.is_compressed))
    (2, 1)
    """
    return isinstance(x, CompressedArray)
