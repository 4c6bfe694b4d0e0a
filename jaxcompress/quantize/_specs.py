"""Specs: what a rule does to the weights that it matches."""

import dataclasses
from collections.abc import Sequence

from jaxcompress.arrays import Activation, IntType
from jaxcompress.arrays._qtype import QType

__all__ = ["Spec", "int2", "int3", "int4", "int8", "w4a4", "w4a8", "w4a16", "w8a8", "w8a16"]

Axis = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How to quantize a weight, and the activations that meet it.

    Attributes:
      qtype: the numbers that the weight becomes.
      axis: the axes along which weights share a scale, those that the product
        contracts. None takes them from the layout, or, without one, -2: one scale for
        each index of the last axis, the output channels of Flax's `Dense`.
      group_size: neighbouring weights along the (last) axis that share a scale; one
        number for each of `axis` makes blocks; None for the whole axis.
      act: how activations are quantized; None leaves them in floats.

    >>> import jaxcompress as jc
    >>> jc.quantize.Spec(qtype=jc.arrays.IntType(5), axis=-1).qtype.name
    'int5'
    """

    qtype: QType
    axis: Axis = None
    group_size: Axis = None
    act: Activation | None = None

    def __post_init__(self) -> None:
        for name in ("axis", "group_size"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))
        if self.act is not None and self.act.grad_bits and not self.qtype.integer:
            raise ValueError(f"gradients in integers need integer weights, not {self.qtype.name}")


def _weights(bits: int, axis: Axis, group_size: Axis, symmetric: bool) -> Spec:
    return Spec(qtype=IntType(bits, symmetric), axis=axis, group_size=group_size)


def int8(*, axis: Axis = None, group_size: Axis = None, symmetric: bool = True) -> Spec:
    """Eight-bit weights, activations in floats: a quarter of float32.

    `w ~ values * scale`, `scale = max |w| / 127` over the weights that share it.

    Args:
      axis: the axes along which weights share a scale, the contracting ones: -2 for
        Flax's `Dense`, -1 for Equinox's `Linear`, all of them for one scale per tensor.
        None takes them from the layout given to `quantize`, or else -2.
      group_size: share a scale in groups of this many along the (last) axis, which need
        not divide it; one number for each of `axis` makes blocks.
      symmetric: False fits the range with a zero point instead.

    >>> import jaxcompress as jc
    >>> jc.quantize.int8(axis=-1, group_size=64).group_size
    64
    """
    return _weights(8, axis, group_size, symmetric)


def int4(*, axis: Axis = None, group_size: Axis = None, symmetric: bool = True) -> Spec:
    """Four-bit weights, activations in floats; arguments as for `int8`.

    `scale = max |w| / 7`. Groups of 32 to 128 recover most of what four bits lose.

    >>> import jaxcompress as jc
    >>> jc.quantize.int4(group_size=128).qtype.name
    'int4'
    """
    return _weights(4, axis, group_size, symmetric)


def int3(*, axis: Axis = None, group_size: Axis = None, symmetric: bool = True) -> Spec:
    """Three-bit weights, activations in floats, stored in three bits; see `int8`.

    `scale = max |w| / 3`.

    >>> import jaxcompress as jc
    >>> jc.quantize.int3(group_size=64).qtype.high
    3
    """
    return _weights(3, axis, group_size, symmetric)


def int2(*, axis: Axis = None, group_size: Axis = None, symmetric: bool = True) -> Spec:
    """Two-bit weights, activations in floats: -1, 0 and 1 if symmetric; see `int8`.

    `scale = max |w|`.

    >>> import jaxcompress as jc
    >>> jc.quantize.int2(symmetric=False).qtype.low
    -2
    """
    return _weights(2, axis, group_size, symmetric)


def w8a16(*, axis: Axis = None, group_size: Axis = None) -> Spec:
    """Eight-bit weights, activations in floats: `int8` by its other name.

    >>> import jaxcompress as jc
    >>> jc.quantize.w8a16() == jc.quantize.int8()
    True
    """
    return int8(axis=axis, group_size=group_size)


def w4a16(*, axis: Axis = None, group_size: Axis = None) -> Spec:
    """Four-bit weights, activations in floats: `int4` by its other name.

    >>> import jaxcompress as jc
    >>> jc.quantize.w4a16() == jc.quantize.int4()
    True
    """
    return int4(axis=axis, group_size=group_size)


def _both(
    bits: int,
    act_bits: int,
    axis: Axis,
    group_size: Axis,
    static: bool,
    per_token: bool,
    act_symmetric: bool,
    grad_bits: int | None,
) -> Spec:
    act = Activation(
        IntType(act_bits, act_symmetric),
        per_token=per_token and not static,
        static=static,
        grad_bits=grad_bits,
    )
    return Spec(qtype=IntType(bits), axis=axis, group_size=group_size, act=act)


def w8a8(
    *,
    axis: Axis = None,
    group_size: Axis = None,
    static: bool = False,
    per_token: bool = True,
    act_symmetric: bool = True,
    grad_bits: int | None = None,
) -> Spec:
    """Eight-bit weights and activations, multiplied as integers.

    `y = s_x s_w (x_q @ w_q)`, `x_q = round(x / s_x)`, summed in int32.

    Args:
      axis, group_size: of the weights, as for `int8`.
      static: one activation scale for the tensor, from the statistics given to
        `quantize` or `prepare_qat`. Otherwise the scale is dynamic,
        `s_x = max |x| / 127`, computed as the activations come,
      per_token: for each token (each index that the product does not contract), or with
        False once for the whole tensor.
      act_symmetric: False fits the range of the activations with an offset instead, which
        is worth a bit after a ReLU: `x ~ s_x x_q + o_x`.
      grad_bits: in training, rounds the gradients that come back to this many bits,
        stochastically, and multiplies them as integers too; None leaves them in floats.

    >>> import jaxcompress as jc
    >>> jc.quantize.w8a8(static=True).act.static
    True

    Jacob et al., 2018, arXiv:1712.05877.
    """
    return _both(8, 8, axis, group_size, static, per_token, act_symmetric, grad_bits)


def w4a8(
    *,
    axis: Axis = None,
    group_size: Axis = None,
    static: bool = False,
    per_token: bool = True,
    act_symmetric: bool = True,
    grad_bits: int | None = None,
) -> Spec:
    """Four-bit weights and eight-bit activations, multiplied as integers; see `w8a8`.

    >>> import jaxcompress as jc
    >>> jc.quantize.w4a8(group_size=64).act.qtype.bits
    8
    """
    return _both(4, 8, axis, group_size, static, per_token, act_symmetric, grad_bits)


def w4a4(
    *,
    axis: Axis = None,
    group_size: Axis = None,
    static: bool = False,
    per_token: bool = True,
    act_symmetric: bool = True,
    grad_bits: int | None = None,
) -> Spec:
    """Four-bit weights and activations, multiplied as integers; see `w8a8`.

    >>> import jaxcompress as jc
    >>> jc.quantize.w4a4().act.qtype.high
    7
    """
    return _both(4, 4, axis, group_size, static, per_token, act_symmetric, grad_bits)
