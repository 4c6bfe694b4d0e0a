"""Low rank: weights as two thin factors, nearest to what the activations see of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._layout import Layout
from jaxcompress._matrices import Matrices
from jaxcompress._paths import map_with_paths
from jaxcompress._rules import Patterns, matched
from jaxcompress._statistics import Observed
from jaxcompress.arrays import LowRankArray, is_compressed

__all__ = ["low_rank"]


def low_rank(
    params: Any,
    rules: Patterns,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layout: Any = None,
    stats: Any = None,
    damping: float = 1e-6,
) -> Any:
    """Weights as products of two thin matrices, `w ~ u v`, by singular values.

    Of `w[m, n]` the rank `r` costs `r (m + n)` numbers. Without `stats` the factors are those
    of least `||w - u v||_F` (Eckart and Young). With the second moments `H = X^T X = S^T S` of
    the activations that meet a weight they are those of least `||X (w - u v)||_F`: `S w = P D Q^T`
    is cut off behind its `r` largest values, `u = S^-1 P D^1/2` and `v = D^1/2 Q^T`.

    Args:
      params: floating leaves of two dimensions and more.
      rules: patterns of the paths to factorize.
      rank: the rank of every leaf; or
      energy: the part of the sum of squared singular values that stays, 0 to 1: each leaf
        gets the least rank that keeps it, in each of its layers and experts. A leaf
        whose factors would be no smaller stays as it is.
      layout: what `jaxcompress.layout` found: which axes are contracted. Without it -2, and
        everything before is layers.
      stats: `jc.calibrate(fn, params, batches, jc.statistics.second_moment())`.
      damping: added to the diagonal of `H`, relative to its mean, so that what no activation
        showed is kept as well as the rest allows.

    Returns:
      A tree like `params` with `LowRankArray` leaves.

    Raises:
      ValueError: neither or both of rank and energy, or one out of range; a rank that saves
        nothing; a rule that matches nothing; axes that the factors cannot split; a weight
        or a statistic that is not finite.
      TypeError: a leaf that is no dense floating array.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, fn = {"w": jax.random.normal(jax.random.key(0), (16, 8))}, lambda p, x: x @ p["w"]
    >>> x = jax.random.normal(jax.random.key(1), (64, 16)) * jnp.arange(16.0)
    >>> stats = jc.calibrate(fn, params, [x], jc.statistics.second_moment())
    >>> small = jc.prune.low_rank(params, ["w"], rank=4, stats=stats)
    >>> error = lambda p: float(jnp.linalg.norm(jc.accelerate(fn)(p, x) - fn(params, x)))
    >>> error(small) < error(jc.prune.low_rank(params, ["w"], rank=4))
    True

    Eckart and Young, 1936, The approximation of one matrix by another of lower rank; Wang et
    al., 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
    Compression, arXiv:2403.07378.
    """
    if (rank is None) == (energy is None):
        raise ValueError("low_rank takes rank= or energy=, one of them")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is 1 or more; got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is above 0 and up to 1; got {energy}")
    if not damping > 0:
        raise ValueError(f"damping is positive; got {damping}")
    chosen = matched(params, rules)

    def one(path: str, leaf: Any, found: Layout | None, seen: Observed | None) -> Any:
        if path not in chosen:
            return leaf
        _check(path, leaf)
        if leaf.size == 0:
            if energy is not None:
                return leaf
            raise ValueError(f"{path!r} has the shape {leaf.shape}: it has no numbers")
        if layout is None:
            found = Layout((-2,), (-1,), tuple(range(-leaf.ndim, -2)))
        if found is None or found.contract is None:
            why = "it has no axes" if found is None else found.why
            raise ValueError(f"the layout has no contracting axes for {path!r} ({why})")
        if stats is not None and seen is None:
            raise ValueError(f"stats has nothing about {path!r}")
        lead, first_contracts = _sides(path, leaf, found)
        matrices = Matrices.of(leaf.shape, found)
        w = np.asarray(matrices.split(jnp.asarray(leaf).astype(jnp.float32)), np.float64)
        if not np.isfinite(w).all():
            raise ValueError(f"{path!r} holds NaN or infinity")
        moments = None if seen is None else np.asarray(matrices.statistic(seen.of(path), 2))
        if moments is not None and not np.isfinite(moments).all():
            raise ValueError(f"the second moments of the activations of {path!r} are not finite")
        if moments is not None and moments.shape[-1] != w.shape[1]:
            raise ValueError(
                f"the statistic of {path!r} is of {moments.shape[-1]} inputs, and it contracts "
                f"{w.shape[1]}; give layout=jc.layout(fn, params, x)"
            )
        if moments is not None and layout is None and w.shape[1] == w.shape[2]:
            raise ValueError(
                f"{path!r} is square, so its statistic could be of either side; "
                "give layout=jc.layout(fn, params, x)"
            )
        left, values, right = _svd(w, moments, damping)
        _, k, n = w.shape
        least = rank if energy is None else _least(values, energy)
        if least * (k + n) >= k * n:
            if energy is not None:
                return leaf
            raise ValueError(
                f"a rank of {least} saves nothing of {path!r}, {k} inputs and {n} outputs; "
                f"below {k * n / (k + n):.4g} it does"
            )
        root = np.sqrt(values[:, :least])
        near, far = left[..., :least] * root[:, None], right[:, :least] * root[..., None]
        if not first_contracts:
            near, far = far.swapaxes(-1, -2), near.swapaxes(-1, -2)
        split = leaf.ndim - (len(found.output) if first_contracts else len(found.contract))
        shape = leaf.shape
        u = near.reshape(*shape[:split], least)
        v = far.reshape(*shape[:lead], least, *shape[split:])
        put = lambda part: jnp.asarray(part, jnp.asarray(leaf).dtype)
        return LowRankArray(put(u), put(v), trailing=leaf.ndim - split, path=path)

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    return map_with_paths(
        one, params, nothing if layout is None else layout, nothing if stats is None else stats
    )


def _check(path: str, leaf: Any) -> None:
    if is_compressed(leaf):
        raise TypeError(f"{path!r} is a {type(leaf).__name__} already")
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{path!r} is no floating array")
    if leaf.ndim < 2:
        raise ValueError(f"{path!r} has the shape {leaf.shape}; two factors need a matrix")
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"factorize {path!r} outside jit: its rank decides shapes")


def _sides(path: str, leaf: Any, found: Layout) -> tuple[int, bool]:
    """How many axes are layers and experts, and whether the contracted ones come before the
    outputs; raises unless the axes are three runs."""
    assert found.contract is not None
    side = lambda axes: sorted(a % leaf.ndim for a in axes)
    batch, contract, output = side(found.batch), side(found.contract), side(found.output)
    for first in (True, False):
        runs = [*batch, *(contract if first else output), *(output if first else contract)]
        if output and runs == [*range(leaf.ndim)]:
            return len(batch), first
    raise ValueError(
        f"{path!r} contracts {found.contract}, with outputs {found.output} and batch axes "
        f"{found.batch}; two factors need batch axes first, and each of the others together"
    )


def _svd(
    w: np.ndarray, moments: np.ndarray | None, damping: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`left, values, right` of `w[batch, k, n]`, of which `left` is not orthogonal with moments."""
    if moments is None:
        return np.linalg.svd(w, full_matrices=False)
    # Any root of H will do; that of its eigenvalues is there for a singular one too.
    values, vectors = np.linalg.eigh(moments.astype(np.float64))
    mean = values.mean(-1, keepdims=True)
    values = np.maximum(values, 0) + damping * np.where(mean > 0, mean, 1.0)
    root = np.sqrt(values)[..., None]
    left, found, right = np.linalg.svd(root * (vectors.swapaxes(-1, -2) @ w), full_matrices=False)
    return vectors @ (left / root), found, right


def _least(values: np.ndarray, energy: float) -> int:
    """The least rank that keeps `energy` of the squares, in each row of `values`."""
    squares = np.cumsum(values**2, -1)
    # Rounding aside, the last is all of it.
    enough = squares >= energy * squares[:, -1:] * (1 - 1e-12)
    return max(1, int(enough.argmax(-1).max()) + 1)
