"""Which way to prune loses least, from 80 to 99 % zeros?

    python experiments/prune_fashion.py            # five seeds, under 60 minutes on two cores
    python experiments/prune_fashion.py --quick    # two seeds, 3,000 images: does it run?

LeNet-300-100 on all of Fashion-MNIST (Debian's dataset-fashion-mnist), every seed in one
program; a CNN of 16 and 32 channels on 20,000 of its images. Each method gets the same
updates, and the accuracy is that of the last epoch. Expected: iterative magnitude pruning
beats one-shot, and RigL beats SET, at 98 %. Where jaxpruner is installed (pip install
git+https://github.com/google-research/jaxpruner), its RigL and SET are trained too. A run that
is cut off goes on where it was: finished trainings lie in build/prune_fashion. Writes
prune_fashion.json and prune_fashion.png to experiments/results.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, write_json

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
CNN_METHODS, CNN_SPARSITIES = ("magnitude", "rigl", "synflow"), (0.9, 0.98)
CNN_SEEDS, CNN_IMAGES = 3, 20_000
RUNGS = (0.5, *SPARSITIES)  # of the lottery ticket
CLAIMS = (  # better, worse, at
    ("iterative", "one_shot", 0.98),
    ("rigl", "set", 0.98),
    ("rigl, jaxpruner", "set, jaxpruner", 0.98),
)


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--epochs", type=int, default=6, help="of each training (default 6)")
    parser.add_argument("--images", type=int, default=60_000, help="to train on (default all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiments/results/prune_fashion.json", help="file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, one epoch of 3,000 images, one sparsity"
    )
    options = parser.parse_args()
    options.sparsities, options.work = SPARSITIES, ROOT / "build" / "prune_fashion"
    if options.quick:
        options.seeds, options.epochs, options.images = 2, 1, 3000
        options.sparsities, options.work = (0.98,), ROOT / "build" / "prune_fashion_quick"
        options.out = options.work / "prune_fashion.json"
    if min(options.seeds, options.epochs, options.images) < 1:
        fail("--seeds, --epochs and --images are 1 or more")
    return options


def runs(options: Any) -> list[tuple[str, str, float]]:
    """`(network, method, sparsity)` of every row; the tickets of a ladder are made together."""
    from _jaxpruner import jaxpruner
    from _prune_methods import METHODS, PEERS

    mlp = [("mlp", "dense", 0.0), ("mlp", "sr_ste", 0.5)]
    mlp += [("mlp", name, s) for name in METHODS for s in options.sparsities]
    mlp += [("mlp", "lottery", s) for s in options.sparsities]
    mlp += [("mlp", name, 0.98) for name in PEERS if jaxpruner()]
    cnn = [("cnn", "dense", 0.0)]
    cnn += [("cnn", n, s) for n in CNN_METHODS for s in CNN_SPARSITIES if s in options.sparsities]
    return mlp + cnn


def train_all(options: Any) -> list[dict[str, Any]]:
    import numpy as np

    from _data import Split
    from _mnist import FASHION, fashion, mnist
    from _prune_methods import DENSE, METHODS, PEERS, SR_STE, TICKET, rung, zeros
    from _prune_train import CNN, MLP, fit

    whole = mnist(FASHION, validation=0) if FASHION.is_dir() else fashion()
    order = np.random.default_rng(0).permutation(len(whole.train.y))
    settings = {"epochs": options.epochs, "images": options.images}

    def data(network: str) -> tuple[Split, int]:
        n, seeds = options.images, options.seeds
        if network == "cnn":
            n, seeds = min(n, CNN_IMAGES), min(seeds, CNN_SEEDS)
        chosen = order[:n]
        return Split(whole.train.x[chosen], whole.train.y[chosen]), seeds

    def file(network: str, name: str, sparsity: float) -> Path:
        return options.work / f"{network}-{name}-{sparsity:g}.json"

    def finished(row: tuple[str, str, float]) -> dict[str, Any] | None:
        if not file(*row).exists():
            return None
        found = json.loads(file(*row).read_text())
        same = found["settings"] == settings and len(found["accuracy"]) == data(row[0])[1]
        return found if same else None

    def record(row: tuple[str, str, float], one: Any) -> dict[str, Any]:
        network, name, sparsity = row
        found = {
            "network": network,
            "method": name,
            "sparsity": sparsity,
            "zeros": float(np.mean([zeros(p) for p in one.params])),
            "accuracy": one.accuracy,
            "seconds": one.seconds,
            "settings": settings,
        }
        write_json(file(*row), found)
        return found

    def ladder(network: str, model: Any) -> None:
        """Lottery tickets, each from the one before: train, prune, rewind."""
        train, seeds = data(network)

        def trained(method: Any, masks: Any) -> Any:
            n = options.epochs
            return fit(model, method, 0.0, train, whole.test, range(seeds), n, masks)

        one, masks = trained(DENSE, None), [None] * seeds
        for sparsity in (s for s in RUNGS if s <= max(options.sparsities)):
            masks = [rung(p, m, sparsity) for p, m in zip(one.params, masks)]
            one = trained(TICKET, masks)
            if sparsity in options.sparsities:
                record((network, "lottery", sparsity), one)

    methods = METHODS | PEERS | {"dense": DENSE, "sr_ste": SR_STE}
    rows = runs(options)
    with progress() as add:
        advance = add("trainings", len(rows))
        for row in rows:
            network, name, sparsity = row
            if finished(row) is None:
                model = MLP() if network == "mlp" else CNN()
                train, seeds = data(network)
                if name == "lottery":
                    ladder(network, model)
                else:
                    one = fit(
                        model,
                        methods[name],
                        sparsity,
                        train,
                        whole.test,
                        range(seeds),
                        options.epochs,
                    )
                    record(row, one)
            advance()
    return [found for row in rows if (found := finished(row)) is not None]


def claims(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired difference over seeds, in points, and its standard error."""
    import numpy as np

    accuracy = {
        (f["method"], f["sparsity"]): np.array(f["accuracy"])
        for f in found
        if f["network"] == "mlp"
    }
    out = []
    for better, worse, sparsity in CLAIMS:
        if (better, sparsity) not in accuracy:  # the peer is not installed
            continue
        difference = 100 * (accuracy[better, sparsity] - accuracy[worse, sparsity])
        error = (
            float(difference.std(ddof=1) / np.sqrt(difference.size)) if difference.size > 1 else 0.0
        )
        out.append(
            {
                "better": better,
                "worse": worse,
                "sparsity": sparsity,
                "points": float(difference.mean()),
                "standard_error": error,
            }
        )
    return out


