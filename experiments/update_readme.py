"""Takes a report into experiments/results and what a page says of it into that page.

    python experiments/update_readme.py report
    python experiments/update_readme.py report/first_principles
    python experiments/update_readme.py build/bench_cpu
    python experiments/update_readme.py build/bench_containers
    python experiments/update_readme.py report/distill_dataset

Of compress_digits.py: the table in README.md. Of first_principles.py: the tour in
docs/first_principles.md. Of bench_cpu.py: the tables in docs/cpu.md. Of bench_containers.py:
those in docs/pruning.md. Of distill_dataset.py: the one in docs/distillation.md. Each stands
between two markers, next to a JSON and a picture in experiments/results; tests compare it with
that JSON.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _digits_report import table
from _harness import ROOT, Parser, fail, write_json
from bench_containers import tables

RESULTS = ROOT / "experiments" / "results"
README = ROOT / "README.md"
TOUR = ROOT / "docs" / "first_principles.md"
CPU = ROOT / "docs" / "cpu.md"
PRUNING = ROOT / "docs" / "pruning.md"
KERNELS = ROOT / "docs" / "kernels.md"
DISTILLATION = ROOT / "docs" / "distillation.md"


def digits_block(record: dict) -> str:
    """The table, one sentence, the picture."""
    head, rows = table(record["variants"])
    environment = record["environment"]
    return "\n".join(
        [
            "",
            *grid(head[0], head[1:], ((row[0], row[1:]) for row in rows)),
            "",
            record["summary"]
            + f" `{environment['command']}`, seeds {environment['seeds']}, on {machine(record)}; "
            + "paired 95 % intervals over the same 1,000 test digits and seeds.",
            "",
            "![accuracy against bytes](experiments/results/compress_digits.png)",
            "",
        ]
    )


def tour_block(record: dict) -> str:
    """The picture, then each lesson's equation and line of result."""
    environment = record["environment"]
    lines = [
        "",
        "![nine panels, one or two for each lesson](../experiments/results/first_principles.png)",
        "",
        f"{record['data']}. `{environment['command']}`, seed {environment['seeds'][0]}, jax "
        f"{environment['versions']['jax']}, on {machine(record)}.",
        "",
    ]
    for number, lesson in enumerate(record["lessons"], 1):
        result = lesson["result"]
        lines += [f"**{number}. {lesson['name']}**", "", "```text", *lesson["equation"], "```", ""]
        lines += [f"{result[0].upper()}{result[1:]}.", ""]
    return "\n".join([*lines, ""])


def cpu_block(record: dict) -> str:
    """A table of dense products and one of pruned ones: times XLA's float32, by the minima."""
    works: dict[str, dict[str, dict]] = {}
    for row in record["rows"]:
        works.setdefault(row["work"], {})[row["name"]] = row
    environment = record["environment"]
    lines = [
        "",
        f"Times as fast as XLA in float32, by the fastest of interleaved runs, and the time of "
        f"that; `{environment['command']}`, jax {environment['versions']['jax']}, path "
        f"`{record['native']}`, on {machine(record)}. Medians and spread are in "
        "[the JSON](../experiments/results/bench_cpu.json).",
    ]
    for pruned in (False, True):
        here = {work: rows for work, rows in works.items() if ("pruned" in work) == pruned}
        names = list(dict.fromkeys(n for rows in here.values() for n in rows if n != "XLA f32"))
        ratio = lambda rows, name: f"{rows[name]['ratio_of_minima']:.2f}" if name in rows else ""
        times = [f"{rows['XLA f32']['min_ms']:.3f} ms" for rows in here.values()]
        found = [("XLA f32", times)]
        found += [(name, [ratio(rows, name) for rows in here.values()]) for name in names]
        lines += ["", *grid("", [w.removesuffix(", pruned") for w in here], found)]
    picture = "![times XLA f32, by work](../experiments/results/bench_cpu.png)"
    return "\n".join([*lines, *shares(record, works), "", picture, ""])


def shares(record: dict, works: dict[str, dict[str, dict]]) -> list[str]:
    """What part of the machine each uses, if that was measured."""
    most = record["peak"]
    if not most:
        return []
    known = lambda rows: any("of_peak" in row for row in rows.values())
    here = {work: rows for work, rows in works.items() if known(rows)}
    names = dict.fromkeys(n for rows in here.values() for n, r in rows.items() if "of_peak" in r)
    lines = [
        "",
        "The same as shares of what the cores do at most, measured in the same run: "
        f"{most['int8_gops']:.0f} GOP/s in int8, {most['float32_gflops']:.0f} GFLOP/s in float32; "
        f"with one row, of {most['read_gb_s']:.0f} GB/s from memory.",
        "",
    ]
    share = lambda rows, name: f"{rows[name]['of_peak']:.0%}" if name in rows else ""
    return lines + grid(
        "", here, ((name, [share(rows, name) for rows in here.values()]) for name in names)
    )


