"""Are the kernels right on this device, and faster than XLA's own products?

    python experiments/bench_kernels.py               # a few minutes on a GPU or TPU

Each op of jc.ops runs with its kernel (pallas_tpu or triton) and with the reference, which
is XLA's own product. First correctness: integers bit for bit, floats against float64 within
the bound of a float32 sum. Then times: both compiled, run in turns, medians. A kernel that
is wrong is not timed, and the script exits with 1. Expected: every row right; nobody has
measured the times yet. Writes bench_kernels.json. Without a GPU or TPU it stops with one
line.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parent))
import _kernel_problems as problems
from _harness import ROOT, Parser, environment, fail, interleaved, write_json
from _kernel_problems import Problem

# What a row is called, and what makes its problem.
Rows = dict[str, Callable[[], Problem]]
FEW, MANY = (1, 16), 1024  # rows of activations


def rows(m: int, k: int, n: int) -> Rows:
    """The ops at one size, for few rows of activations or many."""
    make = functools.partial
    size = (m, k, n)
    found: Rows = {
        f"{bits} bits by 128": make(problems.weight, *size, bits, 128) for bits in (8, 4, 3, 2)
    }
    found |= {
        "int8 x 4 bits by 128": make(problems.weight, *size, 4, 128, integers=True),
        "2:4": make(problems.two_of_four, *size),
        "2:4, int8": make(problems.two_of_four, *size, integers=True),
        "blocks of 128 x 128": make(problems.blocks, *size),
    }
    if m >= MANY:
        found |= {
            "int8 x int8": make(problems.int8, *size),
            "int8 x int8, bias, gelu, int8": make(problems.int8_then, *size),
            "blocks of 128 x 128, gradients": make(problems.blocks, *size, trains=True),
        }
    return {f"{m:5} x {k:5} x {n:5}  {name:30}": problem for name, problem in found.items()}


def all_rows(quick: bool) -> Rows:
    if quick:
        return rows(MANY, 256, 256)
    found = {
        "  129 x  1000 x  1000  4 bits by 32                  ": functools.partial(
            problems.weight, 129, 1000, 1000, 4, 32
        ),
        " 4096 x  4096 x  4096  int8 x int8                   ": functools.partial(
            problems.int8, 4096, 4096, 4096
        ),
    }
    for m in (*FEW, MANY):
        found |= rows(m, 4096, 4096)
    return found


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    default = ROOT / "report" / "bench_kernels.json"
    parser.add_argument("--out", type=Path, default=default, help=f"file (default {default})")
    parser.add_argument("--repeats", type=int, default=50, help="of each product (default 50)")
    parser.add_argument("--quick", action="store_true", help="small products")
    options = parser.parse_args()
    if options.repeats < 1:
        fail("--repeats is 1 or more")
    return options


def backend() -> str:
    """The implementation that is for the device at hand."""
    name = {"tpu": "pallas_tpu", "gpu": "triton"}.get(jax.default_backend())
    if name is None:
        fail(f"this needs a GPU or TPU; jax has found only {jax.devices()[0].device_kind!r}")
    return name


def measure(problem: Problem, kernel: str, repeats: int) -> dict[str, Any]:
    """Whether the kernel is right, and if so the times of both."""
    placed = [jax.device_put(a) for a in problem.args]
    runs = {
        name: functools.partial(
            jax.jit(functools.partial(problem.run, implementation=name)), *placed
        )
        for name in (kernel, "reference")
    }
    row: dict[str, Any] = {"kernel": kernel, "right": problem.is_right(runs[kernel]())}
    if row["right"]:
        times = interleaved(runs, repeats)
        row["milliseconds"] = {name: statistics.median(t) for name, t in times.items()}
    return row


def main() -> None:
    options = arguments()
    kernel = backend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    print(f"{device}: {kernel} against XLA's own product")
    found = []
    for name, make in all_rows(options.quick).items():
        row = measure(make(), kernel, options.repeats)
        found.append({"product": " ".join(name.split()), **row})
        if row["right"]:
            ours, xla = row["milliseconds"][kernel], row["milliseconds"]["reference"]
            times = f"{ours:8.3f} ms, XLA {xla:8.3f} ms: {xla / ours:.2f} times as fast"
            print(f"{name}  right  {times}", flush=True)
        else:
            print(f"{name}  WRONG", flush=True)
    write_json(options.out, {"device": device, "environment": environment([0]), "rows": found})
    print(f"wrote {options.out}")
    sys.exit(not all(row["right"] for row in found))


if __name__ == "__main__":
    main()
