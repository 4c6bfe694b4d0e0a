"""HQQ: scales and zero points fitted to the weights alone, outliers counted less."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._fit import Fit
from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._quantized import store
from jaxcompress.arrays._rounding import encode
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._scales import full_scales, integers_only
from jaxcompress.quantize._specs import Spec

__all__ = ["hqq"]

_BETA = 10.0  # how much the splitting may cost, in units of the scale; grows by 1 % a step


def hqq(
    params: Any,
    rules: Mapping[str, Spec | None],
    *,
    layout: Any = None,
    stats: Any = None,
    norm: float = 0.7,
    steps: int = 20,
) -> Any:
    """Half-quadratic quantization: no data, better scales than those of the largest weight.

    Minimises `sum |w - (q - z) s|^norm` over the scale `s`, the zero point `z` (where the
    spec has one) and the codes `q`, by turns: `e = shrink(w - w_hat)`, the part of the
    error that is left to outliers; then `s` and `z` of least squares to `w - e`; then
    the codes. Of all steps the best is kept, group by group.

    It starts from the full range. Zero points here are whole numbers,
    where those of the paper are floats; the scale, which the paper keeps, is fitted too.

    Args:
      params, rules, layout, stats: as for `quantize`.
      norm: the exponent, above 0 and at most 1.
      steps: of the alternation.

    Returns:
      A tree like `params` with `QuantizedArray` leaves.

    Raises:
      ValueError: as for `quantize`, or a norm outside its range.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w = jax.random.normal(jax.random.key(0), (64, 32))
    >>> params, rules = {"w": w}, {"w": jc.quantize.int3()}
    >>> error = lambda p: jnp.mean(jnp.abs(p["w"].materialise() - w))
    >>> bool(error(jc.quantize.hqq(params, rules)) < error(jc.quantize.quantize(params, rules)))
    True

    Badri and Shaji, 2023, Half-Quadratic Quantization of Large Machine Learning Models,
    https://mobiusml.github.io/hqq_blog/
    """
    if not 0 < norm <= 1:
        raise ValueError(f"norm is above 0 and at most 1; got {norm}")

    def make(w: jax.Array, *, act_scale: Any, act_offset: Any, **static: Any) -> QuantizedArray:
        integers_only("hqq", static["path"], static["qtype"])
        grain = {name: static[name] for name in ("axis", "group_size", "qtype")}
        codes, scale, zero = _fit(w, norm=norm, steps=steps, **grain)
        found = Fit(scale, zero)
        return store(codes, found, act_scale, act_offset, float_dtype=np.dtype(w.dtype), **static)

    return map_rules(make, params, rules, layout, stats)


@functools.partial(jax.jit, static_argnames=("norm", "steps", "axis", "group_size", "qtype"))
def _fit(
    w: jax.Array, *, norm: float, steps: int, axis: Axes, group_size: Axes | None, qtype: IntType
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    w = w.astype(jnp.float32)
    spread = lambda part: expand(part.astype(jnp.float32), w.shape, axis, group_size)
    total = lambda x: reduce_groups(x, axis, group_size, jnp.sum, 0.0)
    count = total(jnp.ones_like(w))
    code = lambda scale, zero: encode(w, scale, zero, qtype, axis, group_size)

    def decoded(codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        return (codes if zero is None else codes - spread(zero)) * spread(scale)

    def step(state: Any, beta: jax.Array) -> Any:
        (scale, zero), best = state
        codes = code(scale, zero)
        error = (w - decoded(codes, scale, zero)) / spread(scale)
        size = jnp.abs(error)
        # The minimum of |e|^norm + beta/2 (e - error)^2, to first order.
        left = jnp.sign(error) * jax.nn.relu(size - jnp.maximum(size, 1e-8) ** (norm - 1) / beta)
        target = w - left * spread(scale)
        centre = 0.0 if zero is None else total(codes) / count
        offset = 0.0 if zero is None else total(target) / count
        off = codes if zero is None else codes - spread(centre)
        fitted = total(off * target) / jnp.maximum(total(off**2), 1e-30)
        scale = jnp.where(fitted > jnp.finfo(jnp.float32).tiny, fitted, scale)
        if zero is not None:
            whole = jnp.clip(jnp.round(centre - offset / scale), qtype.low, qtype.high)
            zero = whole.astype(jnp.int8)
        return keep(best, scale, zero)

    def keep(best: Any, scale: jax.Array, zero: jax.Array | None) -> Any:
        error = total(jnp.abs(w - decoded(code(scale, zero), scale, zero)) ** norm)
        better = error < best[0]
        chosen = jnp.where(better, scale, best[1])
        chosen_zero = None if zero is None else jnp.where(better, zero, best[2])
        return ((scale, zero), (jnp.minimum(error, best[0]), chosen, chosen_zero)), None

    start, zero = full_scales(w, axis, group_size, qtype)
    state, _ = keep((jnp.full(start.shape, jnp.inf), start, zero), start, zero)
    betas = _BETA * 1.01 ** jnp.arange(steps, dtype=jnp.float32)
    (_, (_, scale, zero)), _ = jax.lax.scan(step, state, betas)
    return code(scale, zero), scale, zero
