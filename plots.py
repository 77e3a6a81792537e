"""Pictures of a finished run, drawn from the content of results.json."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import metrics
import utils

_TITLES = {"batch": "batch-wise (as published)", "instance": "instance-wise"}
#: Okabe and Ito's colours, told apart by colour-blind readers.
_COLORS = {"batch": "#0072B2", "instance": "#D55E00"}
#: The published curve lies under the other one where they meet: larger, hollow marks show it.
_STYLES: dict[str, dict[str, Any]] = {
    "batch": {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "--"},
    "instance": {"marker": "s", "markersize": 5},
}


def draw_results(results: dict[str, Any], path: Path) -> None:
    """Draws the instance-wise accuracy matrix and the average accuracy over tasks.

    Args:
        results: Content of results.json.
        path: Picture to write; its ending tells the format.
    """
    matplotlib.use("Agg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_matrix(left, metrics.from_lists(results["instance"]["accuracy_matrix"]))
    _draw_curves(right, results)
    utils.write_whole(
        path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)
    )


def _draw_matrix(axes: Axes, matrix: metrics.Matrix) -> None:
    num_rows, num_tasks = matrix.shape
    axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    if num_tasks <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                color = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(num_tasks), [str(t + 1) for t in range(num_tasks)])
    axes.set_yticks(range(num_rows), [str(i + 1) for i in range(num_rows)])
    axes.set_xlabel("after training task")
    axes.set_ylabel("test set of task")
    axes.set_title("Accuracy in percent, instance-wise")


def _draw_curves(axes: Axes, results: dict[str, Any]) -> None:
    for name, title in _TITLES.items():
        matrix = metrics.from_lists(results[name]["accuracy_matrix"])
        known = [t for t in range(matrix.shape[1]) if np.isfinite(matrix[:, t]).any()]
        axes.plot(
            [t + 1 for t in known],
            [metrics.average_accuracy(matrix, t) for t in known],
            color=_COLORS[name],
            label=title,
            **_STYLES[name],
        )
    axes.set_xticks(range(1, matrix.shape[1] + 1))
    axes.set_ylim(0, 104)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("average accuracy in percent")
    axes.set_title("Average accuracy over the tasks so far")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
