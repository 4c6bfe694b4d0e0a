"""Training for the main job: all seeds at once, one compiled epoch, whatever the optimizer."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _data import Dataset
from _digits_models import SHIFTS, hard_loss, shifted, soft_loss, student, teacher

BATCH = 100
SPARSITY = 0.905  # of the two hidden layers; 90.2 % of all weights
PRUNED = ["params/Dense_[01]/kernel"]
KERNELS = r".*/kernel"


class Fit(NamedTuple):
    """A finished training: stacked over seeds, with its learning curve and times."""

    params: Any
    state: Any
    loss: np.ndarray  # [epochs, seeds]
    accuracy: np.ndarray  # [epochs, seeds], on the validation digits
    seconds: float
    compile_seconds: float


def fit(
    apply: Callable[..., jax.Array],
    params: Any,
    optimizer: Callable[[Any], optax.GradientTransformation],
    loss: Callable[..., jax.Array],
    data: Dataset,
    table: jax.Array,
    keys: jax.Array,
    epochs: int,
    advance: Callable[[], None],
    extra: Any = None,
) -> Fit:
    """Trains every seed; `params`, `keys` and `extra` have a leading axis for them.

    `optimizer(extra)` makes the optimizer of one seed. `table[s, i]` are the teacher's
    logits for digit `i` under shift `s`.
    """
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    vx, vy = jnp.asarray(data.validation.x), jnp.asarray(data.validation.y)
    steps = len(x) // BATCH

    def epoch(params, state, key, extra, x, y, table, vx, vy):
        tx = optimizer(extra)
        order_key, shift_key, drop_key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, len(x))[: steps * BATCH].reshape(steps, BATCH)
        shifts = jax.random.randint(shift_key, order.shape, 0, SHIFTS)

        def step(carry, batch):
            params, state = carry
            index, shift, key = batch
            images = shifted(x[index], shift)

            def objective(params):
                logits = apply(params, images, train=True, rngs={"dropout": key})
                return loss(logits, y[index], table[shift, index])

            value, grads = jax.value_and_grad(objective)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        batches = (order, shifts, jax.random.split(drop_key, steps))
        (params, state), values = jax.lax.scan(step, (params, state), batches)
        correct = apply(params, vx).argmax(-1) == vy
        return params, state, values.mean(), correct.mean()

    state = jax.vmap(lambda p, e: optimizer(e).init(p))(params, extra)
    # Copied, because the epoch may overwrite what it is given.
    params = jax.tree.map(jnp.copy, params)
    every = jax.vmap(epoch, in_axes=(0, 0, 0, 0, None, None, None, None, None))
    fixed = (x, y, table, vx, vy)
    begin = time.perf_counter()
    run = jax.jit(every, donate_argnums=(0, 1)).lower(params, state, keys, extra, *fixed).compile()
    compiled = time.perf_counter()
    losses, accuracies = [], []
    for i in range(epochs):
        epoch_keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        params, state, value, accuracy = run(params, state, epoch_keys, extra, *fixed)
        losses.append(np.asarray(value))
        accuracies.append(np.asarray(accuracy))
        advance()
    done = time.perf_counter()
    return Fit(
        params, state, np.stack(losses), np.stack(accuracies), done - compiled, compiled - begin
    )


def cosine(peak: float, epochs: int, data: Dataset) -> optax.Schedule:
    """A learning rate that falls to zero along half a cosine."""
    return optax.cosine_decay_schedule(peak, epochs * (len(data.train.y) // BATCH))


def fit_teacher(data: Dataset, key: jax.Array, epochs: int, advance: Callable) -> Fit:
    """One network of 2x1200 with dropout."""
    init, train = jax.random.split(key)
    params = jax.vmap(lambda k: teacher.init(k, data.train.x[:1]))(init[None])
    no_table = jnp.zeros((SHIFTS, len(data.train.y), 1))
    adam = lambda _: optax.adam(cosine(1e-3, epochs, data))
    return fit(teacher.apply, params, adam, hard_loss, data, no_table, train[None], epochs, advance)


def teacher_table(params: Any, data: Dataset) -> jax.Array:
    """The teacher's logits for every training digit under every shift, `[shift, digit, 10]`."""
    x = jnp.asarray(data.train.x)
    one = jax.jit(lambda params, s: teacher.apply(params, shifted(x, jnp.full(len(x), s))))
    return jnp.stack([one(params, s) for s in range(SHIFTS)])


def fit_students(
    data: Dataset,
    table: jax.Array,
    seeds: Sequence[int],
    epochs: int,
    add: Callable[[str, int], Callable[[], None]],
) -> dict[str, Fit]:
    """All variants of the student, each from the one that it is made of.

    `epochs` is that of the longer phases; learning to live with integers takes a quarter.
    """
    short = max(1, epochs // 4)
    steps = epochs * (len(data.train.y) // BATCH)
    key = lambda phase: jax.vmap(
        lambda s: jax.random.fold_in(jax.random.fold_in(jax.random.key(1), phase), s)
    )(jnp.asarray(seeds))
    init = jax.vmap(lambda k: student.init(k, data.train.x[:1]))(key(0))
    # The learning rates and the weight decay were chosen on the validation digits.
    first = lambda _: optax.adamw(cosine(2e-3, epochs, data), weight_decay=1e-2)
    adam = lambda peak, n: lambda _: optax.adam(cosine(peak, n, data))
    prune = jc.prune.prune(
        jc.prune.magnitude(),
        jc.prune.unstructured(),
        jc.prune.polynomial(SPARSITY, begin=0, end=2 * steps // 3, every=5),
        rules=PRUNED,
    )
    fits: dict[str, Fit] = {}

    def phase(name, start, optimizer, loss, n, apply=student.apply, extra=None):
        advance = add(name.replace("_", ", "), n)
        number = key(1 + len(fits))
        fits[name] = fit(apply, start, optimizer, loss, data, table, number, n, advance, extra)

    phase("dense", init, first, hard_loss, epochs)
    phase("distilled", init, first, soft_loss, epochs)
    distilled = fits["distilled"].params
    pruning = lambda _: optax.chain(optax.adam(cosine(2e-3, epochs, data)), prune)
    phase("pruned", distilled, pruning, soft_loss, epochs)
    masks = jc.prune.masks(fits["pruned"].state)
    kept = lambda m: optax.chain(optax.adam(cosine(5e-4, short, data)), jc.prune.keep(m))
    accelerated = jc.accelerate(student.apply)
    for bits, spec in ((8, jc.quantize.w8a8()), (4, jc.quantize.w4a8())):
        prepare = jax.vmap(lambda p, spec=spec: jc.quantize.prepare_qat(p, {KERNELS: spec}))
        for name, start, optimizer, extra in (
            (f"int{bits}", distilled, adam(5e-4, short), None),
            (f"pruned_int{bits}", fits["pruned"].params, kept, masks),
        ):
            phase(name, prepare(start), optimizer, soft_loss, short, accelerated, extra)
    return fits


def compressed(name: str, one: Fit, masks: Any, seed: int) -> Any:
    """What is shipped of one seed: integers where it was quantized, bitmaps where pruned."""
    params = jax.tree.map(lambda leaf: leaf[seed], one.params)
    if "int" in name:
        params = jc.quantize.convert(params)
    if "pruned" in name:
        params = jc.prune.pack(params, jax.tree.map(lambda m: m[seed], masks))
    return params
