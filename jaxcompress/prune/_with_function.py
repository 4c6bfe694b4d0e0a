"""Scores that need the function: SNIP, GraSP, SynFlow and Wanda, for `mask`."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jaxcompress._calibrate import calibrate
from jaxcompress._layout import Layout, layout
from jaxcompress._paths import leaves_with_paths, map_with_paths, rebuild
from jaxcompress._rules import Patterns
from jaxcompress._statistics import Observed, Statistic
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._quantized import replace
from jaxcompress.prune._mask import prunable, weight_of

__all__ = ["grasp", "snip", "synflow", "wanda"]

_SQUARES = Statistic(
    "squares", lambda rows: jnp.sum(rows.astype(jnp.float32) ** 2, -2), lambda k: (k,)
)


def snip(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Patterns | None = None,
) -> Any:
    """How much the loss feels each connection: `score = |g w|`, with the mean gradient.

    Args:
      loss: called as `loss(params, batch)`, a scalar mean over the batch.
      params: the parameters, at initialisation in the paper.
      batches: an iterable, read once.
      rules: patterns of the paths to score; floating leaves of two dimensions and more
        if None.

    Returns:
      A tree like `params` of float32 scores, `optax.MaskedNode()` where none is asked for.

    Raises:
      ValueError: no batches; a rule that matches nothing.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[2.0], [-1.0]])}
    >>> loss = lambda p, x: (x @ p["w"]).sum()
    >>> jc.prune.snip(loss, params, [jnp.array([[1.0, 3.0]])])["w"]
    Array([[2.],
           [3.]], dtype=float32)

    Lee et al., 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity,
    arXiv:1810.02340.
    """
    weights, fill = _split(params, rules)
    gradient = eqx.filter_jit(lambda w, batch: jax.grad(lambda w: loss(fill(w), batch))(w))
    grads = _mean("snip", (gradient(weights, batch) for batch in batches))
    return _scores(params, {path: jnp.abs(grads[path] * w) for path, w in weights.items()})


def grasp(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Patterns | None = None,
) -> Any:
    """How much each weight helps the gradient to flow: `score = w (H g)`.

    The mean gradient `g` is found first, then the mean of its product with the Hessian;
    both with respect to the scored weights.

    Args:
      loss: called as `loss(params, batch)`, a scalar mean over the batch.
      params: the parameters, at initialisation in the paper.
      batches: an iterable; its batches are held in memory, because they are used twice.
      rules: as for `snip`.

    Returns:
      A tree like `params` of float32 scores, `optax.MaskedNode()` where none is asked for.

    Raises:
      ValueError: no batches; a rule that matches nothing.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[2.0, -1.0]])}
    >>> loss = lambda p, x: (x * p["w"] ** 2).sum() / 2
    >>> jc.prune.grasp(loss, params, [jnp.array([1.0, 3.0])])["w"]
    Array([[4., 9.]], dtype=float32)

    Wang et al., 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow,
    arXiv:2002.07376. There weights are removed whose `-w (H g)` is largest.
    """
    weights, fill = _split(params, rules)
    kept = list(batches)

    @eqx.filter_jit
    def gradient(w: Any, batch: Any) -> Any:
        return jax.grad(lambda w: loss(fill(w), batch))(w)

    @eqx.filter_jit
    def product(w: Any, g: Any, batch: Any) -> Any:
        return jax.jvp(lambda w: gradient(w, batch), (w,), (g,))[1]

    g = _mean("grasp", (gradient(weights, batch) for batch in kept))
    g = {path: g[path].astype(w.dtype) for path, w in weights.items()}
    hg = _mean("grasp", (product(weights, g, batch) for batch in kept))
    return _scores(params, {path: hg[path] * w for path, w in weights.items()})


def synflow(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Patterns | None = None,
) -> Any:
    """The flow through each connection of the network of magnitudes: `score = w dR/dw`.

    `R` is the sum of the outputs of `fn` with `|w|` for every floating parameter and ones
    for every input. It needs no data: of the first batch only shapes are used. A layer is
    never emptied before the last if it is scored anew in rounds: use `iterative`.

    Args:
      fn: called as `fn(params, batch)`; returns arrays, logits say.
      params: the parameters.
      batches: an iterable, of which one batch is read; one example in it is enough.
      rules: as for `snip`.

    Returns:
      A tree like `params` of float32 scores, `optax.MaskedNode()` where none is asked for.

    Raises:
      ValueError: no batches; a rule that matches nothing.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [4.0]])}
    >>> scores = jc.prune.synflow(lambda p, x: x @ p["a"] @ p["b"], params, [jnp.ones((1, 1))])
    >>> scores["a"], scores["b"]
    (Array([[3., 8.]], dtype=float32), Array([[3.],
           [8.]], dtype=float32))

    Tanaka et al., 2020, Pruning neural networks without any data by iteratively conserving
    synaptic flow, arXiv:2006.05467.
    """
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("synflow got no batches; it needs the shape of one")
    floats = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    positive = jax.tree.map(lambda x: jnp.abs(x) if floats(x) else x, params)
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if floats(x) else x, first)
    weights, fill = _split(positive, rules)

    def flow(w: Any) -> jax.Array:
        out = [x for x in jax.tree.leaves(fn(fill(w), ones)) if floats(x)]
        return sum((jnp.sum(x.astype(jnp.float32)) for x in out), jnp.float32(0))

    # Not compiled: in rounds it would be compiled anew each time.
    grads = jax.grad(flow)(weights)
    return _scores(
        params, {path: grads[path].astype(jnp.float32) * w for path, w in weights.items()}
    )


def wanda(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Patterns | None = None,
) -> Any:
    """Weights times the size of what they are multiplied with: `score_ij = |w_ij| ||x_i||`.

    The paper compares within each output: take `unstructured(axis=...)` or
    `unstructured(layout=...)` for the pattern, or `nm`.

    Args:
      fn: called as `fn(params, batch)`.
      params: the parameters, trained.
      batches: an iterable, read once, one batch in memory at a time.
      rules: patterns of the paths to score; every weight that meets a product if None.

    Returns:
      A tree like `params` of float32 scores, `optax.MaskedNode()` where none is asked for.

    Raises:
      ValueError: no batches; a weight that no activations met; a rule that matches
        nothing, or a weight that meets no product.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
    >>> jc.prune.wanda(lambda p, x: x @ p["w"], params, [jnp.array([[5.0, 0.5]])])["w"]
    Array([[ 5. , 10. ],
           [ 1.5,  2. ]], dtype=float32)

    Sun et al., 2024, A Simple and Effective Pruning Approach for Large Language Models,
    arXiv:2306.11695.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("wanda got no batches")
    layouts = layout(fn, params, first)
    observed = calibrate(fn, params, itertools.chain([first], remaining), _SQUARES, rules=rules)
    chosen = prunable(params, rules)

    def one(path: str, leaf: Any, found: Layout | None, seen: Observed | None) -> Any:
        if path not in chosen or is_compressed(leaf):
            return optax.MaskedNode()
        if found is None or found.contract is None or seen is None:
            if rules is None:
                return optax.MaskedNode()
            why = "it has fewer than two dimensions" if found is None else found.why
            raise ValueError(f"wanda cannot score {path!r}: {why}")
        norm = jnp.sqrt(_beside(seen.of(path), leaf, found))
        return jnp.abs(leaf.astype(jnp.float32)) * norm

    return map_with_paths(one, params, layouts, observed)


