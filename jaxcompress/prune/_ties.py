"""Which indices of which axes have to go together, and which of them can go.

Every index of every axis of every value of a program is an atom. Atoms that an operation
lines up with each other are tied: they go together or stay together. Where a reshape
merges axes, an index of the merged axis goes if one of the indices that it is made of
goes, and an index of a part goes if all that is made of it goes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Merged", "Stay", "Ties"]


class Merged(NamedTuple):
    """`whole[i, j, ...]` is the index that `parts[0][i], parts[1][j], ...` make together."""

    whole: np.ndarray
    parts: tuple[np.ndarray, ...]
    by: str


class Stay(NamedTuple):
    """Atoms that cannot go, and the reason."""

    atoms: np.ndarray
    why: str


class Ties:
    """What is known about the atoms of a program."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.merged: list[Merged] = []
        self.stays: list[Stay] = []
        self.axes: dict[int, np.ndarray] = {}

    def new(self, size: int) -> np.ndarray:
        """The atoms of an axis."""
        atoms = np.arange(self.count, self.count + size)
        self.count += size
        return atoms

    def axis(self, atoms: np.ndarray) -> None:
        """Notes an axis of a value: it must not become empty."""
        self.axes[id(atoms)] = atoms

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is not b:
            self.pairs.append((a, b))

    def merge(self, whole: np.ndarray, parts: Sequence[np.ndarray], by: str) -> None:
        shape = tuple(len(part) for part in parts)
        self.merged.append(Merged(whole.reshape(shape), tuple(parts), by))

    def stay(self, atoms: np.ndarray, why: str) -> None:
        self.stays.append(Stay(atoms, why))

    def solve(
        self, hits: np.ndarray, stays: Iterable[Stay]
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Which atoms go, what stands for each in `why`, and why the others of `hits` stay.

        The largest set is found in which every rule holds, then what of it has to do with
        `hits`: a network may have zeros that nobody asked to remove.
        """
        roots = self._roots()
        free, why = np.ones(self.count, bool), {}

        def keep(atoms: np.ndarray, reason: str) -> bool:
            new = np.unique(roots[atoms])
            new = new[free[new]]
            free[new] = False
            why.update(dict.fromkeys(new.tolist(), reason))
            return bool(new.size)

        for atoms, reason in [*self.stays, *stays]:
            keep(atoms, reason)
        merged = [
            Merged(roots[m.whole], tuple(roots[p] for p in m.parts), m.by) for m in self.merged
        ]
        while True:
            while sum(_settle(m, free, why, keep) for m in merged):  # all of them each time
                pass
            gone = _reached(merged, free, roots[hits])[roots]
            empty = [axis[:1] for axis in self.axes.values() if axis.size and gone[axis].all()]
            if not sum(keep(first, "nothing would be left of an axis") for first in empty):
                return gone, roots, why

    def _roots(self) -> np.ndarray:
        """The smallest atom that each one is tied to."""
        roots = np.arange(self.count)
        if not self.pairs:
            return roots
        a, b = (np.concatenate(side) for side in zip(*self.pairs))
        while True:
            ra, rb = roots[a], roots[b]
            if (ra == rb).all():
                return roots
            smaller = np.minimum(ra, rb)
            np.minimum.at(roots, ra, smaller)
            np.minimum.at(roots, rb, smaller)
            roots = roots[roots]


def _along(part: np.ndarray, k: int, rank: int) -> np.ndarray:
    return part.reshape([-1 if d == k else 1 for d in range(rank)])


def _settle(
    m: Merged, free: np.ndarray, why: dict[int, str], keep: Callable[[np.ndarray, str], bool]
) -> bool:
    """Keeps what has to stay because others do; whether there was any."""
    rank, changed = len(m.parts), False
    covered = np.zeros(m.whole.shape, bool)
    for k, part in enumerate(m.parts):
        covered |= _along(free[part], k, rank)
    alone = m.whole[free[m.whole] & ~covered]
    if alone.size:
        sizes = " x ".join(map(str, m.whole.shape))
        changed |= keep(alone, f"it is one of {sizes} in a {m.by}, where only whole slices can go")
    for k, part in enumerate(m.parts):
        slices = np.moveaxis(m.whole, k, 0).reshape(len(part), -1)
        stuck = ~free[slices]
        for i in np.flatnonzero(stuck.any(1) & free[part]):
            changed |= keep(part[i : i + 1], why[int(slices[i, stuck[i].argmax()])])
    return changed


def _reached(merged: list[Merged], free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What is free and is in `start`, or is merged from or into what is."""
    found = np.zeros_like(free)
    found[start] = True
    found &= free
    while True:
        before = found.sum()
        for m in merged:
            rank = len(m.parts)
            for k, part in enumerate(m.parts):
                up = _along(found[part], k, rank) & free[m.whole]
                others = tuple(d for d in range(rank) if d != k)
                down = found[m.whole].any(others) & free[part]
                found[m.whole[up]] = True
                found[part[down]] = True
        if found.sum() == before:
            return found
