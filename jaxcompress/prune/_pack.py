"""`pack`: store what pruning has kept, and nothing else."""

from typing import Any

import jax
import numpy as np
import optax

from jaxcompress._layout import Layout
from jaxcompress._paths import complete, map_with_paths
from jaxcompress.arrays import CodebookArray, FakeQuantArray, QuantizedArray, is_compressed
from jaxcompress.arrays._bitmap import bitmap_of
from jaxcompress.prune._patterns import Pattern

__all__ = ["pack"]


def pack(params: Any, masks: Any, *, pattern: Pattern | None = None, layout: Any = None) -> Any:
    """Stores what pruning has kept, in the form of the pattern that it was pruned to.

    `nm` gives `NMSparseArray`s, `block` `BlockSparseArray`s. Any other pattern, and None,
    gives `BitmapSparseArray`s, a bit each and the kept values: `bytes = size / 8 +
    kept * bits / 8`, scales aside, at 90 % sparsity 4.1 bits a weight in float32, 1.4
    with four-bit values.

    Args:
      params: dense leaves, `QuantizedArray`s, `FakeQuantArray`s, which are converted, or, for
        bitmaps, `CodebookArray`s, whose leading axes are those that have their own codebook.
      masks: what `jaxcompress.prune.masks` or `mask` returned: True keeps;
        `optax.MaskedNode()` leaves the leaf as it is.
      pattern: `nm(2, 4, axis=-2)`, `block(16, 16)`, ...; every mask must fit it.
      layout: what `jaxcompress.layout` found, for stacked layers and experts: their
        batch axes then stay axes, as `lax.scan` needs. Blocks of a weight that contracts
        its last axis then lie along that.

    Returns:
      A tree like `params`, where every weight that its mask drops is zero.

    Raises:
      ValueError: a mask of another shape than its leaf, or that does not fit the pattern
        (where is said); batch axes that do not lead;
        traced values (how many are kept decides shapes, so pack outside `jit`).
      TypeError: a leaf that cannot be packed: integers, one packed already, or one with
        zero points.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "b": jnp.ones(2)}
    >>> masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5)
    >>> jc.prune.pack(params, masks)["w"]
    BitmapSparseArray(float32[2,2], 50.0% zeros, path='w')

    Han et al., 2016, Deep Compression, arXiv:1510.00149.
    """

    def one(path: str, leaf: Any, mask: Any, found: Layout | None = None) -> Any:
        if isinstance(mask, optax.MaskedNode):
            return leaf
        if isinstance(leaf, FakeQuantArray):
            leaf = leaf.convert()
        _check(path, leaf, mask)
        if pattern is not None and pattern.store is not None:
            if isinstance(leaf, CodebookArray):
                raise TypeError(f"{path!r} has shared values, which only a bitmap can hold")
            return pattern.store(path, leaf, mask, found)
        batch = found.batch if found is not None and found.contract is not None else ()
        leading = len(batch)
        if tuple(batch) != tuple(range(-leaf.ndim, -leaf.ndim + leading)):
            raise ValueError(f"{path!r} has batch axes {batch} that do not come first")
        return bitmap_of(leaf, mask, leading, path)

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    whole = complete(masks, params)
    return map_with_paths(one, params, whole, nothing if layout is None else layout)


def _check(path: str, leaf: Any, mask: Any) -> None:
    if isinstance(leaf, QuantizedArray):
        if leaf.zero_point is not None:
            raise TypeError(f"{path!r} has zero points; a dropped weight has to be code 0")
    elif is_compressed(leaf) and not isinstance(leaf, CodebookArray):
        raise TypeError(f"{path!r} is a {type(leaf).__name__} already")
    elif not hasattr(leaf, "dtype") or not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        raise TypeError(f"{path!r} is no floating array, and has a mask")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((leaf, mask))):
        raise ValueError(f"pack {path!r} outside jit: how many are kept decides its shape")
    if getattr(mask, "shape", None) != leaf.shape or np.dtype(mask.dtype) != bool:
        raise ValueError(
            f"the mask of {path!r} must be bool of the shape {leaf.shape}; it is "
            f"{getattr(mask, 'dtype', type(mask).__name__)}{list(getattr(mask, 'shape', ()))}"
        )
