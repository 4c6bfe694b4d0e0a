"""The models of user_behaviour.py, plain functions of plain parameters, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _users_data import Part, Users

BATCH = 256
LARGE, SMALL = (64, 64), (64,)
SPARSITY = 0.5
TEMPERATURE = 2.0


class Answers(NamedTuple):
    """An ensemble's logits for each part."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def init(key: jax.Array, inputs: int, hidden: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Dense layers to two logits."""
    sizes = [inputs, *hidden, 2]
    return [
        {
            "kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5,
            "bias": jnp.zeros(b),
        }
        for k, a, b in zip(jax.random.split(key, len(sizes)), sizes, sizes[1:])
    ]


def apply(params: Any, x: jax.Array, dropout: jax.Array | None = None) -> jax.Array:
    """ReLU between the layers; a key as `dropout` drops a fifth of what they give."""
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        if dropout is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(dropout, i), 0.8, x.shape)
            x = jnp.where(keep, x / 0.8, 0.0)
    return x @ params[-1]["kernel"] + params[-1]["bias"]


@jax.jit
def logits(params: Any, x: jax.Array) -> jax.Array:
    """The same model, compressed or not."""
    return jc.accelerate(apply)(params, x)


def train(
    params: Any,
    tx: Any,
    loss: Callable,
    forward: Callable,
    arrays: Any,
    key: jax.Array,
    epochs: int,
) -> tuple[Any, Any]:
    """Epochs of one scan each; `arrays` are cut into batches and given to `loss`."""
    step = jc.distill.step(forward, loss, tx)
    count = len(arrays["x"]) // BATCH

    @jax.jit
    def epoch(carry: Any, key: jax.Array) -> Any:
        order_key, drop_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(arrays["x"]))[: count * BATCH]
        keys = jax.random.split(drop_key, count)

        def one(carry: Any, at: Any) -> Any:
            index, drop = at
            batch = jax.tree.map(lambda a: a[index], arrays) | {"key": drop}
            params, state, value = step(*carry, batch)
            return (params, state), value

        return jax.lax.scan(one, carry, (order.reshape(count, BATCH), keys))

    carry = params, tx.init(params)
    for i in range(epochs):
        carry, _ = epoch(carry, jax.random.fold_in(key, i))
    return carry


def optimizer(peak: float, steps: int, *rest: Any) -> Any:
    return optax.chain(
        optax.adamw(optax.cosine_decay_schedule(peak, steps), weight_decay=1e-4), *rest
    )


def hard(out: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def soft(out: jax.Array, batch: Any) -> jax.Array:
    """Half labels, half ensemble."""
    taught = jc.distill.kl(out, batch["teacher"], temperature=TEMPERATURE)
    return 0.5 * hard(out, batch) + 0.5 * taught


def fit_member(data: Users, seed: int, epochs: int, advance: Callable[[], None]) -> Any:
    """One network of the ensemble, with dropout."""
    start, key = jax.random.split(jax.random.key(100 + seed))
    steps = epochs * (len(data.train.y) // BATCH)
    arrays = {"x": jnp.asarray(data.train.x), "y": jnp.asarray(data.train.y)}
    params = init(start, data.train.x.shape[1], LARGE)
    forward = lambda p, batch: apply(p, batch["x"], batch["key"])
    params, _ = train(params, optimizer(1e-3, steps), hard, forward, arrays, key, epochs)
    advance()
    return params


def ensemble(members: Sequence[Any], x: Any) -> jax.Array:
    """Logits of the mean probability."""
    return jnp.log(jnp.mean(jnp.stack([jax.nn.softmax(logits(p, x)) for p in members]), 0))


def answers(members: Sequence[Any], data: Users) -> Answers:
    return Answers(*(np.asarray(ensemble(members, part.x)) for part in data))


def fit_student(name: str, data: Users, teacher: Answers, seed: int, epochs: int) -> Any:
    """`alone`, `distilled`, or `compressed`: distilled, pruned and quantized in each step."""
    start, key = jax.random.split(jax.random.key(seed))
    steps = epochs * (len(data.train.y) // BATCH)
    arrays = {
        "x": jnp.asarray(data.train.x),
        "y": jnp.asarray(data.train.y),
        "teacher": jnp.asarray(teacher.train),
    }
    params: Any = init(start, data.train.x.shape[1], SMALL)
    loss, rest = (hard if name == "alone" else soft), ()
    if name == "compressed":
        params = jc.quantize.prepare_qat(params, {".*/kernel": jc.quantize.w8a8()})
        schedule = jc.prune.polynomial(SPARSITY, begin=0, end=steps // 2, every=5)
        parts = jc.prune.magnitude(), jc.prune.unstructured(), schedule
        rest = (jc.prune.prune(*parts, rules=["0/kernel"]),)
    forward = lambda p, batch: apply(p, batch["x"])
    return train(params, optimizer(3e-3, steps, *rest), loss, forward, arrays, key, epochs)


def score(validation: Any, test: Any, data: Users) -> dict[str, float]:
    """AUC, and recall, precision and F1 at the threshold with the best F1 on validation."""
    from sklearn.metrics import (
        f1_score,
        precision_recall_curve,
        precision_score,
        recall_score,
        roc_auc_score,
    )

    margin = [np.asarray(x)[:, 1] - np.asarray(x)[:, 0] for x in (validation, test)]
    precision, recall, thresholds = precision_recall_curve(data.validation.y, margin[0])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    says = margin[1] >= thresholds[np.argmax(f1[:-1])]
    return {
        "auc": float(roc_auc_score(data.test.y, margin[1])),
        "recall": float(recall_score(data.test.y, says)),
        "precision": float(precision_score(data.test.y, says)),
        "f1": float(f1_score(data.test.y, says)),
    }


def logistic(data: Users) -> dict[str, float]:
    """scikit-learn's logistic regression: what a linear model gets."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(data.train.x, data.train.y)
    return score(*(fitted.predict_log_proba(p.x) for p in (data.validation, data.test)), data)


def importance(model: Callable[[Any], jax.Array], part: Part) -> np.ndarray:
    """How much AUC each feature carries: what is lost when it is shuffled among customers."""
    from sklearn.metrics import roc_auc_score

    auc = lambda x: roc_auc_score(part.y, np.asarray(jnp.diff(model(x), axis=-1))[:, 0])
    whole, random = auc(part.x), np.random.default_rng(0)
    lost = np.zeros(part.x.shape[1])
    for feature in range(len(lost)):
        for _ in range(3):
            x = part.x.copy()
            x[:, feature] = random.permutation(x[:, feature])
            lost[feature] += (whole - auc(x)) / 3
    return lost
