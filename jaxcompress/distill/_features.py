"""Losses on features: a student computes on its way what a teacher computes."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["attention_transfer", "fitnet", "nst", "project", "projector", "vid", "vid_projector"]

_HIGHEST = jax.lax.Precision.HIGHEST


def projector(key: jax.Array, size: int, to: int) -> dict[str, jax.Array]:
    """Parameters of a linear map between features of two sizes.

    `kernel ~ N(0, 1 / size)`, `bias = 0`. They are plain leaves: train them next to the
    student's, and throw them away after.

    Args:
      key: a random key.
      size: features that come in, the student's.
      to: features that go out, the teacher's.

    Returns:
      `{"kernel": [size, to], "bias": [to]}`, float32.

    >>> import jax, jaxcompress as jc
    >>> jax.tree.map(jnp.shape, jc.distill.projector(jax.random.key(0), 3, 5))
    {'bias': (5,), 'kernel': (3, 5)}
    """
    return {"kernel": jax.random.normal(key, (size, to)) / size**0.5, "bias": jnp.zeros(to)}


def project(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Applies a `projector` along the last axis: `features @ kernel + bias`.

    Args:
      params: what `projector` returned.
      features: `[..., size]`.

    Returns:
      `[..., to]`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
    >>> jc.distill.project(params, jnp.array([[3.0, 4.0]]))
    Array([[8.]], dtype=float32)
    """
    return features @ params["kernel"] + params["bias"]


