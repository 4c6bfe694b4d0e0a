"""One protocol for all data sets: fresh networks, trained on the set, tested on real data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["evaluate"]


def evaluate(
    key: jax.Array,
    init: Callable[[jax.Array], Any],
    apply: Callable[[Any, jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    test_images: jax.Array,
    test_labels: jax.Array,
    *,
    tx: optax.GradientTransformation,
    steps: int,
    batch: int = 256,
    networks: int = 20,
    progress: Callable[[], None] | None = None,
) -> jax.Array:
    """Test accuracy of fresh networks that saw nothing but a small data set.

    Each network is drawn and trained alone, by ordinary training with cross-entropy; what
    is reported is its last step.

    Args:
      key: a random key.
      init, apply: the network: `init(key)` draws its parameters, `apply(params, images)`
        gives logits. Evaluate a set also with one that it was not learned with.
      images: the set, `[n, ...]`.
      labels: integers `[n]`, or a teacher's probabilities `[n, classes]`: then they are
        part of the set, and have to be counted.
      test_images, test_labels: real ones, labels integers.
      tx: the optimizer of the networks.
      steps: of training.
      batch: examples a step, all if there are fewer.
      networks: how many, at least 20 for a result.
      progress: called after each network.

    Returns:
      `[networks]` accuracies.

    Raises:
      ValueError: images and labels that do not fit.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    >>> net = lambda key: jax.random.normal(key, (2, 2))
    >>> jc.distill.dataset.evaluate(
    ...     jax.random.key(0), net, lambda w, x: x @ w, x, y, 3 * x, y,
    ...     tx=optax.adam(0.1), steps=100, networks=2,
    ... )
    Array([1., 1.], dtype=float32)

    Zhao et al., 2021, arXiv:2006.05929.
    """
    if len(images) != len(labels) or len(test_images) != len(test_labels):
        raise ValueError(
            f"images and labels differ in number: {len(images)} and {len(labels)}, in the test "
            f"{len(test_images)} and {len(test_labels)}"
        )
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    size = min(batch, len(images))

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = apply(params, x)
        if soft:
            return jnp.mean(optax.softmax_cross_entropy(logits, y))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    # A Python loop over one step: a convolution inside a scan is many times slower on CPUs.
    @jax.jit
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        index = jax.random.permutation(key, len(x))[:size]
        slope = jax.grad(loss)(params, x[index], y[index])
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    answer = jax.jit(lambda params, x: jnp.argmax(apply(params, x), -1))
    accuracies = []
    for one in jax.random.split(key, networks):
        init_key, order_key = jax.random.split(one)
        params = init(init_key)
        state = tx.init(params)
        for i in range(steps):
            params, state = step(params, state, jax.random.fold_in(order_key, i), images, labels)
        pieces = [
            answer(params, test_images[i : i + 1000]) for i in range(0, len(test_images), 1000)
        ]
        accuracies.append(jnp.mean(jnp.concatenate(pieces) == test_labels))
        if progress is not None:
            progress()
    return jnp.stack(accuracies)
