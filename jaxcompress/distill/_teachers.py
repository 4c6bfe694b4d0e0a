"""Several teachers at once."""

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import kl

__all__ = ["multi_teacher_kl"]


def multi_teacher_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    weights: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """The weighted mean of `kl` from several teachers.

    `T^2 sum_k w_k KL(p_k || q)`. Its gradients are those of `kl` from the mixture `sum_k
    w_k p_k`; its value is larger by how far the teachers differ among themselves.

    Args:
      student_logits: `[..., classes]`, floating.
      teacher_logits: `[teachers, ..., classes]`; no gradient passes to them.
      weights: `[teachers]`, or `[teachers, ...]` with weights for each example; equal
        ones that sum to 1 if None. They are taken as they are.
      temperature, axis, where: as for `kl`, in the student's shape.

    Returns:
      The loss of each example, `[...]`, in float32 or wider. It is 0 where every teacher
      equals the student.

    Raises:
      ValueError: shapes that do not fit, or a temperature that is out of range.
      TypeError: logits that are not floating.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student = jnp.zeros((1, 2))
    >>> teachers = jnp.array([[[jnp.log(3.0), 0.0]], [[0.0, 0.0]]])
    >>> jc.distill.multi_teacher_kl(student, teachers).round(4)  # half of what one alone gives
    Array([0.0654], dtype=float32)

    You et al., 2017, Learning from Multiple Teacher Networks, KDD.
    """
    if teacher_logits.shape[1:] != student_logits.shape or not teacher_logits.ndim:
        raise ValueError(
            f"teachers must have logits of the shape [teachers, {student_logits.shape}]; got "
            f"{teacher_logits.shape}"
        )
    one = lambda teacher: kl(
        student_logits, teacher, temperature=temperature, axis=axis, where=where
    )
    losses = jax.vmap(one)(teacher_logits)
    if weights is None:
        return jnp.mean(losses, 0)
    weights = jnp.asarray(weights, losses.dtype)
    if weights.shape not in (losses.shape, losses.shape[:1]):
        raise ValueError(
            f"weights must have the shape {losses.shape[:1]} or {losses.shape}; got {weights.shape}"
        )
    weights = weights.reshape(weights.shape + (1,) * (losses.ndim - weights.ndim))
    return jnp.sum(weights * losses, 0)
