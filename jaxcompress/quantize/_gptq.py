"""GPTQ: round one input feature after the other, and let the others make up for it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._matrices import Matrices
from jaxcompress._statistics import second_moment
from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._rounding import encode
from jaxcompress.quantize._posttrain import Layer, Progress, layerwise
from jaxcompress.quantize._scales import full_scales, integers_only
from jaxcompress.quantize._specs import Spec

__all__ = ["Rounding", "checked", "gptq", "inverse_factor", "round_layer"]

_OUTPUTS = 1024  # solved at once
_TRIES = 5  # dampings, each ten times the one before
_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the full scales, that are tried


class Rounding(NamedTuple):
    """The options of `gptq` that decide the codes of one layer."""

    damping: float = 0.01
    activation_order: bool = True
    search: bool = True
    block_size: int = 128


def gptq(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    stats: Any = None,
    damping: float = 0.01,
    activation_order: bool = True,
    search: bool = True,
    block_size: int = 128,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Rounds weights so that the outputs of their layers change least.

    With `H = X^T X + damping mean(diag H) I` and `H^-1 = U^T U`, for each input feature
    `j` in turn `w_hat_j = round(w_j)` and `w_i -= U_ji (w_j - w_hat_j) / U_jj` for the
    features `i` still to come.

    The layers go in the order of `fn`, and the activations of each come through the
    layers quantized before it. Stacked layers (`lax.scan`) are quantized one by one,
    experts all at once. Between two layers the activations of all batches are kept, and
    the statistics of one group of layers.

    Args:
      fn: called as `fn(params, batch)`.
      params: any pytree; see `quantize`.
      batches: inputs of one shape, at least as many rows as the widest layer has input
        features if they are to tell it all; 128 sequences are usual.
      rules: patterns to specs, as for `quantize`. Every leaf that they name must be
        multiplied with something; axes that a spec leaves open are the contracted ones.
      stats: `absmax` statistics, for specs with static activations.
      damping: added to the diagonal of the second moments, relative to its mean. Ten,
        a hundred, ... times as much is tried where a factorization fails.
      activation_order: start with the features of the largest activations.
      search: try 1, 0.9, ... 0.4 times the scales of the largest weights, and keep for
        each output those that leave it the least error. It takes seven times as long.
      block_size: features whose corrections are applied to the rest at once. It changes
        the time and the last bits only.
      resume: a folder where finished layers are kept. Started again with the same
        arguments, a run goes on from there and ends with the same bits.
      progress: called with a `Finished` after each group of layers.

    Returns:
      A tree like `params` with `QuantizedArray` leaves.

    Raises:
      ValueError: as for `quantize`; a leaf that meets no product, or activations that
        never were; a second moment that is not finite or has no Cholesky factor, with
        the layer and the dampings tried; a `resume` folder of another run.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> params, fn, rules = {"w": w}, lambda p, x: x @ p["w"], {"w": jc.quantize.int3()}
    >>> error = lambda p: jnp.linalg.norm(x @ p["w"].materialise() - x @ w)
    >>> new = jc.quantize.gptq(fn, params, [x], rules)
    >>> bool(error(new) < 0.7 * error(jc.quantize.quantize(params, rules)))
    True

    Frantar, Ashkboos, Hoefler and Alistarh, 2023, GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers, arXiv:2210.17323.
    """
    rounding = checked(Rounding(damping, activation_order, search, block_size))
    return layerwise(
        fn,
        params,
        batches,
        rules,
        second_moment(),
        lambda layer: round_layer(layer, rounding),
        identity=["gptq", *rounding],
        stats=stats,
        resume=resume,
        progress=progress,
    )


def checked(rounding: Rounding) -> Rounding:
    """The options, if they make sense."""
    if not rounding.damping > 0:
        raise ValueError(f"damping is positive; got {rounding.damping}")
    if rounding.block_size < 1:
        raise ValueError(f"block_size is 1 or more; got {rounding.block_size}")
    return rounding


def round_layer(layer: Layer, rounding: Rounding) -> QuantizedArray:
    """The codes and the scales of one layer, from the second moments that it has seen."""
    damping, activation_order, search, block_size = rounding
    w, static, matrices = layer.weight, layer.static, layer.matrices
    integers_only("gptq", layer.name, static["qtype"])
    hessian = layer.statistic(2)
    if not bool(jnp.isfinite(hessian).all()):
        raise ValueError(
            f"the second moments of the activations of {layer.name!r} are not finite; the "
            "batches, or the function, hold NaN, infinity or numbers near 1e19"
        )
    dampings = tuple(damping * 10**i for i in range(_TRIES))
    order, u, factored = _factored(hessian, dampings=dampings, activation_order=activation_order)
    if not bool(factored.all()):
        tried = ", ".join(f"{d:g}" for d in dampings)
        raise ValueError(
            f"the second moments of the activations of {layer.name!r} have no Cholesky factor, "
            f"with {tried} times the mean of their diagonal added to it; give more batches, "
            f"or a damping above {dampings[-1]:g}"
        )
    axis, group_size, qtype = (static[name] for name in ("axis", "group_size", "qtype"))
    full, zero = full_scales(w, axis, group_size, qtype)
    spread = lambda part: matrices.split(expand(part, w.shape, axis, group_size))
    dense = matrices.split(w.astype(jnp.float32))
    best: tuple[jax.Array, jax.Array, jax.Array] | None = None
    for part in _PARTS if search else (1.0,):
        scale = full * part
        codes, errors = _columns(
            dense,
            scale,
            zero,
            hessian,
            order,
            u,
            matrices=matrices,
            axis=axis,
            group_size=group_size,
            qtype=qtype,
            block_size=min(block_size, matrices.k),
        )
        # The outputs that share a scale choose together.
        errors = reduce_groups(matrices.outputs(errors), axis, group_size, jnp.sum, 0.0)
        if best is None:
            best = codes, scale, errors
        else:
            better = errors < best[2]
            best = (
                jnp.where(spread(jnp.broadcast_to(better, scale.shape)), codes, best[0]),
                jnp.where(better, scale, best[1]),
                jnp.where(better, errors, best[2]),
            )
    assert best is not None
    return layer.stored(matrices.join(best[0]), best[1], zero)


