"""Rotation: outliers spread over all features before weights and activations are rounded."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._statistics import Observed, second_moment
from jaxcompress.arrays import RotatedArray
from jaxcompress.arrays._quantized import quantize_array, replace
from jaxcompress.arrays._rotated import mix
from jaxcompress.quantize._gptq import Rounding, checked, round_layer
from jaxcompress.quantize._posttrain import Layer, Progress, layerwise
from jaxcompress.quantize._specs import Spec

__all__ = ["rotate"]


def rotate(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    stats: Any = None,
    seed: int = 0,
    compensate: bool = True,
    damping: float = 0.01,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Rounds weights, and activations, in a basis where none of their features stands out.

    `x w = (x S Q) (Q^T S w)` with random signs `S` and the orthogonal
    `Q = hartley(m) (x) hadamard(2^a)` of `k = m 2^a` features, `m` odd. `Q^T S w` is what
    is rounded and kept; `x S Q` is made at the product, by small factors one after the
    other, so `fn` stays as it is. In exact arithmetic nothing changes but the rounding.
    QuaRot folds most of its rotations into the weights before, so that they cost nothing:
    that is `fold_rotations`, where the network lets it. This rotates in front of any weight.

    Args:
      fn, params, batches, rules, resume, progress: as for `gptq`; specs with quantized
        activations, as `w4a4()`, are what this is for.
      stats: refused where a spec has static activations: they are those before rotation.
      seed: of the signs.
      compensate: round as `gptq` does, as the paper does; False rounds to nearest, takes
        formats other than integers too, and learns nothing from the batches.
      damping: as for `gptq`.

    Returns:
      A tree like `params` with `RotatedArray` leaves.

    Raises:
      ValueError: as for `gptq`; a spec with static activations.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> x, params = x.at[:, 5].mul(100.0), {"w": w}
    >>> fn, rules = lambda p, x: x @ p["w"], {"w": jc.quantize.w4a4()}
    >>> error = lambda p: jnp.linalg.norm(jc.accelerate(fn)(p, x) - x @ w)
    >>> new = jc.quantize.rotate(fn, params, [x], rules)
    >>> bool(error(new) < 0.6 * error(jc.quantize.quantize(params, rules)))
    True

    Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs,
    arXiv:2404.00456.
    """
    for pattern, spec in rules.items():
        if isinstance(spec, Spec) and spec.act is not None and spec.act.static:
            raise ValueError(
                f"{pattern!r}: static activation scales are those before the features are "
                "rotated; use a dynamic spec"
            )
    rounding = checked(Rounding(damping=damping))

    def solve(layer: Layer) -> RotatedArray:
        w, matrices, path = layer.weight, layer.matrices, layer.static["path"]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        signs = jax.random.rademacher(key, (matrices.k,), jnp.int8)
        beside = matrices.features(jnp.broadcast_to(signs, (matrices.experts, matrices.k)))
        rotated = mix(w.astype(jnp.float32) * beside, matrices.contract)
        if compensate:
            seen = Observed(_turned(layer.observed.of(layer.name), signs), layer.observed.count)
            turned = dataclasses.replace(layer, weight=rotated, observed=seen)
            array = round_layer(turned, rounding)
        else:
            array = quantize_array(rotated, **layer.static)
        array = replace(array, float_dtype=np.dtype(w.dtype))
        return RotatedArray(array, beside, axes=matrices.contract, path=path)

    return layerwise(
        fn,
        params,
        batches,
        rules,
        second_moment(),
        solve,
        identity=["rotate", seed, compensate, damping],
        stats=stats,
        resume=resume,
        progress=progress,
    )


@jax.jit
def _turned(moments: jax.Array, signs: jax.Array) -> jax.Array:
    """`(x S Q)^T (x S Q)` from `x^T x`, which is `[..., k, k]`."""
    once = mix(moments * signs, (-1,))
    return mix(once * signs[:, None], (-2,))
