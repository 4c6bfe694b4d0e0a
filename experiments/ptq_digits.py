"""Post-training quantization of a small MLP: every method at 8, 4, 3 and 2 bits.

    python experiments/ptq_digits.py            about 10 minutes on two cores
    python experiments/ptq_digits.py --quick    one seed, 4 and 2 bits: about a minute

A 64-256-256-10 network is trained on the 8x8 digits of scikit-learn with five seeds. Each
method then quantizes all three kernels, with one scale for each output (no groups), from the
training rows without labels. Told of each: the relative error of the logits on the test rows,
|f(q) - f| / |f|, and the accuracy. The methods of weights keep activations in floats; those
that end in a8 quantize them to eight bits as well. Symmetric codes of two bits are -1, 0 and 1,
asymmetric ones use all four.

Where qwix is installed it quantizes the same networks. Its codes take the lowest integer too
(-2 to 1 with two bits), and its scales are max |w| / (2^(b-1) - 1/2).

Expected (relative error): GPTQ .0127 at 4 bits and .081 at 2 bits (.066 asymmetric), BRECQ .0093
and .030; GPTQ of qwix .0146 and .085. Writes ptq_digits.json and ptq_digits.png to --out (default
report/ptq_digits).
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import ROOT, Parser, environment, fail, need, progress, staged, write_json
from _ptq_peers import WIDTHS as PEER_WIDTHS
from _ptq_peers import peers

BITS = (8, 4, 3, 2)
WIDTHS = (64, 256, 256, 10)
STEPS, BATCH = 1500, 128
CALIBRATION = 2, 718  # batches, and rows of each


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    folder = ROOT / "report" / "ptq_digits"
    parser.add_argument("--out", type=Path, default=folder, help="folder (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 and 2 bits: does it run?")
    options = parser.parse_args()
    if options.seeds < 1:
        fail("--seeds is 1 or more")
    return options


def data() -> tuple[Any, Any, Any, Any]:
    """1,437 digits to train on and 360 to report on, shuffled with a fixed seed."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    y = digits.target[order].astype(np.int32)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def mlp(params: Any, x: Any) -> Any:
    import jax

    for i in range(len(WIDTHS) - 1):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def trained(seed: int, x: Any, y: Any) -> Any:
    """The network after `STEPS` steps of Adam on batches of `BATCH`."""
    import jax
    import jax.numpy as jnp
    import optax

    keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = {
        f"layer{i}": {
            "kernel": jax.nn.initializers.lecun_normal()(keys[i], (m, n)),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(itertools.pairwise(WIDTHS))
    }
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))

    def step(state, key):
        params, opt = state
        rows = jax.random.randint(key, (BATCH,), 0, len(x))

        def loss(params):
            logits = mlp(params, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    run = jax.jit(lambda params, keys: jax.lax.scan(step, (params, tx.init(params)), keys)[0][0])
    return run(params, jax.random.split(keys[-1], STEPS))


def methods(batches: list[Any]) -> dict[str, Callable[[Any, int], Any]]:
    """`method(params, bits)` by name."""
    import jaxcompress as jc

    def spec(bits: int, act: int | None = None, symmetric: bool = True) -> Any:
        types = jc.arrays
        chosen = None if act is None else types.Activation(types.IntType(act))
        return {".*kernel": jc.quantize.Spec(qtype=types.IntType(bits, symmetric), act=chosen)}

    def learnt(method: Callable, *kind: Any, **options: Any) -> Callable[[Any, int], Any]:
        return lambda params, bits: method(mlp, params, batches, spec(bits, *kind), **options)

    q = jc.quantize
    whole = [".*kernel"]  # the network is one block
    return {
        "RTN": lambda params, bits: q.quantize(params, spec(bits)),
        "RTN, equalized": learnt(q.equalize),
        "RTN, biases corrected": learnt(q.bias_correct),
        "HQQ": lambda params, bits: q.hqq(params, spec(bits)),
        "AWQ": learnt(q.awq),
        "AdaRound": learnt(q.adaround),
        "BRECQ": learnt(q.brecq, blocks=whole),
        "GPTQ": learnt(q.gptq),
        "RTN asymmetric": lambda params, bits: q.quantize(params, spec(bits, None, False)),
        "GPTQ asymmetric": learnt(q.gptq, None, False),
        "RTN a8": lambda params, bits: q.quantize(params, spec(bits, 8)),
        "SmoothQuant a8": learnt(q.smoothquant, 8),
        "GPTQ a8": learnt(q.gptq, 8),
    }


def run(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxcompress as jc

    seeds = range(1 if options.quick else options.seeds)
    widths = (4, 2) if options.quick else BITS
    x, y, test_x, test_y = map(jnp.asarray, data())
    evaluate = jax.jit(jc.accelerate(mlp))
    batches, size = CALIBRATION
    seen = x[: batches * size]
    chosen = methods(list(seen.reshape(batches, size, -1))) | peers(seen)
    runs = [
        (name, bits)
        for name, bits in itertools.product(chosen, widths)
        if bits in PEER_WIDTHS or not name.startswith("qwix")
    ]
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    dense = []
    with progress() as add:
        advance = add("models quantized", len(seeds) * len(runs))
        for seed in seeds:
            params = trained(seed, x, y)
            want = np.asarray(evaluate(params, test_x), np.float64)
            dense.append(float((want.argmax(-1) == np.asarray(test_y)).mean()))
            for name, bits in runs:
                begin = time.perf_counter()
                small = jax.block_until_ready(chosen[name](params, bits))
                seconds = time.perf_counter() - begin
                got = np.asarray(evaluate(small, test_x), np.float64)
                found = {
                    "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
                    "accuracy": float((got.argmax(-1) == np.asarray(test_y)).mean()),
                    "seconds": seconds,
                }
                kernels = [small[layer]["kernel"] for layer in small]
                if all(map(jc.arrays.is_compressed, kernels)):
                    stored = sum(k.nbytes for k in kernels)
                    found["bits"] = 8 * stored / sum(k.size for k in kernels)
                rows.setdefault((name, bits), []).append(found)
                advance()
    record = {
        "environment": environment(list(seeds)),
        "qwix": importlib.metadata.version("qwix") if importlib.util.find_spec("qwix") else None,
        "data": "the 1,797 digits of scikit-learn, 8x8: 1,437 train, 360 test",
        "dense_accuracy": dense,
        "rows": [
            {"method": name, "width": bits, **summary(found)}
            for (name, bits), found in rows.items()
        ],
    }
    write_json(out / "ptq_digits.json", record)
    figure(record, out / "ptq_digits.png")
    return record


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Each seed's value, and mean and standard deviation over seeds."""
    import numpy as np

    out: dict[str, Any] = {}
    for key in found[0]:
        values = [row[key] for row in found]
        out[key] = {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=min(1, len(values) - 1))),
            "seeds": [round(v, 5) for v in values],
        }
    return out


