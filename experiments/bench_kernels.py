"""Are the kernels right on this device, and faster than XLA's own products?

    python experiments/bench_kernels.py               # a few minutes on a GPU or TPU

Each op of jc.ops runs with its kernels (pallas_tpu, or triton and others for GPUs), with the
reference, which is XLA's own product of the same arrays, and beside the uncompressed weight in
bfloat16, which the vendor's library multiplies. First correctness: integers bit for bit, floats
against float64 within the bound of a float32 sum. Then times: all compiled, run in turns,
medians of a product among several layers. A kernel that is wrong is not timed, and the script
exits with 1. Expected: every row right. Writes bench_kernels.json. Without a GPU or TPU it
stops with one line.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parent))
import _kernel_problems as problems
from _device_time import layered, milliseconds
from _harness import ROOT, Parser, environment, fail, write_json
from _kernel_problems import Problem

# What a row is called, and what makes its problem.
Rows = dict[str, Callable[[], Problem]]
ROWS, BETWEEN = (1, 16, 64, 256, 1024), (64, 256)  # of activations; with fewer products


def rows(m: int, k: int, n: int) -> Rows:
    """The ops at one size, for few rows of activations or many."""
    make = functools.partial
    size = (m, k, n)
    found: Rows = {
        "4 bits by 128": make(problems.weight, *size, 4, 128),
        "int8 x 4 bits by 128": make(problems.weight, *size, 4, 128, integers=True),
        "2:4": make(problems.two_of_four, *size),
        "int8 x int8": make(problems.int8, *size),
        "blocks of 128 x 128": make(problems.blocks, *size),
    }
    if m not in BETWEEN:
        bits = {f"{b} bits by 128": make(problems.weight, *size, b, 128) for b in (8, 3, 2)}
        found |= bits | {"2:4, int8": make(problems.two_of_four, *size, integers=True)}
    if m >= 1024:
        found |= {
            "int8 x int8, bias, gelu, int8": make(problems.int8_then, *size),
            "blocks of 128 x 128, gradients": make(problems.blocks, *size, trains=True),
        }
    return {f"{m:5} x {k:5} x {n:5}  {name:30}": problem for name, problem in found.items()}


def all_rows(quick: bool) -> Rows:
    if quick:
        return rows(1024, 256, 256)
    found = {
        "  129 x  1000 x  1000  4 bits by 32                  ": functools.partial(
            problems.weight, 129, 1000, 1000, 4, 32
        ),
        " 4096 x  4096 x  4096  int8 x int8                   ": functools.partial(
            problems.int8, 4096, 4096, 4096
        ),
    }
    for m in ROWS:
        found |= rows(m, 4096, 4096)
    return found


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    default = ROOT / "report" / "bench_kernels.json"
    parser.add_argument("--out", type=Path, default=default, help=f"file (default {default})")
    parser.add_argument("--repeats", type=int, default=20, help="of each program (default 20)")
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


def measure(problem: Problem, kernels: Sequence[str], repeats: int) -> dict[str, Any]:
    """Whether the kernels are right; the times of those that are, and of what they replace."""
    placed = [jax.device_put(a) for a in problem.args]
    run = {name: functools.partial(problem.run, implementation=name) for name in kernels}
    wrong = {}
    for name, one in run.items():
        try:
            right = problem.is_right(jax.jit(one)(*placed))
        except (RuntimeError, ValueError) as error:  # a compiler or the launch refuses it
            wrong[name] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            wrong |= {} if right else {name: "wrong"}
    row: dict[str, Any] = {"right": not wrong, **({"why not": wrong} if wrong else {})}
    run = {name: one for name, one in run.items() if name not in wrong}
    if run:
        run["reference"] = functools.partial(problem.run, implementation="reference")
        programs = {name: layered(one, problem.args) for name, one in run.items()}
        programs["bfloat16"] = layered(*problem.dense())
        row["milliseconds"] = milliseconds(programs, repeats)
    return row


def said(row: dict[str, Any]) -> str:
    """A line of the row."""
    if not row.get("milliseconds"):
        return "".join(f"{name}: {why}" for name, why in row["why not"].items())
    found = dict(row["milliseconds"])
    xla, dense = found.pop("reference"), found.pop("bfloat16")
    parts = [f"{name}: {why};" for name, why in row.get("why not", {}).items()]
    times = "{} {:7.1f} us, XLA {:5.2f}, bfloat16 {:5.2f} times it;".format
    parts += [times(name, 1e3 * t, xla / t, dense / t) for name, t in found.items()]
    return " ".join(parts)


def main() -> None:
    options = arguments()
    kernel = backend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    print(f"{device}: {kernel} against XLA's own product, and against the weight in bfloat16")
    found = []
    for name, make in all_rows(options.quick).items():
        problem = make()
        row = measure(problem, [kernel, *problem.also.get(kernel, ())], options.repeats)
        found.append({"product": " ".join(name.split()), **row})
        print(f"{name}  {said(row)}", flush=True)
        write_json(options.out, {"device": device, "environment": environment([0]), "rows": found})
    print(f"wrote {options.out}")
    sys.exit(not all(row["right"] for row in found))


if __name__ == "__main__":
    main()
