"""AWQ and SmoothQuant: scale the input features before rounding, and take it back after."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._matrices import Matrices
from jaxcompress._rules import assign
from jaxcompress._statistics import Statistic, second_moment
from jaxcompress.arrays import ScaledArray
from jaxcompress.arrays._granularity import Axes, expand
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._rounding import encode, scale_of
from jaxcompress.quantize._posttrain import Layer, Progress, layerwise
from jaxcompress.quantize._scales import full_scales, integers_only, searched_scales
from jaxcompress.quantize._specs import Spec

__all__ = ["awq", "smoothquant"]

_EXPONENTS = tuple(i / 20 for i in range(20))


def awq(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    stats: Any = None,
    clip: bool = True,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Activation-aware rounding: features that are large get finer steps.

    `w_hat = round_q(w * s) / s`, `s_k = rms(x_k)^a`, with the exponent `a` of 0, 0.05, ...
    0.95 that makes `|x (w - w_hat)|^2` least, for each layer. In exact arithmetic `s`
    changes nothing but the rounding. It is kept beside the weight and multiplies the
    activations, so that `fn`, and what comes before, stay as they are.

    Args:
      fn, params, batches, rules, stats, resume, progress: as for `gptq`; static
        activations are refused, because their statistics are those before scaling.
      clip: choose each scale by the error it makes instead of from the largest weight.

    Returns:
      A tree like `params` with `ScaledArray` leaves.

    Raises:
      ValueError: as for `gptq`; a spec with static activations.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> x, params = x.at[:, 5].mul(30.0), {"w": w}
    >>> fn, rules = lambda p, x: x @ p["w"], {"w": jc.quantize.int3()}
    >>> error = lambda p: jnp.linalg.norm(x @ p["w"].materialise() - x @ w)
    >>> new = jc.quantize.awq(fn, params, [x], rules)
    >>> bool(error(new) < 0.5 * error(jc.quantize.quantize(params, rules)))
    True

    Lin et al., 2023, AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration, arXiv:2306.00978.
    """

    def solve(layer: Layer) -> ScaledArray:
        integers_only("awq", layer.name, layer.static["qtype"])
        _refuse_static(layer)
        hessian = layer.statistic(2)
        _refuse_infinite(layer, hessian)
        grain = {name: layer.static[name] for name in ("axis", "group_size", "qtype")}
        smooth = _best_exponent(layer.weight, hessian, layer.matrices, clip=clip, **grain)
        return _scaled(layer, smooth, clip=clip, hessian=hessian)

    return layerwise(
        fn,
        params,
        batches,
        rules,
        second_moment(),
        solve,
        identity=["awq", clip],
        stats=stats,
        resume=resume,
        progress=progress,
    )


