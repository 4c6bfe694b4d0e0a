"""AdaRound: learn for every weight whether it goes up or down."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._statistics import second_moment
from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._granularity import expand
from jaxcompress.quantize._posttrain import Layer, Progress, layerwise
from jaxcompress.quantize._scales import full_scales, integers_only, searched_scales
from jaxcompress.quantize._specs import Spec

__all__ = ["adaround", "pull", "soft", "start"]

_STRETCH = 0.1  # how far the rectified sigmoid reaches below 0 and above 1
# Weight of the term that pulls towards 0 or 1. Learned roundings make up for each other, so
# that the error is a few hundredths of what nearest rounding makes. With a weight near one they
# stay between 0 and 1 to the end, and the last rounding undoes what was learnt; from ten to
# some hundreds the results are much the same.
_PULL = 30.0


def adaround(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    stats: Any = None,
    steps: int = 2000,
    learning_rate: float = 0.1,
    clip: bool = True,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Learns for every weight whether to round it up or down.

    `min_V tr(E^T X^T X E) + c sum(1 - |2 h(V) - 1|^b)`, `E = w - s clip(floor(w / s) + h(V))`,
    `h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`, by Adam; `b` falls from 20 to 2, after a
    fifth of the steps without the second term. The output of each layer is matched in
    all batches at once, through its second moments. For each output that ends worse than
    nearest rounding, nearest rounding is kept.

    Args:
      fn, params, batches, rules, stats, resume, progress: as for `gptq`.
      steps, learning_rate: of Adam, for each layer.
      clip: choose each scale by the error it makes instead of from the largest weight.

    Returns:
      A tree like `params` with `QuantizedArray` leaves.

    Raises:
      ValueError: as for `gptq`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> params, fn, rules = {"w": w}, lambda p, x: x @ p["w"], {"w": jc.quantize.int3()}
    >>> error = lambda p: jnp.linalg.norm(x @ p["w"].materialise() - x @ w)
    >>> new = jc.quantize.adaround(fn, params, [x], rules, steps=500)
    >>> bool(error(new) < 0.9 * error(jc.quantize.quantize(params, rules)))
    True

    Nagel et al., 2020, Up or Down? Adaptive Rounding for Post-Training Quantization,
    arXiv:2004.10568.
    """
    if steps < 1:
        raise ValueError(f"steps is 1 or more; got {steps}")

    def solve(layer: Layer) -> QuantizedArray:
        w, static = layer.weight.astype(jnp.float32), layer.static
        integers_only("adaround", layer.name, static["qtype"])
        hessian = layer.statistic(2)
        if not bool(jnp.isfinite(hessian).all()):
            raise ValueError(
                f"the second moments of the activations of {layer.name!r} are not finite"
            )
        grain = {name: static[name] for name in ("axis", "group_size", "qtype")}
        diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
        importance = jnp.maximum(diagonal, 1e-6 * diagonal.mean(-1, keepdims=True) + 1e-30)
        if clip:
            scale, zero = searched_scales(w, layer.matrices.features(importance), **grain)
        else:
            scale, zero = full_scales(w, **grain)
        split = lambda part: layer.matrices.split(
            expand(part.astype(jnp.float32), w.shape, static["axis"], static["group_size"])
        )
        offset = 0.0 if zero is None else split(zero)
        codes = _learn(
            layer.matrices.split(w) / split(scale) + offset,
            split(scale),
            hessian,
            steps=steps,
            learning_rate=learning_rate,
            low=static["qtype"].low,
            high=static["qtype"].high,
        )
        return layer.stored(layer.matrices.join(codes), scale, zero)

    return layerwise(
        fn,
        params,
        batches,
        rules,
        second_moment(),
        solve,
        identity=["adaround", steps, learning_rate, clip],
        stats=stats,
        resume=resume,
        progress=progress,
    )


def soft(v: jax.Array) -> jax.Array:
    """How far each weight goes up, 0 to 1: a sigmoid that reaches both."""
    return jnp.clip(jax.nn.sigmoid(v) * (1 + 2 * _STRETCH) - _STRETCH, 0, 1)


def start(up: jax.Array) -> jax.Array:
    """The variable with which `soft` is `up`."""
    inside = jnp.clip((up + _STRETCH) / (1 + 2 * _STRETCH), 1e-3, 1 - 1e-3)
    return jnp.log(inside) - jnp.log1p(-inside)


def pull(up: jax.Array, t: jax.Array) -> jax.Array:
    """What pulls towards 0 or 1, ever more sharply, at the share `t` of the steps."""
    sharpness = 2 + 18 * (1 - jnp.clip((t - 0.2) / 0.8, 0, 1))
    return jnp.where(t < 0.2, 0.0, _PULL) * jnp.sum(1 - jnp.abs(2 * up - 1) ** sharpness)


@functools.partial(jax.jit, static_argnames=("steps", "learning_rate", "low", "high"))
def _learn(
    real: jax.Array,
    scale: jax.Array,
    hessian: jax.Array,
    *,
    steps: int,
    learning_rate: float,
    low: int,
    high: int,
) -> jax.Array:
    """Whole codes for `real[batch, k, n]`, the weights in units of their scale."""
    below = jnp.floor(real)
    nearest = jnp.clip(jnp.round(real), low, high)

    def errors(codes: jax.Array) -> jax.Array:
        e = (codes - real) * scale
        return jnp.einsum("bkn,bkl,bln->bn", e, hessian, e)

    # In units of what nearest rounding costs a weight, so that one weight of the second
    # term does for all layers.
    unit = jnp.maximum(errors(nearest).sum() / real.size, 1e-30)
    v = start(real - below)
    tx = optax.adam(learning_rate)

    def loss(v: jax.Array, t: jax.Array) -> jax.Array:
        up = soft(v)
        return errors(jnp.clip(below + up, low, high)).sum() / unit + pull(up, t)

    def step(state: Any, t: jax.Array) -> Any:
        v, opt = state
        updates, opt = tx.update(jax.grad(loss)(v, t), opt)
        return (optax.apply_updates(v, updates), opt), None

    (v, _), _ = jax.lax.scan(step, (v, tx.init(v)), jnp.arange(steps) / steps)
    learnt = jnp.clip(below + (soft(v) >= 0.5), low, high)
    better = errors(learnt) < errors(nearest)
    return jnp.where(better[:, None, :], learnt, nearest)
