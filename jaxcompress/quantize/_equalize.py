"""Cross-layer equalization: share the range of a channel between the layers around it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

from jaxcompress._neighbours import Neighbours, Product, neighbours_of, product_of
from jaxcompress._program import Unit, name_of
from jaxcompress._rules import assign
from jaxcompress._sequential import restacked, traced, unstacked
from jaxcompress.quantize._posttrain import Method, nearest
from jaxcompress.quantize._specs import Spec

__all__ = ["equalize"]


class _Pair(NamedTuple):
    first: Product
    biases: tuple[Unit, ...]
    second: Product


def equalize(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    method: Method | None = None,
    steps: int = 20,
) -> Any:
    """Scales the channels between two layers so that both use their ranges, then quantizes.

    `w1[:, j] / s_j`, `b1[j] / s_j`, `s_j w2[j, :]` with
    `s_j = sqrt(max|w1[:, j]| / max|w2[j, :]|)`: where only ReLU lies between, the function
    is the same in exact arithmetic, and scales that several channels share lose less.
    Dead channels stay as they are.

    Pairs are found by tracing: two weights that `rules` name, where the result of one
    reaches the other only through biases, ReLU and casts, everything used once.

    Args:
      fn, params, batches, rules: as for `gptq`; the batches are for `method`.
      method: what quantizes then, a function of these four as `gptq` is
        (`functools.partial` for its options); None rounds to nearest.
        `lambda fn, params, batches, rules: params` leaves the weights dense.
      steps: rounds over all pairs; a chain of layers settles in a few.

    Returns:
      A tree like `params`, of what `method` makes of the scaled weights.

    Raises:
      ValueError: there is no such pair, or no batch.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.array([[8.0, 0.5]]), "b": jnp.array([[0.5], [2.0]])}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> dense = lambda fn, params, batches, rules: params
    >>> rules = {"a|b": jc.quantize.int4(axis=(-2, -1))}
    >>> new = jc.quantize.equalize(fn, params, [jnp.ones((1, 1))], rules, method=dense)
    >>> new["a"], new["b"]
    (Array([[2., 1.]], dtype=float32), Array([[2.],
           [1.]], dtype=float32))

    Nagel et al., 2019, Data-Free Quantization Through Weight Equalization and Bias
    Correction, arXiv:1906.04721.
    """
    if steps < 1:
        raise ValueError(f"steps is 1 or more; got {steps}")
    batches = list(batches)
    program = traced(fn, params, batches, assign(params, rules))
    near = neighbours_of(program)
    products = {u: product_of(near, u) for u in program.products}
    by_out = {p.out: p for p in products.values() if p is not None}
    pairs = [_before(near, p, by_out) for p in by_out.values()]
    found = [pair for pair in pairs if pair is not None]
    if not found:
        raise ValueError(
            "equalize found no two layers, of those that rules name, with only biases, ReLU and "
            "casts between them"
        )
    leaves, changed = unstacked(program, params), set()
    names = {name_of(unit) for p in found for unit in (p.first.unit, *p.biases, p.second.unit)}
    exact = {name: np.asarray(leaves[name], np.float64) for name in names}
    for _ in range(steps):
        for pair in found:
            exact |= _equalized(pair, exact)
    leaves |= {name: jnp.asarray(w, leaves[name].dtype) for name, w in exact.items()}
    changed = {unit[0] for unit in program.units if name_of(unit) in names}
    equalized = restacked(program, params, leaves, changed)
    return (method or nearest)(fn, equalized, batches, rules)


def _before(near: Neighbours, second: Product, by_out: dict[Var, Product]) -> _Pair | None:
    """The layer whose output reaches `second` unchanged but for biases and ReLU."""
    value: Any = second.x
    biases: list[Unit] = []
    while isinstance(value, Var) and near.only_use(value) is not None:
        if value in by_out:
            first = by_out[value]
            same = first.leaving == second.entering and first.unit != second.unit
            return _Pair(first, tuple(biases), second) if same else None
        eqn = near.made.get(value)
        if eqn is None:
            return None
        name = eqn.primitive.name
        moving = [v for v in eqn.invars if isinstance(v, Var) and v in near.program.moving]
        if name in ("convert_element_type", "copy"):
            value = eqn.invars[0]
        elif name == "max" and len(moving) == 1:
            if not any(isinstance(v, Literal) and v.val == 0 for v in eqn.invars):
                return None
            [value] = moving
        elif name == "add" and len(moving) == 1:
            [other] = [v for v in eqn.invars if v is not moving[0]]
            bias = near.parameter(other)
            if bias is None or not near.along(other, second.entering):
                return None
            biases.append(bias)
            [value] = moving
        else:
            return None
    return None


def _equalized(pair: _Pair, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    one, two = name_of(pair.first.unit), name_of(pair.second.unit)
    w, v = leaves[one], leaves[two]
    ranges = _range(w, pair.first.output), _range(v, pair.second.contract)
    live = (ranges[0] > 0) & (ranges[1] > 0)
    scale = np.where(live, np.sqrt(ranges[0] / np.where(live, ranges[1], 1.0)), 1.0)
    along = lambda like, axis: scale.reshape([-1 if d == axis else 1 for d in range(like.ndim)])
    new = {one: w / along(w, pair.first.output), two: v * along(v, pair.second.contract)}
    for bias in map(name_of, pair.biases):
        new[bias] = leaves[bias] / scale.reshape(leaves[bias].shape)
    return new


def _range(w: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(w).max(tuple(d for d in range(w.ndim) if d != axis))
