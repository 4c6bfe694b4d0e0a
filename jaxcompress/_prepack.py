"""`prepack`: weights in the order of this platform's kernels, once and not at every call."""

from typing import Any

import jax

from jaxcompress._layout import Layout
from jaxcompress._paths import map_with_paths
from jaxcompress.arrays import (
    BitmapSparseArray,
    BlockSparseArray,
    CodebookArray,
    NMSparseArray,
    PrunedInputArray,
    QuantizedArray,
    RotatedArray,
    ScaledArray,
    is_compressed,
)
from jaxcompress.arrays._prepacked import prepack_array
from jaxcompress.arrays._prepacked_sparse import prepack_sparse
from jaxcompress.arrays._quantized import replace
from jaxcompress.ops._block_linear import fits_panels
from jaxcompress.ops._cpu import native_missing

__all__ = ["prepack"]


def prepack(params: Any, *, layout: Any = None) -> Any:
    """Puts compressed weights into the order in which this platform's kernels read them.

    The values, their scales and `materialise` stay the same, and one copy serves every
    batch size; only products get faster, most of all with few rows. An array that is not
    prepacked runs too: its bytes are rearranged at every call, and `jaxcompress.explain`
    says so. Files keep the canonical order: `jaxcompress.io.save` writes that of either.

    On the CPU, `QuantizedArray` leaves become `PrepackedArray`s. A leaf stays as it is if
    its contracted axes are not known from the axes that share scales, or if they are not
    neighbours; so does every leaf where there are no native kernels, and on other platforms.

    `BitmapSparseArray`s become `PrepackedSparseArray`s where the product of what they keep
    is the faster one: floats up to 40 % kept, integers up to 8 % with quantized activations,
    20 % without. Other bitmaps and N:M get their zeros back, once and not at every call:
    small in the file, in memory as large and in products as fast as dense floats or
    integers. The codes of a `BlockSparseArray` with quantized activations change their order.
    Shared values are looked up, once too. Save them before, not after.

    Args:
      params: any pytree with compressed leaves.
      layout: what `jaxcompress.layout` found, for sparse floats whose product contracts
        another axis than the first of two: Equinox's `Linear`, say, or attention.

    Returns:
      A tree like it.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.quantize({"w": jnp.eye(64)}, {"w": jc.quantize.w8a8()})
    >>> fast = jc.prepack(params)
    >>> apply = jax.jit(jc.accelerate(lambda p, x: x @ p["w"]))
    >>> bool((apply(fast, jnp.ones((1, 64))) == apply(params, jnp.ones((1, 64)))).all())
    True
    """
    if jax.default_backend() != "cpu":
        return params

    def one(path: str, leaf: Any, found: Layout | None) -> Any:
        if isinstance(leaf, (ScaledArray, RotatedArray, PrunedInputArray)):
            return replace(leaf, array=one(path, leaf.array, found))
        if isinstance(leaf, CodebookArray):
            return leaf.materialise()
        if isinstance(leaf, BitmapSparseArray) and isinstance(leaf.values, CodebookArray):
            leaf = replace(leaf, values=leaf.values.materialise())
        if isinstance(leaf, BlockSparseArray) and not leaf.panels and not native_missing():
            return leaf.in_panels() if fits_panels(leaf) else leaf
        if isinstance(leaf, BitmapSparseArray) and not native_missing():
            columns = prepack_sparse(leaf, found.contract if found is not None else None)
            if not isinstance(columns, str):
                return columns
        if isinstance(leaf, (BitmapSparseArray, NMSparseArray)):
            leaf = leaf.expanded()
        if not isinstance(leaf, QuantizedArray) or native_missing():
            return leaf
        packed = prepack_array(leaf)
        return leaf if isinstance(packed, str) else packed

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    return map_with_paths(one, params, nothing if layout is None else layout)