def figure(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    picture, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    for i, name in enumerate(names):
        rows = [row for row in record["rows"] if row["method"] == name]
        widths = [row["width"] for row in rows]
        lines = "--" if name.endswith("a8") else ":" if name.startswith("qwix") else "-"
        style = dict(color=colors[i], marker="os^v"[i % 4], ms=4, ls=lines)
        axes[0].plot(widths, [row["error"]["mean"] for row in rows], label=name, **style)
        axes[1].plot(widths, [100 * row["accuracy"]["mean"] for row in rows], **style)
    axes[0].set(xlabel="bits", ylabel="relative error of the logits", yscale="log")
    axes[1].set(xlabel="bits", ylabel="test accuracy, %")
    for axis in axes:
        axis.set_xticks(sorted({row["width"] for row in record["rows"]}))
        axis.grid(alpha=0.3)
    picture.legend(loc="outside right center", fontsize=8, frameon=False)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def table(record: dict[str, Any]) -> str:
    """Relative errors, a row a method, as they stand on the page of the docs."""
    widths = list(dict.fromkeys(row["width"] for row in record["rows"]))
    cells: dict[str, dict[int, str]] = {}
    for row in record["rows"]:
        text = f"{row['error']['mean']:.4f} ({100 * row['accuracy']['mean']:.1f})"
        cells.setdefault(row["method"], {})[row["width"]] = text
    lines = ["| | " + " | ".join(f"{w} bits" for w in widths) + " |"]
    lines.append("| --- |" + " --- |" * len(widths))
    lines += [
        f"| {name} | " + " | ".join(row.get(w, "-") for w in widths) + " |"
        for name, row in cells.items()
    ]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    need("jax", "optax", "matplotlib", "rich", "sklearn", "jaxcompress")
    with staged(options.out) as out:
        record = run(options, out)
    print(table(record))
    print(f"See {options.out / 'ptq_digits.png'}")


if __name__ == "__main__":
    main()
