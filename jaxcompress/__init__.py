"""Model compression for JAX, as functional transforms."""

from jaxcompress import arrays, distill, io, ops, prune, quantize, statistics
from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._explain import explain
from jaxcompress._calibrate import calibrate
from jaxcompress._layout import layout
