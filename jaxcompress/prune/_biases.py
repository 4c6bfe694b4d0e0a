"""Where what removed channels have added goes: to a bias, or to the function."""

from collections import Counter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

from jaxcompress._program import body_of
from jaxcompress.prune._axes_rules import Place
from jaxcompress.prune._derivatives import aval_of

__all__ = ["Added", "distribute", "plus"]

# None of them changes the order of the elements.
_VIEWS = frozenset(["broadcast_in_dim", "convert_element_type", "reshape", "squeeze"])
_PLAIN_CALLS = frozenset(["closed_call", "core_call", "jit", "pjit"])


class Added(NamedTuple):
    """A constant to add to a value; `fits[d]` is the size that it needs there, None: any."""

    value: np.ndarray
    fits: tuple[int | None, ...]


def distribute(
    jaxpr: Jaxpr, names: dict[Var, str], removed: dict[Place, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[Place, Added]]:
    """What is added to parameters, by path, and the rest, to the results of equations.

    `removed` are constants in the full shape of each result.
    """
    biases, rest = {}, {}
    for place, full in removed.items():
        if not full.any():
            continue
        value = _compact(full)
        pairs = [*zip(value.shape, full.shape)]
        found = _bias_of(jaxpr, place, names)
        if found is not None:
            path, v, operand = found
            shape = aval_of(operand).shape
            # Of a size of one nobody knows whether what is added is the same for more.
            if len(shape) == len(pairs) and all(
                m > 1 and n in (1, size) for (n, m), size in zip(pairs, shape)
            ):
                biases[path] = np.broadcast_to(value, shape).reshape(aval_of(v).shape)
                continue
        rest[place] = Added(value, tuple(None if n == 1 < m else m for n, m in pairs))
    return biases, rest


def plus(value: Any, added: Added) -> Any:
    if any(fit not in (None, n) for fit, n in zip(added.fits, value.shape)):
        raise ValueError(
            f"what removed channels added was found for {list(added.fits)} and is needed for "
            f"{list(value.shape)}; call shrink with arguments like these, or where they may "
            "have any size, with an example of two"
        )
    return value + jnp.asarray(added.value, value.dtype)


def _compact(value: np.ndarray) -> np.ndarray:
    """With size one along axes in which it does not differ by more than rounding."""
    wide = value.astype(np.float64)
    # The same sum, in the order that suits the place in the array; integers are exact.
    is_float = jnp.issubdtype(value.dtype, jnp.inexact)
    eps = float(jnp.finfo(value.dtype).eps) if is_float else 0.0
    tolerance = 16 * eps * np.abs(wide).max(initial=0)
    for d in range(value.ndim):
        first = value.take([0], d)
        if np.abs(wide - first.astype(np.float64)).max(initial=0) <= tolerance:
            value, wide = first, wide.take([0], d)
    return value


def _bias_of(jaxpr: Jaxpr, place: Place, names: dict[Var, str]) -> tuple[str, Var, Any] | None:
    """The parameter that is added to what the equation at `place` makes: its path, itself,
    and how the sum sees it. None if there is none, or if it is used for something else too.
    """
    eqns, first = jaxpr.eqns, jaxpr.eqns[place[0]]
    uses = Counter(v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    if len(place) > 1:
        body = body_of(first)
        if body is None or first.primitive.name not in _PLAIN_CALLS:
            return None
        inside = {
            inner: names[v]
            for inner, v in zip(body.jaxpr.invars, first.invars)
            if not isinstance(v, Literal) and uses[v] == 1 and v in names
        }
        return _bias_of(body.jaxpr, place[1:], inside)
    made = {v: eqn for eqn in eqns for v in eqn.outvars}
    [result] = first.outvars
    addition = next((eqn for eqn in eqns if result in eqn.invars), None)
    if addition is None or uses[result] != 1 or addition.primitive.name != "add":
        return None
    a, b = addition.invars
    v = operand = b if a is result else a
    while not isinstance(v, Literal) and uses[v] == 1:
        if v in names:
            return names[v], v, operand
        eqn = made.get(v)
        if eqn is None or eqn.primitive.name not in _VIEWS:
            return None
        if aval_of(eqn.invars[0]).size != aval_of(v).size:
            return None
        v = eqn.invars[0]
    return None
