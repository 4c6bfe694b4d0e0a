"""Number formats that are not plain integers: odd integers, ternary, floats, codebooks.

Every format has one interface, that of `IntType` too. Numbers are in units of the scale.

- `bits` of a code, `low` and `high`, the numbers at both ends; `integer`, whether they all
  are int8, so that a product can run on them as they are;
- `nearest(x)`: of float32 within the ends, the nearest number, as a float;
- `encode(numbers)`: their int8 codes, of which the low `bits` bits count;
- `decode(codes)`: the numbers again, int8 or float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["CodebookType", "FloatType", "OddType", "TernaryType", "exponent_of", "power_of_two"]


@dataclasses.dataclass(frozen=True)
class OddType:
    """Odd integers of `bits` bits: `-(2^b - 1), ..., -1, 1, ..., 2^b - 1`, no zero.

    One bit is binary, -1 and 1, and its scale is the mean magnitude; with more bits the
    largest magnitude is on the largest number.

    >>> from jaxcompress.arrays import OddType
    >>> OddType(1).name, OddType(3).high
    ('binary', 7)
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"widths of odd integers are 1 to 8 bits; got {self.bits}")

    @property
    def name(self) -> str:
        return "binary" if self.bits == 1 else f"odd{self.bits}"

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def integer(self) -> bool:
        return self.bits < 8

    @property
    def high(self) -> int:
        """The largest number."""
        return 2**self.bits - 1

    @property
    def low(self) -> int:
        """The smallest number."""
        return -self.high

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.clip(2 * jnp.floor(x / 2) + 1, self.low, self.high)

    def encode(self, numbers: jax.Array) -> jax.Array:
        return jnp.floor(numbers / 2).astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return 2 * codes.astype(jnp.int8 if self.integer else jnp.float32) + 1


@dataclasses.dataclass(frozen=True)
class TernaryType:
    """-1, 0 and 1, in two bits. Weights above `threshold` times the mean magnitude are kept.

    Their scale is the mean magnitude of those that are.

    >>> from jaxcompress.arrays import TernaryType
    >>> TernaryType().threshold
    0.7

    Li et al., 2016, Ternary Weight Networks, arXiv:1605.04711.
    """

    threshold: float = 0.7

    @property
    def name(self) -> str:
        return "ternary"

    @property
    def bits(self) -> int:
        return 2

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def integer(self) -> bool:
        return True

    @property
    def high(self) -> int:
        """The largest number."""
        return 1

    @property
    def low(self) -> int:
        """The smallest number."""
        return -1

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.round(x)

    def encode(self, numbers: jax.Array) -> jax.Array:
        return numbers.astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes


@dataclasses.dataclass(frozen=True)
class FloatType:
    """Small floats: a sign, `exponent` and `mantissa` bits, subnormals, no infinity in use.

    `largest` is the largest finite number: formats differ in what they keep for NaN and
    infinity. `scales` says how the scales are stored: "float32"; "e8m0", a power of two
    in a byte (the shared exponent of MX formats); or "e4m3", an eight-bit float, with a
    float32 scale in `outer_scale` over all of its groups (NVFP4).

    >>> from jaxcompress.arrays import FloatType
    >>> FloatType(4, 3, 448.0).name, FloatType(2, 1, 6.0, scales="e8m0").name
    ('float8_e4m3', 'float4_e2m1_scales_e8m0')

    Micikevicius et al., 2022, FP8 Formats for Deep Learning, arXiv:2209.05433; Rouhani et
    al., 2023, Microscaling Data Formats for Deep Learning, arXiv:2310.10537.
    """

    exponent: int
    mantissa: int
    largest: float
    scales: str = "float32"

    def __post_init__(self) -> None:
        if self.scales not in ("float32", "e8m0", "e4m3"):
            raise ValueError(f"scales are float32, e8m0 or e4m3; got {self.scales!r}")
        if self.exponent < 2 or self.mantissa < 1 or self.bits > 8:
            raise ValueError(
                "floats have 2 exponent bits or more, 1 mantissa bit or more, and 8 bits at "
                f"most with the sign; got {self.exponent} and {self.mantissa}"
            )

    @property
    def name(self) -> str:
        name = f"float{self.bits}_e{self.exponent}m{self.mantissa}"
        return name if self.scales == "float32" else f"{name}_scales_{self.scales}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def integer(self) -> bool:
        return False

    @property
    def high(self) -> float:
        """The largest number."""
        return self.largest

    @property
    def low(self) -> float:
        """The smallest number."""
        return -self.largest

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    def nearest(self, x: jax.Array) -> jax.Array:
        step = power_of_two(jnp.maximum(exponent_of(x), 1 - self.bias) - self.mantissa)
        return jnp.round(x / step) * step

    def encode(self, numbers: jax.Array) -> jax.Array:
        size = jnp.abs(numbers)
        exponent = jnp.maximum(exponent_of(numbers), 1 - self.bias)
        # Below the smallest normal number the implicit one is missing, and so is the first
        # exponent: both are what the whole mantissa carries.
        whole = (size / power_of_two(exponent - self.mantissa)).astype(jnp.int32)
        code = ((exponent + self.bias - 1) << self.mantissa) + whole
        sign = jnp.signbit(numbers).astype(jnp.int32) << (self.bits - 1)
        return (code | sign).astype(jnp.uint8).astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        bits = codes.astype(jnp.int32)
        size = bits & (2 ** (self.bits - 1) - 1)
        normal = (size << (23 - self.mantissa)) + ((127 - self.bias) << 23)
        smallest = 2.0 ** (1 - self.bias - self.mantissa)
        subnormal = size.astype(jnp.float32) * jnp.float32(smallest)
        magnitude = jnp.where(
            size >> self.mantissa == 0,
            subnormal,
            lax.bitcast_convert_type(normal, jnp.float32),
        )
        return jnp.where((bits >> (self.bits - 1)) & 1 == 1, -magnitude, magnitude)


@dataclasses.dataclass(frozen=True)
class CodebookType:
    """A power of two of ascending numbers, from -1 to 1 at most; a code is a place in it.

    >>> from jaxcompress.arrays import CodebookType
    >>> CodebookType("quarters", (-1.0, -0.25, 0.25, 1.0)).bits
    2
    """

    name: str
    table: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.table, self.table[1:]))
        if len(self.table) not in (2, 4, 8, 16, 32, 64, 128, 256) or not ascending:
            raise ValueError(
                f"a codebook has 2, 4, ... or 256 ascending numbers; {self.name!r} has "
                f"{len(self.table)}"
            )

    @property
    def bits(self) -> int:
        return int(math.log2(len(self.table)))

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def integer(self) -> bool:
        return False

    @property
    def high(self) -> float:
        """The largest number."""
        return self.table[-1]

    @property
    def low(self) -> float:
        """The smallest number."""
        return self.table[0]

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.table, jnp.float32)[self._place(x)]

    def encode(self, numbers: jax.Array) -> jax.Array:
        return (self._place(numbers) - len(self.table) // 2).astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(self.table, jnp.float32)[codes.astype(jnp.int32) + len(self.table) // 2]

    def _place(self, x: jax.Array) -> jax.Array:
        table = np.asarray(self.table, np.float32)
        return jnp.searchsorted((table[1:] + table[:-1]) / 2, x)


def exponent_of(x: jax.Array) -> jax.Array:
    """The power of two at or below `|x|`; -127 for zero and denormals."""
    return ((lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23) & 255) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """`2^exponent` in float32, for -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
