"""Activation pruning by rule, and the sparsity that it reaches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._accelerate import accelerate
from jaxcompress._calibrate import calibrate
from jaxcompress._histogram import quantile
from jaxcompress._paths import map_with_paths
from jaxcompress._rules import assign
from jaxcompress._statistics import Observed, Statistic
from jaxcompress.arrays import PrunedInputArray, is_compressed
from jaxcompress.arrays._activation_sparsity import ActivationSparsity
from jaxcompress.arrays._qtype import float_dtype
from jaxcompress.arrays._quantized import replace

__all__ = ["activation_sparsity", "prune_activations"]


def prune_activations(
    params: Any, rules: Mapping[str, ActivationSparsity | None], *, stats: Any = None
) -> Any:
    """Weights whose products, under `jaxcompress.accelerate`, prune the activations first.

    `y = prune(x) w`: of each token the features that are smallest are exactly zero, and the
    function stays as it is. Gradients pass straight through. What is saved are the bytes
    and products of a device that skips zeros; `jaxcompress.explain` says where none does.

    Args:
      params: dense leaves, or compressed ones: their activations are quantized afterwards.
      rules: patterns of paths to `ActivationSparsity`, as for `jaxcompress.quantize.quantize`.
      stats: for static thresholds, `jc.calibrate(fn, params, batches,
        jc.statistics.magnitudes())` of the dense parameters.

    Returns:
      A tree like `params` with `PrunedInputArray` leaves.

    Raises:
      ValueError: a rule that matches nothing; a static threshold without statistics, with
        those of something else, or with activations that were not finite.
      TypeError: a rule for a leaf that is no floating array of two axes, or pruned already;
        a rule that is no `ActivationSparsity`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"w": jnp.ones((64, 8))}, jax.random.normal(jax.random.key(0), (512, 64))
    >>> fn = lambda p, x: x @ p["w"]
    >>> stats = jc.calibrate(fn, params, [x], jc.statistics.magnitudes())
    >>> rules = {"w": jc.prune.ActivationSparsity(0.6, static=True)}
    >>> sparse = jc.prune.prune_activations(params, rules, stats=stats)
    >>> round(float(jc.prune.activation_sparsity(fn, sparse, [x])["w"]), 2)
    0.6

    Liu et al., 2024, Training-Free Activation Sparsity in Large Language Models,
    arXiv:2408.14690.
    """
    chosen = assign(params, rules)

    def one(path: str, leaf: Any, seen: Any = None) -> Any:
        if path not in chosen:
            return leaf
        pruning = chosen[path]
        if not isinstance(pruning, ActivationSparsity):
            raise TypeError(
                f"the rule for {path!r} maps to {pruning!r}; expected "
                "jc.prune.ActivationSparsity(0.5), say"
            )
        if isinstance(leaf, PrunedInputArray):
            raise TypeError(f"the activations of {path!r} are pruned already")
        if not hasattr(leaf, "dtype") or len(leaf.shape) < 2:
            raise TypeError(f"{path!r} is no array of two axes or more: it contracts nothing")
        float_dtype(leaf.dtype, path)
        threshold = _threshold(path, leaf, seen, pruning.sparsity) if pruning.static else None
        return PrunedInputArray(leaf, threshold, pruning=pruning, path=path)

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    return map_with_paths(one, params, nothing if stats is None else stats)


def _threshold(path: str, leaf: Any, seen: Any, sparsity: float) -> jax.Array:
    if not isinstance(seen, Observed):
        raise ValueError(
            f"the rule for {path!r} is static and needs stats=jc.calibrate(fn, params, batches, "
            "jc.statistics.magnitudes())"
        )
    counts = seen.of(path)
    if counts.ndim != len(leaf.shape) + 1:
        raise ValueError(
            f"the statistic of {path!r} has the shape {counts.shape}; thresholds take the "
            "histograms of jc.statistics.magnitudes()"
        )
    if not isinstance(counts, jax.core.Tracer) and bool((counts[..., -1] > 0).any()):
        raise ValueError(f"activations that met {path!r} in calibration are not finite")
    above = (1 - sparsity) * jnp.sum(counts, -1)
    return jnp.zeros_like(above) if sparsity == 0 else quantile(counts, above)


def activation_sparsity(fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> Any:
    """The share of zeros in the activations that meet each weight.

    Zeros that an activation function made count as those that `prune_activations` did.

    Args:
      fn: called as `fn(params, batch)`.
      params: floating leaves of two axes and more are looked at, those with pruned
        activations as what is left of them; other compressed leaves are not.
      batches: an iterable, read once.

    Returns:
      A tree like `params` with the share of each such leaf, one for each layer or expert
      of a stack; None for the others, and where no product leads to the output.

    Raises:
      ValueError: no batches.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, x = {"a": jnp.eye(4), "b": jnp.ones((4, 1))}, jnp.array([[1.0, -2.0, 3.0, -4.0]])
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> jc.prune.activation_sparsity(fn, params, [x])
    {'a': Array(0., dtype=float32), 'b': Array(0.5, dtype=float32)}
    """

    def dense(leaf: Any) -> Any:
        return leaf.materialise() if isinstance(leaf, PrunedInputArray) else leaf

    def pruned(p: Any, batch: Any) -> Any:
        wrap = lambda _, leaf, was: (
            replace(was, array=leaf) if isinstance(was, PrunedInputArray) else leaf
        )
        return accelerate(fn)(map_with_paths(wrap, p, params), batch)

    plain = jax.tree.map(dense, params, is_leaf=is_compressed)
    found = calibrate(pruned, plain, batches, _zeros())

    def share(_: str, leaf: Any, seen: Observed | None) -> jax.Array | None:
        if seen is None or not bool(np.all(seen.count > 0)):
            return None
        return jnp.squeeze(seen.value / seen.count)

    return map_with_paths(share, plain, found)


@functools.cache
def _zeros() -> Statistic:
    """The share of zeros, summed over rows."""

    def of(rows: jax.Array) -> jax.Array:
        zeros = jnp.sum(rows == 0, (-2, -1)).astype(jnp.float32)
        return zeros / max(rows.shape[-1], 1)

    return Statistic("zeros", of, lambda k: ())
