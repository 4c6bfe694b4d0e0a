"""Softened distributions of a student and a teacher, and how far apart they are.

Everything that is small because the two agree is computed as a difference of logits,
never as a difference of logarithms or probabilities: at a high temperature, or late in
training, nothing else is left of it in float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "Softened",
    "divergence",
    "excess",
    "from_largest",
    "log_softmax",
    "log_sum_exp",
    "paired",
    "soften",
]


class Softened(NamedTuple):
    """Log-probabilities of both, `gap = log q - log p`, and the temperature.

    `-inf` where a class does not count; there `gap` is 0.
    """

    log_q: jax.Array
    log_p: jax.Array
    gap: jax.Array
    t: jax.Array


def paired(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both in one dtype, float32 or wider, the teacher as a constant; and the temperature."""
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have logits of one shape; got "
            f"{student.shape} and {teacher.shape}"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise TypeError(f"the {name}'s logits must be floating; got {logits.dtype}")
    if isinstance(temperature, (int, float)) and not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature}")
    dtype = jnp.promote_types(jnp.result_type(student, teacher), jnp.float32)
    teacher = jax.lax.stop_gradient(teacher)
    return student.astype(dtype), teacher.astype(dtype), jnp.asarray(temperature, dtype)


def soften(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float | jax.Array,
    axis: int,
    where: jax.Array | None,
) -> Softened:
    """`softmax(logits / temperature)` of both, checked, over the classes that count."""
    student, teacher, t = paired(student, teacher, temperature)
    counts = jnp.ones(student.shape, bool) if where is None else where
    counts = jnp.broadcast_to(counts, student.shape)
    log_q, log_p = (log_softmax(x, axis, counts, t) for x in (student, teacher))
    # An infinite logit is a class that is ruled out; that is no difference if both do so.
    finite = counts & jnp.isfinite(student) & jnp.isfinite(teacher)
    p = jnp.exp(log_p)
    delta = (jnp.where(finite, student, 0.0) - jnp.where(finite, teacher, 0.0)) / t
    delta = delta - jnp.sum(p * delta, axis, keepdims=True)
    same = finite | ~counts | (student == teacher)
    close = jnp.all(same & (jnp.abs(jnp.where(finite, delta, 0.0)) < 1), axis, keepdims=True)
    delta = jnp.where(close & finite, delta, 0.0)
    near = delta - jnp.log1p(jnp.sum(p * jnp.expm1(delta), axis, keepdims=True))
    none = ~counts | ((log_q == -jnp.inf) & (log_p == -jnp.inf))
    far = jnp.where(none, 0.0, log_q) - jnp.where(none, 0.0, log_p)
    return Softened(log_q, log_p, jnp.where(close & finite, near, far), t)


def log_softmax(
    logits: jax.Array, axis: int, where: jax.Array, t: jax.Array | float = 1.0
) -> jax.Array:
    """`log softmax(logits / t)` over the classes that count, `-inf` for the others.

    The largest is subtracted before the temperature divides and rounds; no softmax changes.
    """
    x = from_largest(logits, axis, where) / t
    total = jnp.sum(jnp.exp(x), axis, keepdims=True, where=where)
    return jnp.where(where, x - jnp.log(jnp.where(total == 0, 1.0, total)), -jnp.inf)


def log_sum_exp(x: jax.Array, axis: int, where: jax.Array) -> jax.Array:
    """`log sum exp(x)` over what counts; `-inf`, with gradient 0, where nothing does."""
    top = _largest(x, axis, where)
    shifted = jnp.where(where, x - top, 0.0)
    total = jnp.sum(jnp.exp(shifted), axis, keepdims=True, where=where)
    out = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1.0, total)) + top)
    return jnp.squeeze(out, axis)


def _largest(x: jax.Array, axis: int, where: jax.Array) -> jax.Array:
    top = jnp.max(jax.lax.stop_gradient(x), axis, keepdims=True, initial=-jnp.inf, where=where)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def from_largest(x: jax.Array, axis: int, where: jax.Array) -> jax.Array:
    """Minus the largest of what counts; 0 where it does not."""
    return jnp.where(where, x - _largest(x, axis, where), 0.0)


def divergence(log_p: jax.Array, log_q: jax.Array, gap: jax.Array, axis: int) -> jax.Array:
    """`sum p (log p - log q)`, `gap = log q - log p`.

    Both sum to one, so adding q - p to each term adds nothing in all; but then no term is
    negative, and an error that all the logarithms have in common cancels to first order.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, gap, 0.0)
    near = (p > 0) & (jnp.abs(gap) < 1)
    terms = jnp.where(near, p * excess(jnp.where(near, gap, 0.0)), q - p - p * gap)
    return jnp.sum(terms, axis)


def excess(x: jax.Array) -> jax.Array:
    """`e^x - 1 - x`, to a few roundings also near zero."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0.0)
    # The series to x^10: the next term is below 1e-10 of the sum.
    series = jnp.full_like(small, 1 / math.factorial(10))
    for n in range(9, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return jnp.where(near, small**2 * series, jnp.expm1(x) - x)
