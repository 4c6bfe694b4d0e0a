"""Decoupled distillation: the right class, and the others among themselves."""

import jax
import jax.numpy as jnp

from jaxcompress.distill._softened import divergence, from_largest, log_sum_exp, paired, soften

__all__ = ["dkd"]


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Decoupled knowledge distillation: `kl` in two parts with weights of their own.

    `T^2 (alpha KL(b^p || b^q) + beta KL(p^ || q^))`: `b = (p_y, 1 - p_y)` is how likely
    the label `y` is, and `p^` the softmax of the classes other than `y`. With `beta = 1 -
    p_y` and `alpha = 1` this is `kl`: a sure teacher hides what it knows of the others.

    Args:
      student_logits, teacher_logits, temperature, axis, where: as for `kl`.
      labels: integers, the shape of the logits without `axis`.
      alpha: the weight of the label against the rest.
      beta: the weight of the rest among themselves; the paper's values go from 1 to 8.

    Returns:
      The loss of each example, `[...]`, in float32 or wider; 0, with gradient 0, where
      both are equal. With one class there is nothing to learn, and it is 0.

    Raises:
      ValueError: as `kl`, or labels of another shape.
      TypeError: as `kl`, or labels that are not integers.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[9.0, 1.0, 0.0]])
    >>> loss = lambda beta: jc.distill.dkd(student, teacher, jnp.array([0]), alpha=0, beta=beta)
    >>> loss(1.0).round(4), loss(8.0).round(4)
    (Array([0.1109], dtype=float32), Array([0.8876], dtype=float32))

    Zhao et al., 2022, Decoupled Knowledge Distillation, arXiv:2203.08679.
    """
    student, teacher, t = paired(student_logits, teacher_logits, temperature)
    axis = axis % student.ndim
    expected = student.shape[:axis] + student.shape[axis + 1 :]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != expected:
        raise ValueError(f"labels must have the shape {expected}; got {labels.shape}")
    counts = jnp.broadcast_to(True if where is None else where, student.shape)
    classes = jax.lax.broadcasted_iota(labels.dtype, student.shape, axis)
    target = classes == jnp.expand_dims(labels, axis)
    rest = soften(student, teacher, t, axis, counts & ~target)
    among_rest = divergence(rest.log_p, rest.log_q, rest.gap, axis)
    # Minus the largest, which changes no probability: a sum of the rest keeps its digits.
    s, p = (from_largest(x, axis, counts) / t for x in (student, teacher))
    label = _against_rest(s, p, target, counts, axis)
    return t**2 * (alpha * label + beta * among_rest)


def _against_rest(
    student: jax.Array, teacher: jax.Array, target: jax.Array, counts: jax.Array, axis: int
) -> jax.Array:
    """`KL(b^p || b^q)` of the label and all the rest, from softened logits."""
    sides = (target & counts, counts & ~target)
    pair = lambda x: jnp.stack([log_sum_exp(x, axis, side) for side in sides])
    there = jnp.stack([jnp.any(side, axis) for side in sides])
    two = soften(
        jnp.where(there, pair(student), 0.0), jnp.where(there, pair(teacher), 0.0), 1.0, 0, there
    )
    return divergence(two.log_p, two.log_q, two.gap, 0)
