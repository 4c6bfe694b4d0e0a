"""The picture of user_behaviour.py: what drives the predictions, before and after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from _users_data import NAMES, Users

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def draw(
    importance: dict[str, np.ndarray],
    models: dict[str, Callable[[Any], Any]],
    data: Users,
    path: Path,
) -> None:
    """Left: AUC lost without each feature. Right: the answer as one of the best three moves."""
    order = np.argsort(importance["ensemble"])
    figure = plt.figure(figsize=(11, 5))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    axis = left.subplots()
    height = 0.4
    for i, (name, values) in enumerate(importance.items()):
        at = np.arange(len(order)) + (0.5 - i) * height
        axis.barh(at, values[order], height, color=f"C{i}", label=name)
    axis.set_yticks(range(len(order)), [NAMES[f] for f in order])
    axis.set(xlabel="AUC lost when the feature is shuffled")
    axis.legend(frameon=False, loc="lower right")
    axes = right.subplots(3, 1, sharex=True, gridspec_kw={"hspace": 0.45})
    sample = data.test.x[:500]
    grid = np.linspace(-2, 3, 21)
    for axis, feature in zip(axes, order[::-1]):
        for i, (_, model) in enumerate(models.items()):
            curve = []
            for value in grid:
                x = sample.copy()
                x[:, feature] = value
                margin = np.diff(np.asarray(model(x)), axis=-1)
                curve.append(float(np.mean(1 / (1 + np.exp(-margin)))))
            axis.plot(grid, curve, color=f"C{i}")
        axis.set_title(NAMES[feature], fontsize=10, loc="left")
        axis.set_ylabel("buys again")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("the feature, in standard deviations from its mean")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
