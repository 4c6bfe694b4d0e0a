"""The containers: arrays to JAX, fewer bytes in memory."""

from jaxcompress.arrays._base import CompressedArray, is_compressed
from jaxcompress.arrays._bitmap import BitmapSparseArray
from jaxcompress.arrays._block import BlockSparseArray
from jaxcompress.arrays._codebook import CodebookArray
from jaxcompress.arrays._fake_quant import FakeQuantArray
from jaxcompress.arrays._formats import CodebookType, FloatType, OddType, TernaryType
from jaxcompress.arrays._low_rank import LowRankArray
from jaxcompress.arrays._nm import NMSparseArray
from jaxcompress.arrays._prepacked import PrepackedArray
from jaxcompress.arrays._prepacked_sparse import PrepackedSparseArray
from jaxcompress.arrays._pruned_input import PrunedInputArray
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.arrays._rotated import RotatedArray
from jaxcompress.arrays._scaled import ScaledArray

__all__ = [
    "Activation",
    "BitmapSparseArray",
    "BlockSparseArray",
    "CodebookArray",
    "CodebookType",
    "CompressedArray",
    "FakeQuantArray",
    "FloatType",
    "IntType",
    "LowRankArray",
    "NMSparseArray",
    "OddType",
    "PrepackedArray",
    "PrepackedSparseArray",
    "PrunedInputArray",
    "QuantizedArray",
    "RotatedArray",
    "ScaledArray",
    "TernaryType",
    "is_compressed",
]
