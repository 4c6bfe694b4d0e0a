"""SparseGPT: one-shot pruning that lets the weights that stay make up for those that go."""

import math
import numbers
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from jaxcompress._layout import Layout
from jaxcompress._paths import leaves_with_paths, map_with_paths
from jaxcompress._program import Program, name_of
from jaxcompress._rules import Patterns, assign
from jaxcompress._sequential import Progress, Tell, observed, restacked, traced, walked
from jaxcompress._statistics import second_moment
from jaxcompress.arrays import is_compressed
from jaxcompress.prune._mask import prunable
from jaxcompress.prune._patterns import Pattern
from jaxcompress.prune._surgeon import Surgery, operate
from jaxcompress.quantize._posttrain import Layers
from jaxcompress.quantize._scales import integers_only
from jaxcompress.quantize._specs import Spec

__all__ = ["sparsegpt"]


def sparsegpt(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    pattern: Pattern,
    sparsity: float | Mapping[str, float | None],
    *,
    rules: Patterns | None = None,
    quantize: Spec | Mapping[str, Spec | None] | None = None,
    stats: Any = None,
    damping: float = 0.01,
    block_size: int = 128,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> tuple[Any, Any]:
    """Prunes trained weights, and quantizes what stays, so that outputs change least.

    With the activations `X` that meet a weight and `H = X^T X`, the inputs are visited in
    order; of each the weights with small `w_j^2 / [H_F^-1]_jj` go, `w_hat_j = 0`, the others
    stay, `w_hat_j = w_j` or with `quantize` `round(w_j)`. The inputs `F` still to come make up
    for both: `w_F -= (w_j - w_hat_j) [H_F^-1]_j / [H_F^-1]_jj`.

    The layers go in the order of `fn`, and the activations of each come through the layers
    pruned before it. Stacked layers (`lax.scan`) are pruned one by one.

    Args:
      fn: called as `fn(params, batch)`.
      params: the parameters, trained.
      batches: inputs of one shape; 128 sequences are usual.
      pattern: `unstructured()`, whose competitions are `block_size` inputs of a leaf each
        (of one output with `axis` or `layout`), or `nm` along the contracted axis.
      sparsity: the fraction of zeros, 1.0 for `nm`, all groups; or instead of `rules` a
        mapping of patterns to the sparsity of their leaves, where None leaves them alone.
      rules: patterns of the paths to prune; every floating weight of two dimensions and
        more that meets a product if None.
      quantize: a spec of symmetric integers for all that is pruned, or rules for some of it.
      stats: `absmax` statistics, for specs with static activations.
      damping: added to the diagonal of `H`, as a share of its mean; ten, a hundred, ... times
        as much is tried where a factorization fails.
      block_size: inputs whose updates are gathered before they reach those behind.
      resume: a folder where finished layers are kept. Started again with the same
        arguments, a run goes on from there and ends with the same bits.
      progress: called with a `jc.quantize.Finished` after each group of layers, and within
        one that takes long with a `jc.quantize.Working`.

    Returns:
      `(params, masks)`: the pruned parameters, `QuantizedArray`s where they were quantized,
      and what is kept; `jc.prune.pack` makes them one.

    Raises:
      ValueError: another pattern, a sparsity out of its range, or a mapping of them and
        `rules` too; a weight that no activations met; a rule that matches nothing, or a
        weight that meets no product; a quantized weight that is not pruned;
        activations that are not finite; a `resume` folder of another run.
      TypeError: a rule for a leaf that is no dense weight; a spec that is not of integers.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.ones((8, 8)) + jnp.eye(64, 8)
    >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
    >>> fn, half = lambda p, x: x @ p["w"], jc.prune.nm(2, 4, axis=-2)
    >>> pruned, masks = jc.prune.sparsegpt(fn, params, [x], half, 1.0)
    >>> kept = jc.prune.apply(params, masks)  # the same weights gone, nothing made up for
    >>> error = lambda p: jnp.sum((fn(p, x) - fn(params, x)) ** 2)
    >>> bool(error(pruned) < error(kept) / 10)
    True
    >>> both, masks = jc.prune.sparsegpt(fn, params, [x], half, 1.0, quantize=jc.quantize.int4())
    >>> jc.prune.pack(both, masks, pattern=half)["w"]
    NMSparseArray(int4[8,4], 2:4 along -2, path='w')

    Frantar and Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot, arXiv:2301.00774; Hassibi and Stork, 1993, Optimal Brain Surgeon.
    """
    if pattern.ratio is None and pattern.name != "unstructured":
        raise ValueError(f"sparsegpt takes unstructured() or nm(); got {pattern.name}")
    rules, share = _shares(params, pattern, sparsity, rules)
    if not damping > 0 or block_size < 1:
        raise ValueError(f"damping is positive, block_size 1 or more; got {damping}, {block_size}")
    batches = list(batches)
    layers = Layers.of(fn, params, batches, {}, None)
    chosen = _chosen(params, layers.layouts, rules, pattern)
    program = traced(fn, params, batches, chosen, skip_unmet=rules is None)
    specs = _specs(params, {path for path, _ in program.products}, quantize)
    if specs:
        layers = Layers.of(fn, params, batches, specs, stats)
    for path, static in layers.statics.items():
        integers_only("sparsegpt", path, static["qtype"])
        if not static["qtype"].symmetric:
            raise ValueError(
                f"the spec of {path!r} is asymmetric; a pruned weight has to be code 0, so give "
                "a symmetric one"
            )
    how = pattern.ratio, pattern.separate, damping, block_size

    def work(g: int, leaves: dict[str, Any], values: list[Any], tell: Tell) -> dict[str, Any]:
        seen, group = observed(program, g, leaves, values, second_moment()), program.groups[g]
        done: dict[str, Any] = {}
        for i, unit in enumerate(group):
            name = name_of(unit)
            one = lambda part, i=i: tell((i + part) / len(group))
            layer = layers.layer(unit, jnp.asarray(leaves[name]), seen[name], one)
            done[name], done[_mask_of(name)] = operate(layer, Surgery(share(unit[0]), *how))
        return done

    leaves, changed = walked(
        program,
        layers.params,
        batches,
        work,
        identity=[
            "sparsegpt",
            *how,
            [(path, share(path)) for path in sorted(chosen)],
            sorted(layers.statics.items()),
        ],
        resume=resume,
        progress=progress,
    )
    return restacked(program, layers.params, leaves, changed), _masks(
        program, params, leaves, changed
    )


def _mask_of(name: str) -> str:
    """The name of a mask among the leaves; no path has a colon and a space in it."""
    return f"{name}: kept"


def _masks(program: Program, params: Any, leaves: dict[str, Any], changed: Collection[str]) -> Any:
    kept = {name_of(unit): leaves[_mask_of(name_of(unit))] for unit in program.products}
    whole = restacked(program, params, kept, changed)
    nothing = optax.MaskedNode()
    return map_with_paths(lambda p, _, m: m if p in changed else nothing, params, whole)


def _shares(
    params: Any,
    pattern: Pattern,
    sparsity: float | Mapping[str, float | None],
    rules: Patterns | None,
) -> tuple[Patterns | None, Callable[[str], float]]:
    """Patterns of what is pruned, and the sparsity of a path."""
    given = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    for rule, number in given.items():
        of = f" of {rule!r}" if rule else ""
        if number is None and rule:
            continue
        if not isinstance(number, numbers.Real) or not 0 <= number <= 1:
            raise ValueError(f"the sparsity{of} is a fraction of zeros, 0 to 1; got {number!r}")
        if pattern.ratio is not None and number != 1.0:
            raise ValueError(
                f"sparsegpt constrains every group of {pattern.name}: give sparsity{of} 1.0, "
                f"not {number}"
            )
    if not isinstance(sparsity, Mapping):
        return rules, lambda path: sparsity
    if rules is not None:
        raise ValueError("a mapping of sparsities says what is pruned: leave rules= out")
    found = assign(params, sparsity)
    if not found:
        raise ValueError(f"the mapping of sparsities leaves nothing to prune; got {sparsity!r}")
    return [re.escape(path) for path in found], found.__getitem__


def _chosen(
    params: Any, layouts: Mapping[str, Layout | None], rules: Patterns | None, pattern: Pattern
) -> set[str]:
    """The paths to prune; raises for one that `rules` name and that cannot be."""
    wanted, chosen = prunable(params, rules), set()
    for path, leaf in leaves_with_paths(params):
        found = layouts[path]
        if path not in wanted:
            continue
        if is_compressed(leaf):
            if rules is not None:
                kind = type(leaf).__name__
                raise TypeError(f"sparsegpt prunes dense weights; {path!r} is a {kind}")
        elif found is None or found.contract is None:
            if rules is not None:
                why = "it has fewer than two dimensions" if found is None else found.why
                raise ValueError(f"sparsegpt cannot prune {path!r}: {why}")
        else:
            if pattern.ratio is not None:
                _refuse_other_axis(path, leaf.shape, found.contract, pattern, pattern.ratio)
            elif pattern.separate:
                _refuse_across_outputs(path, leaf.shape, found.contract, pattern)
            chosen.add(path)
    return chosen


def _refuse_other_axis(
    path: str,
    shape: tuple[int, ...],
    contract: tuple[int, ...],
    pattern: Pattern,
    ratio: tuple[int, int],
) -> None:
    """Raises unless the groups of `pattern` lie along the axis that is contracted, the last."""
    n, m = ratio
    if shape[contract[-1]] % m:
        raise ValueError(f"{path!r}: {m} does not divide its {shape[contract[-1]]} inputs")
    ones = [1] * len(shape)
    ones[contract[-1]] = -1
    fits = jnp.broadcast_to((jnp.arange(shape[contract[-1]]) % m < n).reshape(ones), shape)
    if bool(jnp.any(pattern.units(path, fits) > 0)):
        raise ValueError(
            f"{path!r} is contracted along {contract}, which is not the axis of the pattern"
        )


def _refuse_across_outputs(
    path: str, shape: tuple[int, ...], contract: tuple[int, ...], pattern: Pattern
) -> None:
    """Raises unless each competition of `pattern` is among the weights of one output."""
    inputs = [d % len(shape) for d in contract]
    sizes = [1 if d in inputs else size for d, size in enumerate(shape)]
    output = jnp.broadcast_to(jnp.arange(math.prod(sizes)).reshape(sizes), shape)
    units = pattern.units(path, output)
    if bool(jnp.any(units != units[:, :1])):
        raise ValueError(
            f"{path!r} is contracted along {contract}, which is not the axis of the pattern"
        )


def _specs(
    params: Any, pruned: Collection[str], quantize: Spec | Mapping[str, Spec | None] | None
) -> dict[str, Spec | None]:
    """A rule for each path that is quantized."""
    if quantize is None:
        return {}
    if isinstance(quantize, Spec):
        return {re.escape(path): quantize for path in sorted(pruned)}
    found = assign(params, quantize)
    for path in found:
        if path not in pruned:
            raise ValueError(
                f"quantize= names {path!r}, which is not pruned; quantize it on its own, "
                "jc.quantize.gptq for instance"
            )
    return {re.escape(path): spec for path, spec in found.items()}
