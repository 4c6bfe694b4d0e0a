"""How much does training for few bits cost, by method?

    python experiments/qat_fashion.py            # five seeds, under 60 minutes on two cores
    python experiments/qat_fashion.py --quick    # two seeds, one epoch, three runs: does it run?

LeNet-300-100 on Fashion-MNIST in full: trained in floats, then, from there and for as many
epochs each, in floats, with weights and activations at 8, 4, 3 and 2 bits, and with binary
weights, by straight-through rounding, LSQ, PACT and DoReFa. The same at 4 and 2 bits for a
CNN of 16 and 32 channels, on 20,000 of the images, three seeds, a third of the epochs in
floats and half of those a method. What is reported is the accuracy of the converted integers
on the test images after the last epoch. To reach: LSQ at 4 bits within two standard errors
of the floats, at 2 bits within one point. Writes experiments/results/qat_fashion.json and
.png; a run that was interrupted goes on after its last finished method.

The data is in the Debian package dataset-fashion-mnist; --data names a folder with its files.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, write_json

RESULTS = ROOT / "experiments" / "results"
METHODS = ("ste", "lsq", "pact", "dorefa")
BITS = {"lenet": (8, 4, 3, 2, 1), "cnn": (4, 2)}
CNN_SEEDS, CNN_IMAGES = 3, 20_000


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--epochs", type=int, default=30, help="in floats (default 30)")
    parser.add_argument("--tune", type=int, default=10, help="epochs a method (default 10)")
    parser.add_argument("--data", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--networks", nargs="+", choices=list(BITS), default=list(BITS), help="default both"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch, three runs")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.tune = 2, 1, 1
    if min(options.seeds, options.epochs, options.tune) < 1:
        fail("--seeds, --epochs and --tune are 1 or more")
    if not options.out.is_dir():
        fail(f"{options.out} is no folder; make it, or name another with --out")
    return options


def runs(network: str, quick: bool) -> list[tuple[str, int]]:
    if quick:
        return [("lsq", 4), ("pact", 2), ("ste", 1)] if network == "lenet" else [("lsq", 2)]
    return [(method, bits) for bits in BITS[network] for method in METHODS]


def read_parts(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of an interrupted run with the same settings."""
    path = folder / "rows.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    return record["rows"] if record["settings"] == settings else {}


def float_models(
    network: Any, settings: dict[str, Any], data: Any, keys: Any, parts: Path, add: Any
) -> tuple[Any, Any]:
    """Its parameters, before and after as many more epochs as a method gets, and its row.

    Trained now, or read from an interrupted run.
    """
    import _qat_train as train
    import jaxcompress as jc

    file, about = parts / "float.safetensors", parts / "float.json"
    if about.exists():
        record = json.loads(about.read_text())
        if record["settings"] == settings:
            return jc.io.load(file), record["row"]
    epochs, tune, name = settings["epochs"], settings["tune"], settings["network"]
    found = train.fit_float(network, data, keys, epochs, add(f"{name}, float32", epochs))
    tuned = train.fit_longer(
        network, found.params, data, keys, tune, add(f"{name}, float32, longer", tune)
    )
    row = {
        "validation": [*found.accuracy.mean(1).tolist(), *tuned.accuracy.mean(1).tolist()],
        "loss": [*found.loss.mean(1).tolist(), *tuned.loss.mean(1).tolist()],
        "seconds": found.seconds + tuned.seconds,
        "compile_seconds": found.compile_seconds,
    }
    models = {"before": found.params, "after": tuned.params}
    jc.io.save(file, models)
    write_json(about, {"settings": settings, "row": row})
    return models, row


def summary(right: Any, dense: Any) -> dict[str, Any]:
    """Mean, standard error over seeds, and the paired difference to the floats."""
    import numpy as np

    from _digits_report import accuracy_against

    seeds = right.mean(1)
    return {
        "accuracy": float(seeds.mean()),
        "standard_error": float(seeds.std(ddof=min(1, len(seeds) - 1)) / np.sqrt(len(seeds))),
        "seeds": seeds.tolist(),
        "against_float": accuracy_against(right, dense),
    }


