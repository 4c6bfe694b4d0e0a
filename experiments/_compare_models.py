"""Three small models and a training step, for benchmarks beside other libraries.

The products of a model are those of Flax modules, so that a library that replaces them by
class, by interception or by their weights finds them all.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

__all__ = ["MODELS", "Model", "stepper"]


class MLP(nn.Module):
    """784-512-512-10."""

    dot: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (512, 512):
            x = nn.relu(nn.Dense(width, dot_general_cls=self.dot)(x))
        return nn.Dense(10, dot_general_cls=self.dot)(x)


class CNN(nn.Module):
    """Two convolutions of 16 and 32 channels on 28 x 28, and a linear layer."""

    dot: Any = None
    conv: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (16, 32):
            x = nn.Conv(channels, (3, 3), conv_general_dilated_cls=self.conv)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10, dot_general_cls=self.dot)(x.reshape(x.shape[0], -1))


class Transformer(nn.Module):
    """One block of 128 features, four heads, 512 hidden, before normalisation; mean pooled."""

    dot: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda width: nn.Dense(width, dot_general_cls=self.dot)
        batch, length, width = x.shape
        q, k, v = jnp.split(
            dense(3 * width)(nn.LayerNorm()(x)).reshape(batch, length, 4, -1), 3, -1
        )
        x = x + dense(width)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        x = x + dense(width)(nn.gelu(dense(4 * width)(nn.LayerNorm()(x))))
        return dense(10)(nn.LayerNorm()(x).mean(1))


class Model(NamedTuple):
    """A module class and the shape of its batch."""

    module: Callable[..., nn.Module]
    shape: tuple[int, ...]

    def batch(self, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.key(seed), self.shape)
        return x, jax.random.randint(jax.random.key(seed + 1), (self.shape[0],), 0, 10)


MODELS = {
    "MLP 784-512-512-10, batch 128": Model(MLP, (128, 784)),
    "CNN 16/32 channels, batch 128": Model(CNN, (128, 28, 28, 1)),
    "transformer block, 16 x 64 tokens": Model(Transformer, (16, 64, 128)),
}


def stepper(
    apply: Callable[..., jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    x: jax.Array,
    y: jax.Array,
    before: Callable[[Any, Any], Any] = lambda params, state: params,
    after: Callable[[Any, Any], Any] = lambda params, state: params,
) -> tuple[Callable[[], Any], float]:
    """`run()`, one training step from where the last one ended, and the seconds to compile it.

    `apply(params, x, key)` gives the logits; the key is another at each step. Parameters and
    the optimizer's state are donated. `before(params, state)` is what gradients are taken at,
    `after(params, state)` what a step leaves.
    """

    def loss(params: Any, key: jax.Array) -> jax.Array:
        logits = apply(params, x, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state: Any) -> tuple[Any, jax.Array]:
        params, opt, key = state
        key, here = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(before(params, opt), here)
        updates, opt = tx.update(grads, opt, params)
        return (after(optax.apply_updates(params, updates), opt), opt, key), value

    state = jax.tree.map(jnp.copy, (params, tx.init(params), jax.random.key(0)))
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    seconds = time.perf_counter() - begin

    def run() -> jax.Array:
        nonlocal state
        state, value = compiled(state)
        return jax.block_until_ready((state, value))[1]

    return run, seconds
