"""Losses on relations: which examples a teacher finds alike, and how they lie together.

What is compared is of the size of the batch, so the features of student and teacher may
have any sizes. Every loss takes features `[batch, ...]` and returns one value an example,
whose mean is the loss of the paper.
"""

import jax
import jax.numpy as jnp

from jaxcompress.distill._features import _HIGHEST, _unit, _wide
from jaxcompress.distill._softened import excess

__all__ = ["pkt", "rkd_angle", "rkd_distance", "similarity_preserving"]


def similarity_preserving(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Squared difference of the similarities of each example to all the others.

    `mean_j (G_ij / |G_i| - H_ij / |H_i|)^2`, `G = S S^T` of the student's features, one
    row an example, `H` the teacher's.

    Args:
      student, teacher: `[batch, ...]`, floating; no gradient passes to the teacher.
      where: bool, `[batch]`: examples that count, as one of a pair too.

    Returns:
      The loss of each example `i`, `[batch]`, in float32 or wider; 0 where it does not
      count, and, with gradient 0, where both are equal.

    Raises:
      ValueError: batches of different sizes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> apart, alike = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.ones((2, 5))
    >>> jc.distill.similarity_preserving(apart, alike).round(4)
    Array([0.2929, 0.2929], dtype=float32)

    Tung and Mori, 2019, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682.
    """
    s, t, counts = _rows(student, teacher, where)
    rows = lambda x: _unit(jnp.matmul(x, x.T, precision=_HIGHEST))
    return jnp.sum((rows(s) - rows(t)) ** 2, -1) / jnp.maximum(jnp.sum(counts), 1)


def rkd_distance(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Relational distillation of distances.

    `mean_{j != i} huber(d_ij / mean d - e_ij / mean e)`, `d_ij = |s_i - s_j|`, `e` the
    teacher's, means over all pairs, `huber(x) = x^2 / 2` up to 1 and `|x| - 1/2` beyond.
    Memory grows with the square of the batch times the features.

    Args:
      student, teacher, where: as for `similarity_preserving`.

    Returns:
      The loss of each example, as `similarity_preserving`. Distances that are all 0 stay 0.

    Raises:
      ValueError: batches of different sizes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
    >>> jc.distill.rkd_distance(student, teacher).round(4)
    Array([0.1406, 0.2812, 0.1406], dtype=float32)

    Park et al., 2019, Relational Knowledge Distillation, arXiv:1904.05068.
    """
    s, t, counts = _rows(student, teacher, where)
    pairs = counts[:, None] & counts & ~jnp.eye(len(s), dtype=bool)

    def relative(x: jax.Array) -> jax.Array:
        d = jnp.where(pairs, _length(x[:, None] - x), 0.0)
        mean = jnp.sum(d) / jnp.maximum(jnp.sum(pairs), 1)
        return d / jnp.where(mean > 0, mean, 1.0)

    return jnp.sum(_huber(relative(s) - relative(t)), -1) / jnp.maximum(jnp.sum(pairs, -1), 1)


def rkd_angle(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Relational distillation of angles.

    `mean_{i, k} huber(cos(s_i, s_j, s_k) - cos(t_i, t_j, t_k))` over pairs of other
    examples, the angle being that at `j`, the example that the loss is of. (The paper
    adds it to `rkd_distance` with twice its weight.) Memory grows with the cube of the
    batch, and with its square times the features.

    Args:
      student, teacher, where: as for `similarity_preserving`.

    Returns:
      The loss of each example `j`, as `similarity_preserving`. Beside an example of the
      same features the cosine is 0.

    Raises:
      ValueError: batches of different sizes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> right = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> flat = jnp.array([[0.0], [1.0], [-1.0]])
    >>> jc.distill.rkd_angle(right, flat)[0]  # 90 degrees against 180
    Array(0.5, dtype=float32)

    Park et al., 2019, Relational Knowledge Distillation, arXiv:1904.05068.
    """
    s, t, counts = _rows(student, teacher, where)
    other = ~jnp.eye(len(s), dtype=bool)
    triples = (counts[:, None, None] & counts[:, None] & counts) & (
        other[:, :, None] & other[:, None, :] & other
    )

    def cosines(x: jax.Array) -> jax.Array:
        e = _unit(x[None] - x[:, None])  # from j to i
        return jnp.einsum("jid,jkd->jik", e, e, precision=_HIGHEST)

    gap = jnp.where(triples, cosines(s) - cosines(t), 0.0)
    return jnp.sum(_huber(gap), (-2, -1)) / jnp.maximum(jnp.sum(triples, (-2, -1)), 1)


def pkt(
    student: jax.Array,
    teacher: jax.Array,
    *,
    epsilon: float = 1e-7,
    where: jax.Array | None = None,
) -> jax.Array:
    """Probabilistic knowledge transfer: which example would each choose as its neighbour?

    `sum_{j != i} p_ij log((p_ij + epsilon) / (q_ij + epsilon))`, `p_ij = K_ij / sum_k
    K_ik` over `k != i`, with `K = (1 + cos(t_i, t_j)) / 2` of the teacher, `q` the
    student's. Being a cosine it has no width to be tuned.

    Args:
      student, teacher, where: as for `similarity_preserving`.
      epsilon: more than 0; keeps the loss finite where the student sees opposites.

    Returns:
      The loss of each example, as `similarity_preserving`.

    Raises:
      ValueError: batches of different sizes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> jc.distill.pkt(jnp.ones((3, 4)), teacher)[:2].round(4)  # surely the twin, against either
    Array([0.6931, 0.6931], dtype=float32)

    Passalis and Tefas, 2018, Learning Deep Representations with Probabilistic Knowledge
    Transfer, arXiv:1803.10837.
    """
    s, t, counts = _rows(student, teacher, where)
    pairs = counts[:, None] & counts & ~jnp.eye(len(s), dtype=bool)

    def chosen(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        unit = _unit(x)
        kernel = (1 + jnp.matmul(unit, unit.T, precision=_HIGHEST)) / 2
        kernel = jnp.where(pairs, jnp.maximum(kernel, 0.0), 0.0)
        total = jnp.sum(kernel, -1, keepdims=True)
        return kernel / jnp.where(total > 0, total, 1.0), (total[..., 0] > 0).astype(x.dtype)

    (q, q_sum), (p, p_sum) = chosen(s), chosen(t)
    # With the logarithm l of the ratio 1 + r, -p l = p (r - l) - p r, and what p r adds up to
    # is known but for epsilon: nothing large is left to cancel where the two agree.
    r = (q - p) / (p + epsilon)
    near = jnp.abs(r) < 0.5
    ratio = jnp.where(near, 1.0, (q + epsilon) / (p + epsilon))  # near -1 r has lost it
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, r, 0.0)), jnp.log(ratio))
    terms = p * excess(log_ratio) + (q - p) * epsilon / (p + epsilon)
    return jnp.sum(terms, -1) - (q_sum - p_sum)


def _rows(
    student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both as `[batch, features]`, zeros where an example does not count."""
    student, teacher = _wide(student, teacher)
    if not student.ndim or student.shape[:1] != teacher.shape[:1]:
        raise ValueError(
            "student and teacher must have features [batch, ...] of the same examples; got "
            f"{student.shape} and {teacher.shape}"
        )
    counts = jnp.broadcast_to(True if where is None else where, student.shape[:1])
    flat = lambda x: jnp.where(counts[:, None], x.reshape(x.shape[0], -1), 0.0)
    return flat(student), flat(teacher), counts


def _length(x: jax.Array) -> jax.Array:
    """Along the last axis, with gradient 0 where it is 0."""
    square = jnp.sum(x**2, -1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1, x**2 / 2, size - 0.5)
