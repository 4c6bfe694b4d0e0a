"""GPTQ: round one input feature after the other, and let the others make up for it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress._compensate import compensate, factors, in_steps, padded
from jaxcompress._matrices import Matrices
from jaxcompress._statistics import second_moment
from jaxcompress.arrays import QuantizedArray
from jaxcompress.arrays._granularity import Axes, expand, reduce_groups
from jaxcompress.arrays._qtype import IntType
from jaxcompress.arrays._rounding import encode
from jaxcompress.quantize._posttrain import Layer, Progress, layerwise
from jaxcompress.quantize._refit import refitted
from jaxcompress.quantize._scales import full_scales, integers_only
from jaxcompress.quantize._specs import Spec

__all__ = ["Rounding", "checked", "gptq", "round_layer"]

_OUTPUTS = 1024  # solved at once
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
        each output those that leave it the least error; then fit the scales to the codes by
        least squares. It takes seven times as long.
      block_size: features whose corrections are applied to the rest at once. It changes
        the time and the last bits only.
      resume: a folder where finished layers are kept. Started again with the same
        arguments, a run goes on from there and ends with the same bits.
      progress: called with a `Finished` after each group of layers, and within one that
        takes long with a `Working`.

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
    order, u = factors(layer.name, hessian, damping, activation_order=activation_order)
    axis, group_size, qtype = (static[name] for name in ("axis", "group_size", "qtype"))
    full, zero = full_scales(w, axis, group_size, qtype)
    spread = lambda part: matrices.split(expand(part, w.shape, axis, group_size))
    dense = matrices.split(w.astype(jnp.float32))
    best: tuple[jax.Array, jax.Array, jax.Array] | None = None
    parts = _PARTS if search else (1.0,)
    turns = -(-dense.shape[2] // _OUTPUTS)
    cost = dense.size * matrices.k // max(1, turns)
    for i, part in enumerate(parts):
        scale = full * part
        tell = lambda done, i=i: layer.tell((i + done) / len(parts))
        codes, errors = jnp.zeros(dense.shape, jnp.int8), jnp.zeros((len(dense), dense.shape[2]))
        for first, count in in_steps(turns, cost, tell):
            codes, errors = _columns(
                (codes, errors),
                first,
                count,
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
            jax.block_until_ready(errors)
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
    codes, scale, _ = best
    del u, best, errors  # the factor is as large as the layer
    if search:
        offset = 0.0 if zero is None else spread(zero).astype(jnp.float32)
        numbers = codes.astype(jnp.float32) - offset  # eight bits do not hold the difference
        scale = refitted(
            dense,
            numbers,
            scale,
            hessian,
            matrices=matrices,
            axis=axis,
            group_size=group_size,
        )
    return layer.stored(matrices.join(codes), scale, zero)


@functools.partial(
    jax.jit,
    static_argnames=("matrices", "axis", "group_size", "qtype", "block_size"),
    donate_argnums=0,
)
def _columns(
    done: tuple[jax.Array, jax.Array],
    first: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
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

    Outputs have nothing to do with each other: some after the others take less memory, and
    this does `count` times `_OUTPUTS` of them; the others are as they were in `done`.
    """
    # Spread in here: a scale for each weight of a large layer is as much again as the layer.
    spread = lambda part: matrices.split(expand(part, matrices.shape, axis, group_size))
    scale, zero = spread(scale), None if zero is None else spread(zero)

    def one(
        done: tuple[jax.Array, jax.Array],
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

        return lax.fori_loop(first, first + count, outputs, done)

    return jax.vmap(one)(done, w, scale, zero, hessian, order, u)


def _rounded(
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    u: jax.Array,
    qtype: IntType,
    block_size: int,
) -> jax.Array:
    """The codes of `w[k, n]`, feature by feature; corrections to later blocks wait."""
    k = len(w)
    blocks = -(-k // block_size)
    scale = padded(scale, block_size, 1.0)
    zero = None if zero is None else padded(zero, block_size)

    def fix(
        start: jax.Array, j: jax.Array, part: jax.Array, _: jax.Array, codes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        at = lambda array, i: lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
        step, offset = at(scale, start + j), None if zero is None else at(zero, start + j)
        code = encode(at(part, j), step, offset, qtype, (), None)
        back = (code if offset is None else code - offset) * step
        return back, codes.at[start + j].set(code.astype(jnp.int8))

    codes = jnp.zeros(scale.shape, jnp.int8)
    return compensate(w, u, fix, codes, size=block_size, first=0, count=blocks)[1][:k]
