"""Which implementation of an op runs: a table that is read from the top.

An op lists its implementations, best first, the reference last. Each says for which
problem it will not do, and where another serves better, in words; the first that has
nothing to say runs. The answer depends on the platform, the shapes, the dtypes, and on
what is installed and plugged in when the program is traced, so that
`jaxcompress.explain` can state it and a compiled program is stable. There is no fallback
at run time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress.ops._refusal import refused

__all__ = ["PLATFORMS", "Choice", "Implementation", "Problem", "choose", "dispatch", "explained"]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A product `(m, k) x (k, n)`, as far as a choice may depend on it."""

    m: int
    k: int
    n: int
    bits: int = 8
    group_size: int | None = None
    dtype: str = "float32"
    packed: bool = False
    transpose_w: bool = False

    @property
    def group(self) -> int | None:
        """The size of a group, if there is more than one along `k`."""
        return self.group_size if self.group_size and self.group_size < self.k else None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A named way to do an op, in words too.

    `refuses(problem, platform)` says why it cannot; `defers` why it should not, unless it
    is asked for by name. `blocks` says how a kernel cuts the problem.
    """

    name: str
    does: str
    run: Callable[..., Any]
    refuses: Callable[[Problem, str], str | None] = lambda problem, platform: None
    defers: Callable[[Problem, str], str | None] = lambda problem, platform: None
    blocks: Callable[[Problem, str], str] | None = None


class Choice(NamedTuple):
    """The implementation taken, what it does, and what kept the ones above it out."""

    implementation: Implementation
    why: str


def choose(
    table: Sequence[Implementation],
    problem: Problem,
    platform: str,
    implementation: str | None = None,
) -> Choice:
    """The first of `table` that does the problem on the platform, or the named one.

    Raises `ValueError` for a name that is not in the table, and for a named
    implementation that will not do the problem, with its reason.
    """
    if implementation is not None:
        named = _named(table, implementation)
        reason = named.refuses(problem, platform)
        if reason:
            raise ValueError(f"implementation {implementation!r} cannot run: {reason}")
        return Choice(named, f"{named.does} (asked for by name)")
    passed = []
    for candidate in table:
        reason = candidate.refuses(problem, platform) or candidate.defers(problem, platform)
        if reason is None:
            break
        passed.append(f"not {candidate.name}: {reason}")
    return Choice(candidate, "; ".join([candidate.does, *passed]))


def explained(table: Sequence[Implementation], problem: Problem, platform: str) -> Choice:
    """`choose`, which also says how the kernel cuts the problem, if it is one that does."""
    choice = choose(table, problem, platform)
    blocks = choice.implementation.blocks
    if blocks is None:
        return choice
    return choice._replace(why=f"{choice.why}; {blocks(problem, platform)}")


def dispatch(
    table: Sequence[Implementation],
    problem: Problem,
    implementation: str | None,
    *args: jax.Array,
) -> Any:
    """Runs the choice of whichever platform the program is compiled for.

    A named implementation raises its reason only where the program is compiled for a platform
    that it refuses.
    """
    if implementation is not None:
        named = _named(table, implementation)
        reasons = {p: named.refuses(problem, p) for p in PLATFORMS}
        usable = [p for p, reason in reasons.items() if reason is None]
        if not usable:
            why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
            raise ValueError(f"implementation {implementation!r} cannot run: {why}")
        if len(usable) == len(PLATFORMS):
            return named.run(*args)
        serves = lambda p: choose(table, problem, p).implementation.name
        refusing = {
            p: f"implementation {implementation!r} cannot run on {p}, which the program is "
            f"compiled for: {reason}; there {serves(p)!r} serves"
            for p, reason in reasons.items()
            if reason is not None
        }
        elsewhere = f"implementation {implementation!r} runs on {', '.join(usable)} only"
        stop = refused(named.run, refusing, elsewhere)
        return jax.lax.platform_dependent(*args, default=stop, **dict.fromkeys(usable, named.run))
    chosen = {p: choose(table, problem, p).implementation for p in PLATFORMS}
    reference = table[-1]
    special = {p: c.run for p, c in chosen.items() if c is not reference}
    if not special:
        return reference.run(*args)
    return jax.lax.platform_dependent(*args, default=reference.run, **special)


def _named(table: Sequence[Implementation], name: str) -> Implementation:
    for candidate in table:
        if candidate.name == name:
            return candidate
    names = ", ".join(repr(i.name) for i in table)
    raise ValueError(f"there is no implementation {name!r} of this op; there are {names}")
