"""Pictures of a finished run, drawn from the content of results.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import metrics
import utils
from task_stream import display_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis

#: Tasks between two labels of an axis, which has up to twenty.
_TICK_STEPS = (1, 2, 5, *(10**n for n in range(1, 7)))
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

    A run with a single test set has no matrix worth drawing, only the curve.

    Args:
        results: Content of results.json.
        path: Picture to write; its ending tells the format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    matrix = metrics.from_lists(results["instance"]["accuracy_matrix"])
    num_panels = 1 if len(matrix) == 1 else 2
    figure = Figure(figsize=(5 * num_panels, 4), layout="constrained")
    *left, right = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in left:
        names = display_names(results.get("test_sets", []), len(matrix), "{}")
        _draw_matrix(axes, matrix, names)
    _draw_curves(right, results)
    utils.write_whole(
        path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)
    )


def _draw_matrix(axes: Axes, matrix: metrics.Matrix, names: list[str]) -> None:
    num_rows, num_tasks = matrix.shape
    axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    if num_tasks <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                color = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    _label_tasks(axes.xaxis, num_tasks, first=0)
    axes.set_yticks(range(num_rows), names)
    axes.set_xlabel("after training task")
    axes.set_ylabel("test set of task" if names[0] == "1" else "test set")
    axes.set_title("Accuracy in percent, instance-wise")


def _draw_curves(axes: Axes, results: dict[str, Any]) -> None:
    for name, title in _TITLES.items():
        matrix = metrics.from_lists(results[name]["accuracy_matrix"])
        curve = metrics.accuracy_curve(matrix, matrix.shape[1] - 1)
        axes.plot(
            [point["after_task"] for point in curve],
            [point["accuracy"] for point in curve],
            color=_COLORS[name],
            label=title,
            **_STYLES[name],
        )
    _label_tasks(axes.xaxis, matrix.shape[1], first=1)
    axes.set_ylim(0, 104)
    axes.set_xlabel("tasks learned")
    single = len(matrix) == 1
    axes.set_ylabel("accuracy in percent" if single else "average accuracy in percent")
    axes.set_title("Accuracy" if single else "Average accuracy over the tasks so far")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def _label_tasks(axis: XAxis, num_tasks: int, first: int) -> None:
    """Numbers the tasks from 1 where task 1 lies at `first`; not all of them if there are many."""
    step = next(step for step in _TICK_STEPS if num_tasks <= 20 * step)
    shown = range(step - 1, num_tasks, step)
    axis.set_ticks([t + first for t in shown], [str(t + 1) for t in shown])
