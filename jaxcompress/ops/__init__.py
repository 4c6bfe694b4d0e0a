"""Products of compressed arrays, on raw arrays; `accelerate` calls them."""

from jaxcompress.ops._int8_matmul import int8_matmul
from jaxcompress.ops._quantized_matmul import quantized_matmul
from jaxcompress.ops._w4a8_matmul import w4a8_matmul

__all__ = ["int8_matmul", "quantized_matmul", "w4a8_matmul"]
