"""`share`: weights that share a few values, found by k-means."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress._layout import Layout
from jaxcompress._paths import complete, map_with_paths
from jaxcompress._rules import assign
from jaxcompress.arrays import CodebookArray, is_compressed
from jaxcompress.arrays._codebook import codebook_array

__all__ = ["Codebook", "codebook", "kmeans", "share"]

STEPS = 1000  # of Lloyd's algorithm, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook:
    """How a weight shares values; `codebook` makes it.

    >>> import jaxcompress as jc
    >>> jc.quantize.codebook(bits=4)
    Codebook(bits=4, leading=None)
    """

    bits: int
    leading: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"indices have 1 to 8 bits; got {self.bits}")
        if self.leading is not None and self.leading < 0:
            raise ValueError(f"leading counts axes; got {self.leading}")


def codebook(*, bits: int, leading: int | None = None) -> Codebook:
    """`2^bits` values that the weights of an array share, for `share`.

    Args:
      bits: of an index, 1 to 8. Where zeros are kept they take one of the `2^bits`.
      leading: how many leading axes (layers, experts) keep a codebook for each index. None
        takes the batch axes of the layout given to `share`, or, without one, none.

    >>> import jaxcompress as jc
    >>> jc.quantize.codebook(bits=5, leading=1).leading
    1
    """
    return Codebook(bits=bits, leading=leading)


def share(
    params: Any, rules: Mapping[str, Codebook | None], *, masks: Any = None, layout: Any = None
) -> Any:
    """Lets the weights that `rules` name share a few values each, as `CodebookArray` leaves.

    `w ~ c[i]`, the `c` and `i` of k-means in one dimension: Lloyd's algorithm from evenly
    spaced values between the smallest and the largest weight (linear initialization), until
    no weight changes its value. An entry that no weight has keeps its place.

    Train on: `jax.grad` with respect to an entry is the sum of the gradients of its weights;
    `trainable` labels it "weight", the indices "frozen". Then `jaxcompress.prune.pack` stores
    the indices of what masks keep only.

    Args:
      params: any pytree.
      rules: an ordered mapping of patterns of paths to `codebook(bits=...)`, as for
        `quantize`; None leaves its leaves alone.
      masks: what `jaxcompress.prune.masks` or `mask` returned. Where a mask drops, the weight
        is exactly zero and stays so; one of the `2^bits` indices says it.
      layout: what `jaxcompress.layout` found: stacked layers and experts keep their own.

    Returns:
      A tree like `params`; run it with `jaxcompress.accelerate`.

    Raises:
      ValueError: a rule that matches nothing; NaN or infinity; a mask of another shape; batch
        axes that do not lead; traced values (share outside `jit`).
      TypeError: a rule names a leaf that is no floating array, or is compressed already.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[0.9, 1.1], [-0.5, 0.0]])}
    >>> shared = jc.quantize.share(params, {"w": jc.quantize.codebook(bits=1)})
    >>> shared["w"].materialise()
    Array([[ 1.  ,  1.  ],
           [-0.25, -0.25]], dtype=float32)
    >>> loss = lambda p: jc.accelerate(lambda p: (jnp.ones(2) @ p["w"]).sum())(p)
    >>> jax.grad(loss, allow_int=True)(shared)["w"].codebook  # two weights each
    Array([2., 2.], dtype=float32)

    Han et al., 2016, Deep Compression, arXiv:1510.00149.
    """
    specs = assign(params, rules)
    for path, spec in specs.items():
        if not isinstance(spec, Codebook):
            raise TypeError(
                f"the rule for {path!r} maps to {spec!r}; expected jc.quantize.codebook(bits=...)"
            )

    def one(path: str, leaf: Any, mask: Any, found: Layout | None) -> Any:
        spec = specs.get(path)
        if spec is None:
            return leaf
        mask = None if isinstance(mask, optax.MaskedNode) else mask
        _check(path, leaf, mask)
        return _shared(path, leaf, mask, _leading(path, leaf, spec, found), spec.bits)

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    whole = nothing if masks is None else complete(masks, params)
    return map_with_paths(one, params, whole, nothing if layout is None else layout)


def kmeans(values: np.ndarray, count: int) -> np.ndarray:
    """`count` ascending centroids of `values`, in float64; zeros where there are no values."""
    ordered = np.sort(values.astype(np.float64), axis=None)
    if ordered.size == 0:
        return np.zeros(count)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], count)
    cuts = None
    for _ in range(STEPS):
        new = np.searchsorted(ordered, _middles(centroids))
        if cuts is not None and np.array_equal(new, cuts):
            break
        cuts = new
        edges = np.concatenate([[0], cuts, [ordered.size]])
        sizes = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(sizes, 1)
        centroids = np.where(sizes > 0, means, centroids)
    return centroids


def _middles(centroids: np.ndarray) -> np.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2


def _shared(path: str, leaf: Any, mask: Any, leading: int, bits: int) -> CodebookArray:
    lead, core = leaf.shape[:leading], leaf.shape[leading:]
    rows = lambda a: np.asarray(a).reshape(int(np.prod(lead)), -1)
    weights = rows(leaf).astype(np.float64)
    keep = np.ones(weights.shape, bool) if mask is None else rows(mask)
    entries = 2**bits - (mask is not None)
    table = np.zeros((len(weights), entries))
    codes = np.zeros(weights.shape, np.uint8)
    for i, (row, kept) in enumerate(zip(weights, keep)):
        table[i] = kmeans(row[kept], entries)
        place = np.searchsorted(_middles(table[i]), row, side="right") + (mask is not None)
        codes[i] = np.where(kept, place, 0)
    return codebook_array(
        jnp.asarray(table.reshape(*lead, entries), leaf.dtype),
        codes.reshape(*lead, -1),
        core,
        bits,
        zero=mask is not None,
        float_dtype=np.dtype(leaf.dtype),
        path=path,
    )


def _leading(path: str, leaf: Any, spec: Codebook, found: Layout | None) -> int:
    if spec.leading is not None:
        if spec.leading > leaf.ndim:
            raise ValueError(f"{path!r} has {leaf.ndim} axes, and {spec.leading} are to lead")
        return spec.leading
    batch = found.batch if found is not None and found.contract is not None else ()
    if tuple(batch) != tuple(range(-leaf.ndim, -leaf.ndim + len(batch))):
        raise ValueError(f"{path!r} has batch axes {batch} that do not come first")
    return len(batch)


def _check(path: str, leaf: Any, mask: Any) -> None:
    if is_compressed(leaf):
        raise TypeError(f"{path!r} is a {type(leaf).__name__} already")
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{path!r} is no floating array, and a rule names it")
    if any(isinstance(x, jax.core.Tracer) for x in (leaf, mask)):
        raise ValueError(f"share {path!r} outside jit: k-means looks at the weights")
    if not np.isfinite(np.asarray(leaf).astype(np.float64)).all():
        raise ValueError(f"{path!r} holds NaN or infinity, which no codebook can represent")
    if mask is not None and (mask.shape != leaf.shape or np.dtype(mask.dtype) != bool):
        raise ValueError(
            f"the mask of {path!r} must be bool of the shape {leaf.shape}; it is "
            f"{mask.dtype}{list(mask.shape)}"
        )
