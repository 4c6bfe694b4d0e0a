"""The spaces of a whole program: its calls, loops over layers and branches included."""

from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxcompress._model import Model
from jaxcompress._program import body_of
from jaxcompress._quax import scan_sizes
from jaxcompress.quantize._facts import Facts, Value, opaque, shape_of
from jaxcompress.quantize._space_rules import RULES
from jaxcompress.quantize._spaces import RIGID, Axes

__all__ = ["find_spaces"]


def find_spaces(model: Model, may_change: Collection[str]) -> tuple[Facts, dict[str, Axes]]:
    """What is found, and the axes of each parameter. What may not change is fixed."""
    facts, jaxpr = Facts(), model.jaxpr.jaxpr
    parameters, inputs = {}, []
    for path, v in zip(model.paths, jaxpr.invars):
        axes = tuple(map(facts.new, shape_of(v)))
        facts.own |= {label.space: (path, d) for d, label in enumerate(axes) if label is not None}
        parameters[path] = axes
        inputs.append(Value(axes, False))
        if path not in may_change:
            facts.fix(axes, f"the rules leave {path!r} as it is")
        elif not jnp.issubdtype(v.aval.dtype, jnp.floating):
            facts.fix(axes, f"{path!r} holds {v.aval.dtype}")
    why = "the function takes it as an argument"
    for v in jaxpr.invars[len(inputs) :]:
        inputs.append(Value(tuple(facts.fixed(n, why) for n in shape_of(v)), True))
    for value in _follow(facts, jaxpr, inputs):
        facts.fix(value.axes, "the function returns it")
    return facts, parameters


def _follow(facts: Facts, jaxpr: Jaxpr, ins: Sequence[Value]) -> list[Value]:
    env: dict[Any, Value] = dict(zip(jaxpr.invars, ins))
    for v in jaxpr.constvars:
        why = "the function holds a constant along it"
        env[v] = Value(tuple(facts.fixed(n, why) for n in shape_of(v)), False)

    def read(v: Any) -> Value:
        return Value((None,) * len(shape_of(v)), False) if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        given, body = [read(v) for v in eqn.invars], body_of(eqn)
        if body is not None:
            outs = _follow(facts, body.jaxpr, given)
        elif eqn.primitive.name == "scan":
            outs = _scan(facts, eqn, given)
        elif eqn.primitive.name == "cond":
            outs = _cond(facts, eqn, given)
        else:
            moving = any(value.moving for value in given)
            rule = RULES.get(eqn.primitive.name, opaque)
            outs = [Value(axes, moving) for axes in rule(facts, eqn, given)]
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _scan(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
    """Layers that are stacked: one space does for what each hands on to the next."""
    body: ClosedJaxpr = eqn.params["jaxpr"]
    consts, carries = scan_sizes(eqn.params)
    first = consts + carries
    why = "a scan goes along it"
    lead = facts.mixed([value.axes[0] for value in ins[first:]], why)
    lead = lead or facts.fixed(eqn.params["length"], why)
    carried = [tuple(map(facts.new, shape_of(v))) for v in eqn.invars[consts:first]]
    for axes, value in zip(carried, ins[consts:first]):
        _same(facts, [axes, value.axes])
        for label in axes:
            if label is not None:
                facts.mark(label, RIGID, "a scan hands it on from layer to layer")
    each = [Value(value.axes[1:], value.moving) for value in ins[first:]]
    outs = _follow(
        facts, body.jaxpr, [*ins[:consts], *(Value(axes, True) for axes in carried), *each]
    )
    for axes, value in zip(carried, outs):
        _same(facts, [axes, value.axes])
    stacked = [Value((lead, *value.axes), value.moving) for value in outs[carries:]]
    return [*(Value(axes, True) for axes in carried), *stacked]


def _cond(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
    branches = [_follow(facts, branch.jaxpr, ins[1:]) for branch in eqn.params["branches"]]
    moving = any(value.moving for value in ins)
    return [Value(_same(facts, [v.axes for v in values]), moving) for values in zip(*branches)]


def _same(facts: Facts, several: Sequence[Axes]) -> Axes:
    why = "what it is at first, or in another branch, is alike for all of its features"
    return tuple(facts.together(labels, why) for labels in zip(*several))
