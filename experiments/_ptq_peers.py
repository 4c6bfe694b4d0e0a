"""The same networks rounded by qwix, where it is installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["WIDTHS", "peers"]

WIDTHS = (8, 4, 2)  # its GPTQ takes the integers that JAX has


def peers(calibration: Any) -> dict[str, Callable[[Any, int], Any]]:
    """`method(params, bits)` by name, with dense kernels: one scale for each output."""
    if importlib.util.find_spec("qwix") is None:
        return {}
    import jax
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    def how(bits: int) -> Any:
        return qarray.HowToQuantize(qtype=getattr(jax.numpy, f"int{bits}"), channelwise_axes=(0,))

    def nearest(params: Any, bits: int) -> Any:
        return _mapped(params, lambda w, x: qarray.quantize(w, how(bits)))

    def gptq(params: Any, bits: int) -> Any:
        def one(w: Any, x: Any) -> Any:
            return gptq_core.quantize_weight(w, gptq_core.compute_hessian(x.T), how(bits))[0]

        return _mapped(params, one)

    def _mapped(params: Any, quantized: Callable[[Any, Any], Any]) -> Any:
        """Its GPTQ takes the activations of the dense network, all from one pass."""
        x, out = calibration, {}
        for name, layer in params.items():
            kernel = qarray.dequantize(quantized(layer["kernel"].T, x)).T
            out[name] = layer | {"kernel": kernel}
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return out

    return {"qwix RTN": nearest, "qwix GPTQ": gptq}
