"""The report of the main job: numbers, reasons in words, and a page that shows them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.arrays import is_compressed

BOOTSTRAPS = 2000


def accuracy_against(ours: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """The mean difference of `[seeds, items]` of right answers, in points, and its interval.

    A bootstrap over seeds and items at once: both were drawn, and both models saw the
    same ones, so that what is common cancels.
    """
    difference = ours.astype(float) - dense.astype(float)
    random = np.random.default_rng(0)
    seeds, items = difference.shape
    means = np.empty(BOOTSTRAPS)
    for i in range(BOOTSTRAPS):
        chosen = difference[random.integers(0, seeds, seeds)]
        means[i] = chosen.mean(0)[random.integers(0, items, items)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return {"points": 100 * difference.mean(), "low": 100 * low, "high": 100 * high}


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro"))


def leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=is_compressed)


def stored(params: Any) -> dict[str, Any]:
    """Bytes in memory, the share of weights that are zero, and what is left to multiply."""
    matrices = [leaf for leaf in leaves(params) if leaf.ndim == 2]
    dense = [np.asarray(m.materialise() if is_compressed(m) else m) for m in matrices]
    kept, total = sum(int((m != 0).sum()) for m in dense), sum(m.size for m in dense)
    return {
        "param_bytes": int(sum(leaf.nbytes for leaf in leaves(params))),
        "sparsity": 1 - kept / total,
        "macs": kept,
    }


def why(rows: Sequence[Any], ratio: float, batch: int) -> str:
    """One sentence: how fast against dense, and what the products run as.

    `rows` are those of `jaxcompress.explain`, `ratio` the measured time over that of the
    dense model.
    """
    if 0.9 <= ratio <= 1.1:
        speed = f"takes {ratio:.2f} of the time of dense, as long within the noise"
    elif ratio < 1:
        speed = f"is {1 / ratio:.1f} times as fast as dense"
    else:
        speed = f"takes {ratio:.1f} times as long as dense"
    if not rows:
        return f"Batch {batch} {speed}: nothing in it is compressed."
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(row.why, set()).add(row.path)
    parts = [f"{reason}, for {len(paths)} weights" for reason, paths in kinds.items()]
    return f"Batch {batch} {speed}: {'; '.join(parts)}."


def table(variants: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table that the page, the README and the terminal show."""
    head = [
        "variant",
        "accuracy %",
        "against dense, points",
        "file",
        "smaller",
        "zeros",
        "ms, batch 1",
        "ms, batch 128",
    ]
    dense = next(v for v in variants if v["name"] == "dense")
    rows = []
    for v in variants:
        d = v["accuracy_vs_dense"]
        rows.append(
            [
                v["name"],
                f"{100 * v['accuracy_mean']:.2f} ± {100 * v['accuracy_std']:.2f}",
                "" if v is dense else f"{d['points']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]",
                f"{v['file_bytes'] / 1000:,.1f} kB",
                f"{dense['file_bytes'] / v['file_bytes']:.1f}x",
                f"{100 * v['sparsity']:.1f} %",
                *(f"{v['latency_ms'][b]['median']:.3f}" for b in ("1", "128")),
            ]
        )
    return head, rows


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #ddd;
  text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; margin: .5rem 0 0; }}
figure {{ margin: 2rem 0; }} figcaption {{ color: #555; }}
code {{ background: #f4f4f4; padding: .1rem .3rem; }} .note {{ color: #555; font-size: .9rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
<p class="note">Accuracy: mean and standard deviation over seeds of 1,000 digits that nothing was
chosen on. Against dense: paired over the same digits and seeds, with the 95 % interval of a
bootstrap over both. Time: median, in one process with the dense model in turns.</p>
<h2>Why so fast, or not</h2><ul>{why}</ul>
{figures}
<p class="note">{foot}</p>
</body></html>
"""


def page(report: dict[str, Any], figures: Sequence[tuple[Path, str]]) -> str:
    """A page that needs no other file: pictures are inside it."""
    cell = lambda tag, text: f"<{tag}>{html.escape(text)}</{tag}>"
    head, rows = table(report["variants"])
    shown = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{_base64(path)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in figures
    )
    environment = report["environment"]
    return _PAGE.format(
        title="A network of 266,610 parameters, compressed",
        lead=html.escape(report["summary"]),
        head="".join(cell("th", text) for text in head),
        rows="".join("<tr>" + "".join(cell("td", t) for t in row) + "</tr>" for row in rows),
        why="".join(
            f"<li><b>{v['name']}</b>: {html.escape(v['why'])}</li>" for v in report["variants"]
        ),
        figures=shown,
        foot=html.escape(
            f"{environment['command']} at commit {environment['commit']}, jax "
            f"{environment['versions'].get('jax')}, on {environment['machine']['processor']} "
            f"({environment['machine']['cores']} cores). Data: {report['data']}."
        ),
    )


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def explained(params: Any, apply: Any, x: Any) -> Sequence[Any]:
    """The rows of `explain`, none where nothing is compressed."""
    return jc.explain(apply, params, x) if any(map(is_compressed, leaves(params))) else ()
