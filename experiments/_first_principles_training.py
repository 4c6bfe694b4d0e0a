"""Lessons on the update: four optimizers, accumulation, data parallelism, clipping."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from _data import Dataset, Split
from _first_principles_model import (
    Lesson,
    Params,
    accuracy,
    batches,
    difference,
    fit,
    init,
    logits,
    loss,
    rounded,
)

SIZES = (784, 64, 10)
PARTS = 8  # micro-batches, or devices
LARGE = 400  # the batch that they make up
CHECKED = 10  # updates over which an equation by hand is held against Optax
Update = tuple[jax.Array, jax.Array, jax.Array]


def _plain(g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array, lr: float) -> Update:
    return lr * g, m, v


def _momentum(g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array, lr: float) -> Update:
    m = 0.9 * m + g
    return lr * m, m, v


def _adam(g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array, lr: float) -> Update:
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    # m and v start at zero, so at first they are too small; the divisors make up for it.
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return lr * m_hat / (jnp.sqrt(v_hat) + 1e-8), m, v


class Optimizer(NamedTuple):
    make: Callable[..., optax.GradientTransformation]
    by_hand: Callable[..., Update]
    batch: int  # 0: all examples
    rates: tuple[float, ...]  # to choose from


OPTIMIZERS = {
    "gradient descent": Optimizer(optax.sgd, _plain, 0, (0.1, 0.2, 0.4, 0.8)),
    "SGD": Optimizer(optax.sgd, _plain, 100, (0.1, 0.3, 1.0, 3.0)),
    "momentum": Optimizer(partial(optax.sgd, momentum=0.9), _momentum, 100, (0.03, 0.1, 0.3, 1.0)),
    "Adam": Optimizer(optax.adam, _adam, 100, (0.001, 0.003, 0.01, 0.03)),
}


def optimizers(data: Dataset, key: jax.Array, passes: int) -> Lesson:
    """Four optimizers read the same number of digits.

    Each runs at four learning rates; the one that ends with the lowest loss on the training
    digits is shown, since the comparison is about optimization.
    """
    k_init, k_order = jax.random.split(key)
    start = init(k_init, SIZES)
    numbers, curves = {}, {}
    for name, optimizer in OPTIMIZERS.items():
        examples = len(data.train.y)
        size = optimizer.batch or examples
        order = batches(k_order, examples, size, passes * (examples // size))
        order = order.reshape(passes, -1, size)
        losses, final, right = _at_rates(optimizer, start, order, data)
        best = int(jnp.nanargmin(final))
        rate = optimizer.rates[best]
        first = order.reshape(-1, size)[:CHECKED]
        numbers[name] = {
            "learning_rate": rate,
            "updates": losses[best].size,
            "training_loss": rounded(final[best]),
            "test_accuracy": rounded(right[best]),
            "difference_to_equation": rounded(
                _by_equation(optimizer, rate, start, first, data.train)
            ),
        }
        curves[name] = rounded(losses[best].mean(1))
    reached = ", ".join(f"{name} {n['training_loss']:.3f}" for name, n in numbers.items())
    worst = max(n["difference_to_equation"] for n in numbers.values())
    return Lesson(
        "Four optimizers",
        (
            "descent   w <- w - a g,  g = grad L(w); SGD: of a batch, which is right on average",
            "momentum  m <- b m + g;  w <- w - a m",
            "Adam      m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;",
            "          w <- w - a m^ / (sqrt(v^) + eps),  m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)",
        ),
        f"training loss after {passes} passes: {reached}; Optax and these equations differ by "
        f"{worst:.0e} after {CHECKED} updates",
        numbers,
        curves,
    )


def _at_rates(optimizer: Optimizer, start: Params, order: jax.Array, data: Dataset) -> Any:
    """For each learning rate: the batches' losses by pass, the final loss, test accuracy."""

    @jax.jit
    def run(rates: jax.Array, start: Params, order: jax.Array, train: Split, test: Split) -> Any:
        def one(rate: jax.Array) -> Any:
            steps = order.reshape(-1, order.shape[-1])
            params, losses = fit(
                optimizer.make(rate), start, steps, lambda p, i: loss(p, train.x[i], train.y[i])
            )
            right = accuracy(logits(params, test.x), test.y)
            return losses.reshape(order.shape[:2]), loss(params, *train), right

        return jax.vmap(one)(rates)

    return run(jnp.array(optimizer.rates), start, order, data.train, data.test)


