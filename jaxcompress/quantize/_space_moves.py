"""Spaces through primitives that only move values: what stays whole keeps its label."""

import math
from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jaxcompress.arrays._reshape import blocks_of
from jaxcompress.quantize._facts import Facts, Rule, Value, is_zero, opaque, shape_of
from jaxcompress.quantize._spaces import Axes, Label

__all__ = ["MOVES"]


def _broadcast(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    result: list[Label | None] = [None] * len(shape_of(eqn.outvars[0]))
    for label, d in zip(ins[0].axes, eqn.params["broadcast_dimensions"]):
        result[d] = label
    return [tuple(result)]


def _transpose(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    return [tuple(ins[0].axes[d] for d in eqn.params["permutation"])]


def _squeeze(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    axes = ins[0].axes
    gone = {d % len(axes) for d in eqn.params["dimensions"]}
    return [tuple(label for d, label in enumerate(axes) if d not in gone)]


def _reshape(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if eqn.params["dimensions"] is not None or math.prod(new) == 0:
        return opaque(facts, eqn, ins)
    labels = [label for label, n in zip(ins[0].axes, old) if n != 1]
    made: list[Label | None] = []
    for before, after in blocks_of([n for n in old if n != 1], [n for n in new if n != 1]):
        mine, labels = labels[: len(before)], labels[len(before) :]
        made += _reshaped(facts, mine, before, after)
    rest = iter(made)
    return [tuple(None if n == 1 else next(rest) for n in new)]


def _reshaped(
    facts: Facts, labels: list[Label | None], before: Sequence[int], after: Sequence[int]
) -> list[Label | None]:
    first = labels[0]
    if before == after or all(label is None for label in labels):
        return [first] * len(after)
    if len(before) == 1 and first is not None:
        return [Label(part, first.squared) for part in facts.spaces.split(first.space, after)]
    why = f"a reshape makes {tuple(after)} of {tuple(before)}"
    if len(after) == 1 and not any(label is not None and label.squared for label in labels):
        spaces = [
            label or facts.fixed(n, "a reshape repeats it") for label, n in zip(labels, before)
        ]
        return [Label(facts.spaces.product([s.space for s in spaces if s is not None]))]
    facts.fix(labels, why)
    return [facts.fixed(n, why) for n in after]


def _concatenate(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    along, shape = eqn.params["dimension"], shape_of(eqn.outvars[0])
    why = "concatenate puts something beside it"
    facts.fix([value.axes[along] for value in ins], why)
    result = [facts.together(labels, why) for labels in zip(*(value.axes for value in ins))]
    result[along] = facts.fixed(shape[along], why)
    return [tuple(result)]


def _pad(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    why, result = "pad puts something beside it", []
    for d, (label, config) in enumerate(zip(ins[0].axes, eqn.params["padding_config"])):
        if any(config):
            facts.fix([label], why)
            result.append(facts.fixed(shape_of(eqn.outvars[0])[d], why))
        else:
            zero = is_zero(eqn.invars[1])
            result.append(label if zero else facts.together([label, None], why))
    return [tuple(result)]


def _part(facts: Facts, label: Label | None, size: int, start: int, n: int) -> Label | None:
    """`n` of `size` indices; one of several equal parts is a factor of a product."""
    if label is None or n == size:
        return label
    why = "a slice takes a part of it"
    if n == 1 or size % n or start % n:
        facts.fix([label], why)
        return facts.fixed(n, why)
    outer, inner = facts.spaces.split(label.space, (size // n, n))
    facts.fix([Label(outer)], why)
    return Label(inner, label.squared)


def _slice(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    shape = shape_of(eqn.invars[0])
    if eqn.params["strides"] is not None and set(eqn.params["strides"]) != {1}:
        return opaque(facts, eqn, ins)
    parts = zip(ins[0].axes, shape, starts, limits)
    return [tuple(_part(facts, label, size, a, b - a) for label, size, a, b in parts)]


def _split(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    along, sizes, start = eqn.params["axis"], eqn.params["sizes"], 0
    outs = []
    for n in sizes:
        axes = list(ins[0].axes)
        axes[along] = _part(facts, axes[along], sum(sizes), start, n)
        outs.append(tuple(axes))
        start += n
    return outs


def _reversed(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    turned, shape = eqn.params["dimensions"], shape_of(eqn.outvars[0])
    facts.fix([ins[0].axes[d] for d in turned], "rev turns it round")
    return [
        tuple(
            facts.fixed(n, "rev turns it round") if d in turned else label
            for d, (n, label) in enumerate(zip(shape, ins[0].axes))
        )
    ]


def _gather(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    """Whole rows of a table keep their features."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if numbers.operand_batching_dims:
        return opaque(facts, eqn, ins)
    table, indices = ins
    why, shape = "gather looks it up", shape_of(eqn.outvars[0])
    facts.fix(indices.axes, why)
    windows = [d for d in range(len(table.axes)) if d not in numbers.collapsed_slice_dims]
    facts.fix([table.axes[d] for d in numbers.collapsed_slice_dims], why)
    result = [facts.fixed(n, why) for n in shape]
    for d, place in zip(windows, numbers.offset_dims):
        label = table.axes[d]
        if sizes[d] != shape_of(eqn.invars[0])[d]:
            facts.fix([label], why)
        elif label is not None:
            facts.other.add(label.space)
            result[place] = label
    return [tuple(result)]


def _dynamic_slice(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    why, result = "dynamic_slice takes a part of it", []
    for label, size, n in zip(ins[0].axes, shape_of(eqn.invars[0]), eqn.params["slice_sizes"]):
        if n != size:
            facts.fix([label], why)
        result.append(label if n == size else facts.fixed(n, why))
    return [tuple(result)]


def _iota(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    return [tuple(facts.fixed(n, "iota counts along it") for n in shape_of(eqn.outvars[0]))]


MOVES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reversed,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
