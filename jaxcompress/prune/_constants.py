"""Which elements of every value are the same for any input, and what they are.

A channel whose weights are pruned is zero, or after a bias, a normalization and an
activation some other constant. The program is evaluated on elements that are known or
not; a product with a known zero is known. Where a sum goes over channels, this says of
which of them every term is known, and what those that are removed add to the result.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxcompress._primitives import ELEMENTWISE, MOVES, REDUCTIONS, WINDOWS
from jaxcompress._program import body_of, step
from jaxcompress.prune._axes_rules import Place
from jaxcompress.prune._derivatives import aval_of

__all__ = ["Constants", "Known", "constants"]


Gone = Mapping[Place, tuple[Any, ...]]  # of each axis of a sum which indices are removed


class Known(NamedTuple):
    """`value` where `known` is True: all of it, none of it, or an array of bools."""

    value: Any
    known: Any = True

    def clean(self) -> Any:
        """The value, zero where it is not known."""
        if self.known is True:
            return self.value
        return jnp.where(self.known, self.value, jnp.zeros_like(self.value))

    def zeros(self) -> Any:
        """Where it is known to be zero; False for nowhere."""
        if self.known is False or not hasattr(self.value, "ndim"):
            return False
        if isinstance(self.value, np.ndarray | np.generic) and np.all(self.value):
            return False
        return self.known & (self.value == 0)


class Constants(NamedTuple):
    """`known[place][k]`: of each index that axis `k` of a sum goes over, whether all its
    terms are known. `removed[place]`: what the removed indices add.
    """

    known: dict[Place, tuple[Any, ...]]
    removed: dict[Place, Any]


_NOTHING = Known(None, False)


def constants(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Known],
    gone: Gone,
) -> Constants:
    """Evaluates the program on what is known of its inputs."""
    found = Constants({}, {})
    _run(jaxpr, consts, inputs, gone, found, ())
    return found


def _run(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Known],
    gone: Gone,
    found: Constants,
    place: Place,
) -> list[Known]:
    env: dict[Any, Known] = dict(zip(jaxpr.constvars, map(Known, consts)))
    env.update(zip(jaxpr.invars, inputs))
    read = lambda v: Known(v.val) if isinstance(v, Literal) else env[v]
    for i, eqn in enumerate(jaxpr.eqns):
        values, here, name = [read(v) for v in eqn.invars], (*place, i), eqn.primitive.name
        body = body_of(eqn)
        if body is not None:
            outs = _run(body.jaxpr, body.consts, values, gone, found, here)
        elif name in _SUMS:
            outs = [_SUMS[name](eqn, values, here, gone, found)]
        elif all(v.known is True for v in values):
            outs = [Known(out) for out in step(eqn)(*(v.value for v in values))]
        else:
            outs = _rule(name)(eqn, values)
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _rule(name: str) -> Callable[[JaxprEqn, list[Known]], list[Known]]:
    if name in MOVES:
        return _move
    if name in REDUCTIONS:
        return _reduce
    if name in WINDOWS:
        return _window
    if name in ELEMENTWISE:
        return {"mul": _product, "div": _product, "select_n": _select}.get(name, _elementwise)
    return {"gather": _gather}.get(name, _unknown)


def _unknown(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    return [_NOTHING] * len(eqn.outvars)


def _bind(eqn: JaxprEqn, *values: Any) -> list[Any]:
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _as_array(v: Known, aval: Any) -> tuple[Any, Any]:
    """The value and what is known of it, in full."""
    if v.known is False:
        return jnp.zeros(aval.shape, aval.dtype), jnp.zeros(aval.shape, bool)
    return v.clean(), jnp.broadcast_to(v.known, aval.shape)


def _move(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    if all(v.known is False for v in values):
        return _unknown(eqn, values)
    both = [_as_array(v, aval_of(var)) for v, var in zip(values, eqn.invars)]
    moved = _bind(eqn, *(v for v, _ in both)), _bind(eqn, *(k for _, k in both))
    return [Known(v, k) for v, k in zip(*moved)]


def _elementwise(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    if any(v.known is False for v in values):
        return _unknown(eqn, values)
    known: Any = True
    for v in values:
        known = known & v.known
    shape = aval_of(eqn.outvars[0]).shape
    return [Known(out, jnp.broadcast_to(known, shape)) for out in _bind(eqn, *map(_value, values))]


def _value(v: Known) -> Any:
    return v.value


def _product(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    """Known zeros make zeros, if what they meet is finite."""
    out = aval_of(eqn.outvars[0])
    sources = values[:1] if eqn.primitive.name == "div" else values
    zero: Any = False
    for v in sources:
        zero = zero | v.zeros()
    [plain] = _elementwise(eqn, values)
    if zero is False:
        return [plain]
    zero = jnp.broadcast_to(zero, out.shape)
    if plain.known is False:
        return [Known(jnp.zeros(out.shape, out.dtype), zero)]
    value = jnp.where(zero, jnp.zeros(out.shape, out.dtype), plain.value)
    return [Known(value, plain.known | zero)]


def _select(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    """Known where all that could be chosen is the same, or the choice is known too."""
    which, *cases = values
    out = aval_of(eqn.outvars[0])
    full = [_as_array(v, out) for v in cases]
    first, same = full[0]
    for value, known in full[1:]:
        same = same & known & (value == first)
    if which.known is False:
        return [Known(first, same)]
    [value] = _bind(eqn, which.value, *(v for v, _ in full))
    chosen = lax.select_n(which.value, *(k for _, k in full)) & which.known
    return [Known(jnp.where(same, first, value), chosen | same)]


def _reduce(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    [v] = values
    if v.known is False:
        return [_NOTHING]
    return [Known(_bind(eqn, v.clean())[0], jnp.all(v.known, eqn.params["axes"]))]


def _window(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    [v], p = values, eqn.params
    if v.known is False:
        return [_NOTHING]
    missing = lax.reduce_window(
        jnp.where(v.known, 0.0, 1.0),
        0.0,
        lax.max,
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p["base_dilation"],
        p["window_dilation"],
    )
    return [Known(_bind(eqn, v.clean())[0], missing == 0)]


def _gather(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    """A column of zeros of a table is one wherever the table is looked up."""
    table, indices = values
    numbers, out = eqn.params["dimension_numbers"], aval_of(eqn.outvars[0])
    if indices.known is True:
        return _move_first(eqn, values)
    sizes, shape = eqn.params["slice_sizes"], aval_of(eqn.invars[0]).shape
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = [d for d in range(len(shape)) if d not in gone]
    whole = [(d, o) for d, o in zip(windows, numbers.offset_dims) if sizes[d] == shape[d]]
    zero = table.zeros()
    if zero is False:
        return [_NOTHING]
    columns = jnp.all(zero, [d for d in range(len(shape)) if d not in [w for w, _ in whole]])
    known = lax.broadcast_in_dim(columns, out.shape, [o for _, o in whole])
    return [Known(jnp.zeros(out.shape, out.dtype), known)]


def _move_first(eqn: JaxprEqn, values: list[Known]) -> list[Known]:
    first, *rest = values
    if first.known is False:
        return [_NOTHING]
    value, known = _as_array(first, aval_of(eqn.invars[0]))
    others = [v.value for v in rest]
    return [Known(_bind(eqn, value, *others)[0], _bind(eqn, known, *others)[0])]


def _bilinear(
    eqn: JaxprEqn,
    values: list[Known],
    axes: list[tuple[int, int]],
    place: Place,
    gone: Gone,
    found: Constants,
) -> Known:
    """A product summed over `axes`, pairs of one of each side."""
    lhs, rhs = values
    l_aval, r_aval = map(aval_of, eqn.invars)
    terms = []
    for a, b in axes:
        l_zero, r_zero = _all_but(lhs.zeros(), a, l_aval), _all_but(rhs.zeros(), b, r_aval)
        both = _all_but(lhs.known, a, l_aval) & _all_but(rhs.known, b, r_aval)
        terms.append(l_zero | r_zero | both)
    found.known[place] = tuple(terms)
    if lhs.known is False and rhs.known is False:
        return _NOTHING
    if lhs.known is not False and rhs.known is not False and axes:
        removed = jnp.zeros(l_aval.shape, bool)
        for (a, _), which in zip(axes, gone[place]):
            removed |= jnp.expand_dims(which, [d for d in range(l_aval.ndim) if d != a])
        part = jnp.where(removed, lhs.clean(), jnp.zeros_like(lhs.value))
        [found.removed[place]] = _bind(eqn, part, rhs.clean())
    [value] = _bind(eqn, _as_array(lhs, l_aval)[0], _as_array(rhs, r_aval)[0])
    if lhs.known is True and rhs.known is True:
        return Known(value)

    # The number of terms of each result that are not known; zero times anything is.
    params = eqn.params | dict(preferred_element_type=np.dtype(np.float32))
    count = lambda a, b: eqn.primitive.bind(a, b, **params)
    known = [jnp.broadcast_to(v.known, s.shape) for v, s in ((lhs, l_aval), (rhs, r_aval))]
    zero = [jnp.broadcast_to(v.zeros(), s.shape) for v, s in ((lhs, l_aval), (rhs, r_aval))]
    number = lambda flags: jnp.where(flags, jnp.float32(1), jnp.float32(0))
    missing = 0.0
    if lhs.known is not True:
        missing += count(number(~known[0]), number(~zero[1]))
    if rhs.known is not True:
        missing += count(number(known[0] & ~zero[0]), number(~known[1]))
    return Known(value, missing == 0)


def _all_but(flags: Any, axis: int, aval: Any) -> Any:
    """Of each index of `axis`, whether the flags are set in all of it."""
    if isinstance(flags, bool):
        return jnp.full(aval.shape[axis], flags)
    return jnp.all(flags, [d for d in range(aval.ndim) if d != axis])


def _dot_general(
    eqn: JaxprEqn, values: list[Known], place: Place, gone: Gone, found: Constants
) -> Known:
    (left, right), _ = eqn.params["dimension_numbers"]
    return _bilinear(eqn, values, list(zip(left, right)), place, gone, found)


def _convolution(
    eqn: JaxprEqn, values: list[Known], place: Place, gone: Gone, found: Constants
) -> Known:
    numbers = eqn.params["dimension_numbers"]
    grouped = eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1
    axes = [] if grouped else [(numbers.lhs_spec[1], numbers.rhs_spec[1])]
    return _bilinear(eqn, values, axes, place, gone, found)


def _reduce_sum(
    eqn: JaxprEqn, values: list[Known], place: Place, gone: Gone, found: Constants
) -> Known:
    [v] = values
    aval, axes = aval_of(eqn.invars[0]), eqn.params["axes"]
    found.known[place] = tuple(_all_but(v.known, d, aval) for d in axes)
    if v.known is not False:
        removed = jnp.zeros(aval.shape, bool)
        for d, which in zip(axes, gone[place]):
            removed |= jnp.expand_dims(which, [o for o in range(aval.ndim) if o != d])
        part = jnp.where(removed, v.clean(), jnp.zeros_like(v.value))
        [found.removed[place]] = _bind(eqn, part)
    return Known(_bind(eqn, v.value)[0]) if v.known is True else _reduce(eqn, values)[0]


_SUMS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "reduce_sum": _reduce_sum,
}
