"""Which loss teaches best? All of them, on Fashion-MNIST, as somebody would first try them.

    python experiments/kd_fashion.py            # about half an hour on two cores; resumes
    python experiments/kd_fashion.py --quick    # one seed, one epoch of 2,000 images

Full Fashion-MNIST (Debian's dataset-fashion-mnist): 55,000 images to train on, 10,000 to
report on. A teacher of 2x1024 units and a student a quarter of its size, every loss, five
seeds; then convolutions of 16 and 32 channels teach ones of 4 and 8 on 20,000 images, three
seeds, with the four best losses, plain KD, and the two losses that need maps. Some students
begin with units of the teacher instead of drawn ones (jc.prune.shrink). The last epoch is
reported. Expected: that the best closes half of the student's gap; which losses beat plain KD
(`kl`) by two standard errors of the paired difference is said of each. Writes
report/kd_fashion: report.json and kd_fashion.png.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json
from _resume import resumable

WITH_UNITS = ("alone", "kl", "similarity_preserving", "dist")  # also begun with the teacher's


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    folder = ROOT / "report" / "kd_fashion"
    parser.add_argument("--seeds", type=int, default=5, help="of the MLPs (default 5)")
    parser.add_argument("--epochs", type=int, default=8, help="of a student (default 8)")
    parser.add_argument(
        "--out", type=Path, default=folder, help="folder (default report/kd_fashion)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 2,000 images")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = 1, 1
    if options.seeds < 1 or options.epochs < 1:
        fail("--seeds and --epochs are 1 or more")
    return options


def compare(
    pair: str,
    large: Any,
    small: Any,
    names: Any,
    train: Any,
    test: Any,
    seeds: int,
    epochs: int,
    once: Any,
    add: Any,
) -> list[dict[str, Any]]:
    """A row for the teacher and one for each method, over seeds."""
    import jax
    import numpy as np

    import _fashion_train as training
    from _fashion_losses import MAPS, METHODS

    methods = METHODS | MAPS
    advance = add(f"{pair}: teacher", 2 * epochs)
    # Not kept between runs: it takes a minute, its answers a quarter of a gigabyte.
    teacher = training.fit(large, methods["alone"], train, None, 1000, 2 * epochs, advance)
    taught = training.answers(large, teacher, train.x)
    begun = training.cut(large, teacher, small, train.x)
    students = {name: (small, methods[name]) for name in names}
    students |= {f"{name}, teacher's units": (begun, methods[name]) for name in WITH_UNITS}

    def one(name: str, seed: int, advance: Any) -> list[int]:
        params = training.fit(*students[name], train, taught, seed, epochs, advance)
        return np.flatnonzero(~training.right(small, params, test)).tolist()

    found = {}
    for name in students:
        advance = add(f"{pair}: {name}", seeds * epochs)
        wrong = [
            once(f"{pair}_{name}_{s}".replace(" ", "_"), partial(one, name, s, advance))
            for s in range(seeds)
        ]
        found[name] = np.array([[np.isin(np.arange(len(test.y)), w)] for w in wrong])[:, 0]
    count = lambda params: sum(p.size for p in jax.tree.leaves(params))
    best = training.right(large, teacher, test).mean()
    rows: list[dict[str, Any]] = [
        {"pair": pair, "name": "teacher", "accuracy": float(best), "parameters": count(teacher)}
    ]
    alone = 1 - found["alone"].mean()
    for name, wrong in found.items():
        per_seed = found["kl"].mean(1) - wrong.mean(1)
        error = float(per_seed.std(ddof=min(1, seeds - 1)) / seeds**0.5)
        rows.append(
            {
                "pair": pair,
                "name": name,
                "accuracy": float(1 - wrong.mean()),
                "std": float((1 - wrong.mean(1)).std(ddof=min(1, seeds - 1))),
                "closed": float((1 - wrong.mean() - alone) / max(best - alone, 1e-9)),
                "points_over_kl": float(100 * per_seed.mean()),
                "standard_error": 100 * error,
                "beats_kl": bool(per_seed.mean() > 2 * error > 0),
                "parameters": count(jax.eval_shape(small.init, jax.random.key(0))),
            }
        )
    return rows


def run(options: Any, out: Path) -> dict[str, Any]:
    import _fashion_train as training
    from _data import Split
    from _fashion_losses import MAPS, METHODS
    from _mnist import fashion

    begin = time.perf_counter()
    data = fashion()
    part = lambda n: Split(data.train.x[:n], data.train.y[:n])
    many, few = (2000, 2000) if options.quick else (len(data.train.y), 20_000)
    once, done = resumable(options.out, [options.seeds, options.epochs, options.quick])
    few_seeds = min(3, options.seeds)
    with progress() as add:
        rows = compare(
            "MLP",
            training.mlp(1024, 1024),
            training.mlp(384, 384),
            METHODS,
            part(many),
            data.test,
            options.seeds,
            options.epochs,
            once,
            add,
        )
        taught = [r for r in rows if r["name"] in METHODS.keys() - {"alone", "kl"}]
        best = [r["name"] for r in sorted(taught, key=lambda r: -r["accuracy"])[:4]]
        rows += compare(
            "CNN",
            training.cnn(16, 32),
            training.cnn(4, 8),
            ["alone", "kl", *best, *MAPS],
            part(few),
            data.test,
            few_seeds,
            options.epochs,
            once,
            add,
        )
    said = []
    for pair in ("MLP", "CNN"):
        mine = [r for r in rows if r["pair"] == pair and "closed" in r]
        top = max(mine, key=lambda r: r["accuracy"])
        beat = ", ".join(r["name"] for r in mine if r["beats_kl"]) or "none"
        said.append(
            f"{pair}: {top['name']} closes {100 * top['closed']:.0f} % of the gap; better than "
            f"plain KD by two standard errors: {beat}."
        )
    record = {
        "environment": environment(range(options.seeds)),
        "data": f"Fashion-MNIST: {many:,} images for the MLPs, {few:,} for the CNNs; 10,000 test",
        "epochs": options.epochs,
        "minutes": (time.perf_counter() - begin) / 60,
        "summary": " ".join(said),
        "rows": rows,
    }
    draw(rows, out / "kd_fashion.png")
    write_json(out / "report.json", record)
    done()
    return record


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for axis, pair in zip(axes, ("MLP", "CNN")):
        teacher, *mine = (r for r in rows if r["pair"] == pair)
        mine = sorted(mine, key=lambda r: r["accuracy"])
        axis.errorbar(
            [100 * r["accuracy"] for r in mine],
            range(len(mine)),
            xerr=[100 * r["std"] for r in mine],
            fmt="o",
            capsize=3,
        )
        axis.axvline(100 * teacher["accuracy"], color="C2", label="teacher")
        plain = next(r for r in mine if r["name"] == "kl")
        axis.axvline(100 * plain["accuracy"], color="C1", ls=":", label="plain KD")
        axis.set_yticks(range(len(mine)), [r["name"] for r in mine])
        axis.set(xlabel="test accuracy, %", title=pair)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(record: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, text in enumerate(("pair", "loss", "accuracy %", "gap closed", "over plain KD, points")):
        table.add_column(text, justify="left" if i < 2 else "right")
    for r in record["rows"]:
        if "closed" not in r:
            table.add_row(r["pair"], r["name"], f"{100 * r['accuracy']:.2f}", "", "")
            continue
        mark = " *" if r["beats_kl"] else ""
        table.add_row(
            r["pair"],
            r["name"],
            f"{100 * r['accuracy']:.2f} ± {100 * r['std']:.2f}",
            f"{100 * r['closed']:.0f} %",
            f"{r['points_over_kl']:+.2f} ± {r['standard_error']:.2f}{mark}",
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(record["summary"], soft_wrap=True)
    console.print(f"See {out / 'kd_fashion.png'}", soft_wrap=True)


def main() -> None:
    options = arguments()
    need("matplotlib", "rich", "jaxcompress")
    with staged(options.out) as out:
        record = run(options, out)
    show(record, options.out)


if __name__ == "__main__":
    main()
