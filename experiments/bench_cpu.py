"""Is a compressed product faster on this CPU, and than what?

    python experiments/bench_cpu.py            # under four minutes
    python experiments/bench_cpu.py --quick    # a few repeats: does it run?

Linear layers and a transformer block, prepacked, through `accelerate`, against XLA in float32
and bfloat16, and against onnxruntime, OpenVINO and PyTorch where they are installed (pip
install -e '.[benchmark]'). Then pruned linear layers: unstructured, against PyTorch's CSR, and
blocks. All of a row runs in turns in one process, so that a noisy machine is noisy for all, and
four times in a row after one that does not count, as a model does that is in use; weights that
are meant to be out of the cache rotate through 50 MB and more. Shares are of what a few lines of
C++ reach on the same cores in registers, and in reading memory. Expected on a CPU with AVX-512
VNNI: int8 more than three times XLA's float32 from one row to a thousand, blocks of it eight
times. Writes build/bench_cpu/ (bench_cpu.json, table.md, bench_cpu.png).
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _bench_peak
from _bench_peers import peers, sparse_peers
from _harness import ROOT, Parser, environment, interleaved, need, staged, write_json

# rows, k, n, and how many copies of the weight are rotated through.
SHAPES = (
    (128, 1024, 1024, 1),
    (1024, 1024, 1024, 1),
    (16, 1024, 4096, 1),
    (1, 4096, 4096, 6),
    (16, 4096, 4096, 6),
)
# The same of pruned layers.
SPARSE_SHAPES = ((128, 1024, 1024, 1), (16, 1024, 4096, 1), (1, 4096, 4096, 6))
Runs = dict[str, Callable[[], Any]]


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_cpu")
    parser.add_argument("--quick", action="store_true", help="a few repeats")
    parser.add_argument("--no-peers", action="store_true", help="XLA only")
    return parser.parse_args()


def formats() -> dict[str, Any]:
    """What is measured of this library: a spec for each name."""
    import jaxcompress as jc

    return {
        "w8a8": jc.quantize.w8a8(),
        "w4a8 g128": jc.quantize.w4a8(group_size=128),
        "w8a16": jc.quantize.int8(),
        "w4a16 g128": jc.quantize.int4(group_size=128),
    }


def linear_runs(rows: int, k: int, n: int, copies: int, with_peers: bool) -> Runs:
    """Everything that multiplies `x[rows, k]` by a weight `[k, n]`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxcompress as jc

    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weights = [rng.standard_normal((k, n)).astype(np.float32) / k**0.5 for _ in range(copies)]
    fn = lambda p, x: x @ p["w"]
    runs: Runs = {}

    def add(name: str, run: Callable[..., Any], arguments: list[tuple]) -> None:
        turn = itertools.cycle(arguments)
        runs[name] = lambda: run(*next(turn))

    placed = [({"w": jnp.asarray(w)}, jnp.asarray(x)) for w in weights]
    add("XLA f32", jax.jit(fn), placed)
    low = [({"w": p["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16)) for p, x in placed]
    add("XLA bf16", jax.jit(fn), low)
    compressed = jax.jit(jc.accelerate(fn))
    for name, spec in formats().items():
        quantized = [(jc.quantize.quantize(p, {"w": spec}), x) for p, x in placed]
        add(name, compressed, [(jc.prepack(p), x) for p, x in quantized])
        if name == "w8a8":
            add("w8a8, not prepacked", compressed, quantized)
    if with_peers:
        for name, calls in peers(x, weights).items():
            add(name, lambda call: call(), [(call,) for call in calls])
    return runs


def sparse_runs(rows: int, k: int, n: int, copies: int, with_peers: bool) -> Runs:
    """The same product with weights of which most are zero."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxcompress as jc

    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    placed = jnp.asarray(x)
    dense = [rng.standard_normal((k, n)).astype(np.float32) / k**0.5 for _ in range(copies)]
    fn = lambda p, x: x @ p["w"]
    plain, compressed = jax.jit(fn), jax.jit(jc.accelerate(fn))
    runs: Runs = {}

    def add(name: str, run: Callable[..., Any], weights: list[Any]) -> None:
        turn = itertools.cycle([{"w": w} for w in weights])
        runs[name] = lambda: run(next(turn), placed)

    add("XLA f32", plain, [jnp.asarray(w) for w in dense])
    for share in (0.5, 0.8, 0.9, 0.95):
        kept = [w * (rng.random(w.shape) >= share) for w in dense]
        for name in ("f32", "w8a8") if share >= 0.9 else ("f32",):
            params = [{"w": jnp.asarray(w)} for w in kept]
            if name == "w8a8":
                params = [jc.quantize.quantize(p, {"w": jc.quantize.w8a8()}) for p in params]
            packed = [
                jc.prepack(jc.prune.pack(p, {"w": jnp.asarray(w != 0)}))["w"]
                for p, w in zip(params, kept)
            ]
            add(f"{share:.0%} unstructured, {name}", compressed, packed)
        if with_peers and share >= 0.9:
            for name, calls in sparse_peers(x, kept).items():
                turn = itertools.cycle(calls)
                runs[f"{name}, {share:.0%}"] = lambda turn=turn: next(turn)()
    blocks = jc.prune.block(32, 128)
    for share in (0.8,):
        packed = {}
        for w in dense:
            params = {"w": jnp.asarray(w)}
            scores = {"w": jnp.repeat(jnp.repeat(rng.random((k // 32, n // 128)), 32, 0), 128, 1)}
            masks = jc.prune.mask(scores, blocks, share)
            codes = jc.quantize.quantize(params, {"w": jc.quantize.w8a8()})
            for name, array in (("f32", params), ("w8a8", codes)):
                pruned = jc.prepack(jc.prune.pack(array, masks, pattern=blocks))["w"]
                packed.setdefault(name, []).append(pruned)
        for name, weights in packed.items():
            add(f"{share:.0%} blocks of 32x128, {name}", compressed, weights)
    return runs


def block_runs() -> Runs:
    """Four transformer layers, d 512, ff 2048, 8 sequences of 64."""
    import jax

    import jaxcompress as jc

    keys = iter(jax.random.split(jax.random.key(0), 64))
    weight = lambda *shape: jax.random.normal(next(keys), shape) / shape[0] ** 0.5
    layers = [
        {"qkv": weight(512, 1536), "out": weight(512, 512)}
        | {"up": weight(512, 2048), "down": weight(2048, 512)}
        for _ in range(4)
    ]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)

    def attention(qkv):
        # Heads before tokens: for XLA's products on CPUs half the time of the other order.
        q, k, v = qkv.reshape(8, 64, 8, 3, 64).transpose(3, 0, 2, 1, 4).reshape(3, 64, 64, 64)
        shares = jax.nn.softmax(q @ k.mT / 8, -1)
        return (shares @ v).reshape(8, 8, 64, 64).swapaxes(1, 2).reshape(8, 64, 512)

    def model(layers, x):
        for p in layers:
            x = x + attention(norm(x) @ p["qkv"]) @ p["out"]
            x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return x

    x = jax.random.normal(next(keys), (8, 64, 512))
    dense, compressed = jax.jit(model), jax.jit(jc.accelerate(model))
    runs: Runs = {"XLA f32": lambda: dense(layers, x)}
    for name, spec in formats().items():
        packed = jc.prepack(jc.quantize.quantize(layers, {".*": spec}))
        runs[name] = lambda packed=packed: compressed(packed, x)
    return runs


def summary(times: dict[str, list[float]], work: dict[str, Any]) -> list[dict[str, Any]]:
    """Minima, medians, spread, and the ratios of both to float32."""
    base = times["XLA f32"]
    rows = []
    for name, ms in times.items():
        tenth, *_, ninth = statistics.quantiles(ms, n=10)
        rows.append(
            {
                **work,
                "name": name,
                "min_ms": min(ms),
                "median_ms": statistics.median(ms),
                "p10_ms": tenth,
                "p90_ms": ninth,
                "ratio_of_minima": min(base) / min(ms),
                "ratio_of_medians": statistics.median(base) / statistics.median(ms),
                "repeats": len(ms),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | what | min ms | median ms | of XLA f32, minima | medians |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['work']} | {r['name']} | {r['min_ms']:.3f} | {r['median_ms']:.3f} | "
            f"{r['ratio_of_minima']:.2f} | {r['ratio_of_medians']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(r["work"] for r in rows))
    fig, axes = plt.subplots(1, len(works), figsize=(3.2 * len(works), 4), squeeze=False)
    for ax, work in zip(axes[0], works):
        here = [r for r in rows if r["work"] == work]
        ax.barh([r["name"] for r in here], [r["ratio_of_minima"] for r in here], color="#4477aa")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(work, fontsize=9)
        ax.set_xlabel("times XLA f32")
        ax.tick_params(labelsize=7)
        ax.invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    need("jax", "matplotlib")
    from jaxcompress.kernels import cpu

    repeats, budget = (5, 0.2) if options.quick else (50, 5.0)
    timed = partial(interleaved, in_a_row=4)
    rows: list[dict[str, Any]] = []
    most = _bench_peak.peak()
    with staged(options.out) as out:
        for m, k, n, copies in SHAPES:
            runs = linear_runs(m, k, n, copies, not options.no_peers)
            work = dict(work=f"{m} x {k} x {n}", copies=copies)
            found = summary(timed(runs, repeats, budget), work)
            if most:
                found = [
                    r | _bench_peak.share(r["name"], m, k, n, r["min_ms"], most) for r in found
                ]
            rows += found
            print(table(found), flush=True)
        for m, k, n, copies in SPARSE_SHAPES:
            runs = sparse_runs(m, k, n, copies, not options.no_peers)
            work = dict(work=f"{m} x {k} x {n}, pruned", copies=copies)
            rows += summary(timed(runs, repeats, budget), work)
            print(table(rows[-len(runs) :]), flush=True)
        runs = block_runs()
        rows += summary(timed(runs, repeats, budget), dict(work="transformer, 512 tokens"))
        print(table(rows[-len(runs) :]), flush=True)
        native = cpu.missing() or cpu.path()
        record = {"environment": environment(), "native": native, "peak": most, "rows": rows}
        write_json(out / "bench_cpu.json", record)
        (out / "table.md").write_text(table(rows))
        figure(rows, out / "bench_cpu.png")


if __name__ == "__main__":
    main()
