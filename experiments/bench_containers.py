"""From which sparsity on is a pruned network faster than a dense one on this CPU?

    python experiments/bench_containers.py            # about five minutes
    python experiments/bench_containers.py --quick    # small and few: does it run?

A feed-forward block, 1024 to 4096 to 1024, both weights pruned to 50, 80, 90 and 95 % and held in
every container of this library, as floats and as integers; 1, 16 and 128 rows, through
`accelerate`, against the dense block in float32 and in w8a8. All of one sparsity and batch runs in
turns in one process, so that a noisy machine is noisy for all. An interrupted run goes on where it
stopped. Expected on a CPU with AVX-512 VNNI: removed channels and blocks gain from 50 % on,
prepacked bitmaps from 60 to 70 %, against w8a8 from about 90 %; n:m gains bytes only. Shared values
are not measured: `jc.prepack` decodes them, and they run as the floats that they are. Writes
build/bench_containers/ (bench_containers.json, table.md, bench_containers.png).
"""

import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import ROOT, Parser, environment, interleaved, need, staged, write_json
from _resume import resumable

SHARES = (0.5, 0.8, 0.9, 0.95)
ROWS = (1, 16, 128)
# The nearest n:m of powers of two, 81, 91 and 95 %; 2:4 is the one that hardware knows.
NM = {0.5: (2, 4), 0.8: (3, 16), 0.9: (3, 32), 0.95: (3, 64)}
BLOCK = (32, 128)
FLOAT, INTEGER = "dense, float32", "dense, w8a8"


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_containers")
    parser.add_argument("--quick", action="store_true", help="a small block, two sparsities")
    return parser.parse_args()


def block(p: Any, x: Any) -> Any:
    import jax

    return jax.nn.relu(x @ p["up"]) @ p["down"]


def weights(k: int, n: int) -> dict[str, Any]:
    import jax

    keys = jax.random.split(jax.random.key(0))
    return {
        "up": jax.random.normal(keys[0], (k, n)) / k**0.5,
        "down": jax.random.normal(keys[1], (n, k)) / n**0.5,
    }


def networks(params: dict[str, Any], share: float) -> Iterator[tuple[str, Callable, Any]]:
    """`(name, function, params)` of the dense block and of all that holds it pruned."""
    import jax
    import jax.numpy as jnp

    import jaxcompress as jc

    (k, n), sizes = params["up"].shape, jax.tree.map(abs, params)
    formats = {"float32": None, "w8a8": jc.quantize.w8a8(), "int8": jc.quantize.int8()}

    def quantized(params: Any, name: str) -> Any:
        spec = formats[name]
        return params if spec is None else jc.quantize.quantize(params, {".*": spec})

    def packed(pattern: Any, sparsity: float, *names: str) -> dict[str, Any]:
        masks = jc.prune.mask(sizes, pattern, sparsity)
        store = None if pattern.store is None else pattern
        return {
            name: jc.prune.pack(quantized(params, name), masks, pattern=store) for name in names
        }

    yield FLOAT, block, params
    yield INTEGER, block, jc.prepack(quantized(params, "w8a8"))
    yield "dense, int8", block, jc.prepack(quantized(params, "int8"))
    bitmaps = packed(jc.prune.unstructured(), share, *formats)
    yield "bitmap, float32, not prepacked", block, bitmaps["float32"]
    for name, bitmap in bitmaps.items():
        yield f"bitmap, {name}", block, jc.prepack(bitmap)
    some = ("float32", "w8a8")
    for name, held in packed(jc.prune.nm(*NM[share], axis=-2), 1.0, *some).items():
        yield f"n:m, {name}", block, held
    for name, held in packed(jc.prune.block(*BLOCK), share, *some).items():
        yield f"blocks of 32x128, {name}", block, jc.prepack(held)
    rank = max(1, int((1 - share) * k * n / (k + n)))  # as many numbers
    yield "low rank, float32", block, jc.prune.low_rank(params, [".*"], rank=rank)
    masks = jc.prune.mask(sizes, jc.prune.channel(), share, rules=["up"])
    x = jax.ShapeDtypeStruct((2, k), jnp.float32)
    smaller, small = jc.prune.shrink(block, params, masks, x)
    for name in some:
        yield f"channels removed, {name}", smaller, jc.prepack(quantized(small, name))


