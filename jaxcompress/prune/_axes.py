"""The axes of every value of a program, and which of their indices are tied together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jaxcompress._program import body_of
from jaxcompress.prune._axes_rules import RULES, Axes, Place, Step, Sum, fresh, opaque, tie
from jaxcompress.prune._derivatives import DERIVATIVES, is_float
from jaxcompress.prune._ties import Ties

__all__ = ["Frame", "follow"]


@dataclasses.dataclass
class Frame:
    """A jaxpr, the axes of its variables, and the jaxprs that its equations call.

    A call with a derivative of its own has two: its body, and that derivative.
    """

    jaxpr: Jaxpr
    axes: dict[Var, Axes] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Frame", ...]] = dataclasses.field(default_factory=dict)

    def variables(self) -> list[Var]:
        made = [v for eqn in self.jaxpr.eqns for v in eqn.outvars]
        return [*self.jaxpr.constvars, *self.jaxpr.invars, *made]

    def of(self, v: Any) -> Axes:
        return () if isinstance(v, Literal) else self.axes[v]


def follow(
    jaxpr: Jaxpr,
    inputs: Sequence[Axes],
    ties: Ties,
    sums: list[Sum],
    names: Sequence[str] = (),
    place: Place = (),
    derivatives: bool = True,
) -> Frame:
    """The axes of everything in `jaxpr`, given those of its inputs.

    Without `derivatives`, a call that brings its own is taken for its body.
    """
    frame = Frame(jaxpr, dict(zip(jaxpr.invars, inputs)))
    named = dict(zip(jaxpr.invars, names))
    for v in jaxpr.constvars:
        frame.axes[v] = fresh(ties, v)
    for i, eqn in enumerate(jaxpr.eqns):
        ins = [frame.of(v) for v in eqn.invars]
        mine = ["" if isinstance(v, Literal) else named.get(v, "") for v in eqn.invars]
        step, name = Step(ties, eqn, (*place, i), sums, mine), eqn.primitive.name
        body = body_of(eqn)
        if body is not None and all(is_float(v) for v in eqn.outvars if name in DERIVATIVES):
            frame.inner[i] = _call(step, body, ins, derivatives)
            inside = frame.inner[i][0]
            outs = [
                fresh(ties, v) if isinstance(v, Literal) else inside.axes[v]
                for v in inside.jaxpr.outvars
            ]
        else:
            outs = RULES.get(name, opaque)(step, ins)
            # The parameter's name is kept through what only views it.
            if name in ("reshape", "transpose", "broadcast_in_dim", "convert_element_type"):
                named[eqn.outvars[0]] = mine[0]
        frame.axes.update(zip(eqn.outvars, outs))
    for axes in frame.axes.values():
        for axis in axes:
            ties.axis(axis)
    return frame


def _call(step: Step, body: ClosedJaxpr, ins: list[Axes], derivatives: bool) -> tuple[Frame, ...]:
    frame = follow(body.jaxpr, ins, step.ties, step.sums, step.names, step.place, derivatives)
    derive = DERIVATIVES.get(step.eqn.primitive.name)
    if derive is None or not derivatives:
        return (frame,)
    outs = [frame.of(v) for v in body.jaxpr.outvars]
    floats = [axes for axes, v in zip(ins, step.eqn.invars) if is_float(v)]
    forward = step.eqn.primitive.name == "custom_jvp_call"
    inputs, outputs = ([*ins, *floats], outs) if forward else ([*ins, *outs], floats)
    sums: list[Sum] = []
    # It may call the function itself, whose derivative is this one.
    derivative = follow(derive(step.eqn).jaxpr, inputs, step.ties, sums, derivatives=False)
    for found in sums:  # of cotangents nothing is known, so none of them is a constant
        step.stay(found.atoms, f"the derivative of {step.params.get('name', 'a call')} sums it")
    for axes, v in zip(outputs, derivative.jaxpr.outvars):
        tie(step.ties, derivative.of(v), axes)
    return frame, derivative
