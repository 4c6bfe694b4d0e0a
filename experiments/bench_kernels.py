"""Are the kernels right on this device, and faster than XLA's own products?

    python experiments/bench_kernels.py               # a few minutes on a GPU or TPU

Each op of jc.ops runs with its kernel (pallas_tpu or triton) and with the reference, which
is XLA's own product. First correctness: integers bit for bit against numpy's int64, floats
against float64 within the bound of a float32 sum. Then times: both compiled, run in turns,
medians. A kernel that is wrong is not timed, and the script exits with 1. Expected: every
row right; nobody has measured the times yet. Writes bench_kernels.json. Without a GPU or
TPU it stops with one line.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import jaxcompress as jc
from _harness import ROOT, Parser, environment, fail, interleaved, write_json

EPS = 2.0**-24
LOW = {"float32": EPS, "bfloat16": 2.0**-8}


class Size(NamedTuple):
    """A product and the format of the weight; bits 0 is int8 x int8.

    Activations are bfloat16, or with `integers` int8 (w4a8).
    """

    m: int
    k: int
    n: int
    bits: int = 0
    group_size: int | None = None
    integers: bool = False


SIZES = [
    Size(1024, 1024, 1024),
    Size(4096, 4096, 4096),
    *(Size(m, 4096, 4096, bits, 128) for m in (1, 16, 1024) for bits in (8, 4, 3, 2)),
    Size(129, 1000, 1000, 4, 32),
    *(Size(m, 4096, 4096, 4, 128, integers=True) for m in (1, 16, 1024)),
]
QUICK = [
    Size(129, 256, 256),
    Size(16, 512, 256, 4, 128),
    Size(16, 512, 256, 4, 128, integers=True),
]


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    default = ROOT / "report" / "bench_kernels.json"
    parser.add_argument("--out", type=Path, default=default, help=f"file (default {default})")
    parser.add_argument("--repeats", type=int, default=50, help="of each product (default 50)")
    parser.add_argument("--quick", action="store_true", help="three small products")
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


def int8_problem(size: Size) -> tuple[Callable[..., jax.Array], list[Any], Any, Any]:
    """The op, its arguments, the right answer and how far from it one may be."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((size.m, size.k), size[1:3]))
    op = jc.ops.int8_matmul
    # Whole numbers below 2^53: the float64 product is exact, and much faster than int64's.
    want = x.astype(np.float64) @ w.astype(np.float64)
    return op, [x, w], want, np.zeros_like(want)


def weight_problem(size: Size) -> tuple[Callable[..., jax.Array], list[Any], Any, Any]:
    """The same for a weight of few bits: packed by the library, decoded here in float64."""
    rng = np.random.default_rng(0)
    if size.integers:
        x = rng.integers(-128, 128, (size.m, size.k)).astype(np.int8)
    else:
        x = rng.normal(size=(size.m, size.k)).astype(jnp.bfloat16)
    low = -(2 ** (size.bits - 1))
    codes = rng.integers(low, -low, (size.k, size.n)).astype(np.int8)
    groups = -(-size.k // size.group_size)
    scale = rng.uniform(0.5, 2, (groups, size.n)).astype(np.float32)
    decoded = codes * np.repeat(scale.astype(np.float64), size.group_size, 0)[: size.k]
    w = codes if size.bits == 8 else jc.arrays._packing.pack(jnp.asarray(codes), size.bits, 0)
    op = functools.partial(jc.ops.quantized_matmul, bits=size.bits, group_size=size.group_size)
    if size.integers:
        op = functools.partial(jc.ops.w4a8_matmul, group_size=size.group_size)
    exact = x.astype(np.float64)
    want, total = exact @ decoded, np.abs(exact) @ np.abs(decoded)
    if size.integers:  # exact within a group, float32 from there on
        return op, [x, w, scale], want, (groups + 4) * EPS * total
    # Float32 sums; the decoded weight and the result are rounded to bfloat16.
    bound = (size.k * EPS + LOW["bfloat16"]) * total + LOW["bfloat16"] * np.abs(want)
    return op, [x, w, scale], want, bound


def measure(size: Size, kernel: str, repeats: int) -> dict[str, Any]:
    """Whether the kernel is right, and if so the times of both."""
    op, args, want, bound = weight_problem(size) if size.bits else int8_problem(size)
    placed = [jax.device_put(a) for a in args]
    runs = {
        name: functools.partial(jax.jit(functools.partial(op, implementation=name)), *placed)
        for name in (kernel, "reference")
    }
    row = {"size": size._asdict(), "kernel": kernel}
    error = np.abs(np.asarray(runs[kernel](), np.float64) - want)
    row["right"] = bool(np.all(error <= bound))
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
    rows = []
    for size in QUICK if options.quick else SIZES:
        row = measure(size, kernel, options.repeats)
        rows.append(row)
        what = f"{size.bits} bits by {size.group_size}" if size.bits else "int8 x int8"
        what = f"int8 x {what}" if size.integers else what
        head = f"{size.m:5} x {size.k:5} x {size.n:5}  {what:20}"
        if row["right"]:
            ours, xla = row["milliseconds"][kernel], row["milliseconds"]["reference"]
            print(
                f"{head}  right  {ours:8.3f} ms, XLA {xla:8.3f} ms: {xla / ours:.2f} times as fast"
            )
        else:
            print(f"{head}  WRONG")
    write_json(options.out, {"device": device, "environment": environment([0]), "rows": rows})
    print(f"wrote {options.out}")
    sys.exit(not all(row["right"] for row in rows))


if __name__ == "__main__":
    main()
