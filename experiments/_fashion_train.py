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


def cut(large: Network, params: Any, small: Network, x: np.ndarray) -> Network:
    """`small`, which begins with units of a trained `large`: those of the largest weights."""
    wanted = jax.eval_shape(small.init, jax.random.key(0))
    share = 1 - wanted[0]["kernel"].shape[-1] / params[0]["kernel"].shape[-1]
    masks = jc.prune.mask(params, jc.prune.channel(), share, rules=["[01]/kernel"])
    _, start = jc.prune.shrink(large.apply, params, masks, jnp.asarray(x[:2]))
    if jax.tree.map(jnp.shape, start) != jax.tree.map(jnp.shape, wanted):
        raise ValueError(f"expected {wanted}, got {jax.tree.map(jnp.shape, start)}")
    # A copy for every student, as its steps are given their arguments to write to.
    return small._replace(init=lambda key: jax.tree.map(jnp.copy, start))


def answers(network: Network, params: Any, x: np.ndarray) -> Seen:
    """What the teacher says of every image: it is asked once, not by each student again."""
    look = jax.jit(seen(network))
    pieces = [look(params, jnp.asarray(x[i : i + 2000])) for i in range(0, len(x), 2000)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def fit(
    student: Network,
    method: Method,
    data: Split,
    teacher: Seen | None,
    seed: int,
    epochs: int,
    tick: Callable[[], None],
) -> Any:
    """Trains a student, given the `answers` of its teacher, with one jitted, donated step."""
    keys = jax.random.split(jax.random.key(seed), 4)
    look = seen(student)
    known = jnp.asarray(data.x), jnp.asarray(data.y), teacher
    x = known[0]
    start = student.init(keys[0])
    ours = jax.eval_shape(look, start, x[:1]).features.shape[-1]
    theirs = ours if teacher is None else teacher.features.shape[-1]
    params = {"student": start, "extra": method.params(keys[1], ours, theirs)}
    memory = method.state(keys[2], len(x))
    steps = len(x) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, epochs * steps))

    def step(params, state, memory, known, batch):
        images, labels, theirs = jax.tree.map(lambda a: a[batch["index"]], known)

        def objective(params):
            ours = look(params["student"], images)
            extra, teacher = params["extra"], theirs or ours
            losses, after = method.loss(ours, teacher, labels, extra, memory, batch)
            return jnp.mean(losses), after

        grads, after = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, after

    run = jax.jit(step, donate_argnums=(0, 1, 2))
    state, random = tx.init(params), np.random.default_rng(seed)
    for epoch in range(epochs):
        order = random.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH)
        for i, index in enumerate(order):
            key = jax.random.fold_in(keys[3], epoch * steps + i)
            batch = {"index": index, "key": key}
            params, state, memory = run(params, state, memory, known, batch)
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
