"""A user's function as a list of steps, cut where it meets the weights.

Layer-wise methods need the activations that enter one layer after the layers before it
were changed. The function is traced to a jaxpr; calls inside it are opened, and a scan
over stacked weights is unrolled, so that every layer is a weight of its own. Each product
with a wanted weight is then a place to cut. Weights whose products do not depend on each
other, as those of query, key and value, form one group; running the program from cut to
cut keeps only the values that are still needed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.core.primitives import scan_p

from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._probe import Log, probe
from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._quax import scan_sizes

__all__ = ["Program", "Unit", "body_of", "is_array", "name_of", "step", "trace"]

Unit = tuple[str, int | None]  # the path of a leaf, and which of its stacked layers

# Calls that are nothing but their body, as long as nobody differentiates: where it lies.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A flat jaxpr: its first inputs are `units`, the others `batch`; see `trace`.

    `products` are the equations in which each wanted weight is multiplied, in order.
    `groups` are the wanted weights in the order of the program; group `g` is met between
    the cuts `cuts[g]` and `cuts[g + 1]`, and `live[g]` are the values that cross `cuts[g]`.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    units: list[Unit]
    scanned: dict[str, int]
    products: dict[Unit, list[int]]
    moving: set[Var]
    groups: list[list[Unit]]
    cuts: list[int]
    live: list[list[Var]]

    def segment(
        self, g: int, outs: Sequence[Var] | None = None
    ) -> tuple[list[Unit], Callable[[Any, Any], Any]]:
        """Units and `run(leaves, values)` from cut `g` to the next, `leaves` by name.

        `outs` are the values to return, from anywhere behind cut `g`, instead of those
        that cross the next one.
        """
        inside = range(self.cuts[g], self.cuts[g + 1] if outs is None else self.cuts[-1])
        outs = self.live[g + 1] if outs is None else outs
        eqns = self.needed(outs, inside)
        used = {v for eqn in eqns for v in _variables(eqn)}
        slots = dict(zip(self.units, self.jaxpr.invars))
        units = [unit for unit, var in slots.items() if var in used or var in outs]
        consts = [(v, c) for v, c in zip(self.jaxpr.constvars, self.consts) if v in used]
        invars = [*(v for v, _ in consts), *(slots[u] for u in units), *self.live[g]]
        run = _function(invars, outs, eqns)
        constants = [c for _, c in consts]

        def segment(leaves: Any, values: Any) -> Any:
            return run(*constants, *(leaves[name_of(u)] for u in units), *values)

        return units, segment

    def joined(self, sizes: Sequence[int]) -> "Program":
        """The same with runs of this many neighbouring groups made one."""
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        runs = [self.groups[a:b] for a, b in itertools.pairwise(starts)]
        groups = [[unit for group in run for unit in group] for run in runs]
        pick = lambda crossing: [crossing[start] for start in starts]
        return dataclasses.replace(self, groups=groups, cuts=pick(self.cuts), live=pick(self.live))

    def needed(self, outs: Collection[Var], inside: range) -> list[JaxprEqn]:
        """The steps of `inside` that lead to `outs`, and steps of any place on constants."""
        wanted, kept = set(outs), []
        for i in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[i]
            made = wanted.intersection(eqn.outvars)
            if made and (i in inside or not any(v in self.moving for v in eqn.outvars)):
                kept.append(eqn)
                wanted.update(_variables(eqn))
        return kept[::-1]


def name_of(unit: Unit) -> str:
    """`layers/kernel`, or `layers/kernel[3]` of stacked layers."""
    path, row = unit
    return path if row is None else f"{path}[{row}]"


def trace(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, wanted: Collection[str]
) -> Program:
    """Traces `fn(params, batch)` and finds the places where `wanted` leaves are multiplied.
    A wanted leaf that meets no product has no entry in `products`.
    """
    pairs = leaves_with_paths(params)
    arrays = {path: leaf for path, leaf in pairs if hasattr(leaf, "dtype")}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    batch_arrays, batch_rest = eqx.partition(batch, is_array)

    def call(arrays: dict[str, Any], batch_arrays: Any) -> Any:
        leaves = [arrays.get(path, leaf) for path, leaf in pairs]
        return fn(rebuild(params, leaves), eqx.combine(batch_arrays, batch_rest))

    traced = jax.make_jaxpr(call)(shapes, batch_arrays)
    paths = sorted(shapes)  # the order of a dict's leaves
    scanned = _scanned(traced.jaxpr, dict(zip(traced.jaxpr.invars, paths)), wanted)
    units: list[Unit] = []
    for path in paths:
        units += [(path, i) for i in range(scanned[path])] if path in scanned else [(path, None)]

    def flat(leaves: list[Any], values: list[Any]) -> list[Any]:
        inputs: list[Any] = []
        rest = iter(leaves)
        for path in paths:
            rows = [next(rest) for _ in range(scanned.get(path, 1))]
            inputs.append(_Rows(rows) if path in scanned else rows[0])
        return _run(traced.jaxpr, traced.consts, [*inputs, *values])

    rows = [shapes[p] if i is None else _row(shapes[p]) for p, i in units]
    program = jax.make_jaxpr(flat)(rows, jax.tree.leaves(batch_arrays))
    products = _products(program, units, rows, wanted)
    moving = _moving(program.jaxpr, len(units))
    groups, starts = _groups(program.jaxpr, products)
    cuts = [0, *starts[1:], len(program.jaxpr.eqns)]
    live = _live(program.jaxpr, cuts, moving)
    return Program(
        program.jaxpr, program.consts, units, scanned, products, moving, groups, cuts, live
    )


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


class _Rows:
    """Stacked layers, one array each; `whole` for whoever wants them as one."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    @functools.cached_property
    def whole(self) -> Any:
        return jnp.stack(self.rows)


