"""Specs of formats that are no plain integers: binary, ternary, codebooks, floats, blocks."""

from jaxcompress.arrays import Activation, CodebookType, FloatType, OddType, TernaryType
from jaxcompress.quantize._specs import Axis, Spec

__all__ = ["binary", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8", "nf4", "nvfp4", "ternary"]


def binary(*, axis: Axis = None, group_size: Axis = None) -> Spec:
    """One-bit weights: `w ~ s sign(w)`, `s = mean |w|` over those that share it.

    Args:
      axis, group_size: as for `int8`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.array([[1.0], [-3.0]])
    >>> jc.quantize.quantize({"w": w}, {"w": jc.quantize.binary()})["w"].materialise()
    Array([[ 2.],
           [-2.]], dtype=float32)

    Rastegari et al., 2016, XNOR-Net, arXiv:1603.05279.
    """
    return Spec(qtype=OddType(1), axis=axis, group_size=group_size)


def ternary(*, axis: Axis = None, group_size: Axis = None, threshold: float = 0.7) -> Spec:
    """Weights -s, 0 and s in two bits.

    `|w| > d` is kept, `d = threshold mean |w|`, and `s` is the mean magnitude of what is kept.

    Args:
      axis, group_size: as for `int8`.
      threshold: in mean magnitudes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.array([[1.0], [-3.0], [0.1], [0.0]])
    >>> jc.quantize.quantize({"w": w}, {"w": jc.quantize.ternary()})["w"].materialise().T
    Array([[ 2., -2.,  0.,  0.]], dtype=float32)

    Li et al., 2016, Ternary Weight Networks, arXiv:1605.04711.
    """
    return Spec(qtype=TernaryType(threshold), axis=axis, group_size=group_size)


# Quantiles of a normal distribution, scaled to the largest, 0 among them; as published.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4(*, axis: Axis = None, group_size: Axis = 64) -> Spec:
    """Four bits whose 16 numbers are even in probability for a normal distribution.

    `w ~ s table[code]`, `s = max |w|`.

    Args:
      axis, group_size: as for `int8`.

    >>> import jaxcompress as jc
    >>> jc.quantize.nf4().qtype.high, jc.quantize.nf4().group_size
    (1.0, 64)

    Dettmers et al., 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
    """
    return Spec(qtype=CodebookType("nf4", _NF4), axis=axis, group_size=group_size)


def fp8_e4m3(*, axis: Axis = None, group_size: Axis = None) -> Spec:
    """Eight-bit floats with three mantissa bits, to 448: `scale = max |w| / 448`.

    Args:
      axis, group_size: as for `int8`.

    >>> import jaxcompress as jc
    >>> jc.quantize.fp8_e4m3().qtype.name
    'float8_e4m3'

    Micikevicius et al., 2022, FP8 Formats for Deep Learning, arXiv:2209.05433.
    """
    return Spec(qtype=FloatType(4, 3, 448.0), axis=axis, group_size=group_size)


def fp8_e5m2(*, axis: Axis = None, group_size: Axis = None) -> Spec:
    """Eight-bit floats with two mantissa bits and more range, to 57344; see `fp8_e4m3`.

    >>> import jaxcompress as jc
    >>> jc.quantize.fp8_e5m2().qtype.high
    57344.0
    """
    return Spec(qtype=FloatType(5, 2, 57344.0), axis=axis, group_size=group_size)


def mxfp8(*, axis: Axis = None, activations: bool = False) -> Spec:
    """Eight-bit floats (e4m3) in groups of 32 with a shared exponent, a power of two.

    `s = 2^(floor(log2 max |w|) - 8)`, one byte; the largest numbers may saturate.

    Args:
      axis: as for `int8`; groups run along the last.
      activations: True rounds the activations in the same way as they come, 32 neighbours
        along the contracted axis: `jaxcompress.ops.scaled_matmul` multiplies both.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.quantize.quantize({"w": jnp.ones((64, 4))}, {"w": jc.quantize.mxfp8()})["w"].nbytes
    264

    Rouhani et al., 2023, Microscaling Data Formats for Deep Learning, arXiv:2310.10537.
    """
    kind = FloatType(4, 3, 448.0, scales="e8m0")
    act = Activation(kind) if activations else None
    return Spec(qtype=kind, axis=axis, group_size=32, act=act)


def mxfp4(*, axis: Axis = None) -> Spec:
    """Four-bit floats (e2m1) in groups of 32 with a shared exponent; see `mxfp8`.

    `s = 2^(floor(log2 max |w|) - 2)`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.quantize.quantize({"w": jnp.ones((64, 4))}, {"w": jc.quantize.mxfp4()})["w"].nbytes
    136
    """
    return Spec(qtype=FloatType(2, 1, 6.0, scales="e8m0"), axis=axis, group_size=32)


def nvfp4(*, axis: Axis = None) -> Spec:
    """Four-bit floats (e2m1) in groups of 16 with eight-bit float scales.

    `w ~ number s o`: `s = e4m3(max |w| / (6 o))` for each group, `o = max |w| / (6 448)` in
    float32 over all groups of `axis`, so for each output channel; with `axis=(-1, -2)` one
    for the tensor.

    Args:
      axis: as for `int8`; groups run along the last.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.quantize.quantize({"w": jnp.ones((64, 4))}, {"w": jc.quantize.nvfp4()})["w"].nbytes
    160

    NVIDIA, 2025, Pretraining Large Language Models with NVFP4, arXiv:2509.25149.
    """
    return Spec(qtype=FloatType(2, 1, 6.0, scales="e4m3"), axis=axis, group_size=16)
