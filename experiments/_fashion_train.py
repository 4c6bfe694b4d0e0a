"""The two pairs of kd_fashion.py, and their training: features come from `intermediates`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _data import Split
from _fashion_losses import Method, Seen

BATCH = 256


class Network(NamedTuple):
    """Unmodified functions, and which parameters to look at for features and maps."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    head: str  # what goes in here are the features
    last: str | None  # what comes out of here are the maps


def _dense(key: jax.Array, a: int, b: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}


def mlp(*hidden: int) -> Network:
    sizes = [784, *hidden, 10]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(sizes))
        return [_dense(k, a, b) for k, a, b in zip(keys, sizes, sizes[1:])]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    return Network(init, apply, f"{len(hidden)}/kernel", None)


def cnn(first: int, second: int) -> Network:
    """Two 3x3 convolutions with a stride of two, and a dense layer over the 7x7 maps."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        conv = lambda k, a, b: {
            "kernel": jax.random.normal(k, (3, 3, a, b)) * (2 / (9 * a)) ** 0.5,
            "bias": jnp.zeros(b),
        }
        return [
            conv(keys[0], 1, first),
            conv(keys[1], first, second),
            _dense(keys[2], 49 * second, 10),
        ]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for layer in params[:2]:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"])
        x = x.reshape(len(x), -1)
        return x @ params[2]["kernel"] + params[2]["bias"]

    return Network(init, apply, "2/kernel", "1/bias")


def seen(network: Network) -> Callable[[Any, jax.Array], Seen]:
    """Logits, features and maps in one pass of the unmodified function."""
    paths = [network.head] + ([network.last] if network.last else [])
    capture = jc.distill.intermediates(network.apply, paths)

    def run(params: Any, x: jax.Array) -> Seen:
        logits, found = capture(params, x)
        features = found[network.head].input
        maps = jax.nn.relu(found[network.last].output) if network.last else features
        return Seen(logits, features, maps)

    return run


def fit(
    student: Network,
    method: Method,
    data: Split,
    teacher: tuple[Network, Any] | None,
    seed: int,
    epochs: int,
    tick: Callable[[], None],
) -> Any:
    """Trains a student; a Python loop over one jitted, donated step."""
    keys = jax.random.split(jax.random.key(seed), 4)
    look = seen(student)
    answers = None if teacher is None else seen(teacher[0])
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    start = student.init(keys[0])
    ours, theirs = (
        jax.eval_shape(seen(n), p, x[:1]).features.shape[-1]
        for n, p in ((student, start), teacher or (student, start))
    )
    params = {"student": start, "extra": method.params(keys[1], ours, theirs)}
    memory = method.state(keys[2], len(x))
    steps = len(x) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, epochs * steps))

    def step(params, state, memory, taught, batch):
        images, labels = batch["x"], batch["y"]

        def objective(params):
            ours = look(params["student"], images)
            theirs = ours if answers is None else answers(taught, images)
            losses, after = method.loss(ours, theirs, labels, params["extra"], memory, batch)
            return jnp.mean(losses), after

        grads, after = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, after

    run = jax.jit(step, donate_argnums=(0, 1, 2))
    state, random = tx.init(params), np.random.default_rng(seed)
    taught = None if teacher is None else teacher[1]
    for epoch in range(epochs):
        order = random.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH)
        for i, index in enumerate(order):
            key = jax.random.fold_in(keys[3], epoch * steps + i)
            batch = {"x": x[index], "y": y[index], "index": jnp.asarray(index), "key": key}
            params, state, memory = run(params, state, memory, taught, batch)
        jax.block_until_ready(params)
        tick()
    return params["student"]


def right(network: Network, params: Any, data: Split) -> np.ndarray:
    """Which images it gets right."""
    apply = jax.jit(network.apply)
    pieces = [
        np.asarray(apply(params, jnp.asarray(data.x[i : i + 2000])).argmax(-1))
        for i in range(0, len(data.x), 2000)
    ]
    return np.concatenate(pieces) == data.y
