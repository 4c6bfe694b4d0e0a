"""The driver of every method that goes layer by layer over a whole model."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import io
from jaxcompress._accelerate import accelerate
from jaxcompress._calibrate import calibrate
from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._program import Program, is_array, name_of, trace
from jaxcompress._statistics import Statistic
from jaxcompress.arrays import is_compressed

__all__ = [
    "Finished",
    "Progress",
    "Tell",
    "Working",
    "advance",
    "first_values",
    "observed",
    "restacked",
    "sequential",
    "traced",
    "unstacked",
    "walk",
    "walked",
]


class Finished(NamedTuple):
    """What a progress callback is told: group `number` of `total` is done.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, batches = {"w": jnp.eye(4)}, [jnp.ones((2, 4))]
    >>> new = jc.quantize.gptq(
    ...     lambda p, x: x @ p["w"], params, batches, {"w": jc.quantize.int4()}, progress=print
    ... )
    Finished(number=1, total=1, layers=('w',))
    """

    number: int
    total: int
    layers: tuple[str, ...]

    @property
    def fraction(self) -> float:
        """What part of all groups is done, 0 to 1, for a progress bar."""
        return self.number / self.total


class Working(NamedTuple):
    """What a progress callback is told within a long layer: `number` groups of `total` are done.

    And `part` of the next, which has these `layers`. It comes every few seconds, by what
    there is to multiply; a layer that takes less has none.

    >>> import jaxcompress as jc
    >>> jc.quantize.Working(number=1, total=4, layers=("w",), part=0.5).fraction
    0.375
    """

    number: int
    total: int
    layers: tuple[str, ...]
    part: float

    @property
    def fraction(self) -> float:
        """What part of all groups is done, 0 to 1, for a progress bar."""
        return (self.number + self.part) / self.total


Progress = Callable[[Finished | Working], Any] | None
Tell = Callable[[float], Any]  # of what part of something is done
Work = Callable[[int, dict[str, Any], list[Any], Tell], dict[str, Any]]


def sequential(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    wanted: Collection[str],
    statistic: Statistic,
    solve: Callable[..., Any],
    *,
    identity: Any,
    resume: str | Path | None = None,
    progress: Progress = None,
    skip_unmet: bool = False,
) -> Any:
    """Replaces the leaves at `wanted` one group of layers after the other.

    The statistic of a group is that of the activations behind the groups already
    replaced. The activations of all batches between two layers are kept, the statistics
    and the work of one group only.

    Args:
      fn, params, batches: as everywhere; batches of one shape, read once.
      wanted: paths of leaves that are multiplied with something.
      statistic: of the activations that enter each layer.
      solve: `solve(unit, leaves, observed, tell)` returns new leaves by name, that of the
        unit itself as a rule. A unit is a path and, of stacked layers, the number of one
        (or None); `leaves` has every array by the name of its unit; it may `tell` how far
        it is.
      identity: what, beside params and batches, decides the result: text of it tells one
        run from another in the folder `resume`.
      resume: a folder where each finished group is kept; a run that is started again with
        the same arguments goes on from there.
      progress: called with a `Finished` after each group, and a `Working` within.
      skip_unmet: leave a leaf that is multiplied with nothing as it is, do not raise.
    """
    batches = list(batches)
    program = traced(fn, params, batches, wanted, skip_unmet=skip_unmet)

    def work(g: int, leaves: dict[str, Any], values: list[Any], tell: Tell) -> dict[str, Any]:
        seen, group = observed(program, g, leaves, values, statistic), program.groups[g]
        done: dict[str, Any] = {}
        for i, unit in enumerate(group):
            one = lambda part, i=i: tell((i + part) / len(group))
            done |= solve(unit, leaves, seen[name_of(unit)], one)
        return done

    return walk(program, params, batches, work, identity=identity, resume=resume, progress=progress)


def traced(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: list[Any],
    wanted: Collection[str],
    *,
    skip_unmet: bool = False,
) -> Program:
    """The program for these batches; raises if there are none, or a wanted leaf meets none."""
    if not batches:
        raise ValueError("there are no batches to learn from")
    _refuse_other_shapes(batches)
    program = trace(fn, params, batches[0], wanted)
    unmet = sorted(set(wanted) - {path for path, _ in program.products})
    if unmet and not skip_unmet:
        raise ValueError(
            f"{unmet[0]!r} meets no product in the function, so nothing can be learnt about the "
            "activations that it sees; leave it out of the rules"
        )
    return program


def observed(
    program: Program,
    g: int,
    leaves: dict[str, Any],
    values: list[Any],
    statistic: Statistic,
) -> dict[str, Any]:
    """The statistic of the activations that enter the layers of group `g`, by name."""
    units, segment = program.segment(g)
    part = {name_of(u): leaves[name_of(u)] for u in units}
    rules = [re.escape(name_of(u)) for u in program.groups[g]]
    return calibrate(segment, part, values, statistic, rules=rules)


def walk(
    program: Program,
    params: Any,
    batches: list[Any],
    work: Work,
    *,
    identity: Any,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """`params` with the leaves that `work` replaced, group after group.

    `work(g, leaves, values, tell)` returns new leaves by name, given all leaves as they are
    by then, and what crosses the cut before group `g`, of each batch.
    """
    found = walked(
        program, params, batches, work, identity=identity, resume=resume, progress=progress
    )
    return restacked(program, params, *found)


def walked(
    program: Program,
    params: Any,
    batches: list[Any],
    work: Work,
    *,
    identity: Any,
    resume: str | Path | None,
    progress: Progress,
) -> tuple[dict[str, Any], set[str]]:
    """As `walk`, but all leaves by name, and the paths of those that were replaced.

    What `work` returns under names that no unit has is among the leaves too.
    """
    store = None if resume is None else _Store(Path(resume), [identity, params, batches])
    values = first_values(batches)
    del batches
    leaves, changed = unstacked(program, params), set()
    total = len(program.groups)
    for g, group in enumerate(program.groups):
        names = tuple(map(name_of, group))

        def tell(part: float, g: int = g, names: tuple[str, ...] = names) -> None:
            if progress is not None and part < 1:
                progress(Working(g, total, names, part))

        done = store.read(g) if store is not None else None
        if done is None:
            done = work(g, leaves, values, tell)
            jax.block_until_ready(done)
            if store is not None:
                store.write(g, done)
        leaves |= done
        changed |= {unit[0] for unit in program.units if name_of(unit) in done}
        if g + 1 < len(program.groups):
            values = advance(program, g, leaves, values)
        if progress is not None:
            progress(Finished(g + 1, total, names))
    return leaves, changed


def first_values(batches: list[Any]) -> list[Any]:
    """What crosses the first cut: the arrays of each batch."""
    return [[x for x in jax.tree.leaves(b) if is_array(x)] for b in batches]


def advance(program: Program, g: int, leaves: dict[str, Any], values: list[Any]) -> list[Any]:
    """What crosses the cut behind group `g`, of each batch."""
    units, segment = program.segment(g)
    part, run = {name_of(u): leaves[name_of(u)] for u in units}, jax.jit(accelerate(segment))
    return [run(part, v) for v in values]


def _refuse_other_shapes(batches: list[Any]) -> None:
    shapes = [jax.tree.map(lambda x: (np.shape(x), getattr(x, "dtype", x)), b) for b in batches]
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"batches must have one shape; batch {i} has {found}, the first {shapes[0]}"
            )


def unstacked(program: Program, params: Any) -> dict[str, Any]:
    """Every array by the name of its unit."""
    arrays = dict(leaves_with_paths(params))
    return {
        name_of((path, row)): arrays[path]
        if row is None
        else jax.tree.map(lambda part, row=row: jnp.asarray(part)[row], arrays[path])
        for path, row in program.units
    }


def restacked(
    program: Program, params: Any, leaves: dict[str, Any], changed: Collection[str]
) -> Any:
    def whole(path: str, old: Any) -> Any:
        if path not in changed:
            return old
        if path not in program.scanned:
            return leaves[path]
        rows = [leaves[name_of((path, i))] for i in range(program.scanned[path])]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)

    return rebuild(params, [whole(path, old) for path, old in leaves_with_paths(params)])


class _Store:
    """A folder with a file for each finished group, of one run only."""

    def __init__(self, folder: Path, identity: list[Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file, mine = folder / "run.json", {"run": _digest(identity)}
        if not file.exists():
            file.write_text(json.dumps(mine) + "\n")
        elif json.loads(file.read_text()) != mine:
            raise ValueError(
                f"{folder} holds layers of a run with other weights, batches, rules or options; "
                "give another folder, or empty this one"
            )

    def _file(self, g: int) -> Path:
        return self.folder / f"{g:05}.safetensors"

    def read(self, g: int) -> dict[str, Any] | None:
        file = self._file(g)
        if not file.exists():
            return None
        loaded = io.load(file)
        # Its keys are numbers, because a path may hold what a file's path must not.
        names = json.loads(file.with_suffix(".json").read_text())
        return {name: loaded[str(i)] for i, name in enumerate(names)}

    def write(self, g: int, done: dict[str, Any]) -> None:
        file = self._file(g)
        file.with_suffix(".json").write_text(json.dumps(list(done)))
        # Last, and at once or not at all: it says that the group is finished.
        io.save(file, {str(i): leaf for i, leaf in enumerate(done.values())})


def _digest(identity: list[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(identity, is_leaf=is_compressed):
        for part in jax.tree.leaves(leaf):
            if is_array(part):
                array = np.asarray(part)
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()
