"""Which layers are learned together: blocks of a traced program."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxcompress._layout import is_weight
from jaxcompress._paths import leaves_with_paths
from jaxcompress._program import Program, name_of
from jaxcompress._rules import assign

__all__ = ["in_blocks"]


def in_blocks(program: Program, params: Any, blocks: Sequence[str] | None) -> Program:
    """`program` with a group for each block.

    `blocks` are patterns of paths, each a block. Without them, the layers of one module are
    a block, except those at the top of the model, which are blocks of their own, as layers
    are that no pattern matches. Blocks that run side by side become one.
    """
    wanted = {path for path, _ in program.products}
    keys = _modules(params, wanted) if blocks is None else _matched(params, wanted, blocks)
    # Each of stacked layers is a layer of its own.
    key = lambda unit: (keys[unit[0]], unit[1]) if unit[0] in keys else unit
    sizes: list[int] = []
    last: set[Any] = set()
    for group in program.groups:
        here = {key(unit) for unit in group}
        if sizes and here & last:
            sizes[-1] += 1
        else:
            sizes.append(1)
        last = here
    joined = program.joined(sizes)
    if blocks is not None:
        _refuse_torn(joined, key, blocks)
    return joined


def _modules(params: Any, wanted: set[str]) -> dict[str, Any]:
    """For each path the module that holds its layer, unless that is the top."""
    module = lambda path: path.split("/")[:-2]
    weights = [module(path) for path, leaf in leaves_with_paths(params) if is_weight(leaf)]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*weights))
    top = [names[0] for names in shared]
    return {path: tuple(module(path)) for path in wanted if module(path) != top}


def _matched(params: Any, wanted: set[str], blocks: Sequence[str]) -> dict[str, Any]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks are a list of patterns of paths; got {blocks!r}")
    found = assign(params, {pattern: (pattern,) for pattern in blocks})
    keys = {path: pattern for path, (pattern,) in found.items() if path in wanted}
    for pattern in blocks:
        if pattern not in keys.values():
            raise ValueError(
                f"the block {pattern!r} has no weight that rules name and no block before it has"
            )
    return keys


def _refuse_torn(program: Program, key: Any, blocks: Sequence[str]) -> None:
    places: dict[Any, list[int]] = {}
    for g, group in enumerate(program.groups):
        for k in {key(unit) for unit in group}:
            places.setdefault(k, []).append(g)
    for (pattern, _), at in places.items():
        for before, after in itertools.pairwise(at):
            names = [name_of(u) for g in range(before + 1, after) for u in program.groups[g]]
            raise ValueError(
                f"the layers of the block {pattern!r} do not follow each other: "
                f"{', '.join(names)} come between them"
            )