@partial(jax.jit, static_argnums=0)
def _by_equation(
    optimizer: Optimizer, rate: float, start: Params, order: jax.Array, train: Split
) -> jax.Array:
    """How far the equation, written out on one long vector, and Optax come apart."""
    by_optax, _ = fit(
        optimizer.make(rate), start, order, lambda p, i: loss(p, train.x[i], train.y[i])
    )
    w, unravel = ravel_pytree(start)

    def step(carry: Any, each: Any) -> Any:
        w, m, v = carry
        t, i = each
        g = jax.grad(lambda w: loss(unravel(w), train.x[i], train.y[i]))(w)
        update, m, v = optimizer.by_hand(g, m, v, t, rate)
        return (w - update, m, v), None

    counts = jnp.arange(1, len(order) + 1)
    zeros = jnp.zeros_like(w)
    (w, _, _), _ = jax.lax.scan(step, (w, zeros, zeros), (counts, order))
    return jnp.max(jnp.abs(w - ravel_pytree(by_optax)[0]))


def accumulation(data: Dataset, key: jax.Array, updates: int) -> Lesson:
    """Eight micro-batches, averaged, make the step of one large batch; summed, they do not."""
    k_init, k_order = jax.random.split(key)
    start, order = init(k_init, SIZES), batches(k_order, len(data.train.y), LARGE, updates)
    micro = order.reshape(-1, LARGE // PARTS)
    sgd = optax.sgd(0.1, momentum=0.9)
    split = partial(optax.MultiSteps, sgd, every_k_schedule=PARTS)
    runs = {
        "large batch": (sgd, order),
        "accumulated": (split(), micro),
        "summed": (split(use_grad_mean=False), micro),
    }

    @partial(jax.jit, static_argnums=0)
    def run(tx: Any, start: Params, order: jax.Array, train: Split) -> Any:
        return fit(tx, start, order, lambda p, i: loss(p, train.x[i], train.y[i]))

    one, end, curves = {}, {}, {}
    for name, (tx, steps) in runs.items():
        one[name], _ = run(tx, start, steps[: len(steps) // updates], data.train)
        end[name], losses = run(tx, start, steps, data.train)
        curves[name] = rounded(losses.reshape(updates, -1).mean(1))
    gap = lambda name, params: rounded(difference(params[name], params["large batch"]))
    numbers = {
        "micro_batches": PARTS,
        "difference_after_one_update": gap("accumulated", one),
        "difference_at_the_end": gap("accumulated", end),
        "summed_difference_after_one_update": gap("summed", one),
        "updates": updates,
    }
    return Lesson(
        "Gradient accumulation",
        ("g = (1/k) sum_i g_i  over k micro-batches of equal size, then one update",),
        f"weights differ from the large batch's by {numbers['difference_after_one_update']:.0e} "
        f"after one update, {numbers['difference_at_the_end']:.0e} after {updates}; summed instead "
        f"of averaged, by {numbers['summed_difference_after_one_update']:.2f} after one",
        numbers,
        curves,
    )


def data_parallel(data: Dataset, key: jax.Array, updates: int) -> Lesson:
    """Eight devices, a part of the batch each: the mean of their gradients is the gradient."""
    k_init, k_order = jax.random.split(key)
    start, order = init(k_init, SIZES), batches(k_order, len(data.train.y), LARGE, updates)
    x, y = jnp.asarray(data.train.x)[order], jnp.asarray(data.train.y)[order]
    mesh = jax.make_mesh((PARTS,), ("data",), axis_types=(AxisType.Auto,))
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")))

    @partial(sharded, out_specs=P())
    def mean_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        # The mean belongs inside what is differentiated: the gradient of a replicated
        # parameter is the sum over devices already, and a pmean after it changes nothing.
        return jax.lax.pmean(loss(params, x, y), "data")

    @partial(sharded, out_specs=P("data"))
    def own_gradient(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        params = jax.lax.pcast(params, "data", to="varying")
        return ravel_pytree(jax.grad(loss)(params, x, y))[0][None]

    sgd = optax.sgd(0.1, momentum=0.9)
    # Two programs: in one, XLA would spread the work of "one" over the devices as well.
    runs = {
        "one": jax.jit(lambda x, y: fit(sgd, start, (x, y), lambda p, b: loss(p, *b))[0]),
        "eight": jax.jit(lambda x, y: fit(sgd, start, (x, y), lambda p, b: mean_loss(p, *b))[0]),
    }
    first = {name: jax.device_get(run(x[:1], y[:1])) for name, run in runs.items()}
    end = {name: jax.device_get(run(x, y)) for name, run in runs.items()}
    whole = ravel_pytree(jax.jit(jax.grad(loss))(start, x[0], y[0]))[0]
    parts = jax.jit(own_gradient)(start, x[0], y[0])
    away = lambda g: rounded(jnp.linalg.norm(g - whole, axis=-1) / jnp.linalg.norm(whole))
    numbers = {
        "devices": PARTS,
        "difference_after_one_update": rounded(difference(first["one"], first["eight"])),
        "difference_at_the_end": rounded(difference(end["one"], end["eight"])),
        "mean_gradient_off_by": away(parts.mean(0)),
        "summed_gradient_off_by": away(parts.sum(0)),
        "updates": updates,
    }
    return Lesson(
        "Data parallelism",
        ("g = (1/D) sum_d g_d  over D devices with equal shares of the batch (pmean)",),
        f"{PARTS} devices and one differ by {numbers['difference_after_one_update']:.0e} after one "
        f"update, {numbers['difference_at_the_end']:.0e} after {updates}; a sum in place of the "
        f"mean is {1 + numbers['summed_gradient_off_by']:.0f} times the gradient",
        numbers,
        {"one device alone": away(parts)},
    )


def clipping(data: Dataset, key: jax.Array, updates: int) -> Lesson:
    """One batch arrives unscaled, pixels 0 to 255; clipping its gradient saves the run."""
    k_init, k_order = jax.random.split(key)
    start, order = init(k_init, SIZES), batches(k_order, len(data.train.y), 100, updates)
    bad = updates // 3
    factor = jnp.where(jnp.arange(updates) == bad, 255.0, 1.0)
    sgd = optax.sgd(0.03, momentum=0.9)
    limit = 1.0
    runs = {"clipped": optax.chain(optax.clip_by_global_norm(limit), sgd), "not clipped": sgd}

    @partial(jax.jit, static_argnums=0)
    def run(tx: Any, start: Params, order: jax.Array, train: Split, test: Split) -> Any:
        def objective(params: Params, each: Any) -> jax.Array:
            i, scale = each
            return loss(params, scale * train.x[i], train.y[i])

        params, losses = fit(tx, start, (order, factor), objective)
        return losses, accuracy(logits(params, test.x), test.y)

    curves, right = {}, {}
    for name, tx in runs.items():
        losses, right[name] = run(tx, start, order, data.train, data.test)
        curves[name] = rounded(losses)
    numbers = {
        "limit": limit,
        "bad_update": bad,
        "clipped_test_accuracy": rounded(right["clipped"]),
        "not_clipped_test_accuracy": rounded(right["not clipped"]),
        "not_clipped_worst_loss_after": max(curves["not clipped"][bad + 1 :]),
        "clipped_worst_loss_after": max(curves["clipped"][bad + 1 :]),
    }
    return Lesson(
        "Gradient clipping",
        ("g <- g min(1, c / |g|),  |g| over all parameters together: shorter, same direction",),
        f"one batch of {updates} has pixels 0..255; test accuracy at the end "
        f"{numbers['clipped_test_accuracy']:.1%} with c = {limit:g}, "
        f"{numbers['not_clipped_test_accuracy']:.1%} without",
        numbers,
        curves,
    )
