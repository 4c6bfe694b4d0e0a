"""Losses on logits: a student learns what a teacher would have answered."""

import math

import jax
import jax.numpy as jnp

__all__ = ["kl"]


def kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence of the student from the softened teacher.

    `T^2 sum_c p_c (log p_c - log q_c)`, `p = softmax(teacher / T)`, `q = softmax(student
    / T)`. The factor `T^2` keeps the size of the gradient as `T` grows; its limit is half
    the squared difference of the centred logits, over the number of classes.

    Args:
      student_logits: `[..., classes]`, floating.
      teacher_logits: the same shape; no gradient passes to them.
      temperature: `T > 0`.
      axis: of the classes.
      where: bool, broadcastable to the logits: classes that count; the others have no
        part in either softmax. An example without any has loss 0.

    Returns:
      The loss of each example, `[...]`, in float32 or wider. It is 0, with gradient 0,
      where the student equals the teacher.

    Raises:
      ValueError: the shapes differ, or a temperature that is not positive and finite.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
    >>> jc.distill.kl(student, teacher).round(4)  # log 2 - H(3/4, 1/4)
    Array([0.1308], dtype=float32)

    Hinton, Vinyals and Dean, 2015, Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher must have logits of one shape; got "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )
    if isinstance(temperature, (int, float)) and not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature}")
    dtype = jnp.promote_types(jnp.result_type(student_logits, teacher_logits), jnp.float32)
    t = jnp.asarray(temperature, dtype)
    student = _from_largest(student_logits.astype(dtype), axis, where) / t
    teacher = _from_largest(jax.lax.stop_gradient(teacher_logits).astype(dtype), axis, where) / t
    log_q = jax.nn.log_softmax(student, axis, where=where)
    log_p = jax.nn.log_softmax(teacher, axis, where=where)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    # Both sum to one, so adding q - p to each term adds nothing in all; but then no term
    # is negative, and a common error of the logarithms cancels to first order.
    counts = p > 0 if where is None else (p > 0) & where
    gap = jnp.where(counts, log_q - log_p, 0.0)
    near = counts & (jnp.abs(gap) < 1)
    small = jnp.where(near, gap, 0.0)
    terms = jnp.where(near, p * (jnp.expm1(small) - small), q - p - p * gap)
    return t**2 * jnp.sum(terms, axis)


def _from_largest(logits: jax.Array, axis: int, where: jax.Array | None) -> jax.Array:
    """Minus the largest, before the temperature divides and rounds them: no softmax changes."""
    top = jnp.max(jax.lax.stop_gradient(logits), axis, keepdims=True, initial=-jnp.inf, where=where)
    return logits - jnp.where(jnp.isfinite(top), top, 0.0)
