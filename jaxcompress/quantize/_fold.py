"""Batch-norm folding: what is a constant scale and shift at inference goes into the kernel."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var

from jaxcompress._layout import is_weight
from jaxcompress._neighbours import (
    VIEWS,
    Neighbours,
    Product,
    constants,
    neighbours_of,
    product_of,
)
from jaxcompress._paths import leaves_with_paths
from jaxcompress._program import Program, Unit, name_of
from jaxcompress._rules import Patterns, matched
from jaxcompress._sequential import restacked, traced, unstacked
from jaxcompress.arrays import is_compressed

__all__ = ["fold_batch_norm"]


class _Norm(NamedTuple):
    """The steps after a product, and which parameters play which part in them."""

    product: Product
    steps: tuple[tuple[JaxprEqn, Var], ...]  # with the value that each is applied to
    mean: Unit
    variance: Unit
    epsilon: float
    scale: Unit | None
    bias: Unit | None
    own_bias: Unit | None


def fold_batch_norm(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Patterns | None = None,
) -> Any:
    """Folds batch norms at inference into the kernels before them.

    `gamma (x w + b - mean) / sqrt(var + eps) + beta = x w' + b'`: the kernel becomes
    `w' = w gamma / sqrt(var + eps)`, and the norm, which `fn` still runs, the identity:
    variance `1 - eps`, scale 1. `b'` becomes the bias of the layer, or, where it has
    none, minus the mean of the norm. The function is the same but for the rounding of the
    new parameters; the weights that quantization sees are those that count.

    Norms are found by tracing, for products and convolutions: a result that is used once
    and goes through `- mean`, `* rsqrt(var + eps)` and what else is constant.

    Args:
      fn: called as `fn(params, batch)`, with running averages, as at inference.
      params: with the statistics: of Linen the variables `{"params", "batch_stats"}`, of
        NNX the whole state.
      batches: only the shape of the first matters; nothing is run.
      rules: patterns of the kernels to fold into; None is all that have a norm behind them.

    Returns:
      A tree like `params`, dense; quantize it next.

    Raises:
      ValueError: no batch, no batch norm behind a product, or none behind a kernel that
        `rules` name.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.ones((2, 1)), "mean": jnp.array([1.0]), "var": jnp.array([0.25])}
    >>> fn = lambda p, x: (x @ p["w"] - p["mean"]) * jax.lax.rsqrt(p["var"] + 0.0)
    >>> jc.quantize.fold_batch_norm(fn, params, [jnp.ones((1, 2))])
    {'mean': Array([2.], dtype=float32), 'var': Array([1.], dtype=float32), 'w': Array([[2.],
           [2.]], dtype=float32)}

    Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877.
    """
    dense = {
        path
        for path, leaf in leaves_with_paths(params)
        if is_weight(leaf) and not is_compressed(leaf)
    }
    named = None if rules is None else matched(params, rules)
    wanted = dense if named is None else dense & named
    batches = list(batches)
    program = traced(fn, params, batches, wanted, skip_unmet=True)
    near = neighbours_of(program)
    leaves, folded = unstacked(program, params), set()
    new: dict[str, Any] = {}
    for unit in program.products:
        norm = _norm(near, product_of(near, unit))
        changes = {} if norm is None else _folded(program, norm, leaves)
        if changes:
            folded.add(unit[0])
            new |= changes
    missed = sorted(named - folded) if named is not None else []
    if missed or not folded:
        where = f"behind the product with {missed[0]!r}" if missed else "behind any product"
        raise ValueError(
            f"fold_batch_norm found no batch norm {where}: a result that is used once and "
            "normalised with constants, per channel; does fn use running averages, and does "
            "params hold them?"
        )
    changed = {unit[0] for unit in program.units if name_of(unit) in new}
    return restacked(program, params, leaves | new, changed)


def _norm(near: Neighbours, product: Product | None) -> _Norm | None:
    """The affine steps behind `product`, if a batch norm is among them."""
    if product is None:
        return None
    value, steps = product.out, []
    own_bias = mean = variance = scale = bias = None
    epsilon = 0.0
    while (use := near.only_use(value)) is not None and bias is None:
        name = use.primitive.name
        if name == "convert_element_type":
            value = use.outvars[0]
            continue
        if name not in ("add", "sub", "mul") or (name == "sub" and use.invars[1] is value):
            break
        others = [v for v in use.invars if v is not value]
        if len(others) != 1 or (isinstance(others[0], Var) and others[0] in near.program.moving):
            break
        part = near.parameter(others[0])
        if name == "add" and mean is None and own_bias is None:
            own_bias = part
        elif name == "sub" and mean is None:
            mean = part
        elif name == "mul" and mean is not None and variance is None:
            part, epsilon, scale = _inverse_root(near, others[0])
            variance = part
        elif name == "add" and variance is not None:
            bias = part
        else:
            break
        if part is None:  # a constant that cannot be replaced
            break
        steps.append((use, value))
        value = use.outvars[0]
    if mean is None or variance is None:
        return None
    return _Norm(product, tuple(steps), mean, variance, epsilon, scale, bias, own_bias)


def _inverse_root(near: Neighbours, value: Any) -> tuple[Unit | None, float, Unit | None]:
    """Variance, epsilon and scale of `rsqrt(variance + epsilon) * scale`."""
    variance, epsilon, scale = None, 0.0, None
    open_values = [value]
    while open_values:
        value = open_values.pop()
        eqn = near.made.get(value) if isinstance(value, Var) else None
        if eqn is not None and near.only_use(value) is None:  # another norm needs it as it is
            return None, 0.0, None
        if eqn is not None and eqn.primitive.name == "rsqrt":
            root: Any = eqn.invars[0]
            inner = near.made.get(root) if near.only_use(root) is not None else None
            if inner is not None and inner.primitive.name == "add":
                parts = {near.parameter(v): v for v in inner.invars}
                literal = parts.pop(None, None)
                if len(parts) == 1 and literal is not None and not isinstance(literal, Var):
                    [variance], epsilon = parts, float(literal.val)
        elif eqn is not None and eqn.primitive.name == "mul":
            open_values += eqn.invars
        elif eqn is not None and eqn.primitive.name in VIEWS and near.parameter(value) is None:
            open_values.append(eqn.invars[0])
        else:
            scale = near.parameter(value) or scale
    return variance, epsilon, scale


def _folded(program: Program, norm: _Norm, leaves: dict[str, Any]) -> dict[str, Any]:
    """The new leaves by name; none if the steps are no norm of channels after all."""
    before = _affine(program, norm, leaves)
    if before is None:
        return {}
    factor, shift = before
    new: dict[str, Any] = {}

    def put(unit: Unit | None, value: Any) -> None:
        if unit is not None:
            old = leaves[name_of(unit)]
            channels = np.broadcast_to(value, (old.size,)).reshape(old.shape)
            new[name_of(unit)] = jnp.asarray(channels, old.dtype)

    put(norm.variance, 1 - norm.epsilon)
    put(norm.scale, 1.0)
    put(norm.bias, 0.0)
    after = _affine(program, norm, leaves | new)
    # In bfloat16 it is not quite the identity; further off, something is multiplied too that
    # cannot be taken away.
    if after is None or not np.allclose(after[0], 1, atol=1e-2):
        return {}
    put(norm.mean, 0.0 if norm.own_bias else -shift / after[0])
    put(norm.own_bias, shift / after[0])
    total = _affine(program, norm, leaves | new)
    if total is None or not np.allclose(total[1], shift, rtol=1e-2, atol=1e-2 * abs(shift).max()):
        return {}
    kernel = leaves[name_of(norm.product.unit)]
    along = [1] * kernel.ndim
    along[norm.product.output] = factor.size
    scaled = np.asarray(kernel, np.float64) * (factor / after[0]).reshape(along)
    new[name_of(norm.product.unit)] = jnp.asarray(scaled, kernel.dtype)
    return new


def _affine(
    program: Program, norm: _Norm, leaves: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Factor and shift of each channel after all steps; None if channels are not all."""
    out: Any = norm.product.out.aval
    shape, d = out.shape, norm.product.leaving
    factor, shift = np.ones(shape[d]), np.zeros(shape[d])
    others = [next(v for v in eqn.invars if v is not value) for eqn, value in norm.steps]
    for (eqn, _), constant in zip(norm.steps, constants(program, leaves, others)):
        constant = np.broadcast_to(np.asarray(constant, np.float64), shape)
        rows = np.moveaxis(constant, d, 0).reshape(shape[d], -1)
        channel = rows[:, 0]
        if not np.all(rows == channel[:, None]):
            return None
        if eqn.primitive.name == "mul":
            factor, shift = factor * channel, shift * channel
        else:
            shift = shift + (channel if eqn.primitive.name == "add" else -channel)
    return factor, shift