def settings_of(network: str, options: Any) -> dict[str, Any]:
    seeds, epochs, tune, images = options.seeds, options.epochs, options.tune, 55_000
    if network == "cnn":
        seeds, epochs, tune = min(CNN_SEEDS, seeds), -(-epochs // 3), -(-tune // 2)
        images = 3000 if options.quick else CNN_IMAGES
    return {"network": network, "seeds": seeds, "epochs": epochs, "tune": tune, "images": images}


def study(name: str, options: Any, whole: Any, parts: Path, add: Any) -> dict[str, Any]:
    """Every method and width of one network."""
    import jax
    import jax.numpy as jnp

    import _qat_train as train
    import jaxcompress as jc
    from _data import Split

    network = {"lenet": train.LENET, "cnn": train.CNN}[name]
    settings = settings_of(name, options)
    images, seeds, tune = settings["images"], settings["seeds"], settings["tune"]
    data = whole._replace(train=Split(whole.train.x[:images], whole.train.y[:images]))
    parts = parts / name
    parts.mkdir(parents=True, exist_ok=True)
    rows = read_parts(parts, settings)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    turns = 1 if network.at_once else seeds  # of the seeds, an epoch each
    ticks = lambda text, epochs: add(text, epochs * turns)
    models, float_row = float_models(network, settings, data, keys, parts, ticks)
    params = models["before"]
    before = train.right(network.model.apply, params, data)
    dense = train.right(network.model.apply, models["after"], data)
    apply = jc.accelerate(network.model.apply)
    for method, bits in runs(name, options.quick):
        row = f"{method}_{bits}"
        if row in rows:
            continue
        advance = ticks(f"{name}, {method}, {bits} bits", tune)
        stats = train.calibrated(network, params, data, bits)
        found = train.fit_quantized(network, method, bits, params, stats, data, keys, tune, advance)
        # One seed after another: each is what would be shipped.
        shipped = [
            jc.quantize.convert(jax.tree.map(lambda leaf, s=s: leaf[s], found.params))
            for s in range(seeds)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shipped)
        trained = train.right(apply, found.params, data)
        right = train.right(apply, stacked, data)
        rows[row] = {
            "method": method,
            "bits": bits,
            **summary(right, dense),
            # What training saw and what is shipped: the same up to ties of rounding.
            "disagree_with_training": float((right != trained).mean()),
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(shipped[0])),
            "validation": found.accuracy.mean(1).tolist(),
            "seconds": found.seconds,
            "compile_seconds": found.compile_seconds,
        }
        write_json(parts / "rows.json", {"settings": settings, "rows": rows})
    return {
        "settings": settings,
        "float": {
            **float_row,
            **summary(dense, dense),
            "before_tuning": float(before.mean()),
            "bytes": sum(leaf[0].nbytes for leaf in jax.tree.leaves(params)),
        },
        "rows": [rows[f"{method}_{bits}"] for method, bits in runs(name, options.quick)],
    }


def run(options: Any) -> dict[str, Any]:
    from _mnist import fashion

    whole = fashion(options.data)
    name = "qat_fashion_quick" if options.quick else "qat_fashion"
    parts = options.out / f"{name}.parts"
    with progress() as add:
        networks = {each: study(each, options, whole, parts, add) for each in options.networks}
    record = {
        "environment": environment(range(options.seeds)),
        "data": "Fashion-MNIST: 55,000 images to train on, 5,000 to choose on, 10,000 to report on",
        "quantized": "all weights, and activations after a ReLU, at the bits; the image at 8; "
        "one bit: weights only, activations at 8",
        "networks": networks,
    }
    write_json(options.out / f"{name}.json", record)
    figure(record, options.out / f"{name}.png")
    for each in networks:
        shutil.rmtree(parts / each)
    if not any(parts.iterdir()):
        parts.rmdir()
    return record


def figure(record: dict[str, Any], path: Path) -> None:
    """Accuracy against bits, a panel a network, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = record["networks"]
    size = (1 + 4.5 * len(networks), 4)
    shown, panels = plt.subplots(
        1, len(networks), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (network, found) in zip(panels[0], networks.items()):
        base, widths = found["float"], BITS[network][::-1]
        mean, spread = 100 * base["accuracy"], 200 * base["standard_error"]
        axes.axhspan(mean - spread, mean + spread, color="0.85", lw=0)
        axes.axhline(mean, color="0.4", lw=1, label="float32, two standard errors")
        for i, method in enumerate(METHODS):
            rows = [row for row in found["rows"] if row["method"] == method]
            axes.errorbar(
                [widths.index(row["bits"]) + 0.06 * (i - 1.5) for row in rows],
                [100 * row["accuracy"] for row in rows],
                [200 * row["standard_error"] for row in rows],
                marker="o",
                ms=4,
                capsize=2,
                label=method,
            )
        labels = ["binary weights" if bits == 1 else str(bits) for bits in widths]
        axes.set_xticks(range(len(widths)), labels)
        axes.set_xlim(-0.5, len(widths) - 0.5)
        axes.set(title={"lenet": "LeNet-300-100", "cnn": "CNN"}[network])
        axes.set(xlabel="bits of weights and activations", ylabel="test accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    shown.savefig(path, dpi=150)
    plt.close(shown)


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "network", "method", "bits", "accuracy %", "against float, points", "kB", "s an epoch"
    )
    text = lambda row: f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}"
    epoch = lambda row: f"{row['seconds'] / len(row['validation']):.1f}"
    for name, found in record["networks"].items():
        base = found["float"]
        size = f"{base['bytes'] / 1000:.0f}"
        table.add_row(name, "float32", "32", text(base), "", size, epoch(base))
        for row in found["rows"]:
            d = row["against_float"]
            table.add_row(
                name,
                row["method"],
                str(row["bits"]),
                text(row),
                f"{d['points']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]",
                f"{row['bytes'] / 1000:.0f}",
                epoch(row),
            )
    Console().print(table)


def main() -> None:
    options = arguments()
    need("jax", "flax", "optax", "matplotlib", "rich")
    show(run(options))


if __name__ == "__main__":
    main()