def fitnet(
    student: jax.Array,
    teacher: jax.Array,
    projector: dict[str, jax.Array] | None = None,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mean squared difference of features: hints.

    `mean_c (r(s)_c - t_c)^2`, `r` the projector, a linear map along `axis`.

    Args:
      student: `[..., features]`, floating.
      teacher: the same, of another number of features if there is a projector; no
        gradient passes to it.
      projector: what `projector` returned, trained with the student; None compares
        directly.
      axis: of the features.
      where: bool, broadcastable to the teacher's features: those that count.

    Returns:
      The loss at each place, `[...]`, in float32 or wider; 0 where nothing counts.

    Raises:
      ValueError: the shapes differ after the projector.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.fitnet(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
    Array([2.], dtype=float32)

    Romero et al., 2015, FitNets: Hints for Thin Deep Nets, arXiv:1412.6550.
    """
    student, teacher = _wide(student, teacher)
    if projector is not None:
        student = jnp.moveaxis(project(projector, jnp.moveaxis(student, axis, -1)), -1, axis)
    _same(student.shape, teacher.shape)
    counts = jnp.broadcast_to(True if where is None else where, teacher.shape)
    gap = jnp.where(counts, student, 0.0) - jnp.where(counts, teacher, 0.0)
    return jnp.sum(gap**2, axis) / jnp.maximum(jnp.sum(counts, axis), 1)


def attention_transfer(
    student: jax.Array,
    teacher: jax.Array,
    *,
    power: float = 2.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Squared distance of normalised attention maps.

    `sum_i (a_i / |a| - b_i / |b|)^2`, `a_i = sum_c |s_ic|^power` at each position `i`,
    `b` the teacher's. How many channels there are does not matter. (The authors' code
    takes the mean over positions: divide by their number.)

    Args:
      student, teacher: `[batch, positions..., channels]`, floating, of the same positions;
        no gradient passes to the teacher.
      power: of the magnitudes, more than 1.
      axis: of the channels.
      where: bool, broadcastable to `[batch, positions...]`: positions that count.

    Returns:
      The loss of each example, `[batch]`, in float32 or wider; 0, with gradient 0, where
      the maps are equal. A map of zeros stays zeros.

    Raises:
      ValueError: other positions, or a power that is not above 1.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> left, right = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0], [3.0]]])
    >>> jc.distill.attention_transfer(left, right)
    Array([2.], dtype=float32)

    Zagoruyko and Komodakis, 2017, Paying More Attention to Attention, arXiv:1612.03928.
    """
    if not power > 1:
        raise ValueError(f"the power must be above 1; got {power}")
    s, t, counts = _maps(student, teacher, axis, where)
    attention = lambda x: _unit(jnp.where(counts, jnp.sum(jnp.abs(x) ** power, -1), 0.0))
    return jnp.sum((attention(s) - attention(t)) ** 2, -1)


def nst(
    student: jax.Array,
    teacher: jax.Array,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Neuron selectivity transfer: the distributions of the channels' maps are matched.

    The squared maximum mean discrepancy under `k(x, y) = (x^T y)^2`, computed as `|mean_c
    u_c u_c^T - mean_c v_c v_c^T|^2`, with `u_c` the student's map of channel `c` over the
    positions, of length one, `v_c` the teacher's. Memory grows with the square of the
    number of positions.

    Args:
      student, teacher, axis, where: as for `attention_transfer`.

    Returns:
      The loss of each example, `[batch]`, in float32 or wider; 0, with gradient 0, where
      both are equal.

    Raises:
      ValueError: other positions.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> student, teacher = jnp.array([[[2.0], [0.0]]]), jnp.array([[[1.0, 0.0], [0.0, 5.0]]])
    >>> jc.distill.nst(student, teacher)
    Array([0.5], dtype=float32)

    Huang and Wang, 2017, Like What You Like, arXiv:1707.01219.
    """
    s, t, counts = _maps(student, teacher, axis, where)

    def moment(x: jax.Array) -> jax.Array:
        maps = _unit(jnp.where(counts[..., None], x, 0.0), axis=-2)
        outer = jnp.einsum("bpc,bqc->bpq", maps, maps, precision=_HIGHEST)
        return outer / max(x.shape[-1], 1)

    return jnp.sum((moment(s) - moment(t)) ** 2, (-2, -1))


def vid_projector(key: jax.Array, size: int, to: int, variance: float = 5.0) -> dict[str, Any]:
    """Parameters for `vid`: a projector, and a variance for each of the teacher's features.

    `variance = softplus(spread) + 1e-5`.

    Args:
      key, size, to: as for `projector`.
      variance: to start from, more than 1e-5; the authors' 5 if not said.

    Returns:
      `{"mean": projector(key, size, to), "spread": [to]}`.

    Raises:
      ValueError: a variance out of range.

    >>> import jax, jaxcompress as jc
    >>> params = jc.distill.vid_projector(jax.random.key(0), 3, 2)
    >>> (jax.nn.softplus(params["spread"]) + 1e-5).round(4)
    Array([5., 5.], dtype=float32)
    """
    if not variance > _FLOOR:
        raise ValueError(f"the variance must be above {_FLOOR}; got {variance}")
    spread = jnp.log(jnp.expm1(jnp.float32(variance - _FLOOR)))
    return {"mean": projector(key, size, to), "spread": jnp.full(to, spread)}


_FLOOR = 1e-5


def vid(
    student: jax.Array,
    teacher: jax.Array,
    params: dict[str, Any],
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Variational information distillation: how unlikely the teacher's features are.

    `mean_c ((t_c - m_c)^2 / v_c + log v_c) / 2`, where the student predicts the teacher's
    feature `c` with mean `m_c` and a variance `v_c` that is the same for every example: a
    bound on the information that the student has of the teacher.

    Args:
      student: `[..., size]`, floating, features last.
      teacher: `[..., to]`; no gradient passes to it.
      params: what `vid_projector` returned, trained with the student.
      where: bool, broadcastable to the teacher's features: those that count.

    Returns:
      The loss at each place, `[...]`, in float32 or wider, below 0 where the prediction
      is good; 0 where nothing counts.

    Raises:
      ValueError: shapes that do not fit.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.distill.vid_projector(jax.random.key(0), 3, 2, variance=1.0)
    >>> student = jnp.ones((1, 3))
    >>> teacher = jc.distill.project(params["mean"], student) + 2.0
    >>> jc.distill.vid(student, teacher, params).round(3)
    Array([2.], dtype=float32)

    Ahn et al., 2019, Variational Information Distillation, arXiv:1904.05835.
    """
    student, teacher = _wide(student, teacher)
    mean = project(params["mean"], student)
    _same(mean.shape, teacher.shape)
    counts = jnp.broadcast_to(True if where is None else where, teacher.shape)
    variance = jax.nn.softplus(params["spread"]) + _FLOOR
    gap = jnp.where(counts, mean, 0.0) - jnp.where(counts, teacher, 0.0)
    terms = jnp.where(counts, gap**2 / variance + jnp.log(variance), 0.0)
    return jnp.sum(terms, -1) / (2 * jnp.maximum(jnp.sum(counts, -1), 1))


def _wide(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype, float32 or wider, the teacher as a constant."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"the {name}'s features must be floating; got {x.dtype}")
    dtype = jnp.promote_types(jnp.result_type(student, teacher), jnp.float32)
    return student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype)


def _same(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    if student != teacher:
        raise ValueError(
            "student and teacher must have features of one shape, the student's after its "
            f"projector; got {student} and {teacher}"
        )


def _maps(
    student: jax.Array, teacher: jax.Array, axis: int, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both as `[batch, positions, channels]`, and which positions count."""
    student, teacher = (jnp.moveaxis(x, axis, -1) for x in _wide(student, teacher))
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must be [batch, positions..., channels] with the same "
            f"positions; got {student.shape} and {teacher.shape}"
        )
    counts = jnp.broadcast_to(True if where is None else where, student.shape[:-1])
    flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])
    return flat(student), flat(teacher), counts.reshape(counts.shape[0], -1)


def _unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Of length one along `axis`; zeros stay zeros, with gradient 0."""
    # Divided by the largest first: squares of small or large numbers leave float32.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0))
    x = x / jnp.where(top > 0, top, 1.0)
    square = jnp.sum(x**2, axis, keepdims=True)
    return x / jnp.sqrt(jnp.where(top > 0, square, 1.0))
