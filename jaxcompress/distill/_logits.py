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
    student = jnp.moveaxis(student_logits.astype(dtype), axis, -1)
    teacher = jnp.moveaxis(jax.lax.stop_gradient(teacher_logits).astype(dtype), axis, -1)
    if where is None:
        counts = jnp.ones(student.shape, bool)
    else:
        counts = jnp.moveaxis(jnp.broadcast_to(where, student_logits.shape), axis, -1)
    t = jnp.asarray(temperature, dtype)
    return t**2 * _divergence(student, teacher, t, counts)


def _divergence(s: jax.Array, t: jax.Array, temperature: jax.Array, counts: jax.Array) -> jax.Array:
    """`sum p (log p - log q)` over the last axis, without cancellation.

    With `d = (s - t) / T` and `e = d - sum p d` it is `log sum p exp(e)`, which is
    `log1p(sum p (exp(e) - 1 - e))`: no term is negative, and near zero each is a series.
    The logarithms of p and q would be rounded first, and differ by less than that when
    the temperature is high or the student close to its teacher.
    """
    best = jnp.argmax(jnp.where(counts, t, -jnp.inf), -1, keepdims=True)
    at_best = lambda x: jnp.take_along_axis(x, best, -1)
    log_p = _log_softmax(t, temperature, counts)
    p = jnp.exp(log_p)
    counts_p = p > 0
    high, low = _difference(jnp.where(counts_p, s, 0.0), jnp.where(counts_p, t, 0.0))
    d = (high - at_best(high)) + (low - at_best(low))
    d = jnp.where(counts_p, d, 0.0) / temperature
    mean = jnp.sum(p * d, -1, keepdims=True)
    e = jnp.where(counts_p, d - mean, 0.0)
    # log(p exp(e)), from the student alone: its class may be one that the teacher rules out.
    log_r = (s - at_best(s)) / temperature + at_best(log_p) - mean
    log_r = jnp.where(counts, log_r, -jnp.inf)
    near = counts_p & (jnp.abs(e) < 1)
    far = jnp.exp(jnp.minimum(jnp.where(near, -jnp.inf, log_r), 1.0)) - p - p * e
    total = jnp.sum(jnp.where(near, p * _exp_less_line(jnp.where(near, e, 0.0)), far), -1)
    # Where it would overflow the divergence is above 1, and the textbook's sum does.
    direct = jnp.all(log_r <= 1, -1) & jnp.isfinite(total)
    gap = jnp.where(counts_p, log_p - _log_softmax(s, temperature, counts), 0.0)
    return jnp.where(direct, jnp.log1p(jnp.where(direct, total, 0.0)), jnp.sum(p * gap, -1))


def _difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a - b` as a rounded difference and what the rounding lost (Knuth)."""
    high = a - b
    other = high - a
    return high, jax.lax.stop_gradient((a - (high - other)) - (b + other))


def _exp_less_line(x: jax.Array) -> jax.Array:
    """`exp(x) - 1 - x` for `|x| < 1`, to full relative precision."""
    series = jnp.ones_like(x)
    for n in range(12, 2, -1):
        series = 1 + series * x / n
    return series * x * x / 2


def _log_softmax(x: jax.Array, temperature: jax.Array, counts: jax.Array) -> jax.Array:
    """Over the last axis, minus infinity where a class does not count."""
    top = jnp.max(jnp.where(counts, x, -jnp.inf), -1, keepdims=True)
    # Subtracted before the temperature divides and rounds.
    x = x - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    x = jnp.where(counts, x / temperature, -jnp.inf)
    total = jnp.sum(jnp.exp(x), -1, keepdims=True)
    return x - jnp.log(jnp.where(total == 0, 1.0, total))
