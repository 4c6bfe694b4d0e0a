"""SparseGPT: one-shot pruning that lets the weights that stay make up for those that go."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxcompress._calibrate import calibrate
from jaxcompress._layout import Layout, layout
from jaxcompress._paths import map_with_paths, rebuild
from jaxcompress._rules import Patterns
from jaxcompress._statistics import Observed, second_moment
from jaxcompress.arrays import is_compressed
from jaxcompress.prune._mask import prunable
from jaxcompress.prune._patterns import Pattern, nm
from jaxcompress.prune._schedules import constant
from jaxcompress.prune._select import keep_largest

__all__ = ["sparsegpt"]

_DAMPING_STEPS = (1.0, 10.0, 100.0)  # times the damping, until the factors are finite


def sparsegpt(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    pattern: Pattern,
    sparsity: float,
    *,
    rules: Patterns | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Any, Any]:
    """Prunes trained weights so that the outputs of each layer change as little as they can.

    With the activations `X` that meet a weight and `H = X^T X`, the inputs are visited in
    order; of each the weights with small `w_j^2 / [H_F^-1]_jj` go, and the inputs `F` still
    to come take over their part: `w_F -= w_j [H_F^-1]_j / [H_F^-1]_jj`. Activations are those
    of the dense model.

    Args:
      fn: called as `fn(params, batch)`.
      params: the parameters, trained.
      batches: an iterable, read once, one batch in memory at a time.
      pattern: `unstructured()`, whose competitions are `block_size` inputs of a leaf each
        (of one output with `axis` or `layout`), or `nm` along the contracted axis.
      sparsity: the fraction of zeros; 1.0 for `nm`, all groups.
      rules: patterns of the paths to prune; every floating weight of two dimensions and
        more that meets a product if None.
      damping: added to the diagonal of `H`, as a share of its mean; ten and a hundred times
        as much are tried where the factors are not finite.
      block_size: inputs whose updates are gathered before they reach those behind.

    Returns:
      `(params, masks)`: the pruned parameters and what is kept.

    Raises:
      ValueError: another pattern; a weight that no activations met; a rule that matches
        nothing, or a weight that meets no product; activations that are not finite.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.ones((8, 8)) + jnp.eye(64, 8)
    >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
    >>> fn = lambda p, x: x @ p["w"]
    >>> pruned, masks = jc.prune.sparsegpt(fn, params, [x], jc.prune.nm(2, 4, axis=-2), 1.0)
    >>> kept = jc.prune.apply(params, masks)  # the same weights gone, nothing made up for
    >>> error = lambda p: jnp.sum((fn(p, x) - fn(params, x)) ** 2)
    >>> bool(error(pruned) < error(kept) / 10)
    True

    Frantar and Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot, arXiv:2301.00774; Hassibi and Stork, 1993, Optimal Brain Surgeon.
    """
    if pattern.ratio is None and pattern.name != "unstructured":
        raise ValueError(f"sparsegpt takes unstructured() or nm(); got {pattern.name}")
    if pattern.ratio is not None and sparsity != 1.0:
        raise ValueError(f"sparsegpt constrains every group of {pattern.name}: give sparsity 1.0")
    constant(sparsity)  # refuses what is no fraction
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("sparsegpt got no batches")
    layouts = layout(fn, params, first)
    chosen = prunable(params, rules)
    seen = calibrate(fn, params, itertools.chain([first], remaining), second_moment(), rules=rules)

    masks: list[Any] = []

    def one(path: str, leaf: Any, found: Layout | None, observed: Observed | None) -> Any:
        masks.append(optax.MaskedNode())
        if path not in chosen or is_compressed(leaf):
            return leaf
        if found is None or found.contract is None or observed is None:
            if rules is None:
                return leaf
            why = "it has fewer than two dimensions" if found is None else found.why
            raise ValueError(f"sparsegpt cannot prune {path!r}: {why}")
        options: dict[str, Any] = dict(
            pattern=pattern, sparsity=sparsity, damping=damping, block_size=block_size
        )
        new, masks[-1] = _leaf(path, leaf, found, observed, **options)
        return new

    pruned = map_with_paths(one, params, layouts, seen)
    return pruned, rebuild(params, masks)


def _leaf(
    path: str,
    leaf: jax.Array,
    found: Layout,
    observed: Observed,
    *,
    pattern: Pattern,
    sparsity: float,
    damping: float,
    block_size: int,
) -> tuple[jax.Array, jax.Array]:
    """One weight, as matrices `[outputs, inputs]`, one for each batch index."""
    assert found.contract is not None
    contract = [a % leaf.ndim for a in found.contract]
    batch = [a % leaf.ndim for a in found.batch]
    output = [d for d in range(leaf.ndim) if d not in contract and d not in batch]
    order = [*batch, *output, *contract]
    k = math.prod(leaf.shape[d] for d in contract)
    lead = math.prod(leaf.shape[d] for d in batch)
    turned = jnp.transpose(leaf, order).astype(jnp.float32)
    gram = observed.of(path).reshape(lead, k, k)
    if not bool(jnp.isfinite(gram).all()):
        raise ValueError(f"the activations that meet {path!r} are not finite")
    upper = _inverse_factor(path, gram, damping)
    size = block_size
    if pattern.ratio is not None:
        m = pattern.ratio[1]
        if leaf.shape[contract[-1]] % m:
            raise ValueError(f"{path!r}: {m} does not divide its {leaf.shape[contract[-1]]} inputs")
        size = max(m, size // m * m)
    size = min(size, k)
    rows = 1 if pattern.separate else turned.size // (lead * k)  # what shares a competition
    ends = [min(k, start + size) for start in range(0, k, size)]
    totals = [int(constant(sparsity).kept(jnp.int32(0), rows * end)) for end in ends]
    kept = jnp.asarray(np.diff([0, *totals]), jnp.int32)
    solve = functools.partial(_solve, size=size, ratio=pattern.ratio, separate=pattern.separate)
    seen = jnp.diagonal(gram, axis1=-2, axis2=-1) > 0
    new, mask = lax.map(lambda a: solve(*a, kept), (turned.reshape(lead, -1, k), upper, seen))
    back = [order.index(d) for d in range(leaf.ndim)]
    restore = lambda a: jnp.transpose(a.reshape(turned.shape), back)
    mask = restore(mask)
    if pattern.ratio is not None and bool(jnp.any(pattern.units(path, mask) > 0)):
        raise ValueError(
            f"{path!r} is contracted along {found.contract}, which is not the axis of the pattern"
        )
    return restore(new).astype(leaf.dtype), mask


def _inverse_factor(path: str, gram: jax.Array, damping: float) -> jax.Array:
    """Upper triangular `U` with `H^-1 = U^T U`; `U_jj^2` is `[H_F^-1]_jj` of `F = j, j + 1, ...`"""
    for times in _DAMPING_STEPS:
        upper = _factor(gram, damping * times)
        if bool(jnp.isfinite(upper).all()):
            return upper
    raise ValueError(
        f"the second moments of {path!r} have no Cholesky factor, even with damping of "
        f"{damping * _DAMPING_STEPS[-1]:g} of their mean; give more data or more damping"
    )


@jax.jit
def _factor(gram: jax.Array, damping: jax.typing.ArrayLike) -> jax.Array:
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = jnp.mean(diagonal, -1)[..., None, None]
    eye = jnp.eye(gram.shape[-1])
    damped = gram / jnp.where(mean > 0, mean, 1.0) + jnp.where(mean > 0, damping, 1.0) * eye
    # H = R R^T with R upper triangular, from the Cholesky factor of H in reverse order.
    reverse = jnp.linalg.cholesky(damped[..., ::-1, ::-1])[..., ::-1, ::-1]
    return solve_triangular(reverse, jnp.broadcast_to(eye, gram.shape))


@functools.partial(jax.jit, static_argnames=("size", "ratio", "separate"))
def _solve(
    w: jax.Array,
    upper: jax.Array,
    seen: jax.Array,
    kept: jax.Array,
    *,
    size: int,
    ratio: tuple[int, int] | None,
    separate: bool,
) -> tuple[jax.Array, jax.Array]:
    """`w[outputs, inputs]` pruned in blocks of `size` inputs, `kept[b]` of each, and its mask.

    Inputs that are not `seen`, always zero, are the first to go.
    """
    outputs, k = w.shape
    more = -k % size
    w = jnp.pad(w, ((0, 0), (0, more)))
    upper = jnp.pad(upper, ((0, more), (0, more))) + jnp.diag(jnp.arange(k + more) >= k)
    lowest = jnp.pad(jnp.where(seen, 0.0, -1.0), (0, more), constant_values=-jnp.inf)
    width = size if ratio is None else ratio[1]

    def masked(scores: jax.Array, number: jax.Array) -> jax.Array:
        if ratio is not None:
            none = jnp.zeros((outputs, 1), bool)
            return nm(*ratio, axis=-1).spread("", none, scores)
        if separate:
            return jax.vmap(lambda row: keep_largest([row], number)[0][0])(scores)
        return keep_largest([scores], number)[0][0]

    def block(b: jax.Array, state: Any) -> Any:
        w, mask = state
        start = b * size
        part = lax.dynamic_slice_in_dim(w, start, size, 1)
        factor = lax.dynamic_slice(upper, (start, start), (size, size))
        floor = lax.dynamic_slice_in_dim(lowest, start, size)

        def column(j: jax.Array, state: Any) -> Any:
            part, keep, errors = state

            def anew(keep: jax.Array) -> jax.Array:
                scores = jnp.where(floor < 0, floor, (part / jnp.diagonal(factor)) ** 2)
                scores = lax.dynamic_slice_in_dim(scores, j, width, 1)
                return lax.dynamic_update_slice_in_dim(keep, masked(scores, kept[b]), j, 1)

            keep = lax.cond(j % width == 0, anew, lambda keep: keep, keep)
            row = lax.dynamic_index_in_dim(factor, j, 0, keepdims=False)
            lost = jnp.where(keep[:, j], 0.0, part[:, j]) / row[j]
            # Before j the row is zero; at j this leaves what the mask is going to clear.
            part = part - lost[:, None] * row
            return part, keep, errors.at[:, j].set(lost)

        begin = (part, jnp.zeros(part.shape, bool), jnp.zeros_like(part))
        part, keep, errors = lax.fori_loop(0, size, column, begin)
        behind = jnp.arange(w.shape[1]) >= start + size
        rest = jnp.where(behind, lax.dynamic_slice_in_dim(upper, start, size, 0), 0.0)
        w = w - jnp.matmul(errors, rest, precision=lax.Precision.HIGHEST)
        w = lax.dynamic_update_slice_in_dim(w, jnp.where(keep, part, 0.0), start, 1)
        return w, lax.dynamic_update_slice_in_dim(mask, keep, start, 1)

    w, mask = lax.fori_loop(0, w.shape[1] // size, block, (w, jnp.zeros(w.shape, bool)))
    return w[:, :k], mask[:, :k]
