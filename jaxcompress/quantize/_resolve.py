"""From a spec and a leaf to the static facts of its array; everything is checked here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._layout import Layout
from jaxcompress._paths import map_with_paths
from jaxcompress._rules import assign
from jaxcompress._statistics import Observed
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._granularity import normalise
from jaxcompress.arrays._qtype import float_dtype
from jaxcompress.arrays._rounding import range_scale, scale_of
from jaxcompress.quantize._specs import Spec

__all__ = ["map_rules"]


def map_rules(
    make: Callable[..., Any],
    params: Any,
    rules: Mapping[str, Spec | None],
    layout: Any,
    stats: Any,
) -> Any:
    """`make(leaf, spec, **static)` of every leaf that a rule names; the others as they are."""
    specs = assign(params, rules)
    for path, spec in specs.items():
        if not isinstance(spec, Spec):
            raise TypeError(
                f"the rule for {path!r} maps to {spec!r}; expected a spec, as jc.quantize.int8()"
            )

    def one(path: str, leaf: Any, found: Layout | None = None, seen: Observed | None = None) -> Any:
        spec = specs.get(path)
        if spec is None:
            return leaf
        if is_compressed(leaf):
            raise TypeError(f"{path!r} is a {type(leaf).__name__} already")
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{path!r} is no array but {type(leaf).__name__}")
        float_dtype(leaf.dtype, path)
        leaf = jnp.asarray(leaf)  # NumPy's float64, say, becomes what JAX makes of it
        _refuse_non_finite(path, leaf)
        axis, group_size = normalise(
            leaf.shape, _axis(path, leaf, spec, layout is not None, found), spec.group_size, path
        )
        act_scale, act_offset = _act_range(path, leaf, spec, stats is not None, seen)
        static = dict(
            qtype=spec.qtype,
            axis=axis,
            group_size=group_size,
            act=spec.act,
            act_scale=act_scale,
            act_offset=act_offset,
            path=path,
        )
        return make(leaf, **static)

    nothing = jax.tree.map(lambda _: None, params, is_leaf=is_compressed)
    return map_with_paths(
        one, params, nothing if layout is None else layout, nothing if stats is None else stats
    )


def _axis(
    path: str, leaf: Any, spec: Spec, has_layout: bool, found: Layout | None
) -> int | Sequence[int]:
    if spec.axis is not None:
        return spec.axis
    if not has_layout:
        return (-2,) if leaf.ndim >= 2 else tuple(range(-leaf.ndim, 0))
    if found is None or found.contract is None:
        reason = "it is no weight of two dimensions or more" if found is None else found.why
        raise ValueError(
            f"the layout has no contracting axes for {path!r} ({reason}); give its spec axis="
        )
    return found.contract


def _act_range(
    path: str, leaf: Any, spec: Spec, has_stats: bool, seen: Observed | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """The scale and the offset of static activations."""
    if spec.act is None or not spec.act.static:
        return None, None
    if not has_stats or not isinstance(seen, Observed):
        raise ValueError(
            f"the spec for {path!r} has static activations and needs stats=jc.calibrate(fn, "
            "params, batches, jc.statistics.absmax())"
        )
    value = seen.of(path).astype(jnp.float32)
    if value.ndim == leaf.ndim:  # a largest magnitude
        low, high = -value, value
    elif value.ndim == leaf.ndim + 1 and value.shape[-1] == 2:
        low, high = value[..., 0], value[..., 1]
    else:
        raise ValueError(
            f"the statistic of {path!r} has the shape {value.shape}; static activations take "
            f"a magnitude or a range for each layer, in {leaf.ndim} dimensions, from absmax, "
            "minmax, moving_average, percentile, mse, entropy or snr"
        )
    if not isinstance(seen.value, jax.core.Tracer) and not np.isfinite(seen.value).all():
        raise ValueError(f"activations that met {path!r} in calibration are not finite")
    if spec.act.qtype.symmetric:
        return scale_of(jnp.maximum(-low, high), spec.act.qtype.high), None
    return range_scale(low, high, spec.act.qtype)


def _refuse_non_finite(path: str, leaf: Any) -> None:
    """Outside jit only; inside, a channel that is not finite becomes NaN as a whole."""
    if isinstance(leaf, jax.core.Tracer):
        return
    if not bool(_finite(leaf)):
        raise ValueError(f"{path!r} holds NaN or infinity, which no scale can represent")


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
