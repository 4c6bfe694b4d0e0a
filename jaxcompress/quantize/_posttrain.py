"""What all post-training methods share: from rules to layers, and through the model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress._calibrate import calibrate
from jaxcompress._layout import Layout, layout
from jaxcompress._matrices import Matrices
from jaxcompress._paths import leaves_with_paths, subtrees
from jaxcompress._program import Unit, name_of
from jaxcompress._rules import assign
from jaxcompress._sequential import Finished, sequential
from jaxcompress._statistics import Observed, Statistic, absmax
from jaxcompress.quantize._quantize import quantize
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._specs import Spec

__all__ = ["Layer", "Method", "Progress", "layerwise", "nearest"]

Progress = Callable[[Finished], Any] | None
Method = Callable[[Any, Any, Any, Any], Any]  # of `fn, params, batches, rules`, as all of them


def nearest(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
) -> Any:
    """Rounding to nearest in the form of the methods that need data.

    Static activation scales come from the largest magnitudes in `batches`.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to learn from")
    specs = assign(params, rules).values()
    static = any(isinstance(s, Spec) and s.act is not None and s.act.static for s in specs)
    stats = calibrate(fn, params, batches, absmax()) if static else None
    return quantize(params, rules, layout=layout(fn, params, batches[0]), stats=stats)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight to quantize: itself, its matrices, and what its spec says of its array."""

    name: str
    weight: jax.Array
    matrices: Matrices
    static: dict[str, Any]
    observed: Observed

    def statistic(self, own: int) -> jax.Array:
        """The statistic as `[batch, ...]`; raises if nothing was seen."""
        return self.matrices.statistic(self.observed.of(self.name), own)


def layerwise(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    statistic: Statistic,
    solve: Callable[[Layer], Any],
    *,
    identity: Any,
    stats: Any,
    resume: str | Path | None,
    progress: Progress,
) -> Any:
    """`solve` for every weight that `rules` name, in the order of the model."""
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to learn from")
    found = layout(fn, params, batches[0])
    statics: dict[str, dict[str, Any]] = {}

    def remember(leaf: jax.Array, **static: Any) -> jax.Array:
        statics[static["path"]] = static
        return leaf

    params = map_rules(remember, params, rules, found, stats)
    paths = [path for path, _ in leaves_with_paths(params)]
    layouts: dict[str, Layout] = dict(zip(paths, subtrees(found, params)))

    def one(unit: Unit, leaves: dict[str, Any], observed: Observed) -> dict[str, Any]:
        (path, row), name = unit, name_of(unit)
        leaf, static = leaves[name], statics[path]
        if row is not None:
            own = lambda part: None if part is None else part[min(row, part.shape[0] - 1)]
            static = static | {n: own(static[n]) for n in ("act_scale", "act_offset")}
        matrices = Matrices.of(leaf.shape, layouts[path])
        return {name: solve(Layer(name, leaf, matrices, static, observed))}

    return sequential(
        fn,
        params,
        batches,
        set(statics),
        statistic,
        one,
        identity=[identity, sorted(statics.items())],
        resume=resume,
        progress=progress,
    )
