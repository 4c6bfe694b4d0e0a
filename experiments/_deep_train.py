"""Training for deep_compression.py: the MLP's seeds at once, those of LeNet-5 one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _data import Dataset
from _digits_models import MLP, SHIFTS, hard_loss, shifted, soft_loss

BATCH = 100
KERNELS = r".*/kernel"


class LeNet5(nn.Module):
    """Two 5x5 convolutions and two dense layers, 431,080 weights (LeCun et al., 1998; Caffe).

    The convolutions have stride 2 where the original pools: as many weights, and a quarter
    of the time.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for width in (20, 50):
            x = nn.relu(nn.Conv(width, (5, 5), strides=(2, 2), padding="VALID")(x))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


MODELS = {"LeNet-300-100": MLP((300, 100)), "LeNet-5": LeNet5()}
# Biases of a hundred and more, which are worth a codebook of their own.
BIASES = {"LeNet-300-100": r".*/Dense_[01]/bias", "LeNet-5": r".*/Dense_0/bias"}
RATES = {"LeNet-300-100": 2e-3, "LeNet-5": 1e-3}  # after the dense network
Optimizer = Callable[[int], optax.GradientTransformation]  # of the number of steps


def together(name: str) -> bool:
    """Whether seeds train in one program: a convolution inside a scan is slow on a CPU."""
    return name == "LeNet-300-100"


def start(name: str, seeds: Sequence[int]) -> Any:
    """Parameters with a leading axis for the seeds."""
    init = lambda s: MODELS[name].init(
        jax.random.fold_in(jax.random.key(0), s), jnp.zeros((1, 784))
    )
    return jax.vmap(init)(jnp.asarray(seeds))


def one_of(params: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], params)


def accuracies(name: str, params: Any, x: np.ndarray, y: np.ndarray, count: int) -> list[float]:
    run = jax.jit(jc.accelerate(MODELS[name].apply))
    predicted = [np.asarray(run(one_of(params, i), x)).argmax(-1) for i in range(count)]
    return [float((p == y).mean()) for p in predicted]


def teacher_tables(name: str, params: Any, x: np.ndarray, count: int) -> jax.Array:
    """Logits of each seed's own network for every digit under every shift."""

    @jax.jit
    def table(params: Any, x: jax.Array, s: jax.Array) -> jax.Array:
        return MODELS[name].apply(params, shifted(x, jnp.full(len(x), s)))

    rows = [
        jnp.stack([table(one_of(params, i), jnp.asarray(x), s) for s in range(SHIFTS)])
        for i in range(count)
    ]
    return jnp.stack(rows)


def fit(
    name: str,
    params: Any,
    optimizer: Optimizer,
    tables: jax.Array | None,
    data: Dataset,
    seeds: Sequence[int],
    phase: int,
    epochs: int,
    advance: Callable[[], None],
) -> tuple[Any, Any]:
    """Parameters and optimizer state, both with a leading axis for the seeds.

    With `tables` half of the loss is the distance to the teacher's logits.
    """
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    steps = len(x) // BATCH
    tx = optimizer(epochs * steps)
    apply = jc.accelerate(MODELS[name].apply)

    def step(params: Any, state: Any, table: Any, index: Any, shift: Any, x: Any, y: Any) -> Any:
        images = shifted(x[index], shift)

        def loss(params: Any) -> jax.Array:
            logits = apply(params, images)
            if tables is None:
                return hard_loss(logits, y[index], logits)
            return soft_loss(logits, y[index], table[shift, index])

        grads = jax.grad(loss, allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def epoch(params, state, table, index, shift, x, y):
        body = lambda carry, batch: (step(*carry, table, *batch, x, y), None)
        return jax.lax.scan(body, (params, state), (index, shift))[0]

    random = [np.random.default_rng([phase, s]) for s in seeds]
    draw = lambda r: (
        r.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH).astype(np.int32),
        r.integers(0, SHIFTS, (steps, BATCH)).astype(np.int32),
    )
    state = jax.vmap(tx.init)(params)
    logits = jnp.zeros(len(seeds)) if tables is None else tables
    if together(name):
        run = jax.jit(jax.vmap(epoch, (0, 0, 0, 0, 0, None, None)), donate_argnums=(0, 1))
        params = jax.tree.map(jnp.copy, params)  # the epoch overwrites what it is given
        for _ in range(epochs):
            index, shift = (np.stack(a) for a in zip(*map(draw, random)))
            params, state = run(params, state, logits, index, shift, x, y)
            advance()
        return params, state
    run = jax.jit(step, donate_argnums=(0, 1))
    done = []
    for i, r in enumerate(random):
        carry = one_of((params, state), i)
        for _ in range(epochs):
            for index, shift in zip(*draw(r)):
                carry = run(*carry, logits[i], index, shift, x, y)
            advance()
        done.append(carry)
    return jax.tree.map(lambda *a: jnp.stack(a), *done)


def dense_optimizer(steps: int) -> optax.GradientTransformation:
    """Learning rate and weight decay as in the main job."""
    return optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)


def again(name: str) -> Optimizer:
    return lambda steps: optax.adam(optax.cosine_decay_schedule(RATES[name], steps))


def pruning(name: str, before: float, sparsity: float) -> Optimizer:
    """From one sparsity to the next, by magnitude over all kernels, twenty times."""

    def make(steps: int) -> optax.GradientTransformation:
        end = max(1, 2 * steps // 3)
        every = max(1, end // 20)
        schedule = jc.prune.polynomial(sparsity, initial=before, begin=0, end=end, every=every)
        parts = jc.prune.magnitude(), jc.prune.unstructured(), schedule
        everywhere = jc.prune.global_()
        return jc.prune.sparsify(
            again(name)(steps), *parts, rules=[KERNELS], distribution=everywhere
        )

    return make


def sharing(steps: int) -> optax.GradientTransformation:
    """Trains the shared values and what is left in floats."""
    adam = optax.adam(optax.cosine_decay_schedule(5e-4, steps))
    parts = {"weight": adam, "frozen": jc.quantize.freeze()}
    return optax.multi_transform(parts, jc.quantize.trainable)


def shared(name: str, params: Any, masks: Any, bits: int) -> Any:
    """Kernels share `2^bits - 1` values and zero, long biases sixteen."""
    rules = {
        KERNELS: jc.quantize.codebook(bits=bits, leading=1),
        BIASES[name]: jc.quantize.codebook(bits=4, leading=1),
    }
    return jc.quantize.share(params, rules, masks=masks)
