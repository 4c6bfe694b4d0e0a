"""Transformers, layer by layer: which layer learns from which, and what from it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distill._features import _HIGHEST, _wide
from jaxcompress.distill._softened import divergence

__all__ = ["layerwise", "self_relation", "uniform_layers"]


def uniform_layers(student: int, teacher: int) -> tuple[int, ...]:
    """Which of a teacher's layers each of a student's learns from, evenly up to the last.

    `g(i) = floor((i + 1) teacher / student) - 1`, counted from 0.

    Args:
      student, teacher: how many layers each has.

    Returns:
      A layer of the teacher for each of the student.

    Raises:
      ValueError: the student has none, or more than the teacher.

    >>> import jaxcompress as jc
    >>> jc.distill.uniform_layers(4, 12)
    (2, 5, 8, 11)

    Jiao et al., 2020, TinyBERT, arXiv:1909.10351.
    """
    if not 1 <= student <= teacher:
        raise ValueError(
            f"a student has from one layer up to the teacher's number; got {student} and {teacher}"
        )
    return tuple((i + 1) * teacher // student - 1 for i in range(student))


def layerwise(
    loss: Callable[..., jax.Array],
    student: Any,
    teacher: Any,
    *rest: Any,
    layers: Sequence[int] | None = None,
) -> jax.Array:
    """Sums a loss over the layers of a student and those of a teacher that they learn from.

    `sum_i loss(s_i, t_g(i), r_i, ...)`.

    Args:
      loss: of a layer's features, or of trees of them: `fitnet`, `self_relation`, ...
      student: a sequence of them, or a tree of arrays with a leading axis of layers, as
        `lax.scan` stacks them.
      teacher: the same.
      *rest: what else each of the student's layers has, a projector, in the same form.
      layers: `g`, one of the teacher's for each of the student's; evenly if None.

    Returns:
      What `loss` returns, summed.

    Raises:
      ValueError: another number of `layers` than the student has, or one out of range.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student = jnp.zeros((2, 5, 3))
    >>> teacher = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 5, 3))
    >>> jc.distill.layerwise(jc.distill.fitnet, student, teacher)[0]  # 1^2 + 3^2
    Array(10., dtype=float32)

    Sun et al., 2019, Patient Knowledge Distillation, arXiv:1908.09355; Jiao et al., 2020,
    TinyBERT, arXiv:1909.10351.
    """
    ours, theirs = _layers(student), _layers(teacher)
    others = [_layers(r) for r in rest]
    chosen = uniform_layers(len(ours), len(theirs)) if layers is None else tuple(layers)
    wrong = len(chosen) != len(ours) or any(len(o) != len(ours) for o in others)
    if wrong or not all(0 <= j < len(theirs) for j in chosen):
        raise ValueError(
            f"the student has {len(ours)} layers, the teacher {len(theirs)}; got layers={chosen}"
            + "".join(f" and {len(o)} more of something" for o in others if len(o) != len(ours))
        )
    parts = [loss(s, theirs[j], *more) for s, j, *more in zip(ours, chosen, *others)]
    return sum(parts[1:], parts[0])


def _layers(stacked: Any) -> list[Any]:
    if isinstance(stacked, Sequence):
        return list(stacked)
    count = {x.shape[0] for x in jax.tree.leaves(stacked)}
    if len(count) != 1:
        raise ValueError(f"stacked layers share their leading axis; got the sizes {sorted(count)}")
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count.pop())]


def self_relation(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """Divergence of self-attention relations, of queries, keys or values.

    `mean_{h, i} KL(R^t_hi || R^s_hi)`, `R_h = softmax(A_h A_h^T / sqrt(size))`, with the
    features cut into `heads` parts `A_h` of `size`. Student and teacher may differ in
    their width and in their own number of heads. Queries, keys and values are what
    `intermediates` finds as the outputs of their projections.

    Args:
      student, teacher: `[..., length, features]`, floating; no gradient passes to the
        teacher.
      heads: of the relation, a divisor of both numbers of features.
      where: bool, `[..., length]`: tokens that count, the padding does not.

    Returns:
      The loss of each example, `[...]`, in float32 or wider; 0, with gradient 0, where
      both are equal.

    Raises:
      ValueError: shapes that do not fit, or a number of heads that divides not both.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.zeros((1, 2, 4)), 9 * jnp.eye(2, 4)[None]
    >>> jc.distill.self_relation(student, teacher, heads=1).round(4)  # itself, against either
    Array([0.6931], dtype=float32)

    Wang et al., 2021, MiniLMv2, arXiv:2012.15828.
    """
    student, teacher = _wide(student, teacher)
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must be [..., length, features] of the same tokens; got "
            f"{student.shape} and {teacher.shape}"
        )
    if heads < 1 or student.shape[-1] % heads or teacher.shape[-1] % heads:
        raise ValueError(
            f"heads must divide both {student.shape[-1]} and {teacher.shape[-1]}; got {heads}"
        )
    counts = jnp.broadcast_to(True if where is None else where, student.shape[:-1])

    def relation(x: jax.Array) -> jax.Array:
        x = jnp.where(counts[..., None], x, 0.0).reshape(*x.shape[:-1], heads, -1)
        scores = jnp.einsum("...ihs,...jhs->...hij", x, x, precision=_HIGHEST)
        return scores / math.sqrt(x.shape[-1])

    ours, theirs = relation(student), relation(teacher)
    seen = jnp.broadcast_to(counts[..., None, None, :], ours.shape)
    rows = divergence(ours, theirs, 1.0, seen)
    rows = jnp.where(counts[..., None, :], rows, 0.0)
    return jnp.sum(rows, (-2, -1)) / (heads * jnp.maximum(jnp.sum(counts, -1), 1))
