"""Training for prune_fashion.py: an MLP for all seeds at once, a CNN for one after another."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from _data import Split
from _prune_methods import Method

BATCH = 128
RATE = 1e-3
SCORED = 1000  # images that SNIP and GraSP look at


class MLP(nn.Module):
    """LeNet-300-100, LeCun et al., 1998."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two 3x3 convolutions of 16 and 32 channels with a stride of two, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), 2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Fit(NamedTuple):
    """Parameters as they are shipped, by seed, and the test accuracy of the last epoch."""

    params: list[Any]
    accuracy: list[float]
    seconds: float


def loss_of(model: nn.Module) -> Any:
    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def start(model: nn.Module, seed: int) -> Any:
    return model.init(jax.random.fold_in(jax.random.key(0), seed), jnp.zeros((1, 784)))


def _step(model: nn.Module, method: Method, tx: Any) -> Any:
    loss = loss_of(model)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: loss(method.seen(p), batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _optimizer(method: Method, sparsity: float, steps: int, masks: Any, key: Any) -> Any:
    inner = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    return method.optimizer(inner, sparsity, steps, masks, key)


def _accuracy(model: nn.Module, params: Any, test: Split) -> float:
    logits = jax.jit(model.apply)(params, jnp.asarray(test.x))
    return float((np.asarray(logits).argmax(-1) == test.y).mean())


def fit(
    model: nn.Module,
    method: Method,
    sparsity: float,
    train: Split,
    test: Split,
    seeds: Sequence[int],
    epochs: int,
    masks: list[Any] | None = None,
) -> Fit:
    """Trains every seed from its own start; `masks`, by seed, replace those of the method."""
    begin = time.perf_counter()
    steps = epochs * (len(train.y) // BATCH)
    starts = [start(model, s) for s in seeds]
    keys = [jax.random.fold_in(jax.random.key(1), s) for s in seeds]
    if masks is None and method.masks is not None:
        batch = jnp.asarray(train.x[:SCORED]), jnp.asarray(train.y[:SCORED])
        masks = [
            method.masks(loss_of(model), model.apply, p, batch, sparsity, k)
            for p, k in zip(starts, keys)
        ]
    many = _together if isinstance(model, MLP) else _one_by_one
    trained = many(model, method, sparsity, train, starts, masks, keys, epochs, steps)
    shipped = [method.shipped(p) for p in trained]
    accuracy = [_accuracy(model, p, test) for p in shipped]
    return Fit(shipped, accuracy, time.perf_counter() - begin)


def _together(model, method, sparsity, train, starts, masks, keys, epochs, steps):
    """All seeds in one program, an epoch of it a scan."""
    x, y = jnp.asarray(train.x), jnp.asarray(train.y)
    stack = lambda trees: None if trees is None else jax.tree.map(lambda *a: jnp.stack(a), *trees)
    params, extra, keys = stack(starts), stack(masks), jnp.stack(keys)

    first = jax.tree.map(lambda a: a[0], (params, extra, keys))

    def init(params, extra, key):
        return _optimizer(method, sparsity, steps, extra, key).init(params)

    def epoch(params, state, extra, key, number, x, y):
        step = _step(model, method, _optimizer(method, sparsity, steps, extra, key))
        order = jax.random.permutation(jax.random.fold_in(key, number), len(x))
        order = order[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        body = lambda carry, index: (step(carry, (x[index], y[index])), None)
        return jax.lax.scan(body, (params, state), order)[0]

    # All seeds count alike: with one count for all, a branch that is taken now and then (a new
    # mask) stays a branch, where with counts of their own both sides are computed every time.
    axis = lambda path, leaf: None if jax.tree_util.keystr(path).endswith("count") else 0
    axes = jax.tree_util.tree_map_with_path(axis, jax.eval_shape(init, *first))
    state = jax.jit(jax.vmap(init, out_axes=axes))(params, extra, keys)
    run = jax.vmap(epoch, (0, axes, 0, 0, None, None, None), (0, axes))
    run = jax.jit(run, donate_argnums=(0, 1))
    for number in range(epochs):
        params, state = run(params, state, extra, keys, number, x, y)
    return [jax.tree.map(lambda a, i=i: a[i], params) for i in range(len(starts))]


def _one_by_one(model, method, sparsity, train, starts, masks, keys, epochs, steps):
    """A loop in Python: convolutions inside a scan are many times slower on a CPU."""

    def update(params, state, extra, key, x, y):
        tx = _optimizer(method, sparsity, steps, extra, key)
        return _step(model, method, tx)((params, state), (x, y))

    compiled = jax.jit(update, donate_argnums=(0, 1))
    trained = []
    for i, (params, key) in enumerate(zip(starts, keys)):
        extra = None if masks is None else masks[i]
        state = _optimizer(method, sparsity, steps, extra, key).init(params)
        random = np.random.default_rng(i)
        for _ in range(epochs):
            order = random.permutation(len(train.y))[: len(train.y) // BATCH * BATCH]
            for index in order.reshape(-1, BATCH):
                params, state = compiled(params, state, extra, key, train.x[index], train.y[index])
        trained.append(params)
    return trained