def _row(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)


def body_of(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The body of a call that is nothing else; None of any other equation."""
    inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    if isinstance(inner, Jaxpr):
        return ClosedJaxpr(inner, ())
    return inner if isinstance(inner, ClosedJaxpr) else None


def _scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """Where the carry and where the scanned inputs begin."""
    consts, carry = scan_sizes(eqn.params)
    return consts, consts + carry


def _scanned(jaxpr: Jaxpr, names: dict[Any, str], wanted: Collection[str]) -> dict[str, int]:
    """The number of layers of each named input that a scan over a wanted one runs over."""
    found: dict[str, int] = {}
    for eqn in jaxpr.eqns:
        named = [None if isinstance(v, Literal) else names.get(v) for v in eqn.invars]
        inner = body_of(eqn)
        if inner is not None:
            inside = {v: name for v, name in zip(inner.jaxpr.invars, named) if name is not None}
            found |= _scanned(inner.jaxpr, inside, wanted)
        elif eqn.primitive is scan_p:
            _, first = _scan_parts(eqn)
            layers = [name for name in named[first:] if name is not None]
            if any(name in wanted for name in layers):
                found |= dict.fromkeys(layers, eqn.params["length"])
    return found


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates `jaxpr`, its calls opened and its scans over `_Rows` unrolled."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        inner = body_of(eqn)
        if inner is not None:
            outs = _run(inner.jaxpr, inner.consts, values)
        elif eqn.primitive is scan_p and any(isinstance(v, _Rows) for v in values):
            outs = _unrolled(eqn, values)
        else:
            outs = step(eqn)(*map(_whole, values))
        env.update(zip(eqn.outvars, outs))
    return [_whole(read(v)) for v in jaxpr.outvars]


def _whole(value: Any) -> Any:
    return value.whole if isinstance(value, _Rows) else value


def _unrolled(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    start, first = _scan_parts(eqn)
    consts, carry, xs = values[:start], values[start:first], values[first:]
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    order = range(length)[::-1] if eqn.params["reverse"] else range(length)
    stacked: dict[int, list[Any]] = {}
    for i in order:
        slices = [x.rows[i] if isinstance(x, _Rows) else x[i] for x in xs]
        outs = _run(body.jaxpr, body.consts, [*consts, *carry, *slices])
        carry, stacked[i] = outs[: len(carry)], outs[len(carry) :]
    ys = [jnp.stack(parts) for parts in zip(*(stacked[i] for i in range(length)))]
    return [*carry, *ys]


def _function(
    invars: Sequence[Var], outvars: Sequence[Var], eqns: Sequence[JaxprEqn]
) -> Callable[..., list[Any]]:
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    return jaxpr_as_fun(ClosedJaxpr(Jaxpr([], invars, outvars, eqns, effects), ()))


def step(eqn: JaxprEqn) -> Callable[..., list[Any]]:
    """One equation as a function of all of its inputs, literals included."""
    invars = [Var(v.aval) if isinstance(v, Literal) else v for v in eqn.invars]
    run = _function(list(dict.fromkeys(invars)), eqn.outvars, [eqn.replace(invars=[*invars])])
    return lambda *values: run(*dict(zip(invars, values)).values())


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _products(
    program: ClosedJaxpr, units: list[Unit], rows: list[Any], wanted: Collection[str]
) -> dict[Unit, list[int]]:
    """The equations in which each wanted unit is multiplied."""
    found: dict[Unit, list[int]] = {}
    log = Log()
    by_name = {name_of(unit): unit for unit in units}

    def walk(leaves: list[Any], values: list[Any]) -> None:
        inputs = [*program.consts, *leaves, *values]
        env: dict[Any, Any] = dict(zip([*program.jaxpr.constvars, *program.jaxpr.invars], inputs))
        for i, eqn in enumerate(program.jaxpr.eqns):
            before = len(log.meetings)
            inputs = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, step(eqn)(*inputs)))
            for meeting in log.meetings[before:]:
                if meeting.contract and not meeting.lookup:
                    found.setdefault(by_name[meeting.path], []).append(i)

    def probed(leaves: list[Any], values: list[Any]) -> list[Any]:
        probes = [
            probe(name_of(unit), x, log=log) if unit[0] in wanted else x
            for unit, x in zip(units, leaves)
        ]
        accelerate(walk)(probes, values)
        return []

    jax.eval_shape(probed, rows, [v.aval for v in program.jaxpr.invars[len(units) :]])
    return {unit: sorted(set(at)) for unit, at in sorted(found.items(), key=lambda u: u[1])}


def _moving(jaxpr: Jaxpr, units: int) -> set[Var]:
    """The variables that depend on the batch."""
    moving = set(jaxpr.invars[units:])
    for eqn in jaxpr.eqns:
        if any(v in moving for v in _variables(eqn)):
            moving.update(eqn.outvars)
    return moving


def _groups(jaxpr: Jaxpr, products: dict[Unit, list[int]]) -> tuple[list[list[Unit]], list[int]]:
    """Neighbours that do not depend on each other, and the first equation of each group.

    A weight that is used again later takes everything up to there into its group.
    """
    met: dict[int, list[Unit]] = {}
    for unit, at in products.items():
        for i in at:
            met.setdefault(i, []).append(unit)
    depends: dict[Any, frozenset[Unit]] = {}
    groups: list[list[Unit]] = []
    starts: list[int] = []
    last = -1
    for i, eqn in enumerate(jaxpr.eqns):
        above = frozenset().union(*(depends.get(v, frozenset()) for v in _variables(eqn)))
        new = [u for u in met.get(i, []) if products[u][0] == i]
        if new:
            if i > last and (not groups or above & set(groups[-1])):
                groups.append([])
                starts.append(i)
            groups[-1] += new
            last = max(last, *(products[u][-1] for u in new))
        above |= frozenset(met.get(i, []))
        depends.update(dict.fromkeys(eqn.outvars, above))
    return groups, starts


def _live(jaxpr: Jaxpr, cuts: Sequence[int], moving: set[Var]) -> list[list[Var]]:
    """The values that cross each cut; at the end, the results."""
    results = [v for v in jaxpr.outvars if not isinstance(v, Literal) and v in moving]
    after = set(results)
    crossing = [list(dict.fromkeys(results))]
    ends = iter(reversed(cuts[:-1]))
    cut = next(ends)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        if after.intersection(eqn.outvars):
            after.difference_update(eqn.outvars)
            after.update(v for v in _variables(eqn) if v in moving)
        if i == cut and i > 0:
            crossing.append(list(_ordered(jaxpr, after)))
            cut = next(ends)
    crossing.append([v for v in jaxpr.invars if v in moving])
    return crossing[::-1]


def _ordered(jaxpr: Jaxpr, chosen: Collection[Var]) -> Iterator[Var]:
    """`chosen` in the order of the program, so that runs are alike."""
    yield from (v for v in jaxpr.invars if v in chosen)
    for eqn in jaxpr.eqns:
        yield from (v for v in eqn.outvars if v in chosen)
