"""How the kernels for devices cut a product: a table for each op, backend and chip.

The numbers are in blocks.json beside this file; the kernels say what each of them stands
for. `experiments/tune_kernels.py --write` measures them on the device at hand and writes
its rows anew. A chip that has no row gets the one named "default".
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT", "PATH", "block_table", "row_of"]

PATH = Path(__file__).with_name("blocks.json")
DEFAULT = "default"


def block_table(
    op: str, backend: str, kind: Callable[..., Any] = lambda *tile: tile
) -> dict[str, tuple[Any, ...]]:
    """By chip, the tiles of a kernel as `kind(*numbers)`, in the order that it gives them."""
    rows = json.loads(PATH.read_text())[op][backend]
    return {chip: tuple(kind(*tile) for tile in tiles) for chip, tiles in rows.items()}


def row_of(table: dict[str, tuple[Any, ...]], chip: str | None) -> tuple[Any, ...]:
    """The tiles of that chip, or the default ones."""
    return table.get(chip or DEFAULT, table[DEFAULT])
