"""Float activations times int8 weights by XLA's integer product, for CPUs.

XLA:CPU decodes an int8 weight to a float array before it multiplies: for one row that
takes eight times as long as the product of floats. Here the activations are taken apart
instead. A row becomes a power of two times four digits to the base 128, each an int8;
every digit is one more row of an exact integer product. Scaling and digits lose nothing
above 2^-28 of the largest magnitude of the row, so that what is left is the rounding of
float32 when the four sums are put together.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["DIGITS", "join", "split"]

DIGITS = 4
_BASE = 128.0  # what is left after rounding is at most half a unit: 64 of the next digit
_TINY = 1e-30  # a row below this is zero: its scale would be denormal


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Digits of `x[..., m, k]`, int8 `[..., 4 m, k]`, and row scales, f32 `[..., m, 1]`.

    `x ~ scale * sum_i digit_i / 128^i`. A row that is not finite has scale NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), -1, keepdims=True, initial=0.0)
    # The power of two at or below largest / 127, twice: the first digit is at most 127.
    bits = lax.bitcast_convert_type(largest / 127, jnp.uint32) & jnp.uint32(0xFF800000)
    scale = jnp.where(largest < _TINY, 1.0, 2 * lax.bitcast_convert_type(bits, jnp.float32))
    rest, digits = jnp.where(largest < _TINY, 0.0, x / scale), []
    for _ in range(DIGITS):
        digit = jnp.round(rest)
        digits.append(jnp.where(jnp.isfinite(digit), digit, 0.0).astype(jnp.int8))
        rest = (rest - digit) * _BASE
    return jnp.concatenate(digits, -2), jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def join(sums: jax.Array, scale: jax.Array) -> jax.Array:
    """`[..., m, n]` from the products `[..., 4 m, n]` of the digits."""
    parts = jnp.split(sums, DIGITS, -2)
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = part + total / _BASE
    return total * scale
