"""What all post-training methods share: from rules to layers, and through the model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress._calibrate import calibrate
from jaxcompress._layout import Layout, layout
from jaxcompress._matrices import Matrices
from jaxcompress._paths import leaves_with_paths, subtrees
from jaxcompress._program import Unit, name_of
from jaxcompress._rules import assign
from jaxcompress._sequential import Progress, Tell, sequential
from jaxcompress._statistics import Observed, Statistic, absmax
from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._fit import Fit
from jaxcompress.arrays._quantized import store
from jaxcompress.quantize._quantize import quantize
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._specs import Spec

__all__ = ["Layer", "Layers", "Method", "Progress", "layerwise", "nearest"]

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
    tell: Tell = lambda part: None

    def statistic(self, own: int) -> jax.Array:
        """The statistic as `[batch, ...]`; raises if nothing was seen."""
        return self.matrices.statistic(self.observed.of(self.name), own)

    def stored(self, numbers: jax.Array, scale: jax.Array, zero: Any) -> QuantizedArray:
        """The array of `numbers`, of the shape of the weight, as the spec says."""
        static = self.static | {"float_dtype": np.dtype(self.weight.dtype)}
        act = static.pop("act_scale"), static.pop("act_offset")
        return store(numbers, Fit(scale, zero), *act, **static)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The weights that rules name: `statics` and `layouts` by path, `params` as JAX has them."""

    params: Any
    statics: dict[str, dict[str, Any]]
    layouts: dict[str, Layout]

    @classmethod
    def of(
        cls,
        fn: Callable[[Any, Any], Any],
        params: Any,
        batches: list[Any],
        rules: Mapping[str, Spec | None],
        stats: Any,
    ) -> "Layers":
        if not batches:
            raise ValueError("there are no batches to learn from")
        found = layout(fn, params, batches[0])
        statics: dict[str, dict[str, Any]] = {}

        def remember(leaf: jax.Array, **static: Any) -> jax.Array:
            statics[static["path"]] = static
            return leaf

        params = map_rules(remember, params, rules, found, stats)
        paths = [path for path, _ in leaves_with_paths(params)]
        return cls(params, statics, dict(zip(paths, subtrees(found, params))))

    def layer(
        self, unit: Unit, leaf: jax.Array, observed: Observed, tell: Tell = lambda part: None
    ) -> Layer:
        path, row = unit
        static = self.statics.get(path, {})
        if static and row is not None:
            own = lambda part: None if part is None else part[min(row, part.shape[0] - 1)]
            static = static | {n: own(static[n]) for n in ("act_scale", "act_offset")}
        matrices = Matrices.of(leaf.shape, self.layouts[path])
        return Layer(name_of(unit), leaf, matrices, static, observed, tell)


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
    layers = Layers.of(fn, params, batches, rules, stats)

    def one(unit: Unit, leaves: dict[str, Any], observed: Observed, tell: Tell) -> dict[str, Any]:
        name = name_of(unit)
        return {name: solve(layers.layer(unit, leaves[name], observed, tell))}

    return sequential(
        fn,
        layers.params,
        batches,
        set(layers.statics),
        statistic,
        one,
        identity=[identity, sorted(layers.statics.items())],
        resume=resume,
        progress=progress,
    )
