"""The pictures of the main job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxcompress as jc
from _digits_models import SIDE, student
from _digits_train import Fit

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
DPI = 120
FIRST = ("params", "Dense_0", "kernel")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return path


def accuracy_against_bytes(variants: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for i, v in enumerate(variants):
        x, y, error = v["file_bytes"] / 1000, 100 * v["accuracy_mean"], 100 * v["accuracy_std"]
        axis.errorbar(x, y, yerr=error, fmt="o", capsize=3, color=f"C{i}", label=v["name"])
    axis.set_xscale("log")
    ticks = [30, 50, 100, 200, 500, 1000]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set(xlabel="file, kB", ylabel="test accuracy, %")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.grid(alpha=0.3)
    return _save(figure, path)


def weight_histograms(models: dict[str, Any], path: Path) -> Path:
    """First-layer weights that are not zero, before and after."""
    figure, axes = plt.subplots(1, len(models), figsize=(3.1 * len(models), 2.8), sharex=True)
    for axis, (name, params) in zip(axes, models.items()):
        leaf = params[FIRST[0]][FIRST[1]][FIRST[2]]
        w = np.asarray(leaf.materialise() if hasattr(leaf, "materialise") else leaf)
        axis.hist(w[w != 0], bins=121, range=(-0.3, 0.3), color="C0")
        axis.set(title=f"{name}: {100 * (w == 0).mean():.0f} % zeros", xlabel="weight")
    axes[0].set_ylabel("weights")
    figure.tight_layout()
    return _save(figure, path)


def first_layer_mask(mask: np.ndarray, path: Path) -> Path:
    """Which pixels the pruned network still looks at, all units together and one by one."""
    figure = plt.figure(figsize=(9.5, 3.6))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    axis = left.subplots()
    shown = axis.imshow(mask.sum(1).reshape(SIDE, SIDE), cmap="magma")
    axis.set_title(f"weights kept at each pixel, of {mask.shape[1]}")
    axis.axis("off")
    left.colorbar(shown, shrink=0.8)
    busiest = np.argsort(-mask.sum(0), kind="stable")[:18]
    for axis, unit in zip(right.subplots(3, 6).ravel(), busiest):
        axis.imshow(mask[:, unit].reshape(SIDE, SIDE), cmap="gray_r")
        axis.axis("off")
    right.suptitle("the 18 units that keep most; black is kept")
    return _save(figure, path)


def learning_curves(fits: dict[str, Fit], path: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for i, (name, one) in enumerate(fits.items()):
        epochs = np.arange(1, len(one.loss) + 1)
        left.plot(epochs, one.loss.mean(1), color=f"C{i}", label=name)
        accuracy = 100 * one.accuracy
        right.plot(epochs, accuracy.mean(1), color=f"C{i}")
        right.fill_between(epochs, accuracy.min(1), accuracy.max(1), color=f"C{i}", alpha=0.15)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    right.set_ylim(bottom=max(80.0, right.get_ylim()[0]))
    left.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return _save(figure, path)


def saliency(models: dict[str, Any], x: np.ndarray, y: np.ndarray, path: Path) -> Path:
    """Where each model looks: the gradient of its winning logit times the input."""
    apply = jc.accelerate(student.apply)

    @jax.jit
    def attribution(params: Any, x: jax.Array) -> jax.Array:
        return x * jax.grad(lambda x: apply(params, x).max(-1).sum())(x)

    figure, axes = plt.subplots(
        1 + len(models), len(x), figsize=(1.15 * len(x) + 1, 1.2 * (1 + len(models)))
    )
    for column, (image, label) in enumerate(zip(x, y)):
        axes[0, column].imshow(image.reshape(SIDE, SIDE), cmap="gray_r")
        axes[0, column].set_title(str(label))
    for row, (name, params) in enumerate(models.items(), start=1):
        maps = np.asarray(attribution(params, jnp.asarray(x)))
        answers = np.asarray(apply(params, jnp.asarray(x)).argmax(-1))
        for column, (values, answer) in enumerate(zip(maps, answers)):
            limit = np.abs(values).max()
            axis = axes[row, column]
            axis.imshow(values.reshape(SIDE, SIDE), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(f"says {answer}", fontsize=8, pad=2)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("digit", rotation=0, ha="right", va="center")
    return _save(figure, path)


def forgotten(
    before: np.ndarray,
    after: np.ndarray,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    path: Path,
) -> Path:
    """Digits that the dense model knows and the compressed one does not.

    `before` and `after` are right answers, `[seeds, items]`.
    """
    lost = before.astype(float).mean(0) - after.astype(float).mean(0)
    figure = plt.figure(figsize=(10, 3.4))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    axis = left.subplots()
    share = [100 * lost[y == digit].mean() for digit in range(10)]
    axis.bar(range(10), share, color=["C3" if s > 0 else "C2" for s in share])
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xticks=range(10), xlabel="digit", ylabel="answers lost, points")
    worst = np.argsort(-lost, kind="stable")[:12]
    answers = logits.argmax(-1)
    for axis, item in zip(right.subplots(2, 6).ravel(), worst):
        axis.imshow(x[item].reshape(SIDE, SIDE), cmap="gray_r")
        wrong = np.bincount(answers[:, item][answers[:, item] != y[item]], minlength=10)
        said = f", says {wrong.argmax()}" if wrong.any() else ""
        axis.set_title(f"{y[item]}{said}", fontsize=9)
        axis.axis("off")
    right.suptitle("the twelve digits forgotten by most seeds")
    return _save(figure, path)
