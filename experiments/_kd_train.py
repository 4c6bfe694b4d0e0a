"""Training a multilayer perceptron alone or with a teacher: one scan an epoch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from _data import Split
from _digits_models import SHIFTS, shifted

BATCH = 100
Params = list[dict[str, jax.Array]]


class Recipe(NamedTuple):
    """How a network is trained."""

    hidden: tuple[int, ...]
    loss: Callable[..., jax.Array]  # of logits, labels, the teacher's logits: one an example
    epochs: int
    dropout: float = 0.0
    jitter: bool = False
    peak: float = 1e-3


def init(key: jax.Array, hidden: tuple[int, ...], inputs: int = 784) -> Params:
    sizes = [inputs, *hidden, 10]
    keys = jax.random.split(key, len(sizes))
    return [
        {"kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:])
    ]


def apply(
    params: Params, x: jax.Array, dropout: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """ReLU and dropout between the layers; without a key, none."""
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        if dropout and key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
            x = jnp.where(keep, x / (1 - dropout), 0.0)
    return x @ params[-1]["kernel"] + params[-1]["bias"]


@functools.cache
def _training(recipe: Recipe, steps: int) -> tuple[Any, Any]:
    """The optimizer and a compiled epoch, the same for every seed."""
    tx = optax.adam(optax.cosine_decay_schedule(recipe.peak, recipe.epochs * steps))

    def epoch(params, state, key, x, y, table):
        order_key, shift_key, drop_key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, len(x))[: steps * BATCH].reshape(steps, BATCH)
        shifts = jax.random.randint(shift_key, order.shape, 0, SHIFTS)

        def step(carry, batch):
            params, state = carry
            index, shift, key = batch
            images = shifted(x[index], shift) if recipe.jitter else x[index]

            def objective(params):
                logits = apply(params, images, recipe.dropout, key)
                return jnp.mean(recipe.loss(logits, y[index], table[index]))

            updates, state = tx.update(jax.grad(objective)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = (order, shifts, jax.random.split(drop_key, steps))
        return jax.lax.scan(step, (params, state), batches)[0]

    return tx, jax.jit(epoch, donate_argnums=(0, 1))


def fit(recipe: Recipe, data: Split, teacher: Any, seed: int, tick: Callable[[], None]) -> Params:
    """Trains one network; `teacher` are logits for the training images, or None."""
    start, key = jax.random.split(jax.random.key(seed))
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    table = jnp.zeros((len(x), 1)) if teacher is None else jnp.asarray(teacher)
    tx, run = _training(recipe, len(x) // BATCH)
    params = init(start, recipe.hidden, x.shape[1])
    state = tx.init(params)
    for i in range(recipe.epochs):
        params, state = run(params, state, jax.random.fold_in(key, i), x, y, table)
        jax.block_until_ready(params)
        tick()
    return params


_apply = jax.jit(lambda params, x: apply(params, x))


def answer(params: Params, x: np.ndarray) -> np.ndarray:
    """Logits of many images, a piece at a time."""
    pieces = [_apply(params, jnp.asarray(x[i : i + 5000])) for i in range(0, len(x), 5000)]
    return np.concatenate([np.asarray(p) for p in pieces])


def hard(logits: jax.Array, labels: jax.Array, teacher: jax.Array) -> jax.Array:
    """Cross-entropy with the labels; the teacher is not asked."""
    del teacher
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def smoothed(logits: jax.Array, labels: jax.Array, teacher: jax.Array) -> jax.Array:
    """The baseline: a tenth of each label is spread over all classes."""
    del teacher
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1))
