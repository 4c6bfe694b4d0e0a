"""A teacher's answer kept as its largest classes: what fits on a disk for a vocabulary."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcompress.distill._softened import divergence, log_softmax, log_sum_exp

__all__ = ["TopK", "top_k", "top_k_kl"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_probs", "indices", "rest"),
    meta_fields=("temperature", "classes"),
)
@dataclasses.dataclass(frozen=True)
class TopK:
    """A teacher's `k` most likely classes, and the probability of all others together.

    Attributes:
      log_probs: `[..., k]`, softened at `temperature`.
      indices: `[..., k]`, unsigned integers.
      rest: `[...]`, the logarithm of what is left; `-inf` if nothing is.
      temperature: that they were softened at; the tail cannot be softened again.
      classes: how many there were.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> kept = jc.distill.top_k(jnp.zeros((2, 50_000)), 8)
    >>> kept.log_probs.dtype, kept.indices.dtype, sum(a.nbytes for a in jax.tree.leaves(kept))
    (dtype('float16'), dtype('uint16'), 72)
    """

    log_probs: jax.Array
    indices: jax.Array
    rest: jax.Array
    temperature: float
    classes: int


def top_k(
    teacher_logits: jax.Array,
    k: int,
    *,
    temperature: float = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
    dtype: DTypeLike = jnp.float16,
) -> TopK:
    """The `k` most likely classes of a teacher, compactly, for `top_k_kl`.

    `log p_c` for the `k` largest, `p = softmax(teacher / T)`, and `log(1 - sum p_c)`.

    Args:
      teacher_logits: `[..., classes]`, floating.
      k: from 1 to the number of classes.
      temperature, axis, where: as for `kl`; the same `where` has to go to `top_k_kl`.
      dtype: of the stored logarithms. In float16 with indices below 65,536, an example
        takes `4 k + 4` bytes.

    Returns:
      A `TopK`, a pytree of arrays.

    Raises:
      ValueError: `k` or the temperature is out of range.
      TypeError: logits that are not floating.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.top_k(jnp.array([0.0, 3.0, 1.0]), 2).indices
    Array([1, 2], dtype=uint16)
    """
    classes = teacher_logits.shape[axis]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be between 1 and the {classes} classes; got {k}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature}")
    if not jnp.issubdtype(teacher_logits.dtype, jnp.floating):
        raise TypeError(f"the teacher's logits must be floating; got {teacher_logits.dtype}")
    wide = jnp.promote_types(teacher_logits.dtype, jnp.float32)
    logits = jax.lax.stop_gradient(jnp.moveaxis(teacher_logits, axis, -1)).astype(wide)
    log_p = log_softmax(logits, temperature, _last(where, teacher_logits, axis))
    largest, indices = jax.lax.top_k(log_p, k)
    others = jnp.put_along_axis(log_p, indices, -jnp.inf, -1, inplace=False)
    rest = log_sum_exp(others, others > -jnp.inf)
    # What is least likely of the finite must not become infinite, which means ruled out.
    finite = jnp.isfinite(largest)
    low = jnp.maximum(largest, float(jnp.finfo(dtype).min))
    unsigned = jnp.uint16 if classes <= 2**16 else jnp.uint32
    return TopK(
        jnp.where(finite, low, -jnp.inf).astype(dtype),
        indices.astype(unsigned),
        rest.astype(jnp.float32),
        float(temperature),
        classes,
    )


def top_k_kl(
    student_logits: jax.Array,
    teacher: TopK,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`kl` from a teacher of which only the largest classes were kept.

    `T^2 sum_b P_b (log P_b - log Q_b)` over the `k` kept classes and one bucket of all
    the others, `Q` summed in the same way from `softmax(student / T)`. It is never above
    `kl`, and equal to it with every class kept.

    Args:
      student_logits: `[..., classes]`, floating.
      teacher: what `top_k` made; its temperature is that of the loss.
      axis, where: as for `kl`; `where` as it was for `top_k`.

    Returns:
      The loss of each example, `[...]`, in float32 or wider.

    Raises:
      ValueError: another number of classes or other examples than the teacher's.
      TypeError: logits that are not floating.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> teacher, student = jnp.array([[4.0, 2.0, 0.0, 0.0]]), jnp.zeros((1, 4))
    >>> jc.distill.top_k_kl(student, jc.distill.top_k(teacher, 2)).round(2)
    Array([0.87], dtype=float32)
    >>> jc.distill.kl(student, teacher).round(2)
    Array([0.87], dtype=float32)

    Team Gemma, 2024, arXiv:2408.00118, samples instead; the bucket keeps the loss proper.
    """
    logits = jnp.moveaxis(student_logits, axis, -1)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"the student's logits must be floating; got {logits.dtype}")
    if logits.shape != (*teacher.rest.shape, teacher.classes):
        raise ValueError(
            f"the teacher has examples {teacher.rest.shape} of {teacher.classes} classes; the "
            f"student's logits have the shape {student_logits.shape}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / teacher.temperature
    counts = _last(where, student_logits, axis)
    indices = teacher.indices.astype(jnp.int32)
    kept = jnp.take_along_axis(logits, indices, -1)
    outside = counts & jnp.put_along_axis(counts, indices, False, -1, inplace=False)
    others = log_sum_exp(logits, outside)
    student = jnp.concatenate([kept, others[..., None]], -1)
    log_p = jnp.concatenate([teacher.log_probs.astype(student.dtype), teacher.rest[..., None]], -1)
    there = jnp.concatenate(
        [jnp.take_along_axis(counts, indices, -1), jnp.any(outside, -1, keepdims=True)], -1
    )
    student, log_p = (jnp.where(there, x, 0.0) for x in (student, jax.lax.stop_gradient(log_p)))
    return teacher.temperature**2 * divergence(student, log_p, 1.0, there)


def _last(where: jax.Array | None, logits: jax.Array, axis: int) -> jax.Array:
    """Which classes count, in the shape of the logits with the classes last."""
    return jnp.moveaxis(jnp.broadcast_to(True if where is None else where, logits.shape), axis, -1)