def measure(
    params: dict[str, Any], share: float, rows: tuple[int, ...], repeats: int, budget: float
) -> list[dict[str, Any]]:
    """All of one sparsity, each number of rows in turns of its own."""
    import jax

    import jaxcompress as jc

    found = list(networks(params, share))
    out = []
    for m in rows:
        x = jax.random.normal(jax.random.key(m), (m, params["up"].shape[0]))
        runs: dict[str, Callable[[], Any]] = {}
        for name, fn, held in found:
            run = jax.jit(jc.accelerate(fn))
            runs[name] = lambda run=run, held=held, x=x: run(held, x)
        times = interleaved(runs, repeats, budget)
        for name, fn, held in found:
            ms = times[name]
            row = {"name": name, "sparsity": share, "rows": m, "runs_as": runs_as(fn, held, x)}
            row["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
            row |= {"min_ms": min(ms), "median_ms": statistics.median(ms), "repeats": len(ms)}
            for key, base in (("float32", FLOAT), ("w8a8", INTEGER)):
                row[f"minima_of_{key}"] = min(times[base]) / min(ms)
                row[f"medians_of_{key}"] = statistics.median(times[base]) / statistics.median(ms)
            out.append(row)
    return out


def runs_as(fn: Callable, params: Any, x: Any) -> list[str]:
    """What `explain` says of the weights."""
    import jax

    import jaxcompress as jc

    leaves = jax.tree.leaves(params, is_leaf=jc.arrays.is_compressed)
    if not any(map(jc.arrays.is_compressed, leaves)):
        return ["a dense float product"]
    rows = jc.explain(fn, params, x)
    return list(dict.fromkeys(f"{use.op}, {use.implementation}: {use.why}" for use in rows))


def break_even(points: list[tuple[float, float]]) -> str:
    """From which sparsity on the ratio is at least one; between two, linear in the time.

    `points` are `(sparsity, times as fast)`; it has to stay faster beyond.
    """
    points = sorted(points)
    if not points:
        return "none"
    slow = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not slow:
        return f"below {points[0][0]:.0%}"
    if slow[-1] == len(points) - 1:
        return "none"
    (a, ra), (b, rb) = points[slow[-1]], points[slow[-1] + 1]
    ta, tb = 1 / ra, 1 / rb
    return f"{a + (b - a) * (ta - 1) / (ta - tb):.0%}"


def is_dense(row: dict[str, Any]) -> bool:
    """Whether a bitmap got its zeros back, because its dense product is the faster one."""
    bitmap = row["name"].startswith("bitmap") and "not prepacked" not in row["name"]
    return bitmap and not any("sparse_matmul" in use for use in row["runs_as"])


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each number of rows: times as fast as dense float32, by the minima."""
    shares = sorted({row["sparsity"] for row in rows})
    lines = []
    for m in sorted({row["rows"] for row in rows}):
        here = [row for row in rows if row["rows"] == m]
        heads = [f"{share:.0%}" for share in shares] + ["gains from", "against w8a8 from"]
        lines += ["", f"| {m} row{'s' * (m > 1)} | {' | '.join(heads)} |"]
        lines += ["| --- |" + " ---: |" * len(heads)]
        dense = [row["min_ms"] for row in here if row["name"] == FLOAT]
        lines += [f"| {FLOAT} | {' | '.join(f'{ms:.2f} ms' for ms in dense)} | | |"]
        for name in dict.fromkeys(row["name"] for row in here if row["name"] != FLOAT):
            mine = [row for row in here if row["name"] == name]
            cells = [f"{row['minima_of_float32']:.2f}" for row in mine]
            even = ["", ""]
            if not name.startswith("dense"):
                cells = [f"{c} (dense)" if is_dense(row) else c for c, row in zip(cells, mine)]
                keys = ("minima_of_float32", "minima_of_w8a8")
                held = [row for row in mine if not is_dense(row)]
                even = [break_even([(row["sparsity"], row[key]) for row in held]) for key in keys]
            lines += [f"| {name} | {' | '.join([*cells, *even])} |"]
    return lines


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Times as fast as dense float32 against sparsity, a panel for each number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted({row["rows"] for row in rows})
    size = (4.2 * len(counts) + 2, 4.2)
    colors = plt.get_cmap("tab20").colors
    shown, panels = plt.subplots(1, len(counts), figsize=size, layout="constrained", squeeze=False)
    for axes, m in zip(panels[0], counts):
        for i, name in enumerate(dict.fromkeys(r["name"] for r in rows if r["name"] != FLOAT)):
            mine = [r for r in rows if r["name"] == name and r["rows"] == m]
            axes.plot(
                [100 * r["sparsity"] for r in mine],
                [r["minima_of_float32"] for r in mine],
                marker="o",
                ms=3,
                lw=1,
                ls="--" if name.startswith("dense") else "-",
                color=colors[i],
                label=name,
            )
        axes.axhline(1, color="0.4", lw=0.8)
        axes.set_yscale("log")
        axes.set(title=f"{m} row{'s' * (m > 1)}", xlabel="sparsity, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("times as fast as dense float32")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    shown.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    shown.savefig(path, dpi=150)
    plt.close(shown)


def main() -> None:
    options = arguments()
    need("jax", "matplotlib")
    from jaxcompress.kernels import cpu

    k, n, shares, rows = (1024, 4096, SHARES, ROWS)
    repeats, budget = 200, 12.0
    if options.quick:
        k, n, shares, rows, repeats, budget = (128, 256, (0.5, 0.9), (1, 16), 5, 0.2)
    settings = [k, n, rows, repeats, budget]
    with staged(options.out) as out:
        once, done = resumable(options.out, settings)
        params, found = weights(k, n), []
        for share in shares:
            one = functools.partial(measure, params, share, rows, repeats, budget)
            found += once(f"{share}", one)
            print(f"{share:.0%} of the weights are zero: measured", flush=True)
        text = "\n".join(tables(found)) + "\n"
        print(text)
        native = cpu.missing() or cpu.path()
        record = {"environment": environment(), "native": native, "block": [k, n, k]}
        write_json(out / "bench_containers.json", record | {"rows": found})
        (out / "table.md").write_text(text)
        figure(found, out / "bench_containers.png")
    done()


if __name__ == "__main__":
    main()