def smoothquant(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    strength: float = 0.5,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Moves what is hard to quantize from the activations to the weights.

    `x @ w = (x / s) @ (s w)`, `s_k = max|x_k|^strength / max|w_k|^(1 - strength)`, then
    both are rounded. `1 / s` is kept beside the weight and multiplies the activations.

    Args:
      fn, params, batches, rules, resume, progress: as for `gptq`; specs with quantized
        activations, as `w8a8()`, are what this is for. Static activation scales come from
        the same batches: they need no statistics of their own.
      strength: 0 leaves the weights as they are, 1 the activations all alike.

    Returns:
      A tree like `params` with `ScaledArray` leaves.

    Raises:
      ValueError: as for `gptq`; a strength outside 0 to 1.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> x, params = x.at[:, 5].mul(100.0), {"w": w}
    >>> fn, rules = lambda p, x: x @ p["w"], {"w": jc.quantize.w8a8()}
    >>> error = lambda p: jnp.linalg.norm(jc.accelerate(fn)(p, x) - x @ w)
    >>> new = jc.quantize.smoothquant(fn, params, [x], rules)
    >>> bool(error(new) < 0.5 * error(jc.quantize.quantize(params, rules)))
    True

    Xiao et al., 2022, SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models, arXiv:2211.10438.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is 0 to 1; got {strength}")
    static = lambda spec: spec is not None and spec.act is not None and spec.act.static
    fixed = {pattern: static(spec) for pattern, spec in rules.items()}

    def dynamic(spec: Any) -> Any:
        """The spec without its static scale, which is made here."""
        if not isinstance(spec, Spec) or spec.act is None or not spec.act.static:
            return spec
        return dataclasses.replace(spec, act=dataclasses.replace(spec.act, static=False))

    def solve(layer: Layer) -> ScaledArray:
        largest = layer.statistic(1)
        _refuse_infinite(layer, largest)
        weights = jnp.max(jnp.abs(layer.matrices.split(layer.weight.astype(jnp.float32))), -1)
        both = (largest > 0) & (weights > 0)
        raw = jnp.where(both, largest, 1.0) ** strength / jnp.where(both, weights, 1.0) ** (
            1 - strength
        )
        smooth = jnp.where(both, raw, 1.0)
        act = layer.static["act"]
        integers_only("smoothquant", layer.name, layer.static["qtype"])
        if act is not None and not act.qtype.symmetric:
            raise ValueError(f"smoothquant takes symmetric activations; {layer.name!r} has others")
        if layer.static["path"] in wants_static:
            act = dataclasses.replace(act, static=True)
            top = jnp.max(largest / smooth, -1)
            lead = [
                layer.weight.shape[a] if a in layer.matrices.batch else 1
                for a in range(-layer.weight.ndim, 0)
            ]
            scale = scale_of(top.reshape(lead), act.qtype.high)
            static_layer = layer.static | dict(act=act, act_scale=scale)
            layer = dataclasses.replace(layer, static=static_layer)
        return _scaled(layer, smooth, clip=False)

    wants_static = _static_paths(params, rules, fixed)
    return layerwise(
        fn,
        params,
        batches,
        {pattern: dynamic(spec) for pattern, spec in rules.items()},
        _FEATURE_ABSMAX,
        solve,
        identity=["smoothquant", strength, sorted(wants_static)],
        stats=None,
        resume=resume,
        progress=progress,
    )


# One instance, because compiled functions are remembered by their statistic.
_FEATURE_ABSMAX = Statistic(
    "feature_absmax",
    lambda rows: jnp.max(jnp.abs(rows.astype(jnp.float32)), -2, initial=0.0),
    lambda k: (k,),
    maximum=True,
)


def _static_paths(
    params: Any, rules: Mapping[str, Spec | None], fixed: Mapping[str, bool]
) -> set[str]:
    first = assign(params, {pattern: (pattern,) for pattern in rules})
    return {path for path, (pattern,) in first.items() if fixed[pattern]}


def _refuse_static(layer: Layer) -> None:
    if layer.static["act_scale"] is not None:
        raise ValueError(
            f"{layer.name!r}: static activation scales are those before the features are scaled; "
            "use a dynamic spec, or smoothquant, which makes its own"
        )


def _refuse_infinite(layer: Layer, statistic: jax.Array) -> None:
    if not bool(jnp.isfinite(statistic).all()):
        raise ValueError(
            f"the statistic of the activations of {layer.name!r} is not finite; the batches, or "
            "the function, hold NaN or infinity"
        )


@functools.partial(jax.jit, static_argnames=("matrices", "clip", "axis", "group_size", "qtype"))
def _best_exponent(
    w: jax.Array,
    hessian: jax.Array,
    matrices: Matrices,
    *,
    clip: bool,
    axis: Axes,
    group_size: Axes | None,
    qtype: IntType,
) -> jax.Array:
    """The scale of each feature, `[batch, k]`, of the exponent with the least error."""
    size = jnp.sqrt(jnp.diagonal(hessian, axis1=-2, axis2=-1))
    size = jnp.maximum(size, 1e-4 * size.max(-1, keepdims=True))
    size = jnp.where(size > 0, size, 1.0)

    def attempt(exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
        smooth = size**exponent
        smooth = smooth / jnp.sqrt(smooth.max(-1, keepdims=True) * smooth.min(-1, keepdims=True))
        spread = matrices.features(smooth)
        scaled = w.astype(jnp.float32) * spread
        importance = matrices.features(jnp.square(size / smooth))
        scale, zero = _scales(scaled, importance, clip, axis, group_size, qtype)
        codes = encode(scaled, scale, zero, qtype, axis, group_size)
        if zero is not None:
            codes = codes - expand(zero.astype(jnp.float32), w.shape, axis, group_size)
        back = codes * expand(scale, w.shape, axis, group_size) / spread
        error = matrices.split(back - w)
        return jnp.einsum("bkn,bkl,bln->b", error, hessian, error), smooth

    errors, candidates = jax.lax.map(attempt, jnp.asarray(_EXPONENTS, jnp.float32))
    best = jnp.argmin(errors, 0)
    return candidates[best, jnp.arange(len(best))]


def _scales(
    w: jax.Array, importance: Any, clip: bool, axis: Axes, group_size: Axes | None, qtype: IntType
) -> tuple[jax.Array, jax.Array | None]:
    if not clip:
        return full_scales(w, axis, group_size, qtype)
    return searched_scales(w, importance, axis=axis, group_size=group_size, qtype=qtype)


def _scaled(
    layer: Layer, smooth: jax.Array, *, clip: bool, hessian: jax.Array | None = None
) -> ScaledArray:
    """The weight times `smooth[batch, k]`, rounded; the inverse is kept beside it."""
    w, static = layer.weight, layer.static
    spread = layer.matrices.features(smooth)
    scaled = w.astype(jnp.float32) * spread
    importance: Any = 1.0
    if hessian is not None:
        diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
        floor = 1e-8 * diagonal.max(-1, keepdims=True) + 1e-30
        importance = layer.matrices.features(jnp.maximum(diagonal, floor) / smooth**2)
    grain = [static[name] for name in ("axis", "group_size", "qtype")]
    scale, zero = _scales(scaled, importance, clip, *grain)
    axis, group_size, qtype = grain
    codes = encode(scaled, scale, zero, qtype, axis, group_size)
    array = layer.stored(codes, scale, zero)
    return ScaledArray(array, 1 / spread, path=static["path"])
