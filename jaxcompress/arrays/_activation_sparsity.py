"""Activation pruning: of every token the largest features, the others exactly zero."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "ActivationSparsity",
    "nm_activations",
    "prune_along",
    "threshold_activations",
    "top_k_activations",
]


@dataclasses.dataclass(frozen=True)
class ActivationSparsity:
    """How the activations that meet a weight are pruned: a spec for `prune_activations`.

    Of the features that a product contracts, the smallest share `sparsity` of each token
    becomes zero (top-k). With `group_size` that share of every `group_size` neighbours:
    `ActivationSparsity(0.5, group_size=4)` is 2:4. With `static` whatever is not above a
    threshold, which calibration puts where the share is `sparsity` over all tokens.

    >>> import jaxcompress as jc
    >>> jc.prune.ActivationSparsity(0.5, group_size=4)
    ActivationSparsity(sparsity=0.5, group_size=4, static=False)
    """

    sparsity: float
    group_size: int | None = None
    static: bool = False

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.group_size is None:
            return
        if self.static:
            raise ValueError("a static threshold knows no groups: leave out static or group_size")
        dropped = self.sparsity * self.group_size
        if self.group_size < 1 or abs(dropped - round(dropped)) > 1e-6:
            raise ValueError(
                f"a sparsity of {self.sparsity} drops no whole number of {self.group_size} features"
            )


def top_k_activations(x: jax.Array, sparsity: float, *, axis: int = -1) -> jax.Array:
    """The largest magnitudes of each token; the share `sparsity` of its features is zero.

    Of `k` features exactly `round(sparsity k)` become zero, of equal ones those with the
    higher index. The gradient passes straight through, to the features that are zero too,
    so that they can come back.

    Args:
      x: activations, of any floating dtype; a token is an index of the other axes.
      sparsity: of each token, from 0, below 1.
      axis: that of the features.

    Returns:
      An array like `x`. NaN counts as the largest of all, and is kept.

    Raises:
      ValueError: `sparsity` is out of range, or there is no such axis.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> x = jnp.array([[3.0, -1.0, 0.5, -4.0]])
    >>> jc.prune.top_k_activations(x, 0.5)
    Array([[ 3.,  0.,  0., -4.]], dtype=float32)
    >>> jax.grad(lambda x: jc.prune.top_k_activations(x, 0.5).sum())(x)
    Array([[1., 1., 1., 1.]], dtype=float32)

    Makhzani and Frey, 2013, k-Sparse Autoencoders, arXiv:1312.5663; Bengio et al., 2013,
    arXiv:1308.3432 (the gradient).
    """
    return prune_along(x, [_dim(x, axis)], ActivationSparsity(sparsity))


def threshold_activations(x: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
    """What is above a threshold: `x` where `|x| > threshold`, else zero.

    The gradient passes straight through, as in `top_k_activations`. For a threshold with
    a given share of zeros, calibrate one with `prune_activations`.

    Args:
      x: activations.
      threshold: a magnitude, or an array of them that broadcasts to `x`.

    Returns:
      An array like `x`. NaN is kept.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.threshold_activations(jnp.array([3.0, -1.0, 0.5, -4.0]), 1.0)
    Array([ 3.,  0.,  0., -4.], dtype=float32)

    Liu et al., 2024, Training-Free Activation Sparsity in Large Language Models,
    arXiv:2408.14690.
    """
    return _hide(x, ~(jnp.abs(x) <= jnp.asarray(threshold, x.dtype)))


def nm_activations(x: jax.Array, n: int, m: int, *, axis: int = -1) -> jax.Array:
    """The `n` largest magnitudes of every `m` neighbouring features of each token.

    The gradient passes straight through, and ties go to the lower index, as in
    `top_k_activations`.

    Args:
      x: activations.
      n, m: `n` of `m` are kept; a last group that is smaller keeps its `n` largest.
      axis: that of the features.

    Returns:
      An array like `x`.

    Raises:
      ValueError: unless `1 <= n <= m`, or there is no such axis.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.prune.nm_activations(jnp.array([3.0, -1.0, 0.5, -4.0]), 1, 2)
    Array([ 3.,  0.,  0., -4.], dtype=float32)

    Haziza et al., 2025, Accelerating Transformer Inference and Training with 2:4
    Activation Sparsity, arXiv:2503.16672.
    """
    if not 1 <= n <= m:
        raise ValueError(f"nm_activations keeps n of m, 1 <= n <= m; got n={n}, m={m}")
    return prune_along(x, [_dim(x, axis)], ActivationSparsity(1 - n / m, m))


def prune_along(x: jax.Array, dims: Sequence[int], pruning: ActivationSparsity) -> jax.Array:
    """`x` without its smallest features, which are those of `dims` merged in this order."""
    order = [d for d in range(x.ndim) if d not in dims] + list(dims)
    turned = lax.transpose(x, order)
    features = math.prod(x.shape[d] for d in dims)
    keep = _largest(turned.reshape(*turned.shape[: x.ndim - len(dims)], features), pruning)
    back = lax.transpose(keep.reshape(turned.shape), [order.index(d) for d in range(x.ndim)])
    return _hide(x, back)


def _largest(x: jax.Array, pruning: ActivationSparsity) -> jax.Array:
    """Which of the last axis are kept."""
    wide = jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    # As integers: the order is that of the magnitudes, and NaN is above infinity.
    size = lax.bitcast_convert_type(wide, jnp.int32 if wide.dtype.itemsize == 4 else jnp.int64)
    k = x.shape[-1]
    group = pruning.group_size or max(k, 1)
    count = group - round(pruning.sparsity * group)
    if count == group or x.size == 0:
        return jnp.ones(x.shape, bool)
    padded = jnp.pad(size, [(0, 0)] * (x.ndim - 1) + [(0, -k % group)], constant_values=-1)
    groups = padded.reshape(*x.shape[:-1], -1, group)
    if count == 0:
        return jnp.zeros(x.shape, bool)
    last = lax.top_k(groups, count)[0][..., -1:]
    above, equal = groups > last, groups == last
    room = count - jnp.sum(above, -1, keepdims=True)
    keep = above | (equal & (jnp.cumsum(equal, -1) <= room))
    return keep.reshape(padded.shape)[..., :k]


def _dim(x: jax.Array, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"there is no axis {axis} of features in activations of shape {x.shape}")
    return axis % x.ndim


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity of activations is at least 0 and below 1; got {sparsity}")


@jax.custom_jvp
def _hide(x: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, x, jnp.zeros_like(x))


@_hide.defjvp
def _(primals, tangents):
    return _hide(*primals), tangents[0]
