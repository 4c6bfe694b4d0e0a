"""Spaces: axes of a program that can only be rotated all together, and what is known of them.

Two axes whose indices an operation lines up, because it adds or multiplies along them, lie in
one space. A reshape makes a space the product of several; each of those may be rotated alone.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxcompress.arrays._reshape import blocks_of

__all__ = ["CENTRED", "FIXED", "MET", "RIGID", "Axes", "Label", "Spaces"]

FIXED = "fixed"  # nothing may be done along it
RIGID = "rigid"  # only what keeps lengths may be done along it
CENTRED = "centred"  # only what keeps the vector of ones as well
MET = "met"  # activations are multiplied with weights along it


class Label(NamedTuple):
    """The space of an axis; `squared` where the values are the squares of what lies in it."""

    space: int
    squared: bool = False


Axes = tuple[Label | None, ...]  # None: along this axis all values are the same


class Spaces:
    """Spaces are numbers. Those that are unified are one; `find` says which."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, list[int]] = {}
        self._marks: dict[int, dict[str, str]] = {}

    def new(self, size: int) -> int:
        self.sizes.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def find(self, space: int) -> int:
        while self._parent[space] != space:
            self._parent[space] = space = self._parent[self._parent[space]]
        return space

    def parts(self, space: int) -> list[int]:
        """The spaces, none a product, of which this is the product: itself, as a rule."""
        root = self.find(space)
        if root not in self._parts:
            return [root]
        return [atom for part in self._parts[root] for atom in self.parts(part)]

    def is_whole(self, space: int) -> bool:
        """Whether this is no product, and no factor of one."""
        root = self.find(space)
        factors = {self.find(part) for parts in self._parts.values() for part in parts}
        return root not in self._parts and root not in factors

    def mark(self, space: int, mark: str, why: str = "") -> None:
        root = self.find(space)
        marks = self._marks.setdefault(root, {})
        if mark not in marks:
            marks[mark] = why
            for part in self._parts.get(root, []):
                self.mark(part, mark, why)

    def why(self, space: int, mark: str) -> str | None:
        """Why a space has this mark; None if it has not."""
        return self._marks.get(self.find(space), {}).get(mark)

    def unify(self, a: int, b: int) -> int:
        a, b = self.find(a), self.find(b)
        if a == b:
            return a
        if a in self._parts and b in self._parts:
            self._align(self.parts(a), self.parts(b))
        elif b in self._parts:
            a, b = b, a
        self._parent[b] = a
        for mark, why in self._marks.pop(b, {}).items():
            self.mark(a, mark, why)
        return a

    def product(self, spaces: Sequence[int]) -> int:
        if len(spaces) == 1:
            return spaces[0]
        size = 1
        for space in spaces:
            size *= self.sizes[space]
        whole = self.new(size)
        self._parts[whole] = list(spaces)
        return whole

    def split(self, space: int, sizes: Iterable[int]) -> list[int]:
        made = [self.new(n) for n in sizes]
        self.unify(space, self.product(made))
        return made

    def _align(self, a: list[int], b: list[int]) -> None:
        """Unifies two products, whose factors may be products of each other's."""
        for left, right in blocks_of([self.sizes[s] for s in a], [self.sizes[s] for s in b]):
            ours, a = a[: len(left)], a[len(left) :]
            theirs, b = b[: len(right)], b[len(right) :]
            if 1 in (len(ours), len(theirs)):
                self.unify(self.product(ours), self.product(theirs))
            else:
                for space in (*ours, *theirs):
                    self.mark(space, FIXED, f"reshapes make both {left} and {right} of it")
