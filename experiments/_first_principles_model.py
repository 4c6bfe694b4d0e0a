"""The small network of the tour, how it is trained, and what a lesson hands over."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = dict[str, dict[str, jax.Array]]


class Lesson(NamedTuple):
    """One section: what it is about, its equation, its result in a line, its numbers.

    `curves` holds what the figure draws, so that the record alone is enough to draw it.
    """

    name: str
    equation: Sequence[str]
    result: str
    numbers: dict[str, Any]
    curves: dict[str, Any]


def rounded(x: Any) -> Any:
    """Six significant digits of a number or an array, as plain Python for JSON."""
    values = jnp.asarray(x).tolist()
    if not isinstance(values, list):
        return float(f"{values:.6g}")
    return [rounded(v) for v in values]


@partial(jax.jit, static_argnums=1)
def init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Weights of variance 2 / inputs (He et al., 2015, arXiv:1502.01852), biases zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense_{i}": {
            "kernel": jax.random.normal(k, (a, b)) * jnp.sqrt(2 / a),
            "bias": jnp.zeros(b),
        }
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def logits(
    params: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> jax.Array:
    *hidden, last = (params[name] for name in sorted(params))
    for layer in hidden:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def accuracy(answers: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(answers.argmax(-1) == y)


@partial(jax.jit, static_argnums=(1, 2, 3))
def batches(key: jax.Array, examples: int, size: int, count: int) -> jax.Array:
    """Indices `[count, size]`: every example once a pass, in a new order each pass."""
    passes = -(-count * size // examples)
    shuffled = jax.vmap(lambda k: jax.random.permutation(k, examples))
    return shuffled(jax.random.split(key, passes)).reshape(-1)[: count * size].reshape(count, size)


def fit(
    tx: optax.GradientTransformation,
    params: Params,
    inputs: Any,
    objective: Callable[[Params, Any], jax.Array],
) -> tuple[Params, jax.Array]:
    """Descends on `objective(params, input)`, one update for each of the stacked `inputs`."""

    def step(carry: Any, each: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params, each)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, tx.init(params)), inputs)
    return params, values


def difference(a: Any, b: Any) -> jax.Array:
    """The largest absolute difference between two trees of arrays."""
    gaps = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), a, b)
    return jnp.max(jnp.stack(jax.tree.leaves(gaps)))
