"""Model compression for JAX, as functional transforms.

A compressed weight is an array: replace leaves of a params pytree by compressed arrays,
run the unmodified model function through `accelerate`, and every product that meets one
runs on a fused kernel. Training-time compression is an Optax transformation or a
params-to-params function.
"""

from jaxcompress import arrays, distill, io, ops, prune, quantize, statistics
from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._explain import explain
from jaxcompress._calibrate import calibrate
from jaxcompress._layout import layout
from jaxcompress._prepack import prepack

__all__ = [
    "accelerate",
    "arrays",
    "calibrate",
    "distill",
    "explain",
    "io",
    "layout",
    "ops",
    "prepack",
    "prune",
    "quantize",
    "statistics",
]

__version__ = "0.1.0"