def _beside(value: jax.Array, leaf: jax.Array, found: Layout) -> jax.Array:
    """A statistic for each contracted index, in the rank of its weight."""
    assert found.contract is not None
    sizes = [leaf.shape[a] for a in found.contract]
    apart = value.reshape(*value.shape[: leaf.ndim], *sizes)
    places = [a % leaf.ndim for a in found.contract]
    own = range(leaf.ndim - len(places), leaf.ndim)
    return jnp.moveaxis(jnp.squeeze(apart, places), own, places)


def _split(params: Any, rules: Patterns | None) -> tuple[dict[str, jax.Array], Callable]:
    """The weights to score by path, and what puts others of their kind in their places."""
    chosen = prunable(params, rules)
    weights = {path: weight_of(leaf) for path, leaf in leaves_with_paths(params) if path in chosen}

    def fill(new: dict[str, jax.Array]) -> Any:
        def one(path: str, leaf: Any) -> Any:
            if path not in new:
                return leaf
            return replace(leaf, weight=new[path]) if is_compressed(leaf) else new[path]

        return map_with_paths(one, params)

    return weights, fill


def _mean(name: str, trees: Iterable[Any]) -> Any:
    """The mean over batches, in float32."""
    total, count = None, 0
    for tree in trees:
        tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        total = tree if total is None else jax.tree.map(jnp.add, total, tree)
        count += 1
    if total is None:
        raise ValueError(f"{name} got no batches")
    return jax.tree.map(lambda x: x / count, total)


def _scores(params: Any, found: dict[str, jax.Array]) -> Any:
    """A tree like `params` of what was found, and nothing elsewhere."""
    paths = [path for path, _ in leaves_with_paths(params)]
    return rebuild(params, [found.get(path, optax.MaskedNode()) for path in paths])
