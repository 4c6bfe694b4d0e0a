"""What is left of a pretrained transformer without half of its weights, or 70 %, or two of four?

    python experiments/prune_minilm.py            27 minutes on two cores with much other work
    python experiments/prune_minilm.py --quick    two methods, 200 items: does it run?

all-MiniLM-L6-v2, asked the same 1,000 items as in ptq_minilm.py: a reverse dictionary and a
frozen probe. The 36 linear layers of the six blocks are pruned at once, without training, by
magnitude over whole tensors, by Wanda within each output, and by SparseGPT, which goes layer by
layer and, in the same loop, rounds what stays to eight bits, or to four in groups of 128. What
Wanda and SparseGPT learn, they learn from 1,600 other entries. How many, that each output is a
competition of its own, blocks and damping were chosen on 1,000 others again, nothing on the
items. Differences to the dense model are paired.

Expected: SparseGPT at 50 % within one standard error of the dense model's recall (.468 of .480),
with int4 too, above .44 with two of four, above .42 at 70 %. Writes
experiments/results/prune_minilm.json and .png; a run that was cut off goes on after its last
finished row.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from _harness import need, write_json
from _minilm_rows import parsed, parser, record_of

METHODS = ("magnitude", "Wanda", "SparseGPT", "SparseGPT + int8", "SparseGPT + int4")
CALIBRATION = 1600  # entries
PATTERNS = ("50 %", "2:4", "70 %")


class Row(NamedTuple):
    method: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.method}, {self.pattern}".replace(":", " of ")


def pruned(row: Row, params: Any, batches: list[Any]) -> tuple[Any, Any]:
    """The parameters without the weights that `row` drops, and the masks."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxcompress as jc
    from _minilm_model import KERNELS, encode

    found, rules = jc.layout(encode, params, batches[0]), [KERNELS]
    sparsity = {"50 %": 0.5, "70 %": 0.7, "2:4": 1.0}[row.pattern]  # of 2:4, all groups
    nm = jc.prune.nm(2, 4, layout=found) if row.pattern == "2:4" else None
    each = nm or jc.prune.unstructured(layout=found)  # the same number in each output
    if row.method == "magnitude" and nm is None:  # a competition for each of the 36 matrices
        blocks = jax.tree.map(jnp.abs, params["blocks"])
        one = lambda p: jc.prune.mask(p, jc.prune.unstructured(), sparsity, rules=[".*kernel"])
        nothing = jax.tree.map(lambda _: optax.MaskedNode(), params["embedding"])
        masks = {"embedding": nothing, "blocks": jax.vmap(one)(blocks)}
    elif row.method == "magnitude":
        masks = jc.prune.mask(jax.tree.map(jnp.abs, params), each, sparsity, rules=rules)
    elif row.method == "Wanda":
        scores = jc.prune.wanda(encode, params, batches, rules=rules)
        masks = jc.prune.mask(scores, each, sparsity, rules=rules)
    else:
        spec = {"int8": jc.quantize.int8(), "int4": jc.quantize.int4(group_size=128)}
        quantize = spec.get(row.method.rpartition(" + ")[2])
        params, masks = jc.prune.sparsegpt(
            encode, params, batches, each, sparsity, rules=rules, quantize=quantize
        )
    return jc.prune.pack(params, masks, pattern=nm, layout=found), masks


def judged(row: Row, dense: Any) -> dict[str, Any]:
    import jax

    import jaxcompress as jc
    from _minilm_dense import bits_a_weight, compressed_leaves

    begin = time.perf_counter()
    small, masks = jax.block_until_ready(pruned(row, dense.params, dense.learn))
    seconds = time.perf_counter() - begin
    whole = lambda leaf: leaf.materialise() if jc.arrays.is_compressed(leaf) else leaf
    kept = [int(mask.sum()) for mask in jax.tree.leaves(masks)]
    return {
        "method": row.method,
        "pattern": row.pattern,
        "zeros": 1 - sum(kept) / sum(mask.size for mask in jax.tree.leaves(masks)),
        "bits": bits_a_weight(compressed_leaves(small)),
        "seconds": seconds,
        **dense.judged(jax.tree.map(whole, small, is_leaf=jc.arrays.is_compressed)),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = [Row(method, pattern) for pattern in PATTERNS for method in METHODS]
    if options.quick:
        rows = [Row("magnitude", "70 %"), Row("SparseGPT", "2:4")]
    record, done = record_of(options, "prune_minilm.json", rows, judged, CALIBRATION)
    write_json(options.out / "prune_minilm.json", record)
    figure(record, options.out / "prune_minilm.png")
    done()
    return record


def figure(record: dict[str, Any], path: Path) -> None:
    """Accuracy by pattern, a bar a method, with the interval of the paired difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    picture, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = {"recall": "reverse dictionary, R@1 in %", "probe": "frozen probe, % right"}
    patterns = [p for p in PATTERNS if any(row["pattern"] == p for row in record["rows"])]
    for axis, (metric, label) in zip(axes, labels.items()):
        dense = record["dense"][metric]
        middle, error = 100 * dense["mean"], 100 * dense["standard_error"]
        axis.axhline(middle, color="0.4", lw=1)
        axis.axhspan(middle - error, middle + error, color="0.9", label="dense, one SE")
        for i, method in enumerate(METHODS):
            rows = [row for row in record["rows"] if row["method"] == method]
            means = [100 * row[metric]["mean"] for row in rows]
            spread = [
                [100 * abs(row[metric][end] - row[metric]["difference"]) for row in rows]
                for end in ("low", "high")
            ]
            places = [patterns.index(row["pattern"]) + 0.16 * (i - 2) for row in rows]
            axis.bar(places, means, 0.15, color=f"C{i}", label=method, yerr=spread, capsize=2)
        axis.set_xticks(range(len(patterns)), patterns)
        axis.set(ylabel=label, ylim=(0, None))
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def table(record: dict[str, Any]) -> str:
    lines = ["| | zeros | bits a weight | R@1 | from dense | probe |", "| --- |" + " ---: |" * 5]
    dense = {m: f"{record['dense'][m]['mean']:.3f}" for m in ("recall", "probe")}
    lines.append(f"| dense | 0 % | 32 | {dense['recall']} | | {dense['probe']} |")
    for row in record["rows"]:
        r = row["recall"]
        lines.append(
            f"| {row['method']}, {row['pattern']} | {100 * row['zeros']:.0f} % | {row['bits']:.2f} "
            f"| {r['mean']:.3f} | {r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}] "
            f"| {row['probe']['mean']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parsed(parser(__doc__.splitlines()[0]))
    need("jax", "matplotlib", "rich", "sklearn", "safetensors", "jaxcompress")
    record = run(options)
    print(table(record))
    error = record["dense"]["recall"]["standard_error"]
    print(f"Standard error of R@1: {error:.3f}. See {options.out / 'prune_minilm.png'}")


if __name__ == "__main__":
    main()
