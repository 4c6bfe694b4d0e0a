"""`quantize`: round the weights of a trained model to nearest."""

from collections.abc import Mapping
from typing import Any

from jaxcompress.arrays._quantized import quantize_array
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._specs import Spec

__all__ = ["quantize"]


def quantize(
    params: Any, rules: Mapping[str, Spec | None], *, layout: Any = None, stats: Any = None
) -> Any:
    """Rounds the weights that `rules` name to nearest, as `QuantizedArray` leaves.

    `values = round(w / scale)`, `scale = max |w| / (2^(b-1) - 1)` over the weights that
    share it; with `symmetric=False` the range is fitted with a zero point.

    Args:
      params: any pytree: a Linen or Haiku dict, NNX state or module, an Equinox module.
      rules: an ordered mapping of patterns (regular expressions that match a whole path
        like `params/Dense_0/kernel`) to specs; the first that matches counts, None
        leaves its leaves alone, and so do leaves that no rule names.
      layout: what `jaxcompress.layout` found: the contracting axes, for specs without
        `axis`. Without it such a spec takes -2.
      stats: what `jaxcompress.calibrate` found, for specs with static activations: with
        `absmax()`, `minmax()`, `moving_average()`, `percentile()`, `mse()`, `entropy()` or
        `snr()` of `jaxcompress.statistics`.

    Returns:
      A tree like `params`; run it with `jaxcompress.accelerate`. Within a group the error
      is at most half a scale. A group of zeros, or of denormals, has scale 1 and values 0.

    Raises:
      ValueError: a rule that matches nothing; an axis or a group size that does not fit;
        NaN or infinity in a weight (inside `jit`, where values are not known, the scale
        of that group becomes NaN instead); static activations without statistics.
      TypeError: a rule names a leaf that is not a floating array.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
    >>> jc.quantize.quantize(params, {"kernel": jc.quantize.int4(group_size=32)})["kernel"]
    QuantizedArray(int4[64,32] as float32, axis=(-2,), group_size=(32,), path='kernel')
    """
    return map_rules(quantize_array, params, rules, layout, stats)
