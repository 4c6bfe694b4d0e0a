"""The rows of ptq_minilm and prune_minilm: each is made once, and all become a record."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import ROOT, Parser, environment, fail, progress

RESULTS = ROOT / "experiments" / "results"
QUICK = (200, 10, 200, 500)  # instead of SIZES


def parser(description: str) -> argparse.ArgumentParser:
    made = Parser(description=description)
    made.add_argument("--wordnet", type=Path, help="folder with WordNet's data files")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    made.add_argument("--quick", action="store_true", help="two methods, 200 items")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    options = made.parse_args()
    if not options.out.is_dir():
        fail(f"{options.out} is no folder; make it, or name another with --out")
    return options


def record_of(
    options: argparse.Namespace,
    file: str,
    rows: list[Any],
    judged: Callable[[Any, Any], Any],
    calibration: int | None = None,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The record of `rows`, each `judged(row, dense)` unless an interrupted run has it.

    And what clears the rows that are kept aside, for when all is written. `calibration` is
    how many entries there are to learn from, if not as many as usual.
    """
    from _minilm_dense import SIZES, dense_model
    from _minilm_tasks import against
    from _resume import resumable

    sizes = QUICK if options.quick else SIZES
    if calibration is not None and not options.quick:
        sizes = (*sizes[:2], calibration, *sizes[3:])
    once, done = resumable(options.out / file, [sizes, options.quick])
    # Made when the first row asks for it: a report of finished rows needs no model.
    dense = functools.cache(lambda: dense_model(options.wordnet, sizes))
    with progress() as add:
        advance = add("models", len(rows))
        itself = lambda: {name: against(value, value) for name, value in dense().right.items()}
        base, found = once("dense", itself), []
        for row in rows:
            found.append(once(row.name, lambda row=row: judged(row, dense())))
            advance()
    record = {
        "environment": environment(),
        "data": f"WordNet 3.0: {sizes[0]:,} items, {sizes[2]:,} entries to calibrate, "
        f"{sizes[3]:,} to train the probe",
        "dense": base,
        "rows": found,
    }
    return record, done
