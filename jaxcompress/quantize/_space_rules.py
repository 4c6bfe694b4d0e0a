"""Which axes each primitive puts into one space, and which it does not let rotate.

A label on an axis says: rotated parameters make this value rotated along the axis, by the
rotation of its space. What is linear and acts on other axes keeps labels; a sum or a product
along an axis unifies them; everything else fixes them.
"""

from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxcompress._primitives import ELEMENTWISE, REDUCTIONS
from jaxcompress.quantize._facts import Facts, Rule, Value, by_dimension, is_zero, opaque, shape_of
from jaxcompress.quantize._space_moves import MOVES
from jaxcompress.quantize._spaces import CENTRED, MET, RIGID, Axes, Label

__all__ = ["RULES"]


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _pass(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    if not all(map(_is_float, [*eqn.invars, *eqn.outvars])):
        return _nonlinear(facts, eqn, ins)
    return [value.axes for value in ins]


def _nonlinear(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    why = f"{eqn.primitive.name} acts on each of its features"
    [made] = by_dimension(facts, eqn, ins, lambda labels: facts.mixed(labels, why))
    return [made] * len(eqn.outvars)


def _sum(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    ins = [value for v, value in zip(eqn.invars, ins) if not is_zero(v)] or ins
    why = f"{eqn.primitive.name} puts the same number into all of its features"
    return by_dimension(facts, eqn, ins, lambda labels: facts.together(labels, why))


def _select(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    which, *cases = ins
    [made] = _sum(facts, eqn.replace(invars=eqn.invars[1:]), cases)
    both = [Value(made, True), which]
    why = "select_n chooses for each of its features"
    choose = lambda labels: labels[0] if labels[1] is None else facts.mixed(labels, why)
    return by_dimension(facts, eqn, both, choose)


def _square(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    def one(labels: list[Label | None]) -> Label | None:
        if labels[0] is None or labels[0].squared:
            return facts.mixed(labels[:1], "it is squared twice")
        facts.mark(labels[0], RIGID, "the squares of its features are added up")
        return Label(labels[0].space, squared=True)

    return by_dimension(facts, eqn, ins, one)


def _power(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    return (_square if eqn.params["y"] == 2 else _nonlinear)(facts, eqn, ins)


def _product(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    """A parameter along one dimension is taken for a scale, for now: see `fold_scales`."""
    if eqn.invars[0] is eqn.invars[1]:
        return _square(facts, eqn, ins[:1])
    why = "mul meets each of its features with another number"
    rank = len(shape_of(eqn.outvars[0]))
    pairs = list(zip(*(value.axes or (None,) * rank for value in ins)))
    loose = [d for d, pair in enumerate(pairs) if all(map(facts.is_loose, pair))]
    moving = any(value.moving for value in ins)
    factor = facts.factor(pairs[loose[0]]) if len(loose) == 1 and moving else None
    made: list[Label | None] = []
    for d, (a, b) in enumerate(pairs):
        if a is None or b is None:
            made.append(a or b)
        elif factor is not None and d == loose[0]:
            made.append(facts.scaled((a, b)[1 - factor], (a, b)[factor]))
        else:
            made.append(facts.mixed([a, b], why))
    return [tuple(made)]


def _quotient(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    why = "div meets each of its features with another number"
    keep = lambda labels: labels[0] if labels[1] is None else facts.mixed(labels, why)
    return by_dimension(facts, eqn, ins, keep)


def _reduce_sum(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    for d in eqn.params["axes"]:
        label = ins[0].axes[d]
        if label is not None and not label.squared:  # of squares the sum is a length
            facts.mark(label, CENTRED, "reduce_sum adds up its features")
    return [tuple(label for d, label in enumerate(ins[0].axes) if d not in eqn.params["axes"])]


def _reduce(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    for value in ins:
        facts.fix(value.axes, f"{eqn.primitive.name} looks at each of its features")
    kept = [label for d, label in enumerate(ins[0].axes) if d not in eqn.params["axes"]]
    return [tuple(kept)] * len(eqn.outvars)


def _cumsum(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    facts.fix([ins[0].axes[eqn.params["axis"]]], "cumsum goes along it")
    return [ins[0].axes]


def _contract(facts: Facts, a: Label | None, b: Label | None, moving: tuple[bool, bool]) -> None:
    """A sum over an axis of products of `a` and `b`."""
    weight, activation = (b, a) if moving[0] else (a, b)
    if weight is not None and moving[0] != moving[1]:
        facts.contracted.add(weight.space)
    if weight is None or activation is None:
        label = weight or activation
        if label is not None and not label.squared:
            facts.mark(label, CENTRED, "a product adds up its features")
    elif weight.squared or activation.squared:
        facts.mixed([weight, activation], "a product weighs the squares of its features")
    else:
        facts.spaces.unify(weight.space, activation.space)
        facts.other.add(activation.space)
        if moving[0] != moving[1]:
            facts.spaces.mark(weight.space, MET)
        else:
            facts.mark(weight, RIGID, "two activations are multiplied along it")


def _dot_general(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    contract, batch = eqn.params["dimension_numbers"]
    moving = ins[0].moving, ins[1].moving
    for i, j in zip(*contract):
        _contract(facts, ins[0].axes[i], ins[1].axes[j], moving)
    why = "it is a batch axis of a product"
    result: list[Label | None] = []
    for i, j in zip(*batch):
        pair = ins[0].axes[i], ins[1].axes[j]
        result.append(pair[0] or pair[1] if None in pair else facts.mixed(pair, why))
    for value, used in zip(ins, zip(contract, batch)):
        inside = {d for dims in used for d in dims}
        free = [label for d, label in enumerate(value.axes) if d not in inside]
        facts.other.update(label.space for label in free if label is not None)
        result += free
    return [tuple(result)]


def _convolution(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    p = eqn.params
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return opaque(facts, eqn, ins)
    numbers, shape = p["dimension_numbers"], shape_of(eqn.outvars[0])
    lhs, rhs = (value.axes for value in ins)
    why = "a convolution moves along it"
    facts.fix([lhs[d] for d in numbers.lhs_spec[2:]] + [rhs[d] for d in numbers.rhs_spec[2:]], why)
    moving = ins[0].moving, ins[1].moving
    _contract(facts, lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[1]], moving)
    result = {d: facts.fixed(shape[d], why) for d in numbers.out_spec[2:]}
    result[numbers.out_spec[0]] = lhs[numbers.lhs_spec[0]]
    made = result[numbers.out_spec[1]] = rhs[numbers.rhs_spec[0]]
    facts.other.update(label.space for label in (made,) if label is not None)
    return [tuple(result[d] for d in range(len(shape)))]


RULES: dict[str, Rule] = {
    **MOVES,
    **dict.fromkeys(ELEMENTWISE, _nonlinear),
    **dict.fromkeys(
        [
            "convert_element_type",
            "copy",
            "copy_p",
            "name",
            "neg",
            "optimization_barrier",
            "sharding_constraint",
            "stop_gradient",
        ],
        _pass,
    ),
    **dict.fromkeys(["add", "add_any", "sub"], _sum),
    **dict.fromkeys(REDUCTIONS, _reduce),
    "conv_general_dilated": _convolution,
    "cumsum": _cumsum,
    "div": _quotient,
    "dot_general": _dot_general,
    "integer_pow": _power,
    "mul": _product,
    "reduce_sum": _reduce_sum,
    "select_n": _select,
    "square": _square,
}
