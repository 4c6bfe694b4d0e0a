"""Which blocks are fastest on this device? Refills its rows of kernels/blocks.json.

    python experiments/tune_kernels.py --write        # minutes to an hour on a GPU or TPU
    python experiments/tune_kernels.py --ops nm_matmul --places 0 --minutes 2

For each op and each kind of product that the table tells apart (few rows of activations,
many), a search starts at the blocks that the table has: one number is halved or doubled,
the fastest of these neighbours is next, until none is 2 % faster. Blocks whose product is
wrong, or that the compiler refuses, are out. Most of the time is the compiler's, so several of
these may run beside each other, each with ops of its own: they compile together, and time one
at a time. Writes tune_kernels.json with every time, and with --write the chip's rows of the
table. Expected: no worse than the table by its own measure. Without a GPU or TPU it stops with
one line.
"""

import contextlib
import fcntl
import functools
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parent))
import _kernel_problems as problems
from _device_time import layered, milliseconds
from _harness import ROOT, Parser, environment, fail, write_json
from _kernel_problems import Problem
from bench_kernels import backend
from jaxcompress.kernels.block_table import DEFAULT, PATH, row_of
from jaxcompress.ops._kernels import chip, kernel_module

FASTER = 0.98  # of the best time: less is noise
Tile = tuple[int, ...]


class Slot(NamedTuple):
    """A tile of an op's table: which one, what it is measured on, and the least numbers."""

    op: str
    place: int
    problem: Callable[..., Problem]
    least: Tile
    most: Tile = (4096, 4096, 4096, 16, 6)


