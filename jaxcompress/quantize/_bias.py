"""Bias correction: what quantization shifts on average is put back into the biases."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from jaxcompress._accelerate import accelerate
from jaxcompress._neighbours import VIEWS, Neighbours, neighbours_of
from jaxcompress._paths import leaves_with_paths, subtrees
from jaxcompress._program import Program, Unit, name_of
from jaxcompress._sequential import Tell, advance, first_values, traced, unstacked, walk
from jaxcompress.arrays import is_compressed
from jaxcompress.quantize._posttrain import Method, nearest
from jaxcompress.quantize._specs import Spec

__all__ = ["bias_correct"]


class _Bias(NamedTuple):
    """A parameter that is added to a product: `sum` is `value` plus a `view` of it."""

    unit: Unit
    value: Var
    view: Callable[[Any], Any]


def bias_correct(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    method: Method | None = None,
) -> Any:
    """Quantizes, then corrects biases so that each layer's mean output is the dense one.

    `b' = b + E[x w] - E[x_hat w_hat]`, with `x` from the dense model and `x_hat` from the
    quantized one, whose earlier biases are corrected already; `E` is over all that is
    added to the same element of the bias.

    Biases are found by tracing: a parameter that is added to a product with a compressed
    weight, behind views only, where product and parameter are used once. Compressed leaves
    without one stay as they are.

    Args:
      fn, params, batches, rules: as for `gptq`.
      method: what quantizes, a function of these four as `gptq` is (`functools.partial` for
        its options); None rounds to nearest.

    Returns:
      A tree like `params`: what `method` returns, with other biases.

    Raises:
      ValueError: no batches, batches of several shapes, or no compressed leaf with a bias.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 32, 32)) + 1.0
    >>> params, fn = {"w": w, "b": jnp.zeros(32)}, lambda p, x: x @ p["w"] + p["b"]
    >>> rules = {"w": jc.quantize.int3()}
    >>> shift = lambda q: jnp.abs((jc.accelerate(fn)(q, x) - fn(params, x)).mean(0)).max()
    >>> bool(shift(jc.quantize.quantize(params, rules)) > 0.1)
    True
    >>> bool(shift(jc.quantize.bias_correct(fn, params, [x], rules)) < 1e-3)
    True

    Nagel et al., 2019, Data-Free Quantization Through Weight Equalization and Bias
    Correction, arXiv:1906.04721.
    """
    batches = list(batches)
    qparams = (method or nearest)(fn, params, batches, rules)
    paths = [path for path, _ in leaves_with_paths(params)]
    small = dict(zip(paths, subtrees(qparams, params)))
    wanted = {path for path, leaf in small.items() if is_compressed(leaf)}
    program = traced(fn, params, batches, wanted, skip_unmet=True)
    near = neighbours_of(program)
    found = {unit: _bias_of(near, unit) for unit in program.products}
    if not any(found.values()):
        raise ValueError("bias_correct found no compressed leaf with a bias of its own")
    dense, dense_values = unstacked(program, params), first_values(batches)

    def work(g: int, leaves: dict[str, Any], values: list[Any], tell: Tell) -> dict[str, Any]:
        nonlocal dense_values
        biases = [b for unit in program.groups[g] if (b := found[unit]) is not None]
        want = _sums(program, g, biases, dense, dense_values)
        have = _sums(program, g, biases, leaves, values)
        if g + 1 < len(program.groups):
            dense_values = advance(program, g, dense, dense_values)
        done = {}
        for bias, (total, count), (other, _) in zip(biases, want, have):
            old = leaves[name_of(bias.unit)]
            change = (total - other) / jnp.maximum(count, 1)
            done[name_of(bias.unit)] = (old + change).astype(old.dtype)
        return done

    return walk(program, qparams, batches, work, identity=None)


def _bias_of(near: Neighbours, unit: Unit) -> _Bias | None:
    """What is added to the product with `unit`, if that is a parameter."""
    products = near.program.products[unit]
    if len(products) != 1:
        return None
    value = near.program.jaxpr.eqns[products[0]].outvars[0]
    while True:
        use = near.only_use(value)
        if use is None:
            return None
        if use.primitive.name in VIEWS:
            value = use.outvars[0]
        elif use.primitive.name == "add":
            others = [v for v in use.invars if v is not value]
            bias = near.parameter(others[0]) if len(others) == 1 else None
            return None if bias is None else _Bias(bias, value, near.view(others[0]))
        else:
            return None


def _sums(
    program: Program, g: int, biases: list[_Bias], leaves: dict[str, Any], values: list[Any]
) -> list[tuple[jax.Array, jax.Array]]:
    """Of what each bias is added to, the sum over what an element is added to, and the count."""
    units, run = program.segment(g, [bias.value for bias in biases])
    part = {name_of(u): leaves[name_of(u)] for u in units}
    shapes = [leaves[name_of(bias.unit)].shape for bias in biases]

    @jax.jit
    def batch(part: Any, values: Any) -> list[tuple[jax.Array, jax.Array]]:
        found = []
        for bias, shape, added in zip(biases, shapes, accelerate(run)(part, values)):
            # The transpose of spreading a bias is the sum over what it is spread to.
            added = added.astype(jnp.float32)
            spread = lambda b, bias=bias, added=added: jnp.broadcast_to(bias.view(b), added.shape)
            _, back = jax.vjp(spread, jnp.zeros(shape))
            found.append((back(added)[0], back(jnp.ones_like(added))[0]))
        return found

    total: Any = None
    for v in values:
        new = batch(part, v)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return total
