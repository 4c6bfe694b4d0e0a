"""Quantization: specs, rounding to nearest, and training for it."""

from jaxcompress._sequential import Finished, Working
from jaxcompress.quantize._adaround import adaround
from jaxcompress.quantize._bias import bias_correct
from jaxcompress.quantize._brecq import brecq
from jaxcompress.quantize._equalize import equalize
from jaxcompress.quantize._fold import fold_batch_norm
from jaxcompress.quantize._fold_rotations import Rotatable, Turn, fold_rotations, rotatable
from jaxcompress.quantize._format_specs import (
    binary,
    fp8_e4m3,
    fp8_e5m2,
    mxfp4,
    mxfp8,
    nf4,
    nvfp4,
    ternary,
)
from jaxcompress.quantize._gptq import gptq
from jaxcompress.quantize._hqq import hqq
from jaxcompress.quantize._methods import dorefa, lsq, lsq_plus, pact
from jaxcompress.quantize._qat import convert, freeze, prepare_qat, trainable
from jaxcompress.quantize._quantize import quantize
from jaxcompress.quantize._report import LeafReport, Report, report, sensitivity
from jaxcompress.quantize._rotate import rotate
from jaxcompress.quantize._scaling import awq, smoothquant
from jaxcompress.quantize._schedules import clip_weights, delayed, freeze_ranges
from jaxcompress.quantize._share import Codebook, codebook, share
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
    "Codebook",
    "Finished",
    "LeafReport",
    "Report",
    "Rotatable",
    "Spec",
    "Turn",
    "Working",
    "binary",
    "clip_weights",
    "adaround",
    "awq",
    "bias_correct",
    "brecq",
    "codebook",
    "convert",
    "delayed",
    "dorefa",
    "fp8_e4m3",
    "fp8_e5m2",
    "equalize",
    "fold_batch_norm",
    "fold_rotations",
    "freeze",
    "freeze_ranges",
    "gptq",
    "hqq",
    "int2",
    "int3",
    "int4",
    "int8",
    "lsq",
    "lsq_plus",
    "mxfp4",
    "mxfp8",
    "nf4",
    "nvfp4",
    "pact",
    "prepare_qat",
    "quantize",
    "report",
    "rotatable",
    "rotate",
    "sensitivity",
    "share",
    "ternary",
    "smoothquant",
    "trainable",
    "w4a4",
    "w4a8",
    "w4a16",
    "w8a8",
    "w8a16",
]
