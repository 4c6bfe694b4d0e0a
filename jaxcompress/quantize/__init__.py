"""Quantization: specs, rounding to nearest, and training for it."""

from jaxcompress._sequential import Finished
from jaxcompress.quantize._adaround import adaround
from jaxcompress.quantize._gptq import gptq
from jaxcompress.quantize._hqq import hqq
from jaxcompress.quantize._qat import convert, freeze, prepare_qat, trainable
from jaxcompress.quantize._quantize import quantize
from jaxcompress.quantize._report import LeafReport, Report, report, sensitivity
from jaxcompress.quantize._scaling import awq, smoothquant
from jaxcompress.quantize._specs import (
    Spec,
    int2,
    int3,
    int4,
    int8,
    w4a4,
    w4a8,
    w4a16,
    w8a8,
    w8a16,
)

__all__ = [
    "Finished",
    "LeafReport",
    "Report",
    "Spec",
    "adaround",
    "awq",
    "convert",
    "freeze",
    "gptq",
    "hqq",
    "int2",
    "int3",
    "int4",
    "int8",
    "prepare_qat",
    "quantize",
    "report",
    "sensitivity",
    "smoothquant",
    "trainable",
    "w4a4",
    "w4a8",
    "w4a16",
    "w8a8",
    "w8a16",
]
