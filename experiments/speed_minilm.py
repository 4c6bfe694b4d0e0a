"""Is a compressed transformer faster, from end to end, than the dense one and than onnxruntime's?

    python experiments/speed_minilm.py            about 10 minutes on two cores
    python experiments/speed_minilm.py --quick    200 items, few repeats: does it run?

all-MiniLM-L6-v2 (see ptq_minilm.py) encodes definitions of WordNet, one at a time and 32 at
once, sorted by length and padded to a multiple of eight tokens: in float32 by XLA, with weights
and activations in int8, with weights in int4 by GPTQ, and with 70 % of the weights pruned by
SparseGPT, in int8. Then the same weights in onnxruntime, in floats and as its own dynamic int8,
if it is installed (pip install -e '.[benchmark]'). All take turns within one process. Recall is
that of ptq_minilm, on the same 1,000 items; the peak of memory is that of a fresh process that
loads the file and encodes 32 texts.

Expected: int8 at least 2.5 times XLA's float32, and 1.1 times onnxruntime's int8, at the same
recall; pruned weights gain nothing here, since 30 % kept is too much for a sparse product.
Writes experiments/results/speed_minilm.json and .png.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _harness import environment, interleaved, need, progress, write_json
from _minilm_rows import QUICK, parsed, parser

BATCHES = {1: 64, 32: 320}  # texts at once, and how many are timed
CUT = 16  # tokens of a text to calibrate with: none is padding


def padded(tokens: list[list[int]], at_once: int) -> list[tuple[Any, Any]]:
    """Tokens `[at_once, multiple of 8]` and lengths, in the order of the texts."""
    import numpy as np

    batches = []
    for start in range(0, len(tokens), at_once):
        rows = tokens[start : start + at_once]
        rows = rows + [rows[-1]] * (at_once - len(rows))
        lengths = np.array([len(row) for row in rows], np.int32)
        filled = np.zeros((at_once, -(-lengths.max() // 8) * 8), np.int32)
        for i, row in enumerate(rows):
            filled[i, : len(row)] = row
        batches.append((filled, lengths))
    return batches


def vectors(encode: Any, tokens: list[list[int]]) -> Any:
    """`[n, 384]`: long texts with long ones, then back in order."""
    import numpy as np

    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    found = [encode(*batch) for batch in padded([tokens[i] for i in order], 32)]
    out = np.empty((len(tokens), found[0].shape[1]), np.float32)
    out[order] = np.concatenate(found)[: len(tokens)]
    return out


def variants(learn: list[Any]) -> dict[str, Callable[[Any], Any]]:
    """What becomes of the float parameters, by name."""
    import jaxcompress as jc
    from _minilm_layers import LINEAR, encode_padded

    table = {"embedding/word": jc.quantize.int8(axis=-1)}
    fn = lambda params, batch: encode_padded(params, *batch)

    def pruned(params: Any) -> Any:
        rules = [LINEAR]
        params, masks = jc.prune.sparsegpt(
            fn, params, learn, jc.prune.unstructured(), 0.7, rules=rules
        )
        small = jc.quantize.quantize(jc.prune.apply(params, masks), {LINEAR: jc.quantize.w8a8()})
        return jc.quantize.quantize(jc.prune.pack(small, masks), table)

    def four(params: Any) -> Any:
        spec = {LINEAR: jc.quantize.w4a8(group_size=128)}
        small = jc.quantize.gptq(fn, params, learn, spec)
        return jc.quantize.hqq(small, {"embedding/word": jc.quantize.int4(axis=-1)})

    eight = {LINEAR: jc.quantize.w8a8()} | table
    return {
        "float32": lambda params: params,
        "int8": lambda params: jc.quantize.quantize(params, eight),
        "int4": four,
        "70 % pruned, int8": pruned,
    }


def saved(params: Any, learn: list[Any], folder: Path, advance: Any) -> dict[str, Path]:
    """The file of every variant."""
    import jaxcompress as jc

    files = {}
    for i, (name, make) in enumerate(variants(learn).items()):
        files[name] = folder / f"{i}.safetensors"
        jc.io.save(files[name], make(params))
        advance()
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        from _minilm_onnx import save

        for eight_bits in (False, True):
            name = "onnxruntime " + ("dynamic int8" if eight_bits else "float32")
            files[name] = folder / f"{eight_bits:d}.onnx"
            save(params, files[name], eight_bits)
            advance()
    return files


def peak(file: Path, texts: Path) -> int:
    """Bytes, of a process of its own."""
    program = Path(__file__).with_name("_minilm_encoders.py")
    command = [sys.executable, str(program), str(file), str(texts)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def every(encode: Any, batches: list[tuple[Any, Any]]) -> list[Any]:
    return [encode(*batch) for batch in batches]


def speed(encoders: dict[str, Any], tokens: list[list[int]], quick: bool) -> dict[str, Any]:
    """Texts a second by batch size, all variants in turns."""
    found: dict[str, dict[str, Any]] = {name: {} for name in encoders}
    for at_once, count in BATCHES.items():
        chosen = sorted(tokens[: 32 if quick else count], key=len)
        batches = padded(chosen, at_once)
        runs = {name: partial(every, encode, batches) for name, encode in encoders.items()}
        times = interleaved(runs, 5 if quick else 40, 60.0)
        base = times["float32"]
        for name, ms in times.items():
            found[name][str(at_once)] = {
                "texts": len(chosen),
                "min_ms": min(ms),
                "median_ms": statistics.median(ms),
                "max_ms": max(ms),
                "repeats": len(ms),
                "texts_per_second": 1e3 * len(chosen) / min(ms),
                "ratio_of_minima": min(base) / min(ms),
                "ratio_of_medians": statistics.median(base) / statistics.median(ms),
            }
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from _minilm_data import read, split
    from _minilm_dense import SIZES
    from _minilm_encoders import load as encoder
    from _minilm_layers import unstacked
    from _minilm_model import folder, load, tokenize
    from _minilm_tasks import against, retrieved
    from jaxcompress.kernels import cpu

    sizes, where = QUICK if options.quick else SIZES, folder()
    parts = split(read(options.wordnet), sizes)
    definitions, names = (
        tokenize(where, texts) for texts in (parts.items.definitions, parts.items.names)
    )
    known = [ids[:CUT] for ids in tokenize(where, parts.calibration.definitions)]
    long = [ids for ids in known if len(ids) == CUT]
    learn = padded(long[: len(long) // 32 * 32], 32)
    with tempfile.TemporaryDirectory() as made, progress() as add:
        texts = Path(made, "texts.npz")
        batch = padded(sorted(definitions, key=len)[-32:], 32)[0]
        np.savez(texts, tokens=batch[0], lengths=batch[1])
        files = saved(unstacked(load(where)), learn, Path(made), add("models", 6))
        encoders, rows, right = {}, [], {}
        advance = add("recall and memory", len(files))
        for name, file in files.items():
            encoders[name] = encoder(file)
            both = (vectors(encoders[name], tokens) for tokens in (definitions, names))
            right[name] = retrieved(*both)
            rows.append(
                {
                    "name": name,
                    "file_bytes": file.stat().st_size,
                    "peak_bytes": peak(file, texts),
                    "recall": against(right[name], right["float32"]),
                }
            )
            advance()
        timed = speed(encoders, definitions, options.quick)
    record = {
        "environment": environment(),
        "data": f"WordNet 3.0: {sizes[0]:,} items, {len(learn) * 32:,} texts to calibrate",
        "native": cpu.missing() or cpu.path(),
        "rows": [row | {"speed": timed[row["name"]]} for row in rows],
    }
    write_json(options.out / "speed_minilm.json", record)
    figure(record, options.out / "speed_minilm.png")
    return record


def figure(record: dict[str, Any], path: Path) -> None:
    """Times as fast as float32, by variant, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    picture, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    rows = record["rows"][::-1]
    for axis, at_once in zip(axes, BATCHES):
        found = [row["speed"][str(at_once)] for row in rows]
        colors = ["C7" if row["name"].startswith("onnx") else "C0" for row in rows]
        bars = axis.barh(
            [row["name"] for row in rows], [f["ratio_of_minima"] for f in found], color=colors
        )
        axis.bar_label(bars, [f"{f['texts_per_second']:,.0f}/s" for f in found], padding=3)
        axis.axvline(1, color="0.3", lw=0.8)
        axis.set(xlabel=f"times XLA float32, {at_once} text{'s' * (at_once > 1)} at once")
        axis.margins(x=0.2)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def table(record: dict[str, Any]) -> str:
    lines = [
        "| | file MB | peak MB | R@1 | from float32 | texts/s, 1 | of f32 | texts/s, 32 | of f32 |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in record["rows"]:
        r = row["recall"]
        cells = [f"{row['file_bytes'] / 1e6:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        cells += [f"{r['mean']:.3f}", f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"]
        for found in row["speed"].values():
            cells += [f"{found['texts_per_second']:,.0f}", f"{found['ratio_of_minima']:.2f}"]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parsed(parser(__doc__.splitlines()[0]))
    need("jax", "matplotlib", "rich", "safetensors", "jaxcompress")
    record = run(options)
    print(table(record))
    print(f"See {options.out / 'speed_minilm.png'}")


if __name__ == "__main__":
    main()
