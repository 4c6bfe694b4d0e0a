"""Decoupled distillation: the right class, and the others among themselves."""

import jax
import jax.numpy as jnp

from jaxcompress.distill._softened import divergence, from_largest, log_sum_exp, paired

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
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != s.shape[:-1]:
        raise ValueError(f"labels must have the shape {s.shape[:-1]}; got {labels.shape}")
    target = jnp.arange(s.shape[-1]) == labels[..., None]
    among_rest = divergence(s, t, temperature, counts & ~target)
    # Minus the largest, which changes no probability: a sum of the rest keeps its digits.
    two_s, two_t = (
        _against_rest(from_largest(x, counts) / temperature, target, counts) for x in (s, t)
    )
    there = jnp.stack([jnp.any(target & counts, -1), jnp.any(~target & counts, -1)], -1)
    label = divergence(two_s, two_t, 1.0, there)
    return temperature**2 * (alpha * label + beta * among_rest)


def _against_rest(x: jax.Array, target: jax.Array, counts: jax.Array) -> jax.Array:
    """Two logits: of the label, and of all the rest together."""
    sides = [log_sum_exp(x, side & counts) for side in (target, ~target)]
    return jnp.stack([jnp.where(jnp.isfinite(side), side, 0.0) for side in sides], -1)
