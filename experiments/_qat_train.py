"""Training for qat_fashion: one compiled epoch, of a network's seeds at once or in turn."""

import math
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

BATCH, PEAK = 200, 1e-3  # rows a step, and the learning rate at the start


class _Net(nn.Module):
    """LeNet-300-100: 784-300-100-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class _ConvNet(nn.Module):
    """Two 3x3 convolutions of 16 and 32 channels with a stride of two, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), 2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Network(NamedTuple):
    """A model, the path of the layer that sees the image, and those of the others."""

    model: nn.Module
    first: str
    others: str
    at_once: bool  # all seeds in one program: convolutions of many kernels are slow on a CPU


LENET = Network(_Net(), "params/Dense_0/kernel", "params/Dense_[12]/kernel", True)
CNN = Network(_ConvNet(), "params/Conv_0/kernel", "params/(Conv_1|Dense_0)/kernel", False)


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
    at_once: bool,
) -> Fit:
    """Trains every seed; `params` and `keys` have a leading axis for them."""
    if at_once:
        return _train(jax.vmap, apply, params, tx, data, keys, epochs, advance)
    alone = lambda fn, in_axes=0: fn
    fits = []
    for seed, key in enumerate(keys):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        fits.append(_train(alone, apply, one, tx, data, key, epochs, advance))
    return Fit(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(f.params for f in fits)),
        np.stack([f.loss for f in fits], 1),
        np.stack([f.accuracy for f in fits], 1),
        sum(f.seconds for f in fits),
        sum(f.compile_seconds for f in fits),
    )


def _train(
    over: Callable[..., Callable[..., Any]],
    apply: Callable[..., jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    data: Dataset,
    keys: jax.Array,
    epochs: int,
    advance: Callable[[], None],
) -> Fit:
    """A loop in Python over one step: convolutions in a compiled loop are slow on a CPU."""
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    vx, vy = jnp.asarray(data.validation.x), jnp.asarray(data.validation.y)
    steps = len(y) // BATCH

    def step(params, state, index, x, y):
        def objective(params):
            logits = apply(params, x[index])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def order(key, epoch):
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(y))
        return shuffled[: steps * BATCH].reshape(steps, BATCH)

    orders = jax.jit(over(order, (0, None)))
    right = jax.jit(over(lambda p, x, y: (apply(p, x).argmax(-1) == y).mean(), (0, None, None)))
    params, state = jax.tree.map(jnp.copy, params), over(tx.init)(params)
    begin = time.perf_counter()
    shuffled = orders(keys, 0)
    run = (
        jax.jit(over(step, (0, 0, 0, None, None)), donate_argnums=(0, 1))
        .lower(params, state, shuffled[..., 0, :], x, y)
        .compile()
    )
    compiled = time.perf_counter()
    losses, accuracies = [], []
    for epoch in range(epochs):
        shuffled, total = orders(keys, epoch), 0.0
        for i in range(steps):
            params, state, value = run(params, state, shuffled[..., i, :], x, y)
            total = total + value
        losses.append(np.asarray(total) / steps)
        accuracies.append(np.asarray(right(params, vx, vy)))
        advance()
    seconds = time.perf_counter() - compiled
    return Fit(params, np.stack(losses), np.stack(accuracies), seconds, compiled - begin)


def fit_float(
    network: Network, data: Dataset, keys: jax.Array, epochs: int, advance: Callable[[], None]
) -> Fit:
    init, x = network.model.init, data.train.x[:1]
    params = jax.vmap(lambda k: init(jax.random.fold_in(k, 1 << 20), x))(keys)
    return fit_longer(network, params, data, keys, epochs, advance)


def fit_longer(
    network: Network,
    params: Any,
    data: Dataset,
    keys: jax.Array,
    epochs: int,
    advance: Callable[[], None],
) -> Fit:
    """The float network again, as long as a quantized one: what they are compared with."""
    tx = optax.adam(cosine(PEAK, epochs, data))
    return fit(network.model.apply, params, tx, data, keys, epochs, advance, network.at_once)


def fit_quantized(
    network: Network,
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
    chosen = rules(network, bits, static=method in ("lsq", "pact"))
    params = jax.vmap(lambda p, s: prepare(p, chosen, stats=s))(params, stats)
    rates = {"weight": PEAK, "scale": _scale_rate(method, bits)}
    tx = optax.multi_transform(
        {label: optax.adam(cosine(rate, epochs, data)) for label, rate in rates.items()},
        jc.quantize.trainable,
    )
    if bits == 1:
        tx = optax.chain(tx, jc.quantize.clip_weights(1.0))
    apply = jc.accelerate(network.model.apply)
    return fit(apply, params, tx, data, keys, epochs, advance, network.at_once)


def rules(network: Network, bits: int, static: bool) -> dict[str, Spec]:
    """Weights at `bits`; activations after a ReLU too, the image at eight bits.

    One bit is for weights only: activations then have eight.
    """
    weight = OddType(1) if bits == 1 else IntType(bits)

    def spec(act_bits: int) -> Spec:
        kind = IntType(act_bits, symmetric=False)
        return Spec(qtype=weight, act=Activation(kind, per_token=False, static=static))

    return {
        network.first: spec(8),
        network.others: spec(8 if bits == 1 else bits),
    }


def calibrated(network: Network, params: Any, data: Dataset, bits: int) -> Any:
    """Ranges of the activations of each seed: of least squared error at `bits`."""
    batches = [jnp.asarray(data.train.x[i : i + 500]) for i in range(0, 2000, 500)]
    statistic = jc.statistics.mse(8 if bits == 1 else bits, symmetric=False)
    seeds = jax.tree.leaves(params)[0].shape[0]
    apply = network.model.apply
    found = [
        jc.calibrate(apply, jax.tree.map(lambda leaf, s=s: leaf[s], params), batches, statistic)
        for s in range(seeds)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def right(apply: Callable[..., jax.Array], params: Any, data: Dataset) -> np.ndarray:
    """`[seeds, images]`: which test images each seed has right."""
    run = jax.jit(lambda p, x: apply(p, x).argmax(-1))
    x = jnp.asarray(data.test.x)
    seeds = range(jax.tree.leaves(params)[0].shape[0])
    models = [jax.tree.map(lambda leaf, s=s: leaf[s], params) for s in seeds]
    parts = [[np.asarray(run(p, x[i : i + 2000])) for i in range(0, len(x), 2000)] for p in models]
    return np.stack([np.concatenate(part) for part in parts]) == data.test.y


def cosine(peak: float, epochs: int, data: Dataset) -> optax.Schedule:
    """A learning rate that falls to zero along half a cosine."""
    return optax.cosine_decay_schedule(peak, epochs * (len(data.train.y) // BATCH))


def _scale_rate(method: str, bits: int) -> float:
    """Adam moves by about its rate, so the rate goes with the size of what it moves.

    A clipping range is hundreds of steps of weights. With the largest code `Q`, LSQ starts its
    steps in proportion to `1 / sqrt(Q)`.
    """
    return 1e-2 if method == "pact" else 3e-3 / math.sqrt(max(1, 2 ** (bits - 1) - 1))
