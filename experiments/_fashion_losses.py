"""Every loss of the library on one footing, for kd_fashion.py.

Each is `loss(student, teacher, labels, extra, state) -> (one an example, state)`, where
student and teacher are what `Seen` holds. The weights are those of the papers where they
give one for classes of about ten, and were not tuned here: the table compares losses as
somebody would first try them. The temperature was chosen once for all: of 1, 2, 3 and 4 the
best for `kl` on the validation images (two seeds).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc

d = jc.distill
T = 2.0


class Seen(NamedTuple):
    """A network's logits, and the features that its last layer takes in."""

    logits: jax.Array
    features: jax.Array  # [batch, features]
    maps: jax.Array  # [batch, positions..., channels]: of the last convolution; features if none


class Method(NamedTuple):
    """A loss, and the parameters and the memory that come with it."""

    loss: Callable[..., Any]
    params: Callable[..., Any] = lambda key, student, teacher: ()
    state: Callable[..., Any] = lambda key, examples: ()


def hard(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _logits(weight: float, fn: Callable[..., jax.Array]) -> Method:
    """`(1 - weight)` labels and `weight` of a loss on logits."""

    def loss(student, teacher, labels, params, state, batch):
        taught = fn(student.logits, teacher.logits, labels)
        return (1 - weight) * hard(student.logits, labels) + weight * taught, state

    return Method(loss)


def _features(weight: float, fn: Callable[..., jax.Array], params: Any = None) -> Method:
    """Labels, and `weight` of a loss on features."""

    def loss(student, teacher, labels, params, state, batch):
        taught = fn(student, teacher, params)
        return hard(student.logits, labels) + weight * taught, state

    return Method(loss, params) if params else Method(loss)


def _kl_and_similarities(student, teacher, labels, params, state, batch):
    """Losses add up: half labels, half `kl`, and how the batch's features lie together."""
    logits = 0.5 * hard(student.logits, labels) + 0.5 * d.kl(
        student.logits, teacher.logits, temperature=T
    )
    return logits + 3000.0 * d.similarity_preserving(student.features, teacher.features), state


def _crd() -> Method:
    def loss(student, teacher, labels, params, state, batch):
        negatives = jax.random.randint(batch["key"], (len(labels), 256), 0, len(state.student))
        taught, state = d.crd(
            student.features, teacher.features, params, state, batch["index"], negatives
        )
        return hard(student.logits, labels) + 0.8 * taught / 256, state

    return Method(
        loss,
        lambda key, student, teacher: d.crd_projectors(key, student, teacher, 64),
        lambda key, examples: d.crd_memory(key, examples, 64),
    )


def _smoothed(student, teacher, labels, params, state, batch):
    soft = optax.smooth_labels(jax.nn.one_hot(labels, student.logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(student.logits, soft), state


_projector = lambda key, student, teacher: d.projector(key, student, teacher)
_vid = lambda key, student, teacher: d.vid_projector(key, student, teacher)
# The square of a batch of 256 times the features, and its cube, take seconds a step: distances
# are those of its first 64, angles those of its first 32.
_some, _few = lambda x: x[:64], lambda x: x[:32]

METHODS: dict[str, Method] = {
    "alone": _logits(0.0, lambda s, t, y: jnp.zeros(len(y))),
    "smoothed labels": Method(_smoothed),
    "kl": _logits(0.9, lambda s, t, y: d.kl(s, t, temperature=T)),
    "soft_cross_entropy": _logits(0.9, lambda s, t, y: d.soft_cross_entropy(s, t, temperature=T)),
    "mse": _logits(0.9, lambda s, t, y: d.mse(s, t)),
    "reverse_kl": _logits(0.9, lambda s, t, y: d.reverse_kl(s, t, temperature=T)),
    "jensen_shannon": _logits(0.9, lambda s, t, y: 4 * d.jensen_shannon(s, t, temperature=T)),
    "dkd": _logits(0.5, lambda s, t, y: 2 * d.dkd(s, t, y, beta=4.0, temperature=T)),
    "dist": _logits(0.5, lambda s, t, y: 2 * d.dist(s, t, beta=2.0, gamma=2.0)),
    "top_k_kl": _logits(
        0.9, lambda s, t, y: d.top_k_kl(s, d.top_k(t, 3, temperature=T, dtype=jnp.float32))
    ),
    "fitnet": _features(1.0, lambda s, t, p: d.fitnet(s.features, t.features, p), _projector),
    "vid": _features(0.1, lambda s, t, p: d.vid(s.features, t.features, p), _vid),
    "similarity_preserving": _features(
        3000.0, lambda s, t, p: d.similarity_preserving(s.features, t.features)
    ),
    "kl and similarities": Method(_kl_and_similarities),
    "rkd_distance": _features(
        25.0, lambda s, t, p: jnp.mean(d.rkd_distance(_some(s.features), _some(t.features)))
    ),
    "rkd_angle": _features(
        50.0, lambda s, t, p: jnp.mean(d.rkd_angle(_few(s.features), _few(t.features)))
    ),
    "pkt": _features(300.0, lambda s, t, p: d.pkt(s.features, t.features)),
    "crd": _crd(),
}
# These need maps with positions, so only the convolutional pair has them.
MAPS: dict[str, Method] = {
    "attention_transfer": _features(1.0, lambda s, t, p: 10 * d.attention_transfer(s.maps, t.maps)),
    "nst": _features(1.0, lambda s, t, p: 10 * d.nst(s.maps, t.maps)),
}
