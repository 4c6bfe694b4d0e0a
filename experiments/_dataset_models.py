"""The networks of distill_dataset.py: the papers' ConvNet of any width, and an MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Network(NamedTuple):
    """Plain functions of plain parameters, for images `[n, 28, 28, 1]`."""

    init: Callable[[jax.Array], Any]
    features: Callable[[Any, jax.Array], jax.Array]
    apply: Callable[[Any, jax.Array], jax.Array]


def _head(init: Callable, features: Callable) -> Network:
    apply = lambda p, x: features(p, x) @ p["head"]["kernel"] + p["head"]["bias"]
    return Network(init, features, apply)


def _dense(key: jax.Array, a: int, b: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (a, b)) / a**0.5, "bias": jnp.zeros(b)}


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Of each image and channel; sums and squares in one pass over memory, its main cost."""
    mean = jnp.mean(x, (1, 2), keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, (1, 2), keepdims=True) - mean**2, 0)
    scale = jax.lax.rsqrt(variance + 1e-5) * scale
    return x * scale + (bias - mean * scale)


def _pool(x: jax.Array) -> jax.Array:
    """Means of 2x2; sums of strided slices, as a reshaped mean is half as fast."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return sum(x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)) / 4


def convnet(width: int, depth: int = 3) -> Network:
    """Blocks of a 3x3 convolution, instance norm, ReLU and 2x2 average pooling."""
    side = 28 // 2**depth

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, depth + 1)
        sizes = [1] + [width] * depth
        blocks = [
            {
                "kernel": jax.random.normal(k, (3, 3, a, b)) * (2 / (9 * a)) ** 0.5,
                "scale": jnp.ones(b),
                "bias": jnp.zeros(b),
            }
            for k, a, b in zip(keys, sizes, sizes[1:])
        ]
        return {"blocks": blocks, "head": _dense(keys[-1], side * side * width, 10)}

    def features(params: Any, x: jax.Array) -> jax.Array:
        for block in params["blocks"]:
            x = jax.lax.conv_general_dilated(
                x, block["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = _pool(jax.nn.relu(_norm(x, block["scale"], block["bias"])))
        return x.reshape(len(x), -1)

    return _head(init, features)


def mlp(width: int = 256) -> Network:
    """Two hidden layers: the architecture that nothing was learned with."""

    def init(key: jax.Array) -> Any:
        a, b, c = jax.random.split(key, 3)
        return {
            "layers": [_dense(a, 784, width), _dense(b, width, width)],
            "head": _dense(c, width, 10),
        }

    def features(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in params["layers"]:
            x = jax.nn.relu(2**0.5 * x @ layer["kernel"] + layer["bias"])
        return x

    return _head(init, features)
