"""Losses on logits: a student learns what a teacher would have answered."""

import math

import jax
import jax.numpy as jnp

from jaxcompress.distill._softened import divergence, excess, log_ratio, log_softmax, paired

__all__ = ["jensen_shannon", "kl", "mse", "reverse_kl", "soft_cross_entropy"]


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
      TypeError: logits that are not floating.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
    >>> jc.distill.kl(student, teacher).round(4)  # log 2 - H(3/4, 1/4)
    Array([0.1308], dtype=float32)

    Hinton, Vinyals and Dean, 2015, Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531.
    """
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    return temperature**2 * divergence(s, t, temperature, counts)


def reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence of the softened teacher from the student.

    `T^2 sum_c q_c (log q_c - log p_c)`, `p` and `q` as in `kl`. It seeks a mode: a student
    too small for all that the teacher says keeps to what the teacher finds likely.

    Args:
      student_logits, teacher_logits, temperature, axis, where: as for `kl`.

    Returns:
      The loss of each example, as `kl`; 0, with gradient 0, where both are equal.

    Raises:
      ValueError, TypeError: as `kl`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[jnp.log(3.0), 0.0]]), jnp.array([[0.0, 0.0]])
    >>> jc.distill.reverse_kl(student, teacher).round(4)
    Array([0.1308], dtype=float32)

    Gu et al., 2024, MiniLLM: Knowledge Distillation of Large Language Models,
    arXiv:2306.08543.
    """
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    return temperature**2 * divergence(t, s, temperature, counts)


def jensen_shannon(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Generalized Jensen-Shannon divergence: both against their mixture.

    `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`, `m = beta p + (1 - beta) q`, `p` and
    `q` as in `kl`. It is bounded. Divided by `beta` it tends to `kl` as `beta` goes to 0,
    and divided by `1 - beta` to `reverse_kl` as `beta` goes to 1.

    Args:
      student_logits, teacher_logits, temperature, axis, where: as for `kl`.
      beta: between 0 and 1, both excluded.

    Returns:
      The loss of each example, as `kl`; 0, with gradient 0, where both are equal.

    Raises:
      ValueError: as `kl`, or a `beta` that is not between 0 and 1.
      TypeError: as `kl`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> apart = jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]])
    >>> jc.distill.jensen_shannon(*apart).round(4)  # log 2, the most there is
    Array([0.6931], dtype=float32)

    Agarwal et al., 2024, On-Policy Distillation of Language Models, arXiv:2306.13649.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, both excluded; got {beta}")
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    q, p = (jnp.exp(log_softmax(x, temperature, counts)) for x in (s, t))
    gap = log_ratio(s, t, temperature, counts)
    m = beta * p + (1 - beta) * q
    from_teacher = _to_mixture(p, m, _log_mixture(beta, gap))
    from_student = _to_mixture(q, m, _log_mixture(1 - beta, -gap))
    return temperature**2 * (beta * from_teacher + (1 - beta) * from_student)


def _to_mixture(p: jax.Array, m: jax.Array, gap: jax.Array) -> jax.Array:
    """`sum p (log p - log m)`, `gap = log m - log p`.

    Both sum to one, so adding m - p to each term adds nothing in all; but then no term is
    negative.
    """
    gap = jnp.where(p > 0, gap, 0.0)
    near = (p > 0) & (jnp.abs(gap) < 1)
    terms = jnp.where(near, p * excess(jnp.where(near, gap, 0.0)), m - p - p * gap)
    return jnp.sum(terms, -1)


def _log_mixture(share: float, gap: jax.Array) -> jax.Array:
    """`log(share + (1 - share) e^gap)`."""
    near = jnp.abs(gap) < 1
    small = jnp.log1p((1 - share) * jnp.expm1(jnp.where(near, gap, 0.0)))
    large = jnp.logaddexp(math.log(share), math.log1p(-share) + jnp.where(near, 0.0, gap))
    return jnp.where(near, small, large)


def soft_cross_entropy(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of the student with the softened teacher.

    `-T^2 sum_c p_c log q_c`, `p` and `q` as in `kl`: its gradients are those of `kl`, and
    its value is larger by `T^2` times the teacher's entropy. With smoothed labels instead
    of a teacher, the baseline, it is `optax.softmax_cross_entropy(logits,
    optax.smooth_labels(one_hot, alpha))`.

    Args:
      student_logits, teacher_logits, temperature, axis, where: as for `kl`.

    Returns:
      The loss of each example, `[...]`, in float32 or wider; the teacher's entropy times
      `T^2`, with gradient 0, where both are equal.

    Raises:
      ValueError, TypeError: as `kl`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[5.0, -1.0]])
    >>> jc.distill.soft_cross_entropy(student, teacher).round(4)  # log 2, whatever it says
    Array([0.6931], dtype=float32)

    Hinton, Vinyals and Dean, 2015, arXiv:1503.02531.
    """
    s, t, temperature, counts = paired(student_logits, teacher_logits, temperature, axis, where)
    p = jnp.exp(log_softmax(t, temperature, counts))
    log_q = log_softmax(s, temperature, counts)
    return -(temperature**2) * jnp.sum(p * jnp.where(p > 0, log_q, 0.0), -1)


def mse(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mean squared difference of the logits.

    `mean_c (s_c - t_c)^2`. A temperature would change nothing: `T^2 (s / T - t / T)^2`
    is the same. For centred logits it is twice the limit of `kl` as `T` grows.

    Args:
      student_logits, teacher_logits, axis: as for `kl`.
      where: bool, broadcastable to the logits: classes that count, in the mean too.

    Returns:
      The loss of each example, `[...]`, in float32 or wider; 0, with gradient 0, where
      both are equal, and where no class counts.

    Raises:
      ValueError, TypeError: as `kl`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.mse(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
    Array([2.], dtype=float32)

    Ba and Caruana, 2014, arXiv:1312.6184; Kim et al., 2021, arXiv:2105.08919.
    """
    s, t, _, counts = paired(student_logits, teacher_logits, axis=axis, where=where)
    gap = jnp.where(counts, s, 0.0) - jnp.where(counts, t, 0.0)
    return jnp.sum(gap**2, -1) / jnp.maximum(jnp.sum(counts, -1), 1)