def show(record: dict[str, Any], out: Path) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for network in ("mlp", "cnn"):
        rows = [r for r in record["runs"] if r["network"] == network]
        sparsities = sorted({r["sparsity"] for r in rows})
        table = Table(title=network)
        table.add_column("method")
        for s in sparsities:
            table.add_column(f"{100 * s:g} % zeros", justify="right")
        for name in dict.fromkeys(r["method"] for r in rows):
            cells = []
            for s in sparsities:
                a = [
                    100 * np.array(r["accuracy"])
                    for r in rows
                    if (r["method"], r["sparsity"]) == (name, s)
                ]
                cells.append(
                    f"{a[0].mean():.2f} ± {a[0].std(ddof=min(1, a[0].size - 1)):.2f}" if a else ""
                )
            table.add_row(name, *cells)
        console.print(table)
    for c in record["claims"]:
        console.print(
            f"{c['better']} against {c['worse']} at {100 * c['sparsity']:g} %: "
            f"{c['points']:+.2f} points, standard error {c['standard_error']:.2f}",
            soft_wrap=True,
        )
    console.print(f"Written: {out}", soft_wrap=True)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(2, 1))
    for axis, network, title in zip(axes, ("mlp", "cnn"), ("LeNet-300-100", "CNN")):
        rows = [r for r in record["runs"] if r["network"] == network]
        for i, name in enumerate(dict.fromkeys(r["method"] for r in rows)):
            mine = sorted((r for r in rows if r["method"] == name), key=lambda r: r["sparsity"])
            accuracy = [100 * np.array(r["accuracy"]) for r in mine]
            style = {"color": f"C{i % 10}", "label": name}
            if name == "dense":
                axis.axhline(accuracy[0].mean(), color="black", ls=":", label="dense")
                continue
            axis.errorbar(
                [f"{100 * r['sparsity']:g}" for r in mine],
                [a.mean() for a in accuracy],
                yerr=[a.std(ddof=min(1, a.size - 1)) for a in accuracy],
                fmt="s" if len(mine) == 1 else "o-" if i < 10 else "^--",
                capsize=2,
                **style,
            )
        axis.set(xlabel="zeros, %", ylabel="test accuracy, %", title=title)
        axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    options = arguments()
    need("flax", "matplotlib", "rich", "jaxcompress")
    from _jaxpruner import about

    options.work.mkdir(parents=True, exist_ok=True)
    found = train_all(options)
    record = {
        "environment": environment(range(options.seeds)) | {"peers": about()},
        "data": f"Fashion-MNIST: {options.images:,} images to train on, 10,000 to test on; the CNN "
        f"{min(options.images, CNN_IMAGES):,}",
        "epochs": options.epochs,
        "runs": found,
        "claims": claims(found),
    }
    write_json(options.out, record)
    draw(record, options.out.with_suffix(".png"))
    show(record, options.out)


if __name__ == "__main__":
    main()
