"""Figures that compare several configurations (arms), each with its runs over seeds.

Each shows mean and sample standard deviation over the seeds, cut off at 0 and 100 %. `groups` come
from `stored_runs.group`. A function raises `NothingToDrawError` if the runs lack what it shows.
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from cli.terminal import one_line
from reports import figure_style, metrics, stored_runs
from reports.figure_style import PALETTE, NothingToDrawError, styled
from reports.metrics import SELECTIONS
from reports.stored_runs import Group

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@styled
def average_accuracy(groups: Sequence[Group]) -> Figure:
    """The average accuracy over the tasks.

    A configuration that learns all tasks at once is a horizontal line among others that do not.
    """
    if not groups:
        raise NothingToDrawError("there are no finished runs to compare")
    most = max(run.num_tasks for group in groups for run in group.runs)
    points = [
        (name, label, task, point["accuracy"])
        for name, label, matrix in _matrices(groups)
        for point in metrics.accuracy_curve(matrix, matrix.shape[1] - 1)
        for task in ([point["after_task"]] if matrix.shape[1] > 1 else range(1, most + 1))
    ]
    figure = _draw("average accuracy", "over the tasks", groups, points, bands=most > 1)
    for axes in figure.axes:
        what = "tasks learned" if most > 1 else "all tasks learned at once"
        figure_style.label_tasks(axes, most, what)
    return figure


@styled
def forgetting(groups: Sequence[Group]) -> Figure:
    """The forgetting of each task after the last one; configurations without it are left out."""
    groups = [group for group in groups if group.values("batch", "forgetting")]
    if not groups:
        raise NothingToDrawError("no finished run has forgetting: tasks have no test sets")
    points = [
        (name, label, task, drop)
        for name, label, matrix in _matrices(groups)
        for task, drop in enumerate(metrics.forgetting_by_task(matrix, len(matrix) - 1), start=1)
    ]
    most = max(task for _, _, task, _ in points)
    figure = _draw("forgetting", "of each task", groups, points, bands=most > 20)
    for axes in figure.axes:
        figure_style.label_tasks(axes, most, "test set of task")
    return figure


@styled
def accuracy_against(groups: Sequence[Group], setting: str, lines: str = "") -> Figure:
    """The average accuracy after the last task against the value of a setting.

    Args:
        groups: Finished runs by configuration.
        setting: Name of the setting on the x axis.
        lines: Name of another setting, whose values get a line each.
    """
    if problem := stored_runs.problem_against(groups, setting, lines):
        raise NothingToDrawError(problem)
    ordered = sorted(groups, key=lambda group: _order(group.settings.get(setting)))
    values = list(dict.fromkeys(group.shown(setting) for group in ordered))
    points = [
        (name, f"{lines} {group.shown(lines)}" if lines else "", place, accuracy)
        for group in sorted(ordered, key=lambda group: _order(group.settings.get(lines)))
        for place in [values.index(group.shown(setting)) + 1]
        for name in SELECTIONS
        for accuracy in group.values(name, "average_accuracy").values()
    ]
    figure = _draw("average accuracy", f"against {setting}", groups, points)
    for axes in figure.axes:
        axes.set_xticks(range(1, len(values) + 1), values)
        axes.set_xlabel(setting)
    return figure


def _draw(
    quantity: str, how: str, groups: Sequence[Group], points: Sequence[tuple], bands: bool = False
) -> Figure:
    """A panel for each selection with all arms, and one legend.

    A point is a selection, the label of an arm, a place on the x axis, and the value of one seed.
    """
    frame = DataFrame(points, columns=["selection", "arm", "place", "value"])
    lines = frame.groupby(["selection", "arm", "place"])["value"].agg(["mean", "std", "size"])
    arms = {arm: _with_seeds(arm, lines.loc["batch", arm]["size"]) for arm in frame["arm"].unique()}
    num_columns = max(1, min(4, 140 // (max(map(len, arms.values())) + 8)))
    num_lines = "\n".join(arms.values()).count("\n") + 1
    datasets = ", ".join(dict.fromkeys(group.shown("dataset") for group in groups))
    title, height = f"{datasets}: {quantity} {how}", 3.9 + 0.18 * num_lines / num_columns
    figure = figure_style.new_figure(title, 9.0, height)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, SELECTIONS, strict=True):
        for number, (arm, label) in enumerate(arms.items()):
            side = 0 if bands else 0.3 * ((number + 0.5) / len(arms) - 0.5)
            _draw_line(axes, lines.loc[name, arm], side, bands, label=label, **_look(number))
        axes.set_title(f"{name.capitalize()}-wise")
        axes.grid(True, axis="y")
    panels[0].set_ylabel(f"{quantity} (%)")
    figure_style.limit_percent(panels[0])
    is_repeated = any(len(group.runs) > 1 for group in groups)
    note = "mean ± sample standard deviation over n seeds" if is_repeated else ""
    figure_style.legend_below(panels[0], note, num_columns)
    return figure


def _draw_line(axes: Axes, line: DataFrame, side: float, band: bool, **look: Any) -> None:
    """Mean and standard deviation at each place; a single run has no deviation."""
    places, mean, sd = line.index.to_numpy() + side, line["mean"].clip(0, 100), line["std"]
    low, high = (mean - sd).clip(0, 100), (mean + sd).clip(0, 100)
    if band:
        axes.plot(places, mean, markevery=max(1, len(places) // 15), **look)
        axes.fill_between(places, low, high, color=look["color"], alpha=0.18, linewidth=0)
    else:
        axes.errorbar(places, mean, [mean - low, high - mean], capsize=2.5, elinewidth=0.8, **look)


def _look(number: int) -> dict[str, Any]:
    """How the n-th arm is drawn; it repeats after 56."""
    kinds = {"color": PALETTE, "marker": _MARKERS, "linestyle": ("-", "--", "-.", ":")}
    return {name: values[number % len(values)] for name, values in kinds.items()}


def _with_seeds(arm: str, sizes: Any) -> str:
    """The label of an arm with the number of its seeds."""
    n = " to ".join(str(number) for number in dict.fromkeys([sizes.min(), sizes.max()]))
    arm = " " * arm.startswith("_") + one_line(arm)  # a legend leaves out what begins so
    return textwrap.fill(f"{arm} (n = {n})" if arm else f"n = {n}", 120)


def _matrices(groups: Sequence[Group]) -> Iterator[tuple[str, str, metrics.Matrix]]:
    """The matrices of all runs, with their selection and the label of their group."""
    for group in groups:
        for run in group.runs:
            for name, matrix in run.matrices.items():
                yield name, group.label, matrix


def _order(value: Any) -> tuple[bool, float]:
    """What sorts values: words first, as they come, then numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number, value if is_number else 0
