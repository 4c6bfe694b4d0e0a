"""What is found about the axes of a program, to rotate some of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from jaxcompress.quantize._spaces import CENTRED, FIXED, Axes, Label, Spaces

__all__ = ["Facts", "Rule", "Scale", "Value", "by_dimension", "is_zero", "opaque", "shape_of"]


class Value(NamedTuple):
    """The axes of a value, and whether it depends on more than the parameters."""

    axes: Axes
    moving: bool


class Scale(NamedTuple):
    """A product along an axis with a parameter: it takes the axis from one space to another."""

    before: int
    after: int
    factor: int  # the axis of the parameter


@dataclasses.dataclass
class Facts:
    """What is found about a program. `own[space]` is an axis of a parameter: path, number.

    Of such an axis, `contracted` says that activations are multiplied with it, `other` that
    it is used in another way.
    """

    spaces: Spaces = dataclasses.field(default_factory=Spaces)
    own: dict[int, tuple[str, int]] = dataclasses.field(default_factory=dict)
    scales: list[Scale] = dataclasses.field(default_factory=list)
    contracted: set[int] = dataclasses.field(default_factory=set)
    other: set[int] = dataclasses.field(default_factory=set)

    def new(self, size: int) -> Label | None:
        return None if size == 1 else Label(self.spaces.new(size))

    def fixed(self, size: int, why: str) -> Label | None:
        label = self.new(size)
        self.fix([label], why)
        return label

    def fix(self, labels: Sequence[Label | None], why: str) -> None:
        for label in labels:
            if label is not None:
                self.mark(label, FIXED, why)

    def mark(self, label: Label, mark: str, why: str = "") -> None:
        self.other.add(label.space)
        self.spaces.mark(label.space, mark, why)

    def together(self, labels: Sequence[Label | None], why: str) -> Label | None:
        """One label for values that are added: ones everywhere alike stay what they are."""
        there = [label for label in labels if label is not None]
        if not there:
            return None
        for label in there:
            self.other.add(label.space)
            self.spaces.unify(there[0].space, label.space)
        if any(label.squared for label in there):
            self.fix(there, why)
        elif len(there) < len(labels):
            self.mark(there[0], CENTRED, why)
        return Label(there[0].space)

    def mixed(self, labels: Sequence[Label | None], why: str) -> Label | None:
        """One label for values of which each index meets its own; it cannot be rotated."""
        found = self.together([label for label in labels if label is not None], why)
        self.fix([found], why)
        return found

    def is_loose(self, label: Label | None) -> bool:
        return label is not None and self.spaces.why(label.space, FIXED) is None

    def factor(self, pair: Sequence[Any]) -> int | None:
        """Which of two labels is the axis of a parameter that may be a scale of the other."""
        if any(label.squared for label in pair):
            return None
        used = self.other | self.contracted
        return next((i for i in (1, 0) if pair[i].space in self.own.keys() - used), None)

    def scaled(self, label: Any, factor: Any) -> Label:
        after = self.spaces.new(self.spaces.sizes[label.space])
        self.other.add(label.space)
        self.scales.append(Scale(label.space, after, factor.space))
        return Label(after)


Rule = Callable[[Facts, JaxprEqn, list[Value]], list[Axes]]


def opaque(facts: Facts, eqn: JaxprEqn, ins: list[Value]) -> list[Axes]:
    why = f"{eqn.primitive.name} needs it as it is"
    for value in ins:
        facts.fix(value.axes, why)
    return [tuple(facts.fixed(n, why) for n in shape_of(v)) for v in eqn.outvars]


def shape_of(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def is_zero(v: Any) -> bool:
    return isinstance(v, Literal) and v.val == 0


def by_dimension(
    facts: Facts,
    eqn: JaxprEqn,
    ins: list[Value],
    rule: Callable[[list[Label | None]], Label | None],
) -> list[Axes]:
    """`rule` for each dimension; scalars and sizes of one are the same everywhere."""
    rank = len(shape_of(eqn.outvars[0]))
    full = [value.axes or (None,) * rank for value in ins]
    return [tuple(rule([axes[d] for axes in full]) for d in range(rank))]