@functools.partial(jax.jit, static_argnames=("dampings", "activation_order"))
def _factored(
    hessian: jax.Array, *, dampings: tuple[float, ...], activation_order: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each `hessian[batch, k, k]` the order of the features, and `inverse_factor` in it."""

    def one(hessian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        order = jnp.arange(len(hessian))
        if activation_order:
            order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
        return (order, *inverse_factor(hessian[order][:, order], dampings))

    return jax.vmap(one)(hessian)


@functools.partial(
    jax.jit, static_argnames=("matrices", "axis", "group_size", "qtype", "block_size")
)
def _columns(
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    hessian: jax.Array,
    order: jax.Array,
    u: jax.Array,
    *,
    matrices: Matrices,
    axis: Axes,
    group_size: Axes | None,
    qtype: IntType,
    block_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The codes of `w[batch, k, n]`, given its scales, and what each output loses.

    Outputs have nothing to do with each other: some after the others take less memory.
    """
    # Spread in here: a scale for each weight of a large layer is as much again as the layer.
    spread = lambda part: matrices.split(expand(part, matrices.shape, axis, group_size))
    scale, zero = spread(scale), None if zero is None else spread(zero)

    def one(
        w: jax.Array,
        scale: jax.Array,
        zero: jax.Array | None,
        hessian: jax.Array,
        order: jax.Array,
        u: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        n = w.shape[1]
        width = min(n, _OUTPUTS)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(len(w)))

        def outputs(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
            start = jnp.minimum(i * width, n - width)  # the last ones may be solved twice
            cut = lambda part: lax.dynamic_slice_in_dim(part, start, width, 1)
            part, scales = cut(w), cut(scale)
            zeros = None if zero is None else cut(zero).astype(jnp.float32)
            pick = None if zeros is None else zeros[order]
            codes = _rounded(part[order], scales[order], pick, u, qtype, block_size)[back]
            error = (codes if zeros is None else codes - zeros) * scales - part
            lost = jnp.sum(error * lax.dot(hessian, error), 0)
            put = lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, start, -1)
            return put(state[0], codes), put(state[1], lost)

        empty = jnp.zeros(w.shape, jnp.int8), jnp.zeros(n)
        return lax.fori_loop(0, -(-n // width), outputs, empty)

    return jax.vmap(one)(w, scale, zero, hessian, order, u)


def inverse_factor(hessian: jax.Array, dampings: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """The upper `U` of `(H + d mean(diag H) I)^-1 = U^T U`, and whether there is one.

    `d` is the first of `dampings` with which the Cholesky factorization succeeds. A
    feature that is always zero gets the mean on its diagonal.
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


def _rounded(
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    u: jax.Array,
    qtype: IntType,
    block_size: int,
) -> jax.Array:
    """The codes of `w[k, n]`, feature by feature; corrections to later blocks wait."""
    k, n = w.shape
    extra = -k % block_size
    if extra:
        rows = lambda part, fill: jnp.pad(part, ((0, extra), (0, 0)), constant_values=fill)
        w, scale = rows(w, 0.0), rows(scale, 1.0)
        zero = None if zero is None else rows(zero, 0.0)
        u = jnp.pad(u, ((0, extra), (0, extra))) + jnp.diag(jnp.arange(k + extra) >= k)
    cut = lambda part, start: lax.dynamic_slice_in_dim(part, start, block_size, 0)

    def block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, codes = state
        start = b * block_size
        factor = cut(u, start)
        inner = lax.dynamic_slice_in_dim(factor, start, block_size, 1)
        scales, zeros = cut(scale, start), None if zero is None else cut(zero, start)

        def feature(j: jax.Array, state: Any) -> Any:
            part, codes, errors = state
            at = lambda array: lax.dynamic_index_in_dim(array, j, 0, keepdims=False)
            offset = None if zeros is None else at(zeros)
            code = encode(at(part), at(scales), offset, qtype, (), None)
            back = (code if offset is None else code - offset) * at(scales)
            row = at(inner)
            error = (at(part) - back) / row[j]
            part = part - row[:, None] * error
            return part, codes.at[j].set(code.astype(jnp.int8)), errors.at[j].set(error)

        empty = jnp.zeros((block_size, n), jnp.int8), jnp.zeros((block_size, n))
        _, block_codes, errors = lax.fori_loop(0, block_size, feature, (cut(w, start), *empty))
        # Features before the end of the block are finished; what becomes of them is not read.
        w = w - lax.dot(factor.T, errors, precision=lax.Precision.HIGHEST)
        return w, lax.dynamic_update_slice_in_dim(codes, block_codes, start, 0)

    blocks = (k + extra) // block_size
    start = w, jnp.zeros(w.shape, jnp.int8)
    return lax.fori_loop(0, blocks, block, start)[1][:k]
