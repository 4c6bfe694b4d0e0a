"""Training for qat_fashion: all seeds at once, one compiled epoch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _data import Dataset
from jaxcompress.arrays import Activation, IntType, OddType
from jaxcompress.quantize import Spec

BATCH = 200
METHODS = ("ste", "lsq", "pact", "dorefa")


class _Net(nn.Module):
    """LeNet-300-100: 784-300-100-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


net = _Net()


class Fit(NamedTuple):
    """A finished training, stacked over seeds."""

    params: Any
    loss: np.ndarray  # [epochs, seeds]
    accuracy: np.ndarray  # [epochs, seeds], on the validation images
    seconds: float
    compile_seconds: float


def fit(
    apply: Callable[..., jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    data: Dataset,
    keys: jax.Array,
    epochs: int,
    advance: Callable[[], None],
) -> Fit:
    """Trains every seed; `params` and `keys` have a leading axis for them."""
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    vx, vy = jnp.asarray(data.validation.x), jnp.asarray(data.validation.y)
    steps = len(y) // BATCH

    def epoch(params, state, key, x, y, vx, vy):
        order = jax.random.permutation(key, len(y))[: steps * BATCH].reshape(steps, BATCH)

        def step(carry, index):
            params, state = carry

            def objective(params):
                logits = apply(params, x[index])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

            value, grads = jax.value_and_grad(objective)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = jax.lax.scan(step, (params, state), order)
        return params, state, values.mean(), (apply(params, vx).argmax(-1) == vy).mean()

    params = jax.tree.map(jnp.copy, params)  # the epoch overwrites what it is given
    state = jax.vmap(tx.init)(params)
    every = jax.jit(
        jax.vmap(epoch, in_axes=(0, 0, 0, None, None, None, None)), donate_argnums=(0, 1)
    )
    begin = time.perf_counter()
    run = every.lower(params, state, keys, x, y, vx, vy).compile()
    compiled = time.perf_counter()
    losses, accuracies = [], []
    for i in range(epochs):
        epoch_keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        params, state, loss, accuracy = run(params, state, epoch_keys, x, y, vx, vy)
        losses.append(np.asarray(loss))
        accuracies.append(np.asarray(accuracy))
        advance()
    done = time.perf_counter()
    return Fit(params, np.stack(losses), np.stack(accuracies), done - compiled, compiled - begin)


def fit_float(data: Dataset, keys: jax.Array, epochs: int, advance: Callable[[], None]) -> Fit:
    params = jax.vmap(lambda k: net.init(jax.random.fold_in(k, 1 << 20), data.train.x[:1]))(keys)
    return fit(
        net.apply, params, optax.adam(cosine(1e-3, epochs, data)), data, keys, epochs, advance
    )


def fit_longer(
    params: Any, data: Dataset, keys: jax.Array, epochs: int, advance: Callable[[], None]
) -> Fit:
    """The float network again, as long as a quantized one: what they are compared with."""
    return fit(
        net.apply, params, optax.adam(cosine(5e-4, epochs, data)), data, keys, epochs, advance
    )


def fit_quantized(
    method: str,
    bits: int,
    params: Any,
    stats: Any,
    data: Dataset,
    keys: jax.Array,
    epochs: int,
    advance: Callable[[], None],
) -> Fit:
    """From the trained float network, with every weight and hidden activation at `bits`."""
    prepare = {
        "ste": jc.quantize.prepare_qat,
        "lsq": jc.quantize.lsq,
        "pact": jc.quantize.pact,
        "dorefa": jc.quantize.dorefa,
    }[method]
    static = method in ("lsq", "pact")
    params = jax.vmap(lambda p, s: prepare(p, rules(bits, static), stats=s))(params, stats)
    rates = {"weight": 5e-4, "scale": _scale_rate(method)}
    tx = optax.multi_transform(
        {label: optax.adam(cosine(rate, epochs, data)) for label, rate in rates.items()},
        jc.quantize.trainable,
    )
    if bits == 1:
        tx = optax.chain(tx, jc.quantize.clip_weights(1.0))
    return fit(jc.accelerate(net.apply), params, tx, data, keys, epochs, advance)


def rules(bits: int, static: bool) -> dict[str, Spec]:
    """Weights at `bits`; activations after a ReLU too, the image at eight bits.

    One bit is for weights only: activations then have eight.
    """
    weight = OddType(1) if bits == 1 else IntType(bits)

    def spec(act_bits: int) -> Spec:
        kind = IntType(act_bits, symmetric=False)
        return Spec(qtype=weight, act=Activation(kind, per_token=False, static=static))

    return {
        "params/Dense_0/kernel": spec(8),
        "params/Dense_[12]/kernel": spec(8 if bits == 1 else bits),
    }


def calibrated(params: Any, data: Dataset, bits: int) -> Any:
    """Ranges of the activations of each seed: of least squared error at `bits`."""
    batches = [jnp.asarray(data.train.x[i : i + 500]) for i in range(0, 2000, 500)]
    statistic = jc.statistics.mse(8 if bits == 1 else bits, symmetric=False)
    seeds = jax.tree.leaves(params)[0].shape[0]
    found = [
        jc.calibrate(net.apply, jax.tree.map(lambda leaf, s=s: leaf[s], params), batches, statistic)
        for s in range(seeds)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def right(apply: Callable[..., jax.Array], params: Any, data: Dataset) -> np.ndarray:
    """`[seeds, images]`: which test images each seed has right."""
    run = jax.jit(jax.vmap(lambda p, x: apply(p, x).argmax(-1), in_axes=(0, None)))
    x = jnp.asarray(data.test.x)
    parts = [np.asarray(run(params, x[i : i + 2000])) for i in range(0, len(x), 2000)]
    return np.concatenate(parts, 1) == data.test.y


def cosine(peak: float, epochs: int, data: Dataset) -> optax.Schedule:
    """A learning rate that falls to zero along half a cosine."""
    return optax.cosine_decay_schedule(peak, epochs * (len(data.train.y) // BATCH))


def _scale_rate(method: str) -> float:
    """Adam moves by about its rate: a clipping range is a hundred times a step of weights."""
    return 1e-2 if method == "pact" else 1e-4
