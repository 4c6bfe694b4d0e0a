"""The blocked loop of GPTQ and SparseGPT: fix an input feature, and let the others make up."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["compensate", "factors", "in_steps", "inverse_factor", "padded"]

_TRIES = 5  # dampings, each ten times the one before
_STEP = 2**33  # multiply-adds after which the host hears of a loop: seconds on two cores


def factors(
    name: str, hessian: jax.Array, damping: float, *, activation_order: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of each `hessian[batch, k, k]` the order of the features, and `inverse_factor` in it.

    Raises `ValueError` with the layer, and the dampings tried, if there is none.
    """
    if not bool(jnp.isfinite(hessian).all()):
        raise ValueError(
            f"the second moments of the activations of {name!r} are not finite; the "
            "batches, or the function, hold NaN, infinity or numbers near 1e19"
        )
    dampings = tuple(damping * 10**i for i in range(_TRIES))
    order, u, factored = _factored(hessian, dampings=dampings, activation_order=activation_order)
    if not bool(factored.all()):
        tried = ", ".join(f"{d:g}" for d in dampings)
        raise ValueError(
            f"the second moments of the activations of {name!r} have no Cholesky factor, "
            f"with {tried} times the mean of their diagonal added to it; give more batches, "
            f"or a damping above {dampings[-1]:g}"
        )
    return order, u


@functools.partial(jax.jit, static_argnames=("dampings", "activation_order"))
def _factored(
    hessian: jax.Array, *, dampings: tuple[float, ...], activation_order: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(hessian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        order = jnp.arange(len(hessian))
        if activation_order:
            order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
        return (order, *inverse_factor(hessian[order][:, order], dampings))

    return jax.vmap(one)(hessian)


def inverse_factor(hessian: jax.Array, dampings: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """The upper `U` of `(H + d mean(diag H) I)^-1 = U^T U`, and whether there is one.

    `d` is the first of `dampings` with which the Cholesky factorization succeeds. A
    feature that is always zero gets the mean on its diagonal. Of the features `F = j, j + 1,
    ...` still to come, `U_jj^2 = [H_F^-1]_jj` and `U_jj U_ji = [H_F^-1]_ji`.
    """
    diagonal = jnp.diagonal(hessian)
    live = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    scaled = hessian / mean + jnp.diag(jnp.where(live, 0.0, 1.0))
    tries = jnp.asarray(dampings, jnp.float32)

    def factor(i: jax.Array) -> jax.Array:
        damped = scaled + tries[i] * jnp.eye(len(hessian), dtype=scaled.dtype)
        # Of the matrix turned about: M = L L^T becomes R R^T with an upper R, whose inverse
        # is the U looked for. One factorization and one triangular inverse.
        lower = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        return lower[::-1, ::-1]

    fails = lambda r: ~jnp.isfinite(r).all()
    _, r = lax.while_loop(
        lambda state: fails(state[1]) & (state[0] < len(dampings) - 1),
        lambda state: (state[0] + 1, factor(state[0] + 1)),
        (jnp.int32(0), factor(jnp.int32(0))),
    )
    eye = jnp.eye(len(hessian), dtype=scaled.dtype)
    u = lax.linalg.triangular_solve(r, eye, left_side=True, lower=False)
    return u / jnp.sqrt(mean), ~fails(r)


def padded(part: jax.Array, size: int, fill: float = 0.0) -> jax.Array:
    """`part[k, ...]` with rows of `fill` up to a multiple of `size`."""
    more = [(0, -len(part) % size)] + [(0, 0)] * (part.ndim - 1)
    return jnp.pad(part, more, constant_values=fill)


def compensate(
    w: jax.Array,
    u: jax.Array,
    fix: Callable[[Any, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    made: Any,
    *,
    size: int,
    first: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
) -> tuple[jax.Array, Any]:
    """Fixes the features of `count` blocks of `w[k, n]` from block `first` on.

    Of each feature `j`, `fix(start, j, part, factor, made)` says what it becomes, `[n]`, and
    carries what it makes along; `part[size, n]` is the block that begins at `start`, and `j`
    counts from there, `factor` is the block of `u[k, k]`. What the change costs the outputs
    is made up for by the features behind: at once in the block, afterwards in later ones.

    Returns:
      `w`, of which only the features behind those blocks mean something, and `made`.
    """
    k, n = w.shape
    extra = -k % size
    u = jnp.pad(u, ((0, extra), (0, extra))) + jnp.diag(jnp.arange(k + extra) >= k) if extra else u
    w = padded(w, size)
    cut = lambda part, start: lax.dynamic_slice_in_dim(part, start, size, 0)

    def block(b: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        w, made = state
        start = b * size
        rows = cut(u, start)
        factor = lax.dynamic_slice_in_dim(rows, start, size, 1)

        def feature(j: jax.Array, state: Any) -> Any:
            part, errors, made = state
            new, made = fix(start, j, part, factor, made)
            at = lambda array: lax.dynamic_index_in_dim(array, j, 0, keepdims=False)
            row = at(factor)
            error = (at(part) - new) / row[j]
            part = part - row[:, None] * error
            return part, errors.at[j].set(error), made

        begin = cut(w, start), jnp.zeros((size, n)), made
        _, errors, made = lax.fori_loop(0, size, feature, begin)
        # Features before the end of the block are finished; what becomes of them is not read.
        w = w - lax.dot(rows.T, errors, precision=lax.Precision.HIGHEST)
        return w, made

    w, made = lax.fori_loop(first, first + count, block, (w, made))
    return w[:k], made


def in_steps(turns: int, cost: int, tell: Callable[[float], Any]) -> Iterator[tuple[int, int]]:
    """`(first, count)` of pieces of a loop of `turns`, each of `cost` multiply-adds.

    After a piece that took its time, `tell` is told which part of the turns is done.
    """
    each = -(-_STEP // max(1, cost))
    for first in range(0, turns, each):
        count = min(each, turns - first)
        yield first, count
        if count == each:
            tell((first + count) / turns)
