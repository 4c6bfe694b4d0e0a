"""Products of compressed arrays, on raw arrays; `accelerate` calls them."""

from jaxcompress.ops._block_sparse import block_sparse_matmul
from jaxcompress.ops._int8_matmul import int8_matmul
from jaxcompress.ops._nm_matmul import nm_matmul
from jaxcompress.ops._quantized_matmul import quantized_matmul
from jaxcompress.ops._scaled_matmul import scaled_matmul
from jaxcompress.ops._w4a8_matmul import w4a8_matmul

__all__ = [
    "block_sparse_matmul",
    "int8_matmul",
    "nm_matmul",
    "quantized_matmul",
    "scaled_matmul",
    "w4a8_matmul",
]