def containers_block(record: dict) -> str:
    """A table for each number of rows, of times as fast as dense float32, by the minima."""
    environment, (k, n, _) = record["environment"], record["block"]
    return "\n".join(
        [
            "",
            f"Times as fast as the dense block in float32, {k} to {n} to {k}, by the fastest of "
            "interleaved runs, and the time of that. `gains from` is the sparsity from which on "
            "it stays faster, linear in the time between two; `(dense)` is where `jc.prepack` "
            f"puts zeros back. `{environment['command']}`, jax {environment['versions']['jax']}, "
            f"path `{record['native']}`, on {machine(record)}. Medians, bytes and what each runs "
            "as are in [the JSON](../experiments/results/bench_containers.json).",
            *tables(record["rows"]),
            "",
            "![times as fast as dense, by sparsity](../experiments/results/bench_containers.png)",
            "",
        ]
    )


def dataset_block(record: dict, name: str) -> str:
    """A row for each set, beside what its paper says; a column for each size and network."""
    cells = {(r["method"], r["per_class"], r["network"]): r for r in record["rows"]}
    columns = list(dict.fromkeys(key[1:] for key in cells))
    environment = record["environment"]
    lines = [
        "",
        f"Test accuracy, per cent, mean and standard deviation of {record['networks']} networks, "
        "by images a class and the network that was trained on them; in italics what does not beat "
        f"random images by two standard errors. {record['data']}; "
        + ", ".join(f"{n} updates at {size}" for size, n in record["updates"].items())
        + f". `{environment['command']}`, jax {environment['versions']['jax']}, on "
        f"{machine(record)}.",
        "",
    ]
    rows = []
    for method in dict.fromkeys(key[0] for key in cells):
        line = []
        for column in columns:
            row = cells[(method, *column)]
            text = f"{100 * row['accuracy']:.1f} ± {100 * row['std']:.1f}"
            known = row["beats_random"] or method == "random"
            line.append(text if known else f"*{text}*")
        line.append(" / ".join(f"{v:.1f}" for v in record["published"].get(method, ())))
        rows.append((method, line))
    lines += grid("", [*(f"{size}, {network}" for size, network in columns), "published"], rows)
    picture = f"![the first image of each class of each set](../experiments/results/{name}.png)"
    return "\n".join([*lines, "", picture, ""])


def kernels_block(record: dict) -> str:
    """A row for each kind of weight, a column for each number of rows of activations."""
    cells: dict[tuple[str, str], str] = {}
    for row in record["rows"]:
        m, _, k, _, n, what = row["product"].split(maxsplit=5)
        found = dict(row["milliseconds"])
        others = [found.pop(name, None) for name in ("reference", "bfloat16")]
        for kernel, t in found.items():
            ratios = [f"{other / t:.2f}" for other in others if other is not None]
            text = ", ".join([f"{1e3 * t:.0f} µs", *ratios])
            cells[f"{what}, {kernel}", f"{m} x {k} x {n}"] = text
    columns = list(dict.fromkeys(size for _, size in cells))
    columns.sort(key=lambda size: int(size.split()[0]))
    lines = [
        "",
        "A product's time in a program of several layers, then how many times as fast it is as "
        "XLA's own product of the same arrays, and as the uncompressed weight in bfloat16. "
        f"`{record['environment']['command']}` on {machine(record)}, jax "
        f"{record['environment']['versions']['jax']}; all right, by the bounds of the suite.",
        "",
    ]
    names = dict.fromkeys(name for name, _ in cells)
    table = grid("weight", columns, ((n, [cells.get((n, c), "") for c in columns]) for n in names))
    return "\n".join([*lines, *table, ""])


def grid(
    corner: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]
) -> list[str]:
    """The lines of a table: a name, then numbers."""
    line = lambda name, cells: "| " + f"{name} | ".lstrip() + " | ".join(cells) + " |"
    columns = list(columns)
    return [line(corner, columns), "| --- |" + " ---: |" * len(columns)] + [
        line(name, cells) for name, cells in rows
    ]


def machine(record: dict) -> str:
    found = record["environment"]["machine"]
    cores = f"{found['cores']} cores ({found['processor']})"
    return f"one {found['accelerator']} and {cores}" if "accelerator" in found else cores


def replaced(page: str, name: str, block: str) -> str:
    """The page with `block` between the markers of `name`."""
    start = page.index("\n", page.index(f"<!-- {name}:")) + 1
    return page[:start] + block + page[page.index(f"<!-- /{name} -->") :]


def take(
    report: Path, file: str, picture: str, name: str, page: Path, block: Callable[[dict], str]
) -> None:
    record = json.loads((report / file).read_text())
    text = block(record)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", record)
    if f"results/{name}.png" in text:
        shutil.copyfile(report / picture, RESULTS / f"{name}.png")
    page.write_text(replaced(page.read_text(), name, text))


PAGES = {
    "first_principles": (TOUR, tour_block),
    "bench_cpu": (CPU, cpu_block),
    "bench_containers": (PRUNING, containers_block),
    "bench_kernels": (KERNELS, kernels_block),
    **{
        name: (DISTILLATION, partial(dataset_block, name=name))
        for name in ("distill_dataset", "distill_dataset_full")
    },
}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the folder that an experiment wrote")
    report = parser.parse_args().report
    if (report / "report.json").exists():
        picture = "accuracy_against_bytes.png"
        take(report, "report.json", picture, "compress_digits", README, digits_block)
        return
    for name, (page, block) in PAGES.items():
        if (report / f"{name}.json").exists():
            take(report, f"{name}.json", f"{name}.png", name, page, block)
            return
    fail(f"{report} has no report of an experiment that a page tells of; run one first")


if __name__ == "__main__":
    main()
