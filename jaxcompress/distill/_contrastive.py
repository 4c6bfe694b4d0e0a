"""Contrastive distillation: of many examples' features, tell which is the teacher's own."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distill._features import _HIGHEST, _unit, _wide, project, projector

__all__ = ["CRDMemory", "crd", "crd_memory", "crd_projectors"]


class CRDMemory(NamedTuple):
    """The embeddings of every training example, of both sides, as last seen: `[examples, size]`.

    >>> import jax, jaxcompress as jc
    >>> jc.distill.crd_memory(jax.random.key(0), 100, 8).student.shape
    (100, 8)
    """

    student: jax.Array
    teacher: jax.Array


def crd_memory(key: jax.Array, examples: int, size: int = 128) -> CRDMemory:
    """A memory for `crd`, of random directions.

    Args:
      key: a random key.
      examples: in the training set, not in a batch.
      size: of the embeddings.

    Returns:
      A `CRDMemory`: state, to be carried from step to step and saved with the rest.

    >>> import jax, jaxcompress as jc
    >>> memory = jc.distill.crd_memory(jax.random.key(0), 100, 8)
    >>> jnp.linalg.norm(memory.teacher, axis=-1).min().round(4)
    Array(1., dtype=float32)
    """
    draw = lambda key: _unit(jax.random.normal(key, (examples, size)))
    return CRDMemory(*map(draw, jax.random.split(key)))


def crd_projectors(
    key: jax.Array, student: int, teacher: int, size: int = 128
) -> dict[str, dict[str, jax.Array]]:
    """Parameters for `crd`: a projector of each side into the embeddings.

    Args:
      key: a random key.
      student, teacher: the number of features of each.
      size: of the embeddings, that of the memory.

    Returns:
      `{"student": projector, "teacher": projector}`, both trained with the student.

    >>> import jax, jaxcompress as jc
    >>> params = jc.distill.crd_projectors(jax.random.key(0), 4, 16, 8)
    >>> params["teacher"]["kernel"].shape
    (16, 8)
    """
    first, second = jax.random.split(key)
    return {"student": projector(first, student, size), "teacher": projector(second, teacher, size)}


def crd(
    student: jax.Array,
    teacher: jax.Array,
    projectors: dict[str, Any],
    memory: CRDMemory,
    index: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    where: jax.Array | None = None,
) -> tuple[jax.Array, CRDMemory]:
    """Contrastive representation distillation.

    `-log h(u_i, v_i) - sum_n log(1 - h(u_i, v_n))`, `h(u, v) = e^(u v / T) / (e^(u v / T) +
    N / M)`, plus the same with the sides exchanged. `u` and `v` are the embeddings of
    student and teacher, of length one; those of the other side come from the memory; `n`
    runs over `N` negatives of `M` examples.

    Args:
      student: `[batch, features]`, floating.
      teacher: `[batch, features]` of any size; no gradient passes to it, but one does to
        its projector.
      projectors: what `crd_projectors` returned.
      memory: what `crd_memory` returned, or the last call.
      index: integers, `[batch]`: the examples' numbers in the training set.
      negatives: integers, `[batch, N]`: numbers of others to tell them from, drawn anew
        each step, `jax.random.randint(key, (batch, N), 0, examples)`. One that happens to
        be the example itself does not count.
      temperature: `T > 0`.
      momentum: of the memory: the share that stays when an example is seen again.
      where: bool, `[batch]`: examples that count; the memory keeps what it has of others.

    Returns:
      The loss of each example, `[batch]`, in float32 or wider, and the new memory.

    Raises:
      ValueError: shapes that do not fit, or a temperature that is not positive.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> memory = jc.distill.crd_memory(jax.random.key(0), 100, 8)
    >>> projectors = jc.distill.crd_projectors(jax.random.key(1), 4, 16, 8)
    >>> index, others = jnp.array([3, 5]), jax.random.randint(jax.random.key(2), (2, 20), 0, 100)
    >>> loss, memory = jc.distill.crd(
    ...     jnp.ones((2, 4)), jnp.ones((2, 16)), projectors, memory, index, others
    ... )
    >>> loss.shape
    (2,)

    Tian, Krishnan and Isola, 2020, Contrastive Representation Distillation,
    arXiv:1910.10699.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature}")
    batch = student.shape[:1]
    if teacher.shape[:1] != batch or index.shape != batch or negatives.shape[:1] != batch:
        raise ValueError(
            "student, teacher, index and negatives must have the same examples; got the shapes "
            f"{student.shape}, {teacher.shape}, {index.shape} and {negatives.shape}"
        )
    student, teacher = _wide(student, teacher)
    counts = jnp.broadcast_to(True if where is None else where, batch)
    u = _unit(project(projectors["student"], student))
    v = _unit(project(projectors["teacher"], teacher))
    memory = jax.lax.stop_gradient(memory)
    others = negatives != index[:, None]
    # log(h / (1 - h)) is the similarity minus this.
    offset = math.log(negatives.shape[1] / memory.student.shape[0])

    def one_side(x: jax.Array, bank: jax.Array) -> jax.Array:
        similar = lambda rows, at: jnp.einsum(rows, x, bank[at], precision=_HIGHEST) / temperature
        right = jax.nn.softplus(offset - similar("bd,bd->b", index))
        wrong = jax.nn.softplus(similar("bd,bnd->bn", negatives) - offset)
        return right + jnp.sum(wrong, -1, where=others)

    loss = jnp.where(counts, one_side(u, memory.teacher) + one_side(v, memory.student), 0.0)

    def remember(bank: jax.Array, x: jax.Array) -> jax.Array:
        old = bank[index]
        new = _unit(momentum * old + (1 - momentum) * jax.lax.stop_gradient(x))
        return bank.at[index].set(jnp.where(counts[:, None], new, old).astype(bank.dtype))

    return loss, CRDMemory(remember(memory.student, u), remember(memory.teacher, v))
