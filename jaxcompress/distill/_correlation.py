"""Distillation by correlation: the order of things rather than their exact values."""

import jax
import jax.numpy as jnp

from jaxcompress.distill._softened import log_softmax, paired

__all__ = ["dist"]


def dist(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    batch_axis: int = 0,
    where: jax.Array | None = None,
) -> jax.Array:
    """One minus the correlation of the softened probabilities, over classes and over examples.

    `T^2 (beta (1 - r(q_b, p_b)) + gamma mean_c (1 - r(q_c, p_c)))`: `r` is Pearson's
    correlation, of the classes of example `b` and of the examples for class `c`. A
    student far smaller than its teacher can match relations where values are out of reach.

    The second part belongs to the batch. It is added to each of its examples, so that the
    mean of the result is the loss of the paper.

    Args:
      student_logits, teacher_logits, temperature, axis: as for `kl`, of two dimensions or
        more.
      beta, gamma: the weights of the two parts.
      batch_axis: of the examples.
      where: bool, broadcastable to the logits: what counts, classes or examples.

    Returns:
      The loss of each example, the shape of the logits without `axis`, in float32 or
      wider. It is 0 where the student equals the teacher, and gives an example that does
      not count 0. Where the teacher does not vary there is nothing to learn, and a part
      is 0; where only the student does not, it is 1, with gradient 0.

    Raises:
      ValueError: as `kl`, or fewer than two dimensions.
      TypeError: as `kl`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> jc.distill.dist(-teacher, teacher).round(4)  # all upside down
    Array([4., 4.], dtype=float32)

    Huang et al., 2022, Knowledge Distillation from A Stronger Teacher, arXiv:2205.10536.
    """
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    if s.ndim < 2 or axis % s.ndim == batch_axis % s.ndim:
        raise ValueError(
            f"dist needs an axis of classes and another of examples; got logits of the shape "
            f"{student_logits.shape}, axis={axis} and batch_axis={batch_axis}"
        )
    batch_axis = batch_axis % s.ndim - (batch_axis % s.ndim > axis % s.ndim)  # classes are last
    q, p = (jnp.exp(log_softmax(x, temperature, counts)) for x in (s, t))
    inter = _uncorrelated(q, p, -1, counts)
    intra = _uncorrelated(q, p, batch_axis, counts)
    some = jnp.any(counts, batch_axis, keepdims=True)
    intra = jnp.sum(intra, -1, keepdims=True) / jnp.maximum(jnp.sum(some, -1, keepdims=True), 1)
    loss = beta * inter + jnp.where(jnp.any(counts, -1, keepdims=True), gamma * intra, 0.0)
    return temperature**2 * jnp.squeeze(loss, -1)


def _uncorrelated(x: jax.Array, y: jax.Array, axis: int, where: jax.Array) -> jax.Array:
    """`1 - r(x, y)` along `axis`, which is kept: half the squared distance of unit vectors."""
    (u, x_varies), (v, y_varies) = (_standard(z, axis, where) for z in (x, y))
    half = jnp.sum((u - v) ** 2, axis, keepdims=True) / 2
    return jnp.where(y_varies, jnp.where(x_varies, half, 1.0), 0.0)


def _standard(x: jax.Array, axis: int, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centred and of length one, and whether it varies at all; zeros if it does not."""
    n = jnp.maximum(jnp.sum(where, axis, keepdims=True), 1)
    centred = jnp.where(where, x, 0.0)
    first = centred - jnp.sum(centred, axis, keepdims=True) / n
    centred = jnp.where(where, first, 0.0)
    # The mean of equal numbers may be a rounding off: that is no variation.
    noise = 4 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
    varies = jnp.any(jnp.abs(centred) > noise, axis, keepdims=True)
    square = jnp.sum(centred**2, axis, keepdims=True)
    length = jnp.sqrt(jnp.where(varies, square, 1.0))
    return jnp.where(varies, centred, 0.0) / length, varies
