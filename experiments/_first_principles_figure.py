"""The figure of the tour, drawn from its record alone: one panel for each lesson."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours, which colour-blind readers tell apart; WRONG is for mistakes only.
BLUE, ORANGE, GREEN, SKY, WRONG, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#666666"
)  # fmt: skip
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "mathtext.fontset": "dejavusans",
}


def _optimizers(axis: Axes, lesson: dict[str, Any]) -> None:
    for color, (name, losses) in zip((GREY, SKY, BLUE, ORANGE), lesson["curves"].items()):
        updates = lesson["numbers"][name]["updates"]
        label = f"{name}, {updates} updates"
        axis.plot(range(1, len(losses) + 1), losses, color=color, marker="o", ms=3, label=label)
    axis.set(yscale="log", xlabel="passes over the digits", ylabel="training loss")
    axis.legend()


def _accumulation(axis: Axes, lesson: dict[str, Any]) -> None:
    curves = lesson["curves"]
    updates = range(1, len(curves["summed"]) + 1)
    axis.plot(updates, curves["large batch"], color=BLUE, lw=3, alpha=0.5, label="batch of 400")
    axis.plot(updates, curves["accumulated"], ".", color="black", ms=4, label="8 x 50, averaged")
    axis.plot(updates, curves["summed"], "--", color=WRONG, label="8 x 50, summed")
    axis.set(xlabel="updates", ylabel="training loss", ylim=(0, 3))
    axis.legend()


def _data_parallel(axis: Axes, lesson: dict[str, Any]) -> None:
    alone, numbers = lesson["curves"]["one device alone"], lesson["numbers"]
    devices = range(1, len(alone) + 1)
    mean, total = len(alone) + 1.8, len(alone) + 3.2
    axis.bar(devices, alone, color=SKY, width=0.7)
    axis.bar(mean, numbers["mean_gradient_off_by"], color=BLUE, width=0.7)
    axis.bar(total, numbers["summed_gradient_off_by"], color=WRONG, width=0.7)
    axis.set_xticks([*devices, mean, total], [*map(str, devices), "mean", "sum"])
    axis.set(yscale="log", ylim=(1e-8, 30), xlabel="gradient of one device, or of all eight")
    axis.set_ylabel("distance to the whole batch's\ngradient, relative")
    axis.grid(axis="x", visible=False)


def _clipping(axis: Axes, lesson: dict[str, Any]) -> None:
    curves, numbers = lesson["curves"], lesson["numbers"]
    bad = numbers["bad_update"]
    for name, color in (("not clipped", WRONG), ("clipped", BLUE)):
        right = numbers[name.replace(" ", "_") + "_test_accuracy"]
        label = f"{name}: test accuracy {right:.0%}"
        axis.plot(curves[name], color=color, lw=1.4, label=label)
    top = max(curves["not clipped"])
    axis.set(yscale="log", xlabel="updates", ylabel="training loss", ylim=(None, 30 * top))
    axis.annotate(
        "one batch\nunscaled",
        (bad, top),
        xytext=(-12, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=GREY,
        arrowprops={"arrowstyle": "-", "color": GREY},
    )
    axis.legend(loc="upper right")


def _quantization(axis: Axes, lesson: dict[str, Any]) -> None:
    curves, numbers = lesson["curves"], lesson["numbers"]
    w = curves["weight"]
    shown = (
        ("round(w), no scale", "--", WRONG, "round(w), without a scale"),
        ("int4, a scale per tensor", "-", ORANGE, "4 bits"),
        ("int8, a scale per tensor", "-", BLUE, "8 bits"),
    )
    for name, line, color, label in shown:
        size = f", {numbers[name]['bytes'] / 1000:.0f} kB" if "bytes" in numbers[name] else ""
        axis.plot(w, curves[name], line, color=color, label=label + size, drawstyle="steps-mid")
    axis.set(xlabel="weight, float32", ylabel="weight after quantization")
    title = f"float32: {numbers['float32']['bytes'] / 1000:.0f} kB"
    axis.legend(title=title, title_fontsize=8.5, alignment="left")


def _lasso(axis: Axes, lesson: dict[str, Any]) -> None:
    curves = lesson["curves"]
    ours, theirs = curves["coefficients of the eight"], curves["scikit-learn's"]
    for i, (path, reference) in enumerate(zip(ours, theirs)):
        axis.plot(curves["penalty"], path, color=plt.cm.viridis(i / len(ours)), lw=1, zorder=2)
        label = "scikit-learn's Lasso" if i == 0 else None
        axis.plot(curves["penalty"], reference, "o", color="black", ms=1.8, label=label, zorder=3)
    axis.set(xscale="log", xlabel="penalty r", ylabel="coefficients of the class 8")
    ticks = [0.002, 0.005, 0.01, 0.02, 0.05]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.legend()


def _linear(axis: Axes, lesson: dict[str, Any]) -> None:
    curves, numbers = lesson["curves"], lesson["numbers"]
    lines = (
        ("magnitude", GREY, "--"),
        ("magnitude + refit", GREY, "-"),
        ("L1", GREEN, "--"),
        ("L1 + refit", GREEN, "-"),
    )
    for name, color, line in lines:
        axis.plot(curves["kept"], curves[name], line, color=color, marker="o", ms=3, label=name)
    axis.axhline(numbers["dense_test_accuracy"], color="black", lw=0.8, ls=":")
    axis.set(xlabel=f"coefficients kept of {numbers['coefficients']}", ylabel="test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.invert_xaxis()
    axis.legend(loc="lower left")


def _activations(axis: Axes, lesson: dict[str, Any]) -> None:
    curves, numbers = lesson["curves"], lesson["numbers"]
    for name, color, line in (
        ("own k for each example", BLUE, "-"),
        ("same k for all", WRONG, "--"),
    ):
        axis.plot(curves["kept"], curves[name], line, color=color, marker="o", ms=3, label=name)
    axis.plot(
        numbers["kept"],
        numbers["trained_test_accuracy"],
        "*",
        color=ORANGE,
        ms=11,
        label="own k, trained with it",
    )
    axis.axhline(numbers["dense_test_accuracy"], color="black", lw=0.8, ls=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks(curves["kept"], [str(k) for k in curves["kept"]])
    axis.invert_xaxis()
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set(xlabel=f"units kept of {numbers['width']} a layer", ylabel="test accuracy")
    axis.legend(loc="center left")


def _distillation(axis: Axes, lesson: dict[str, Any]) -> None:
    curves, numbers = lesson["curves"], lesson["numbers"]
    for x, (name, color) in enumerate((("alone", GREY), ("distilled", GREEN))):
        spread = [x + 0.05 * (i - (len(curves[name]) - 1) / 2) for i in range(len(curves[name]))]
        axis.plot(spread, curves[name], "o", color=color, ms=5, alpha=0.8)
        axis.hlines(numbers[f"{name}_test_accuracy"], x - 0.25, x + 0.25, color=color, lw=2)
    teacher = numbers["teacher_test_accuracy"]
    axis.axhline(teacher, color="black", lw=0.8, ls=":")
    axis.annotate(
        f"teacher, {numbers['teacher_parameters'] / 1000:.0f}k parameters",
        (-0.45, teacher),
        xytext=(0, -4),
        textcoords="offset points",
        va="top",
    )
    axis.set_xticks((0, 1), ("student alone", "student distilled"))
    axis.set(xlim=(-0.5, 1.5), ylabel="test accuracy")
    axis.set_xlabel(f"five students of {numbers['student_parameters'] / 1000:.0f}k parameters")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)


class Panel(NamedTuple):
    lesson: str
    title: str
    equation: str
    draw: Callable[[Axes, dict[str, Any]], None]


PANELS = (
    Panel(
        "Four optimizers",
        "Four optimizers",
        r"Adam: $w \leftarrow w - \alpha\,\hat m\,/\,(\sqrt{\hat v} + \epsilon)$",
        _optimizers,
    ),
    Panel(
        "Gradient accumulation",
        "Gradient accumulation",
        r"$g = (g_1 + \ldots + g_k)\,/\,k$",
        _accumulation,
    ),
    Panel(
        "Data parallelism",
        "Data parallelism",
        r"$g = (g_1 + \ldots + g_D)\,/\,D$",
        _data_parallel,
    ),
    Panel(
        "Gradient clipping",
        "Gradient clipping",
        r"$g \leftarrow g\,\min(1,\ c/\|g\|)$",
        _clipping,
    ),
    Panel(
        "Quantization",
        "Quantization",
        r"$\hat w = s\,\mathrm{round}(w/s),\ \ s = \max|w|\,/\,h,\ \ |w - \hat w| \leq s/2$",
        _quantization,
    ),
    Panel(
        "Pruning a linear model",
        "L1: proximal gradient steps",
        r"minimise $\ \|b - Aw\|^2\,/\,(2n) + r\,\|w\|_1$",
        _lasso,
    ),
    Panel(
        "Pruning a linear model",
        "Pruning a linear model",
        r"$w_i \leftarrow 0\ $ unless $|w_i|$ is among the $k$ largest",
        _linear,
    ),
    Panel(
        "Activation pruning",
        "Activation pruning",
        r"$h_i \leftarrow 0\ $ unless among the $k$ largest of its example",
        _activations,
    ),
    Panel(
        "Distillation",
        "Distillation",
        r"$L = c\,T^2\,\mathrm{KL}(p_T\,\|\,q_T) + (1 - c)\,\mathrm{CE}$",
        _distillation,
    ),
)


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the figure of a record to `path`."""
    lessons = {lesson["name"]: lesson for lesson in record["lessons"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 3, figsize=(14, 12), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.14)
        for i, (axis, panel) in enumerate(zip(axes.flat, PANELS)):
            panel.draw(axis, lessons[panel.lesson])
            title = f"{'abcdefghi'[i]}  {panel.title}"
            axis.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=24)
            axis.text(
                0, 1.03, panel.equation, transform=axis.transAxes, fontsize=9.5, color="#333333"
            )
        figure.savefig(path, dpi=110)
        plt.close(figure)
