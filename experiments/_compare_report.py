"""What the benchmarks beside other libraries say of their times: rows, a table, a figure."""

import statistics
from pathlib import Path
from typing import Any

__all__ = ["bars", "step_rows", "table"]


def step_rows(
    work: str, times: dict[str, list[float]], compiled: dict[str, float], base: str
) -> list[dict[str, Any]]:
    """For each name its milliseconds, and how many times those of `base` they are.

    `ratio_of_pairs` are the 10th and 90th percentile of the ratio within a round, in which
    all ran one after the other.
    """
    rows = []
    for name, ms in times.items():
        pairs = [a / b for a, b in zip(ms, times[base])]
        tenth, *_, ninth = statistics.quantiles(pairs, n=10, method="inclusive")
        rows.append(
            {
                "work": work,
                "name": name,
                "min_ms": min(ms),
                "median_ms": statistics.median(ms),
                "ratio_of_minima": min(ms) / min(times[base]),
                "ratio_of_medians": statistics.median(ms) / statistics.median(times[base]),
                "ratio_of_pairs": [tenth, ninth],
                "compile_s": compiled[name],
                "repeats": len(ms),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cores = all("cpu_ratio" in r for r in rows)  # not every benchmark counts their time
    lines = [
        "| step | by | median ms | of dense: minima | medians | 10-90 % of pairs | compile s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    if cores:
        lines = [f"{lines[0]} time of the cores |", f"{lines[1]} ---: |"]
    for r in rows:
        low, high = r["ratio_of_pairs"]
        lines.append(
            f"| {r['work']} | {r['name']} | {r['median_ms']:.2f} | {r['ratio_of_minima']:.2f} | "
            f"{r['ratio_of_medians']:.2f} | {low:.2f}-{high:.2f} | {r['compile_s']:.1f} |"
            + (f" {r['cpu_ratio']:.2f} |" if cores else "")
        )
    return "\n".join(lines) + "\n"


def bars(rows: list[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """One panel a model: the ratios of the medians, and lines at the `limits` of `work`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(r["work"] for r in rows))
    fig, axes = plt.subplots(1, len(works), figsize=(4.2 * len(works), 3.6), squeeze=False)
    for ax, work in zip(axes[0], works):
        here = [r for r in rows if r["work"] == work]
        ratios = [r["ratio_of_medians"] for r in here]
        spread = list(zip(*(r["ratio_of_pairs"] for r in here)))
        ours = ["#4477aa" if r["name"].startswith(("ours", "dense")) else "#bbbbbb" for r in here]
        ax.barh([r["name"] for r in here], ratios, color=ours)
        ax.hlines(range(len(here)), *spread, color="black", linewidth=0.8)
        ax.axvline(limits[work], color="#cc3311", linewidth=0.8)
        if max(spread[1]) > 10:
            ax.set_xscale("log")
        ax.set_title(work, fontsize=8)
        ax.set_xlabel("times the dense step", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
