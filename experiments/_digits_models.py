"""The networks of the main job, unmodified Flax, and how a batch is made for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc

HIDDEN = (300, 100)  # LeNet-300-100, LeCun et al., 1998
TEACHER_HIDDEN = (1200, 1200)  # the teacher of Hinton et al., 2015
SIDE, REACH = 28, 2  # pixels; training images are shifted by up to two


class MLP(nn.Module):
    """Dense layers with ReLU between them, ten classes, dropout while training."""

    hidden: tuple[int, ...]
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


student = MLP(HIDDEN)
teacher = MLP(TEACHER_HIDDEN, dropout=0.5)
SHIFTS = (2 * REACH + 1) ** 2


def shifted(x: jax.Array, which: jax.Array) -> jax.Array:
    """Each image of `[n, 784]` moved by the shift of its number, 0 to `SHIFTS - 1`."""
    padded = jnp.pad(x.reshape(-1, SIDE, SIDE), ((0, 0), (REACH, REACH), (REACH, REACH)))
    corner = jnp.stack(jnp.divmod(which, 2 * REACH + 1), -1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, at, (SIDE, SIDE))
    return jax.vmap(cut)(padded, corner).reshape(x.shape)


def hard_loss(logits: jax.Array, labels: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Cross-entropy with the labels; the teacher is not asked."""
    del teacher_logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def soft_loss(logits: jax.Array, labels: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Half labels, half teacher at temperature 2 (chosen on the validation digits)."""
    soft = jc.distill.kl(logits, teacher_logits, temperature=2.0).mean()
    return 0.5 * hard_loss(logits, labels, teacher_logits) + 0.5 * soft
