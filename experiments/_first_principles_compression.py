"""Lessons on the model: quantization, pruning of weights and activations, distillation."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _data import Dataset, Split
from _digits_models import SHIFTS, shifted
from _first_principles_model import (
    Lesson,
    Params,
    accuracy,
    batches,
    fit,
    init,
    logits,
    loss,
    rounded,
)

LARGE = (784, 256, 256, 10)
SMALL = (784, 32, 10)
GROUP = 56  # divides 784
TEMPERATURE, SOFT_SHARE = 4.0, 0.9


def large_net(data: Dataset, key: jax.Array, passes: int) -> Params:
    """The network to compress; it sees every digit shifted by up to two pixels."""
    k_init, k_order, k_shift = jax.random.split(key, 3)
    order = batches(k_order, len(data.train.y), 100, passes * len(data.train.y) // 100)
    shifts = jax.random.randint(k_shift, order.shape, 0, SHIFTS)
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, len(order)))

    @jax.jit
    def run(start: Params, order: jax.Array, shifts: jax.Array, train: Split) -> Params:
        def objective(params: Params, each: Any) -> jax.Array:
            i, by = each
            return loss(params, shifted(train.x[i], by), train.y[i])

        return fit(tx, start, (order, shifts), objective)[0]

    return run(init(k_init, LARGE), order, shifts, data.train)


def quantization(data: Dataset, net: Params) -> Lesson:
    """Eight and four bits for a trained matrix: error against its bound, bytes, accuracy."""
    specs = {
        "int8, a scale per tensor": jc.quantize.int8(axis=(-1, -2)),
        "int8, per channel": jc.quantize.int8(axis=-2),
        "int4, a scale per tensor": jc.quantize.int4(axis=(-1, -2)),
        "int4, per channel": jc.quantize.int4(axis=-2),
        f"int4, per group of {GROUP}": jc.quantize.int4(axis=-2, group_size=GROUP),
    }
    right = jax.jit(lambda p, x, y: accuracy(jc.accelerate(logits)(p, x), y))
    w = net["dense_0"]["kernel"]
    # For the figure: weights that lie evenly between the smallest and the largest.
    order = jnp.argsort(w.reshape(-1))
    even = jnp.linspace(w.min(), w.max(), 120)
    shown = order[jnp.searchsorted(w.reshape(-1)[order], even).clip(0, w.size - 1)]
    numbers: dict[str, Any] = {
        "float32": {"bytes": w.nbytes, "test_accuracy": rounded(right(net, *data.test))}
    }
    curves = {"weight": rounded(w.reshape(-1)[shown])}
    for name, spec in specs.items():
        quantized = jax.jit(partial(jc.quantize.quantize, rules={".*kernel": spec}))(net)
        q = quantized["dense_0"]["kernel"]
        back = q.materialise()
        scale = jnp.repeat(q.scale, len(w) // len(q.scale), axis=0)
        numbers[name] = {
            "bytes": q.nbytes,
            "largest_error_over_half_a_scale": rounded(jnp.max(jnp.abs(w - back) / (scale / 2))),
            "relative_error": rounded(jnp.linalg.norm(w - back) / jnp.linalg.norm(w)),
            "test_accuracy": rounded(right(quantized, *data.test)),
        }
        curves[name] = rounded(back.reshape(-1)[shown])
    naive = jax.tree.map(jnp.round, net)
    numbers["round(w), no scale"] = {
        "zeros": rounded(jnp.mean(naive["dense_0"]["kernel"] == 0)),
        "test_accuracy": rounded(right(naive, *data.test)),
    }
    curves["round(w), no scale"] = rounded(naive["dense_0"]["kernel"].reshape(-1)[shown])
    eight, four = numbers["int8, per channel"], numbers[f"int4, per group of {GROUP}"]
    bound = max(n.get("largest_error_over_half_a_scale", 0) for n in numbers.values())
    describe = lambda n: f"{n['bytes'] / 1000:.0f} kB, {n['test_accuracy']:.1%}"
    return Lesson(
        "Quantization",
        (
            "q = clip(round(w / s), -h, h),  s = max|w| / h,  h = 2^(bits-1) - 1",
            "w ~ s q,  |w - s q| <= s / 2",
        ),
        f"float32 {describe(numbers['float32'])}; int8 {describe(eight)}; int4 in groups "
        f"{describe(four)}; largest error {bound:.5f} of s/2; without a scale "
        f"{numbers['round(w), no scale']['zeros']:.0%} of the matrix is zero",
        numbers,
        curves,
    )


def small_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 8x8 digits, standardised on 1,200 of them; a target of 0 or 1 a class."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = x[order], labels[order]
    train, test = slice(0, 1200), slice(1200, None)
    live = x[train].std(0) > 0.3  # the others are dark nearly always
    x = (x[:, live] - x[train][:, live].mean(0)) / x[train][:, live].std(0)
    return x[train], np.eye(10)[labels[train]], x[test], labels[test]


@jax.jit
def lasso(gram: jax.Array, cross: jax.Array, alpha: jax.Array) -> jax.Array:
    """Proximal gradient steps on `|b - A w|^2 / (2 n) + alpha |w|_1`, for each column of b.

    `gram = A^T A / n` and `cross = A^T b / n`: all that the gradient needs of the data.
    """
    step = 1 / jnp.linalg.norm(gram, 2)

    def descend(_: int, w: jax.Array) -> jax.Array:
        w = w - step * (gram @ w - cross)
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * alpha, 0)

    return jax.lax.fori_loop(0, 3000, descend, jnp.zeros_like(cross))


@jax.jit
def least_squares(gram: jax.Array, cross: jax.Array, mask: jax.Array) -> jax.Array:
    """Least squares on what the mask keeps in each column, zero elsewhere."""

    def column(c: jax.Array, keep: jax.Array) -> jax.Array:
        kept = jnp.outer(keep, keep)
        return jnp.linalg.solve(jnp.where(kept, gram, jnp.eye(len(c))), jnp.where(keep, c, 0))

    return jax.vmap(column, in_axes=1, out_axes=1)(cross, mask)


def linear_pruning(rates: int) -> Lesson:
    """A linear model with fewer and fewer coefficients: by magnitude, and by an L1 penalty."""
    from sklearn.linear_model import Lasso

    a, targets, test_a, test_labels = small_digits()
    mean = targets.mean(0)
    b = targets - mean
    gram, cross = (jnp.asarray(m, jnp.float32) for m in (a.T @ a / len(a), a.T @ b / len(a)))
    alphas = np.geomspace(0.002, 0.08, rates).astype(np.float32)
    ours = np.asarray(jax.vmap(lasso, (None, None, 0))(gram, cross, alphas), float)
    theirs = np.stack(
        [Lasso(alpha=float(r), fit_intercept=False, tol=1e-8).fit(a, b).coef_.T for r in alphas]
    )

    def objective(w: np.ndarray) -> np.ndarray:
        """What scikit-learn minimises, in float64 and summed over the columns."""
        squares = ((b - a @ w) ** 2).sum((1, 2)) / (2 * len(a))
        return squares + alphas * np.abs(w).sum((1, 2))

    def right(w: Any) -> float:
        return rounded(np.mean((test_a @ np.asarray(w) + mean).argmax(1) == test_labels))

    refitted = partial(least_squares, gram, cross)
    dense = refitted(jnp.ones(cross.shape, bool))
    kept = (ours != 0).sum((1, 2)).tolist()
    masks = [
        jc.prune.mask(jnp.abs(dense), jc.prune.unstructured(), 1 - k / dense.size) for k in kept
    ]
    curves = {
        "magnitude": [right(dense * m) for m in masks],
        "magnitude + refit": [right(refitted(m)) for m in masks],
        "L1": [right(w) for w in ours],
        "L1 + refit": [right(refitted(w != 0)) for w in ours],
    }
    shown = int(np.argmin(np.abs(np.array(kept) - dense.size / 4)))
    numbers = {
        "lasso_difference": rounded(np.max(np.abs(ours - theirs))),
        "objective_relative_difference": rounded(
            np.max(np.abs(objective(ours) / objective(theirs) - 1))
        ),
        "coefficients": dense.size,
        "dense_test_accuracy": right(dense),
        "kept": kept[shown],
        "test_accuracy": {name: curve[shown] for name, curve in curves.items()},
    }
    compared = ", ".join(f"{name} {value:.1%}" for name, value in numbers["test_accuracy"].items())
    return Lesson(
        "Pruning a linear model",
        (
            "magnitude  w_i <- w_i if |w_i| is among the k largest, else 0",
            "L1         min |b - A w|^2 / (2 n) + r |w|_1  by proximal gradient steps",
            "           w <- S(w - a A^T (A w - b) / n, a r),  S(z, t) = sign(z) max(|z| - t, 0)",
        ),
        f"Lasso within {numbers['lasso_difference']:.0e} of scikit-learn's coefficients; "
        f"{kept[shown]} of {dense.size} kept: {compared}; all {numbers['dense_test_accuracy']:.1%}",
        numbers,
        curves
        | {
            "kept": kept,
            "penalty": rounded(alphas),
            "coefficients of the eight": rounded(ours[:, :, 8].T),
            "scikit-learn's": rounded(theirs[:, :, 8].T),
        },
    )


def _largest(k: int, h: jax.Array) -> jax.Array:
    """The `k` largest entries of each example (row), zero elsewhere."""
    sparsity = 1 - k / h.shape[-1]
    one = lambda row: jc.prune.mask(row[None], jc.prune.unstructured(), sparsity)[0]
    return jnp.where(jax.vmap(one)(h), h, 0)


def activation_pruning(data: Dataset, key: jax.Array, net: Params, passes: int) -> Lesson:
    """Each example keeps its own k largest activations, against one choice for all."""
    x, y = data.test
    width, trained = LARGE[1], 32
    sparse = lambda k: lambda h: _largest(k, jax.nn.relu(h))

    @partial(jax.jit, static_argnums=0)
    def own(k: int, net: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return accuracy(logits(net, x, sparse(k)), y)

    @jax.jit
    def shared(k: jax.Array, net: Params, known: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        """The k units that are largest on average over `known` digits stay, the others go."""

        def activation(h: jax.Array) -> jax.Array:
            h = jax.nn.relu(h)
            rank = jnp.argsort(jnp.argsort(-h[: len(known)].mean(0)))
            return jnp.where(rank < k, h, 0)

        return accuracy(logits(net, jnp.concatenate([known, x]), activation)[len(known) :], y)

    @jax.jit
    def tuned(net: Params, train: Split) -> Params:
        order = batches(key, len(train.y), 100, passes * len(train.y) // 100)

        def objective(params: Params, i: jax.Array) -> jax.Array:
            answers = logits(params, train.x[i], sparse(trained))
            return optax.softmax_cross_entropy_with_integer_labels(answers, train.y[i]).mean()

        return fit(optax.adam(1e-3), net, order, objective)[0]

    counts = [width // 2**i for i in range(1, 6)]
    curves = {
        "kept": counts,
        "own k for each example": [rounded(own(k, net, x, y)) for k in counts],
        "same k for all": [rounded(shared(k, net, data.validation.x, x, y)) for k in counts],
    }
    at = counts.index(trained)
    numbers = {
        "width": width,
        "dense_test_accuracy": rounded(accuracy(logits(net, x), y)),
        "kept": trained,
        "own_test_accuracy": curves["own k for each example"][at],
        "same_test_accuracy": curves["same k for all"][at],
        "trained_test_accuracy": rounded(own(trained, tuned(net, data.train), x, y)),
    }
    return Lesson(
        "Activation pruning",
        ("h_i <- h_i if h_i is among the k largest of its example, else 0",),
        f"{trained} of {width} units of each example: {numbers['own_test_accuracy']:.1%} of "
        f"{numbers['dense_test_accuracy']:.1%}, {numbers['trained_test_accuracy']:.1%} after "
        f"training with it; the same {trained} for all "
        f"{numbers['same_test_accuracy']:.1%}",
        numbers,
        curves,
    )


def distillation(data: Dataset, key: jax.Array, teacher: Params, passes: int) -> Lesson:
    """A small net learns from the labels alone, or from the large net's answers as well.

    Chosen on the validation digits: the temperature (of 1, 4, 10), the share (of 0.9, 1) and
    the learning rate, the best for both. Five students differ in their first weights.
    """
    k_init, k_order = jax.random.split(key)
    starts = jax.vmap(lambda k: init(k, SMALL))(jax.random.split(k_init, 5))
    order = batches(k_order, len(data.train.y), 100, passes * len(data.train.y) // 100)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, len(order)))

    @jax.jit
    def run(share: float, starts: Params, teacher: Params, train: Split, test: Split) -> jax.Array:
        answers = logits(teacher, train.x)

        def objective(params: Params, i: jax.Array) -> jax.Array:
            student = logits(params, train.x[i])
            soft = jc.distill.kl(student, answers[i], temperature=TEMPERATURE).mean()
            hard = optax.softmax_cross_entropy_with_integer_labels(student, train.y[i]).mean()
            return share * soft + (1 - share) * hard

        one = lambda start: fit(tx, start, order, objective)[0]
        return jax.vmap(lambda start: accuracy(logits(one(start), test.x), test.y))(starts)

    alone, distilled = (run(s, starts, teacher, data.train, data.test) for s in (0.0, SOFT_SHARE))
    count = lambda sizes: sum((a + 1) * b for a, b in pairwise(sizes))
    numbers = {
        "teacher_parameters": count(LARGE),
        "student_parameters": count(SMALL),
        "teacher_test_accuracy": rounded(accuracy(logits(teacher, data.test.x), data.test.y)),
        "alone_test_accuracy": rounded(alone.mean()),
        "alone_std": rounded(alone.std(ddof=1)),
        "distilled_test_accuracy": rounded(distilled.mean()),
        "distilled_std": rounded(distilled.std(ddof=1)),
    }
    return Lesson(
        "Distillation",
        (
            "L = c T^2 KL(p_T || q_T) + (1 - c) CE(label, q_1),",
            "p_T = softmax(teacher / T), q_T = softmax(student / T)",
        ),
        f"teacher {numbers['teacher_test_accuracy']:.1%} with {numbers['teacher_parameters']:,} "
        f"parameters; student with {numbers['student_parameters']:,} alone {alone.mean():.1%} +- "
        f"{numbers['alone_std']:.1%}, distilled {distilled.mean():.1%} +- "
        f"{numbers['distilled_std']:.1%}",
        numbers,
        {"alone": rounded(alone), "distilled": rounded(distilled)},
    )
