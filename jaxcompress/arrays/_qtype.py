"""Number formats: what the codes of a quantized array mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcompress.arrays._formats import CodebookType, FloatType, OddType, TernaryType

__all__ = ["Activation", "IntType", "QType", "float_dtype"]


@dataclasses.dataclass(frozen=True)
class IntType:
    """Signed integers of `bits` bits, 2 to 8.

    Symmetric integers leave out the lowest code, `-(2^(b-1) - 1) .. 2^(b-1) - 1`, so
    that zero is exact and a sign change is one of the codes; asymmetric ones use all
    `2^b` and come with a zero point.

    >>> from jaxcompress.arrays import IntType
    >>> IntType(4).low, IntType(4).high, IntType(4, symmetric=False).low
    (-7, 7, -8)
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer widths are 2 to 8 bits; got {self.bits}")

    @property
    def name(self) -> str:
        return f"int{self.bits}" if self.symmetric else f"int{self.bits}_asymmetric"

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def low(self) -> int:
        """The smallest code."""
        return -self.high if self.symmetric else -self.high - 1

    @property
    def integer(self) -> bool:
        return True

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.round(x)

    def encode(self, numbers: jax.Array) -> jax.Array:
        return numbers.astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes


QType = IntType | OddType | TernaryType | FloatType | CodebookType


@dataclasses.dataclass(frozen=True)
class Activation:
    """How the activations that meet a quantized weight are quantized.

    Dynamic (`static=False`): the scale is the absolute maximum of each token, that is
    of each index of the axes that are not contracted, or of the whole tensor with
    `per_token=False`. Static: one scale for the tensor, fixed by calibration and kept
    in the array's `act_scale`. With an asymmetric `qtype` the range of the activations is
    fitted, `x ~ codes * scale + offset`, and a static offset is kept in `act_offset`. With a
    `FloatType` whose scales are "e8m0", every 32 neighbours of a token share a dynamic one.

    In training, gradients that come back are rounded stochastically to `grad_bits`, 2 to
    8, and multiplied as integers; and with `clip_gradient` the gradient to a static range
    is that of clipping alone (PACT).

    >>> import jaxcompress as jc
    >>> jc.quantize.w4a8().act.qtype.bits
    8
    """

    qtype: QType
    per_token: bool = True
    static: bool = False
    grad_bits: int | None = None
    clip_gradient: bool = False

    def __post_init__(self) -> None:
        if self.grad_bits is not None and not (
            2 <= self.grad_bits <= 8 and isinstance(self.qtype, IntType)
        ):
            raise ValueError(
                "gradients take 2 to 8 bits, with integer activations; got "
                f"grad_bits={self.grad_bits} and {self.qtype.name}"
            )
        scales = getattr(self.qtype, "scales", "float32")
        if scales == "e4m3" or (scales == "e8m0" and (self.static or not self.per_token)):
            raise ValueError(
                "activations have scales in float32, or dynamic powers of two (e8m0) for 32 of a "
                f"token; got {self.qtype.name}, static={self.static}, per_token={self.per_token}"
            )
        if self.static and self.per_token:
            raise ValueError(
                "a static activation scale covers the whole tensor: use per_token=False"
            )


def float_dtype(dtype: DTypeLike, path: str = "") -> np.dtype:
    """`dtype` as a NumPy dtype; raises unless it is a real floating one."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"only floating arrays can be compressed; {path or 'the array'} is "
            f"{np.dtype(dtype).name}"
        )
    return np.dtype(dtype)
