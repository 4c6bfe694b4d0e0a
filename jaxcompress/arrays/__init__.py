"""The containers: arrays to JAX, fewer bytes in memory."""

from jaxcompress.arrays._base import CompressedArray, is_compressed
from jaxcompress.arrays._bitmap import BitmapSparseArray
from jaxcompress.arrays._fake_quant import FakeQuantArray
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._scaled import ScaledArray

__all__ = [
    "Activation",
    "BitmapSparseArray",
    "CompressedArray",
    "FakeQuantArray",
    "IntType",
    "QuantizedArray",
    "ScaledArray",
    "is_compressed",
]
