"""Softened distributions of a student and a teacher, and how far apart they are.

Everything that is small because the two agree is computed from the difference of their
logits: differences of logarithms or of probabilities are rounded first, and at a high
temperature, or late in training, nothing else is left of them in float32.
"""

import math

import jax
import jax.numpy as jnp

__all__ = [
    "divergence",
    "excess",
    "from_largest",
    "log_ratio",
    "log_softmax",
    "log_sum_exp",
    "paired",
]


def paired(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Both with the classes last, float32 or wider, the teacher a constant; T; what counts."""
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
    counts = jnp.broadcast_to(True if where is None else where, student.shape)
    s, t, counts = (
        jnp.moveaxis(x, axis, -1)
        for x in (student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype), counts)
    )
    return s, t, jnp.asarray(temperature, dtype), counts


def divergence(
    s: jax.Array, t: jax.Array, temperature: jax.Array | float, counts: jax.Array
) -> jax.Array:
    """`sum p (log p - log q)` over the last axis, without cancellation.

    `p` and `q` are the softmax of `t / T` and `s / T`. With `d = (s - t) / T` and `e = d -
    sum p d` it is `log sum p exp(e)`, which is `log1p(sum p (exp(e) - 1 - e))`: no term is
    negative, and near zero each is a series.
    """
    best = jnp.argmax(jnp.where(counts, t, -jnp.inf), -1, keepdims=True)
    at_best = lambda x: jnp.take_along_axis(x, best, -1)
    log_p = log_softmax(t, temperature, counts)
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
    total = jnp.sum(jnp.where(near, p * excess(jnp.where(near, e, 0.0)), far), -1)
    # Where it would overflow the divergence is above 1, and the textbook's sum does.
    direct = jnp.all(log_r <= 1, -1) & jnp.isfinite(total)
    gap = jnp.where(counts_p, log_p - log_softmax(s, temperature, counts), 0.0)
    return jnp.where(direct, jnp.log1p(jnp.where(direct, total, 0.0)), jnp.sum(p * gap, -1))


def log_ratio(
    s: jax.Array, t: jax.Array, temperature: jax.Array | float, counts: jax.Array
) -> jax.Array:
    """`log q - log p` of each class, to its last digits where all of them are near zero."""
    log_q, log_p = (log_softmax(x, temperature, counts) for x in (s, t))
    # A class that both rule out has no part, and no difference.
    out = ~counts | ((log_q == -jnp.inf) & (log_p == -jnp.inf))
    finite = ~out & jnp.isfinite(s) & jnp.isfinite(t)
    high, low = _difference(jnp.where(finite, s, 0.0), jnp.where(finite, t, 0.0))
    p = jnp.exp(log_p)
    # Minus what all have in common before the small parts are added.
    top = jnp.sum(p * high, -1, keepdims=True)
    d = jnp.where(finite, ((high - top) + low) / temperature, 0.0)
    close = jnp.all((finite | out) & (jnp.abs(d) < 1), -1, keepdims=True)
    d = jnp.where(close, d, 0.0)
    e = jnp.where(finite, d - jnp.sum(p * d, -1, keepdims=True), 0.0)
    near = e - jnp.log1p(jnp.sum(p * excess(e), -1, keepdims=True))
    far = jnp.where(out, 0.0, log_q) - jnp.where(out, 0.0, log_p)
    return jnp.where(close & finite, near, far)


def _difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a - b` as a rounded difference and what the rounding lost (Knuth)."""
    high = a - b
    other = high - a
    return high, jax.lax.stop_gradient((a - (high - other)) - (b + other))


def excess(x: jax.Array) -> jax.Array:
    """`exp(x) - 1 - x`, to full relative precision also near zero."""
    near = jnp.abs(x) < 1
    small = jnp.where(near, x, 0.0)
    series = jnp.ones_like(small)
    for n in range(12, 2, -1):
        series = 1 + series * small / n
    return jnp.where(near, series * small * small / 2, jnp.expm1(x) - x)


def log_softmax(x: jax.Array, temperature: jax.Array | float, counts: jax.Array) -> jax.Array:
    """Over the last axis, minus infinity where a class does not count."""
    # Subtracted before the temperature divides and rounds.
    x = jnp.where(counts, from_largest(x, counts) / temperature, -jnp.inf)
    total = jnp.sum(jnp.exp(x), -1, keepdims=True)
    return x - jnp.log(jnp.where(total == 0, 1.0, total))


def log_sum_exp(x: jax.Array, counts: jax.Array) -> jax.Array:
    """`log sum exp(x)` over what counts; `-inf`, with gradient 0, where nothing does."""
    top = _largest(x, counts)
    shifted = jnp.where(counts, x - top, -jnp.inf)
    total = jnp.sum(jnp.exp(shifted), -1)
    finite = jnp.log(jnp.where(total == 0, 1.0, total)) + top[..., 0]
    return jnp.where(total == 0, -jnp.inf, finite)


def from_largest(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Minus the largest of what counts along the last axis; no softmax changes."""
    return x - _largest(x, counts)


def _largest(x: jax.Array, counts: jax.Array) -> jax.Array:
    top = jnp.max(jnp.where(counts, x, -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
