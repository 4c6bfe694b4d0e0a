"""`CodebookArray`: a few shared values, and for each weight which of them it has."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._quax import stop_gradient_p
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._packing import pack, unpack
from jaxcompress.arrays._quantized import replace

__all__ = ["CodebookArray", "codebook_array"]


class CodebookArray(CompressedArray):
    """An array of `x = codebook[indices]`: weights that share a few values.

    Invariants:

    - `codebook` is `[..., entries]`, floats, of at most `2^bits` entries.
    - `indices` are one for each element of `core`, the trailing shape that is flattened in
      row-major order, as uint8: bit planes along the last axis below eight bits.
    - With `zero` index 0 stands for exactly 0, which is no entry and is never trained, and
      index `i` for entry `i - 1`.
    - Leading axes (layers, experts) are axes of both leaves, so slices are valid arrays,
      and each has a codebook of its own.

    It is differentiable in `codebook`: the gradient of an entry is the sum of those of the
    weights that share it. `jaxcompress.quantize.trainable` labels it "weight". There is no
    product of its own: `jaxcompress.accelerate` looks the values up and multiplies floats.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.tile(jnp.array([0.5, -1.0, 0.25, 2.0]), 64).reshape(64, 4)
    >>> shared = jc.quantize.share({"w": w}, {"w": jc.quantize.codebook(bits=2)})["w"]
    >>> shared, shared.nbytes, bool((shared.materialise() == w).all())
    (CodebookArray(4 x float32[64,4], path='w'), 80, True)

    Han et al., 2016, Deep Compression, arXiv:1510.00149.
    """

    codebook: Any
    indices: Any
    core: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    bits: int = eqx.field(static=True, kw_only=True)
    zero: bool = eqx.field(static=True, kw_only=True, default=False)
    float_dtype: np.dtype = eqx.field(static=True, kw_only=True, default=np.dtype("float32"))
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray((*self.indices.shape[:-1], *self.core), self.float_dtype)

    def codes(self) -> jax.Array:
        """The indices `[..., size]`, unpacked, as uint8."""
        if self.bits == 8:
            return self.indices
        signed = unpack(self.indices, self.bits, math.prod(self.core), -1)
        return signed.astype(jnp.uint8) & (2**self.bits - 1)

    def materialise(self) -> jax.Array:
        """The dense array that this one stands for, in its logical dtype."""
        return _dense(replace(self, path=""))

    def lowered(self) -> jax.Array:
        why = "shared values are looked up at every call: no product of them"
        self.note("expand", "codebook", "materialised", why)
        return self.materialise()

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> "CodebookArray | None":
        if primitive is lax.convert_element_type_p:
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return replace(self, float_dtype=np.dtype(params["new_dtype"]))
        elif primitive is lax.copy_p:
            return self
        elif primitive is stop_gradient_p:
            return replace(self, codebook=lax.stop_gradient(self.codebook))
        return None

    def planes(self) -> dict[str, tuple[int, int]]:
        return {"indices": (self.bits, -1)} if self.bits < 8 else {}

    def __repr__(self) -> str:
        if not hasattr(self.indices, "shape"):  # a tree of labels or specs in its shape
            return f"CodebookArray(codebook={self.codebook}, indices={self.indices})"
        zero = "0 and " if self.zero else ""
        return (
            f"CodebookArray({zero}{self.codebook.shape[-1]} x {self.float_dtype.name}"
            f"[{','.join(map(str, self.shape))}], path={self.path!r})"
        )


@functools.partial(jax.jit, inline=True)  # as `QuantizedArray.materialise` is
def _dense(array: CodebookArray) -> jax.Array:
    table = array.codebook
    if array.zero:
        table = jnp.concatenate([jnp.zeros((*table.shape[:-1], 1), table.dtype), table], -1)
    places = array.codes().astype(jnp.int32)
    if table.shape[-1] == 0:
        return jnp.zeros(array.shape, array.float_dtype)
    found = jnp.take_along_axis(table, places, -1, mode="clip")
    return found.reshape(array.shape).astype(array.float_dtype)


def codebook_array(
    codebook: jax.Array, codes: np.ndarray, core: tuple[int, ...], bits: int, **static: Any
) -> CodebookArray:
    """A `CodebookArray` of indices `[..., size]`, bit-packed below eight bits."""
    indices = jnp.asarray(codes.astype(np.uint8))
    if bits < 8:
        indices = pack(indices, bits, -1)
    return CodebookArray(codebook, indices, core=core, bits=bits, **static)
