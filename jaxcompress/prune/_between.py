"""What lies between two linear layers of a traced program, and the program without it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from jaxcompress._neighbours import Neighbours, Product, neighbours_of, product_of
from jaxcompress._primitives import ELEMENTWISE
from jaxcompress._program import Program, Unit, name_of, step
from jaxcompress.prune._derivatives import aval_of

__all__ = ["Between", "along", "betweens", "evaluate", "merged", "sizes", "without"]

Swap = Callable[[Mapping[Any, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Between:
    """`second` multiplies `inner`, which steps of single elements make of `outer`.

    `outer` is the result of `first`, with its bias if that is a parameter; nothing else
    uses what lies between. Without steps `inner` is `outer`.
    """

    first: Product
    bias: Unit | None
    outer: Var
    inner: Var
    second: Product
    steps: tuple[str, ...]
    matrices: bool
    how: Mapping[str, Any]  # precision and type of the second product's sums

    @property
    def channels(self) -> int:
        """The dimension of `outer` and `inner` that numbers them."""
        return self.second.entering


def betweens(program: Program) -> list[Between]:
    """All pairs of products that have nothing but steps of single elements between them.

    Of stacked layers there are none: their leaves have one size for all.
    """
    near = neighbours_of(program)
    products = [product_of(near, unit) for unit in program.products if unit[1] is None]
    by_out = {p.out: p for p in products if p is not None}
    found = [_between(near, p, by_out) for p in by_out.values()]
    return [between for between in found if between is not None]


def _between(near: Neighbours, second: Product, by_out: dict[Var, Product]) -> Between | None:
    shape, moving = aval_of(second.x).shape, near.program.moving
    region: list[JaxprEqn] = []
    starts, todo, seen = set(), [second.x], set()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v in by_out:
            starts.add(v)
            continue
        eqn = near.made.get(v)
        if eqn is None or eqn.primitive.name not in ELEMENTWISE or aval_of(v).shape != shape:
            return None
        region.append(eqn)
        todo += [u for u in eqn.invars if isinstance(u, Var) and u in moving]
    if len(starts) != 1:
        return None
    [start] = starts
    first, inside = by_out[start], {id(eqn) for eqn in region}
    if (
        first.leaving != second.entering
        or first.unit == second.unit
        or aval_of(start).shape != shape
    ):
        return None
    used = [start, *(v for eqn in region for v in eqn.outvars if v is not second.x)]
    others = [eqn for v in used if v is not second.x for eqn in near.uses.get(v, [])]
    if any(id(eqn) not in inside for eqn in others) or near.only_use(second.x) is None:
        return None
    if any(v in near.program.jaxpr.outvars for v in used):
        return None
    outer, bias = start, None
    use = near.only_use(start)
    if use is not None and use.primitive.name == "add" and id(use) in inside:
        [other] = [v for v in use.invars if v is not start] or [start]
        if near.along(other, first.leaving):
            outer, bias = use.outvars[0], near.parameter(other)
            region = [eqn for eqn in region if eqn is not use]
    names = tuple(dict.fromkeys(eqn.primitive.name for eqn in region[::-1]))
    matrices = all(near.made[p.out].primitive.name == "dot_general" for p in (first, second))
    last = near.made[second.out].params
    how = {key: last.get(key) for key in ("precision", "preferred_element_type")}
    return Between(first, bias, outer, second.x, second, names, matrices, how)


def sizes(between: Between) -> tuple[int, int, int] | None:
    """Inputs, channels and outputs of the two layers; None unless both are matrices."""
    if not between.matrices:
        return None
    inputs = aval_of(between.first.x).shape[between.first.entering]
    channels = aval_of(between.inner).shape[between.channels]
    return inputs, channels, aval_of(between.second.out).shape[between.second.leaving]


def evaluate(
    program: Program,
    leaves: Mapping[str, Any],
    values: Sequence[Any],
    swaps: Mapping[Var, tuple[Sequence[Any], Swap]],
    outs: Sequence[Any] | None = None,
) -> list[Any]:
    """The results, or `outs`, with other values for some variables.

    `swaps[v]` are the variables that the new value is made of, `v` itself among them or
    not, and how. Steps that nobody needs any more are left out: their operands may have
    other shapes now.
    """
    jaxpr = program.jaxpr
    outs = jaxpr.outvars if outs is None else outs
    wanted = {v for v in outs if isinstance(v, Var)}
    todo: list[tuple[JaxprEqn, bool, Var | None]] = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.intersection(eqn.outvars):
            continue
        swapped = next((v for v in eqn.outvars if v in swaps), None)
        parts = [] if swapped is None else swaps[swapped][0]
        run = swapped is None or swapped in parts
        todo.append((eqn, run, swapped))
        wanted.update(parts)
        wanted.update(v for v in eqn.invars if run and isinstance(v, Var))
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts))
    given = [leaves[name_of(unit)] for unit in program.units]
    env.update(zip(jaxpr.invars, [*given, *values]))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for eqn, run, swapped in reversed(todo):
        if run:
            env.update(zip(eqn.outvars, step(eqn)(*map(read, eqn.invars))))
        if swapped is not None:
            env[swapped] = swaps[swapped][1](env)
    return [read(v) for v in outs]


def without(between: Between, shift: Any) -> dict[Var, tuple[Sequence[Any], Swap]]:
    """The swap that skips the steps; `shift` is added where the first layer has no bias."""

    def swap(env: Mapping[Any, Any]) -> Any:
        value = env[between.outer]
        if shift is not None:
            value = value + along(shift, value.ndim, between.channels)
        return value.astype(aval_of(between.inner).dtype)

    return {between.inner: ([between.outer], swap)}


def merged(
    between: Between, matrix: str, bias: str | None, shift: Any, leaves: Mapping[str, Any]
) -> dict[Var, tuple[Sequence[Any], Swap]]:
    """The swap that makes one product of both layers, with `leaves[matrix]`."""
    first, second = between.first, between.second

    def swap(env: Mapping[Any, Any]) -> Any:
        x = env[first.x]
        dims = (((first.entering,), (first.contract,)), ((), ()))
        out = lax.dot_general(x, leaves[matrix].astype(x.dtype), dims, **between.how)
        added = shift if bias is None else leaves[bias]
        out = out + jnp.asarray(added, out.dtype)
        return jnp.moveaxis(out, -1, second.leaving).astype(aval_of(second.out).dtype)

    return {second.out: ([first.x], swap)}


def along(numbers: Any, ndim: int, dimension: int) -> jax.Array:
    """The numbers of channels, as they broadcast to a value that has them in a dimension."""
    return jnp.asarray(numbers).reshape([-1 if d == dimension else 1 for d in range(ndim)])