SIZE, FEW = (1024, 4096, 4096), (16, 4096, 4096)
WARPS = (1, 1)  # the least of warps and stages
MOST = (16, 6, 4096)  # warps, stages and programs; without programs where no sum is shared
INT4 = functools.partial(problems.weight, bits=4, group_size=128)
W4A8 = functools.partial(INT4, integers=True)
N_OF_M, BLOCKS = problems.two_of_four, problems.blocks
TRAINS = functools.partial(problems.blocks, trains=True)
# A TPU7x sums at most 1024 products of int8 exactly in a block. Bit planes, and kept rows,
# come in multiples of 256 on a TPU and of 64 on a GPU.
SLOTS = {
    "pallas_tpu": [
        Slot("int8_matmul", 0, problems.int8, (128, 256, 128), (4096, 4096, 1024)),
        Slot("quantized_matmul", 0, INT4, (64, 256, 256)),
        Slot("w4a8_matmul", 0, W4A8, (64, 128, 256), (4096, 4096, 1024)),
        Slot("nm_matmul", 0, N_OF_M, (64, 256, 256)),
        Slot("block_sparse_matmul", 0, BLOCKS, (128,)),
    ],
    "triton": [
        Slot("int8_matmul", 0, problems.int8, (16, 16, 32, *WARPS)),
        Slot("quantized_matmul", 0, INT4, (16, 16, 64, *WARPS, 1), (16, 256, 128, *MOST)),
        Slot("quantized_matmul", 1, INT4, (16, 16, 64, *WARPS, 1), (256, 256, 128, *MOST)),
        Slot("w4a8_matmul", 0, W4A8, (16, 16, 64, *WARPS, 1), (16, 256, 128, *MOST)),
        Slot("w4a8_matmul", 1, W4A8, (16, 16, 64, *WARPS, 1), (256, 256, 128, *MOST)),
        Slot("nm_matmul", 0, N_OF_M, (16, 16, 32, *WARPS, 1), (16, 256, 256, *MOST)),
        Slot("nm_matmul", 1, N_OF_M, (16, 16, 32, *WARPS, 1), (256, 256, 256, *MOST)),
        Slot("block_sparse_matmul", 0, BLOCKS, (16, 16, 16, *WARPS, 1), (16, 128, 128, *MOST)),
        Slot("block_sparse_matmul", 1, BLOCKS, (16, 16, 16, *WARPS, 1), (256, 128, 128, *MOST)),
        Slot("block_sparse_matmul", 2, TRAINS, (16, 16, 16, *WARPS), (256, 128, 128, 16, 6)),
    ],
}


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    default = ROOT / "report" / "tune_kernels.json"
    parser.add_argument("--out", type=Path, default=default, help=f"file (default {default})")
    parser.add_argument("--repeats", type=int, default=10, help="of each program (default 10)")
    ops = sorted({slot.op for slots in SLOTS.values() for slot in slots})
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, help="(default all)")
    places = sorted({slot.place for slots in SLOTS.values() for slot in slots})
    parser.add_argument(
        "--places", type=int, nargs="+", choices=places, default=places, help="tiles (default all)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="for a tile at most (default 60)")
    parser.add_argument("--quick", action="store_true", help="products of 256, one op")
    parser.add_argument("--write", action="store_true", help=f"refill {PATH.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.repeats < 1 or options.minutes <= 0:
        fail("--repeats is 1 or more, --minutes more than 0")
    return options


def neighbours(tile: Tile, least: Tile, most: Tile) -> list[Tile]:
    """One number halved or doubled; the number of stages, which is the fifth, one off."""
    found = []
    for i, size in enumerate(tile):
        for other in (size - 1, size + 1) if i == 4 else (size // 2, size * 2):
            if least[i] <= other <= most[i]:
                found.append((*tile[:i], other, *tile[i + 1 :]))
    return found


def climb(
    start: Tile,
    near: Callable[[Tile], list[Tile]],
    time: Callable[[Tile], float | None],
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Tile, dict[Tile, float | None]]:
    """The fastest tile that steps from `start` lead to, and the times of all that were tried.

    `time` gives milliseconds, or None for a tile that cannot be taken. Once it `is_over` no
    more are tried.
    """
    best, times = start, {start: time(start)}
    while True:
        times |= {tile: time(tile) for tile in near(best) if tile not in times and not is_over()}
        known = {tile: t for tile, t in times.items() if t is not None}
        if not known:
            return start, times
        fastest = min(known, key=known.get)
        if best in known and known[fastest] >= FASTER * known[best]:
            return best, times
        best = fastest


@contextlib.contextmanager
def using(slot: Slot, name: str, here: str, tile: Tile) -> Iterator[None]:
    """The table of a kernel with another tile for the chip."""
    table = kernel_module(slot.op, name).BLOCKS
    row = list(row_of(table, here))
    kind = type(row[slot.place])
    row[slot.place] = kind(tile) if kind is tuple else kind(*tile)
    before = dict(table)
    table[here] = tuple(row)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Only one process at a time is in here, of all that search on this machine."""
    with open(Path(tempfile.gettempdir()) / "tune_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def refusals() -> tuple[type[Exception], ...]:
    """What compilers raise of a tile that needs more memory than there is."""
    found: list[type[Exception]] = [RuntimeError, ValueError]
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        found.append(TritonError)
    return tuple(found)


def timed(
    slot: Slot, problem: Problem, name: str, here: str, repeats: int, reasons: dict[Tile, str]
) -> Callable[[Tile], float | None]:
    """Milliseconds of the problem in a tile; the reason where there are none."""
    placed = [jax.device_put(a) for a in problem.args]

    def time(tile: Tile) -> float | None:
        run = functools.partial(problem.run, implementation=name)
        try:
            with using(slot, name, here, tile):
                once = jax.jit(run).lower(*placed).compile()
                program = layered(run, problem.args)
            with alone():
                if problem.is_right(once(*placed)):
                    return milliseconds({name: program}, repeats)[name]
                reasons[tile] = "wrong"
        except refusals() as error:
            reasons[tile] = (str(error).splitlines() or [type(error).__name__])[0]
        return None

    return time


def tune(
    slot: Slot,
    size: tuple[int, int, int],
    name: str,
    here: str,
    repeats: int,
    minutes: float = 60,
) -> Any:
    """The record of one slot: where the search began and ended, and all it tried."""
    end = time.monotonic() + 60 * minutes
    start = tuple(row_of(kernel_module(slot.op, name).BLOCKS, here)[slot.place])[: len(slot.most)]
    near = functools.partial(neighbours, least=slot.least, most=slot.most)
    reasons: dict[Tile, str] = {}
    problem = slot.problem(*size)
    in_a_tile = timed(slot, problem, name, here, repeats, reasons)
    best, times = climb(start, near, in_a_tile, lambda: time.monotonic() > end)
    tried = [
        {"tile": list(tile), "milliseconds": t, **({"why not": reasons[tile]} if t is None else {})}
        for tile, t in times.items()
    ]
    return {
        "op": slot.op,
        "place": slot.place,
        "size": list(size),
        "from": list(start),
        "to": list(best),
        "tried": tried,
    }


def refilled(table: dict[str, Any], name: str, here: str, found: list[Any]) -> dict[str, Any]:
    """The table of all kernels with what was found for a chip."""
    table = json.loads(json.dumps(table))
    for record in found:
        rows = table[record["op"]][name]
        row = rows.setdefault(here, [list(tile) for tile in rows[DEFAULT]])
        row[record["place"]] = record["to"]
    return table


def written(table: dict[str, Any]) -> str:
    """The text of blocks.json: a line for each chip."""
    ops = []
    for op, backends in table.items():
        parts = []
        for name, rows in backends.items():
            lines = ",\n".join(f"   {json.dumps(c)}: {json.dumps(t)}" for c, t in rows.items())
            parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
        ops.append(f" {json.dumps(op)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def main() -> None:
    options = arguments()
    name = backend()
    here = chip("tpu") or chip("cuda") or chip("rocm")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[Any] = []
    slots = [s for s in SLOTS[name] if s.op in options.ops and s.place in options.places]
    for slot in slots[:1] if options.quick else slots:
        few = slot.most[0] == 16
        size = (256, 256, 256) if options.quick else FEW if few else SIZE
        record = tune(slot, size, name, here, options.repeats, options.minutes)
        found.append(record)
        print(f"{slot.op}, tile {slot.place}: {record['from']} -> {record['to']}", flush=True)
        record_of = {"device": here, "environment": environment([0]), "found": found}
        write_json(options.out, record_of)
    print(f"wrote {options.out}")
    if options.write:
        PATH.write_text(written(refilled(json.loads(PATH.read_text()), name, here, found)))
        print(f"wrote {PATH}; make test-kernels says what the compilers make of it")


if __name__ == "__main__":
    main()
