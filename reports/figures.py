"""Figures of one run: each function draws one from the content of results.json.

| function | shows |
|---|---|
| `overview` | a run at a glance: accuracy on each task, on average, and the prompts selected |
| `accuracy_matrix` | the accuracy on every test set after every task, both selections |
| `run_accuracy` | the accuracy over the tasks of the run, on average and on each task |
| `prompt_selection` | how often each prompt is selected for the images of each test set |
| `key_similarity` | how similar the queries of each test set are to each key |
| `training_curves` | loss, accuracy and learning rate over the epochs of the run |

Each names its run, and the last evaluated task if the run is not finished. A function raises
`NothingToDrawError` if the results lack what it shows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cli.parser import command_words
from continual_datasets.stream import display_names
from reports import metrics
from reports.figure_style import (
    HEADLINE_FONT,
    HEADLINE_HEIGHT,
    LARGEST_FONT,
    PAGE_WIDTH,
    PALETTE,
    SMALLEST_FONT,
    TITLES,
    Array,
    NothingToDrawError,
    accuracy_over_tasks,
    as_number,
    color_bar,
    heat_height,
    heat_map,
    heights_of_lines,
    label_numbers,
    label_rows,
    label_step,
    label_tasks_learned,
    limit_accuracy,
    most_labels,
    most_letters,
    new_figure,
    outline_cells,
    shortened,
    side_by_side,
    spread,
    styled,
)
from reports.metrics import SELECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Most test sets that get a panel each.
_MOST_PANELS = 20

#: Most epochs that get a tick each.
_MOST_EPOCHS = 30

#: Lines that reach below this accuracy leave no room for a legend below them.
_LOW = 35.0

_COLORS = {"batch": PALETTE[0], "instance": PALETTE[1]}
#: Where the curves coincide, the batch-wise one is seen by its larger, hollow markers.
_STYLES: dict[str, dict[str, Any]] = {
    "batch": {"marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "--"},
    "instance": {"marker": "s", "markersize": 4},
}
_BARS: dict[str, dict[str, Any]] = {
    "batch": {"color": _COLORS["batch"], "hatch": "/////", "edgecolor": "white"},
    "instance": {"color": _COLORS["instance"], "edgecolor": "white"},
}
#: Colour maps from light (low) to dark (high), which keep that order in greyscale.
_ACCURACY_MAP, _SHARE_MAP, _SIMILARITY_MAP = "YlGnBu", "Purples", "Purples"


@styled
def overview(results: dict[str, Any]) -> Figure:
    """A run at a glance: accuracy on each task, average accuracy, and the prompts selected.

    Panels without information are left out: the matrix of a single test set, and the prompts of a
    run that does not select any. A run that learned all tasks at once gets bars.

    Raises:
        NothingToDrawError: If no task was evaluated yet.
    """
    matrix = _matrix(results, "instance")
    if _is_evaluated_once(matrix):
        panels = [_draw_bars]
    else:
        panels = [_draw_own_matrix] * (len(matrix) > 1) + [_draw_average_panel]
    panels += [_draw_selection] * _has_selection(results)
    widths = {1: [5.5], 2: [4.5, 4.5], 3: [3.0, 2.8, 3.2]}[len(panels)]
    figure = new_figure(sum(widths), 3.3)
    indent = 0.45 + 0.065 * max(map(len, _row_names(results)))
    for panel, axes, width in zip(panels, side_by_side(figure, widths), widths, strict=True):
        panel(axes, results, width - indent)
    headline = _headline(results, most_letters(sum(widths), 10))
    figure.suptitle(headline, x=0.008, ha="left", fontsize=10, fontweight="bold")
    return figure


@styled
def accuracy_matrix(results: dict[str, Any]) -> Figure:
    """The accuracy on every test set (rows) after every task (columns), in percent.

    What was not evaluated is hatched.

    Raises:
        NothingToDrawError: If there is a single test set, which `average_accuracy` shows.
    """
    matrices = {name: _matrix(results, name) for name in SELECTIONS}
    num_rows = len(matrices["batch"])
    if num_rows == 1:
        raise NothingToDrawError(
            "these results have a single test set: average_accuracy shows its accuracy"
        )
    height = heat_height(num_rows)
    figure = _new_figure(results, PAGE_WIDTH, height + 0.9)
    panels = side_by_side(figure, [1, 1])
    limits = _color_limits(np.concatenate(list(matrices.values())))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image, _ = heat_map(axes, matrix, _ACCURACY_MAP, limits, 3.6, height, "{:.1f}", "{:.0f}")
        _label_matrix(axes, results, matrix, 3.6, height)
        axes.set_title(TITLES[name].capitalize())
    panels[1].set_ylabel("")
    color_bar(figure, image, panels, "accuracy (%)")
    return figure


@styled
def run_accuracy(results: dict[str, Any]) -> Figure:
    """The accuracy over the tasks of one run: on average, and on each task if each has a test set.

    Raises:
        NothingToDrawError: If no task was evaluated yet.
    """
    matrix = _matrix(results, "instance")
    figure = _new_figure(results, 7.5, 3.6)
    axes = figure.subplots()
    if _is_evaluated_once(matrix):
        _draw_bars(axes, results, 6.7)
        return figure
    if metrics.has_test_set_per_task(matrix):
        _draw_task_lines(axes, matrix)
    single = len(matrix) == 1
    _draw_averages(axes, results, 6.7, "{title}" if single else "average, {title}")
    limit_accuracy(axes, heights_of_lines(axes).min(), 90)
    if metrics.has_test_set_per_task(matrix) and len(matrix) <= 20:
        _number_task_lines(axes, matrix)
    axes.set_title("Accuracy over the tasks")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def prompt_selection(results: dict[str, Any]) -> Figure:
    """How often each prompt is selected for each test set, after the last evaluated task.

    A panel for each test set, or heat maps if they are too many. Percent of the images; K prompts
    are selected for each.

    Raises:
        NothingToDrawError: If the run had no prompt pool, or did not select from it.
    """
    shares = {name: _shares(results, name) for name in SELECTIONS}
    _check_selection(results)
    num_rows = len(shares["batch"])
    if num_rows > _MOST_PANELS:
        return _selection_heat_maps(results, shares)
    num_columns = num_rows if num_rows <= 5 else {6: 3, 7: 4, 8: 4}.get(num_rows, 5)
    figure, grid = _grid(results, num_rows, num_columns)
    for axes, name, *rows in zip(grid.flat, _used_names(results), *shares.values(), strict=False):
        title = f"test set {name}" if name.isdigit() else name
        for selection, share, side in zip(SELECTIONS, rows, (-0.4, 0.0), strict=True):
            _add_bars(axes, np.arange(len(share)) + side, 0.4, share, selection)
        axes.set_title(title if num_rows > 1 else "all test images", fontsize=8.5, pad=4)
        axes.grid(axis="y")
    size = shares["batch"].shape[1]
    grid[0, 0].set(xlim=(-0.7, size - 0.3), ylim=(0, 105), yticks=range(0, 101, 25))
    label_numbers(grid[0, 0].xaxis, size, 0, 0.85 * figure.get_figwidth() / num_columns)
    figure.supxlabel("prompt", y=0.02, va="bottom", fontsize=9)
    middle = (figure.subplotpars.bottom + figure.subplotpars.top) / 2
    figure.supylabel("selected by (% of images)", x=0.01, y=middle, fontsize=9)
    handles, _ = grid[0, 0].get_legend_handles_labels()
    labels = ["after the vote (batch-wise)", "each image's own choice (instance-wise)"]
    below = 1 - HEADLINE_HEIGHT / figure.get_figheight()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, below), ncols=2)
    return figure


@styled
def key_similarity(results: dict[str, Any]) -> Figure:
    """Mean cosine similarity of each test set's queries and each key, after the last task.

    The K prompts that most of its images select are outlined.

    Raises:
        NothingToDrawError: If the run had no prompt pool, did not select from it, or did not store
            similarities.
    """
    usage = _usage(results)
    _check_selection(results)
    if any(not entry.get("key_similarity") for entry in usage):
        raise NothingToDrawError("these results were written before key similarities were stored")
    values = np.array([entry["key_similarity"] for entry in usage], dtype=np.float64)
    num_rows, num_keys = values.shape
    height = heat_height(num_rows)
    width = min(PAGE_WIDTH, max(5.0, 2.2 + 0.55 * num_keys))
    figure = _new_figure(results, width, height + 0.9)
    axes = figure.subplots()
    limits = (math.floor(values.min() * 20) / 20, math.floor(values.max() * 20 + 1) / 20)
    inner = width - 1.9
    image, _ = heat_map(axes, values, _SIMILARITY_MAP, limits, inner, height, "{:.2f}")
    label_rows(axes, _used_names(results), height)
    label_numbers(axes.xaxis, num_keys, 0, inner)
    thickness = min(1.6, inner * 72 / num_keys / 6, height * 72 / num_rows / 6)
    outline_cells(axes, _most_selected(usage, _top_k(results)), thickness)
    axes.set_xlabel("key")
    axes.set_title(
        f"Similarity of queries and keys (outlined: the {_top_k(results)} most selected)"
    )
    color_bar(figure, image, [axes], "mean cosine similarity")
    return figure


@styled
def training_curves(results: dict[str, Any]) -> Figure:
    """Loss, training accuracy, and a learning rate that changes, over the epochs of the run.

    Raises:
        NothingToDrawError: If the results do not have them.
    """
    points = results.get("training_curve", [])
    if not points:
        raise NothingToDrawError("these results were written before training curves were stored")
    panels = {"Loss": "loss", "Acc@1": "accuracy (%)", "Lr": "learning rate"}
    rates = np.array([point["Lr"] for point in points])
    if np.allclose(rates, rates[0], rtol=1e-6, atol=0):
        del panels["Lr"]
    figure = _new_figure(results, PAGE_WIDTH, 0.6 + 1.5 * len(panels))
    rows = figure.subplots(len(panels), sharex=True)
    starts = [i for i, p in enumerate(points) if i == 0 or p["task"] != points[i - 1]["task"]]
    for axes, (name, label) in zip(rows, panels.items(), strict=True):
        _draw_epochs(axes, [point[name] for point in points], starts)
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(-0.06, 0.5)
    low, high = rows[1].get_ylim()
    rows[1].set_ylim(low, min(high, 100 + 0.04 * (100 - low)))
    rows[0].set_title("Training")
    rows[-1].set_xlabel("epoch of the run")
    rows[-1].set_xlim(0.5, len(points) + 0.5)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    if len(points) <= _MOST_EPOCHS:
        rows[-1].set_xticks(range(1, len(points) + 1))
    if len(starts) > 1:
        _name_tasks(rows[0], starts, points)
    return figure


# Panels


def _draw_own_matrix(axes: Axes, results: dict[str, Any], width: float) -> None:
    matrix = _matrix(results, "instance")
    limits = _color_limits(matrix)
    image, has_numbers = heat_map(
        axes, matrix, _ACCURACY_MAP, limits, width, 2.2, "{:.1f}", "{:.0f}"
    )
    _label_matrix(axes, results, matrix, width, 2.2)
    axes.set_title("Accuracy (%), instance-wise")
    if not has_numbers:
        color_bar(axes.figure, image, [axes], None)


def _draw_averages(axes: Axes, results: dict[str, Any], width: float, label: str) -> None:
    """The average accuracy after each evaluated task; one line if both selections agree."""
    matrices = {name: _matrix(results, name) for name in SELECTIONS}
    if np.array_equal(matrices["batch"], matrices["instance"], equal_nan=True):
        matrices = {"batch- and instance": matrices["instance"]}
    for name, matrix in matrices.items():
        tasks, averages = accuracy_over_tasks(matrix)
        like = name if name in SELECTIONS else "instance"
        style = {**_STYLES[like], "color": _COLORS[like]}
        title = TITLES.get(name, f"{name}-wise")
        style["label"] = label.format(name, title=title, last=averages[-1])
        if len(tasks) > 30:
            style["markevery"] = 0.1
        axes.plot(tasks, averages, zorder=3, **style)
    label_tasks_learned(axes, matrix.shape[1], width)
    axes.set_ylabel("accuracy (%)")


def _draw_average_panel(axes: Axes, results: dict[str, Any], width: float) -> None:
    """The average accuracy, with a legend below the lines, or at the top if they are low."""
    _draw_averages(axes, results, width, "{}-wise: {last:.1f}")
    heights = heights_of_lines(axes)
    limit_accuracy(axes, heights.min(), 80, room=0.45)
    legend: dict[str, Any] = {"alignment": "left", "title_fontsize": 8}
    legend["loc"] = "lower left" if heights[-1] <= heights[0] else "lower right"
    if heights.min() < _LOW:
        axes.set(ylim=(axes.get_ylim()[0], 148), yticks=range(0, 101, 20))
        legend["loc"] = "upper left"
    axes.set_ylabel("")
    matrix = _matrix(results, "instance")
    axes.set_title("Accuracy (%)" if len(matrix) == 1 else "Average accuracy (%)")
    is_finished = metrics.is_finished(matrix)
    title = "at the end:" if is_finished else f"after task {_last_evaluated(matrix)}:"
    axes.legend(title=title, **legend)


def _draw_bars(axes: Axes, results: dict[str, Any], width: float) -> None:
    """The accuracy on each test set, and on average, of a run that was evaluated once."""
    matrices = {name: _matrix(results, name) for name in SELECTIONS}
    rows, columns = np.nonzero(np.isfinite(matrices["batch"]))
    names = ["all test images"]
    if len(rows) > 1:
        names = [*(_row_names(results)[row] for row in rows), "mean"]
    bar = 0.4 * width * 72 / len(names)  # its width in points
    form, size = ("{:.1f}", bar / 2.8) if bar > 2.8 * SMALLEST_FONT else ("{:.0f}", bar / 2.0)
    for name, side in zip(SELECTIONS, (-0.2, 0.2), strict=True):
        values = matrices[name][rows, columns]
        heights = np.append(values, values.mean()) if len(rows) > 1 else values
        places = np.arange(len(names)) + side
        label = f"{name}-wise: {values.mean():.1f}"
        axes.bar(places, heights, width=0.4, label=label, **_BARS[name])
        for place, value in zip(places, heights, strict=True):
            if size >= SMALLEST_FONT:
                center: dict[str, Any] = {"ha": "center", "fontsize": min(size, LARGEST_FONT)}
                axes.text(place, value + 1, as_number(value, form), **center)
    axes.set(ylim=(0, 148), yticks=range(0, 101, 20), ylabel="accuracy (%)")
    axes.set_xlim(min(-0.7, len(names) / 2 - 1.5), max(len(names) - 0.3, 0.7))
    at_once = matrices["batch"].shape[1] == 1
    when = ", all tasks learned at once" if at_once else f" after task {columns[0] + 1}"
    axes.set_title(f"Accuracy{when}")
    _label_bars(axes, names, width)
    axes.legend(loc="upper left", title="mean:", alignment="left", title_fontsize=8)


def _label_bars(axes: Axes, names: list[str], width: float) -> None:
    """Labels the test sets below their bars: as many numbers as fit, or names, slanted if wide."""
    *sets, last = names
    if sets and sets[0].isdigit():
        step = label_step(len(sets), most_labels(len(sets), width))
        places = [place for place in range(len(sets)) if (place + 1) % step == 0]
        axes.set_xticks([*places, len(sets)], [*(sets[place] for place in places), last])
        axes.set_xlabel("test set of task")
    else:
        is_wide = max(map(len, names)) * 5.5 > width * 72 / len(names)
        slanted: dict[str, Any] = {}
        if is_wide:
            slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(names)), names, **slanted)


def _draw_selection(axes: Axes, results: dict[str, Any], width: float) -> None:
    """How often images select each prompt: a row for each test set, or bars for a single one."""
    shares = _shares(results, "instance")
    num_rows, size = shares.shape
    break_or_space = "\n" if width < 2.5 else " "
    axes.set_title(f"Prompts selected (%),{break_or_space}instance-wise")
    if num_rows == 1:
        axes.bar(range(size), shares[0], width=0.8, **_BARS["instance"])
        axes.set_ylim(0, 100)
        axes.set_ylabel("selected by (% of images)")
        axes.grid(axis="y")
    else:
        image, has_numbers = heat_map(axes, shares, _SHARE_MAP, (0, 100), width, 2.2, "{:.0f}")
        label_rows(axes, _used_names(results), 2.2)
        if not has_numbers:
            color_bar(axes.figure, image, [axes], None)
    label_numbers(axes.xaxis, size, 0, width)
    axes.set_xlabel("prompt")


def _draw_task_lines(axes: Axes, matrix: metrics.Matrix) -> None:
    """The accuracy on each task since it was learned, as thin lines."""
    label = "each task, instance-wise"
    for values in matrix:
        tasks = np.flatnonzero(np.isfinite(values))
        if len(tasks) == 0:
            continue
        marker = "." if len(tasks) == 1 else ""
        axes.plot(
            tasks + 1, values[tasks], color="#9a9a9a", linewidth=0.8, marker=marker, label=label,
            zorder=2, alpha=1.0 if len(matrix) <= 20 else 0.5,
        )  # fmt: skip
        label = "_"


def _number_task_lines(axes: Axes, matrix: metrics.Matrix) -> None:
    """Writes the numbers of the tasks at the ends of their lines, without overlap."""
    last = _last_evaluated(matrix)
    ends = matrix[:, last - 1]
    rows = np.flatnonzero(np.isfinite(ends))
    low, high = axes.get_ylim()
    places = spread(ends[rows], 0.045 * (high - low), high)
    for row, place in zip(rows, places, strict=True):
        axes.annotate(
            str(row + 1), (last, place), xytext=(7, 0), fontsize=7, va="center",
            textcoords="offset points", color="#707070",
        )  # fmt: skip


def _selection_heat_maps(results: dict[str, Any], shares: dict[str, Array]) -> Figure:
    num_rows, size = shares["batch"].shape
    height = heat_height(num_rows)
    figure = _new_figure(results, PAGE_WIDTH, height + 0.9)
    panels = side_by_side(figure, [1, 1])
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        image, _ = heat_map(axes, share, _SHARE_MAP, (0, 100), 3.6, height, "{:.0f}")
        label_rows(axes, _used_names(results), height)
        label_numbers(axes.xaxis, size, 0, 3.6)
        axes.set_xlabel("prompt")
        axes.set_title(TITLES[name].capitalize())
    panels[1].set_ylabel("")
    color_bar(figure, image, panels, "selected by (% of images)")
    return figure


def _grid(results: dict[str, Any], number: int, num_columns: int) -> tuple[Figure, NDArray[Any]]:
    """A figure with a grid of panels at fixed places, much faster than an automatic layout."""
    num_lines = math.ceil(number / num_columns)
    width = max(5.0, min(PAGE_WIDTH, 2.4 * num_columns))
    figure = _new_figure(results, width, 0.9 + 1.35 * num_lines)
    height, top = figure.get_figheight(), 0.55 + HEADLINE_HEIGHT
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - top / height,
        wspace=0.08, hspace=0.3,
    )  # fmt: skip
    grid = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < number)
        axes.xaxis.set_tick_params(labelbottom=place + num_columns >= number)
    return figure, grid


def _add_bars(axes: Axes, left: NDArray[Any], width: float, heights: Array, name: str) -> None:
    """Adds the bars of a selection as a single artist, which is fast for hundreds of bars."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x, 0), (x, height), (x + width, height), (x + width, 0)]
        for x, height in zip(left, heights, strict=True)
    ]
    style = {**_BARS[name], "facecolor": _COLORS[name], "linewidth": 0}
    del style["color"]
    axes.add_collection(PolyCollection(corners, label=name, **style), autolim=False)


def _draw_epochs(axes: Axes, values: list[float], starts: list[int]) -> None:
    """A line for each task, or points if tasks have one epoch; vertical lines between tasks."""
    ends = [*starts[1:], len(values)]
    style: dict[str, Any] = {"color": _COLORS["batch"], "linewidth": 1.2, "markersize": 3}
    if len(starts) == len(values):
        axes.plot(range(1, len(values) + 1), values, marker="o", linestyle="none", **style)
    else:
        marker = "o" if len(values) <= 100 else ""
        for start, end in zip(starts, ends, strict=True):
            axes.plot(range(start + 1, end + 1), values[start:end], marker=marker, **style)
    if 1 < len(starts) <= 50:
        for start in starts[1:]:
            axes.axvline(start + 0.5, color="#b0b0b0", linewidth=0.8, zorder=1)
    axes.grid(axis="y")


def _name_tasks(axes: Axes, starts: list[int], points: list[dict[str, Any]]) -> None:
    """The numbers of the tasks above their epochs."""
    ends = [*starts[1:], len(points)]
    middles = [(start + end + 1) / 2 for start, end in zip(starts, ends, strict=True)]
    above = axes.secondary_xaxis("top")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)
    step = label_step(len(starts), 25)
    shown_tasks = range(step - 1 if step > 1 else 0, len(starts), step)
    names = [f"task {points[starts[i]]['task']}" for i in shown_tasks]
    if len(names) > 12:
        names = [name.removeprefix("task ") for name in names]
        axes.set_title("Training (above: tasks)")
    above.set_xticks([middles[i] for i in shown_tasks], names)


# Data


def _matrix(results: dict[str, Any], name: str) -> metrics.Matrix:
    """The accuracy matrix of a selection.

    Raises:
        NothingToDrawError: If nothing was evaluated yet.
    """
    matrix = metrics.from_lists(results[name]["accuracy_matrix"])
    if not np.isfinite(matrix).any():
        raise NothingToDrawError("these results have no accuracy: nothing was evaluated yet")
    return matrix


def _is_evaluated_once(matrix: metrics.Matrix) -> bool:
    return len(metrics.evaluated_tasks(matrix)) == 1


def _last_evaluated(matrix: metrics.Matrix) -> int:
    """The last task, from 1, after which something was evaluated; 0 before the first."""
    return max(metrics.evaluated_tasks(matrix), default=-1) + 1


def _usage(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt usage after the last evaluated task, by test set."""
    usage = results.get("prompt_usage")
    if not usage:
        why = "the run had no prompt pool"
        if results["config"].get("prompt_pool", True):
            why = "nothing was evaluated with a prompt pool yet"
        raise NothingToDrawError(f"these results have no prompt usage: {why}")
    last = max(entry["after_task"] for entry in usage)
    return sorted(
        (entry for entry in usage if entry["after_task"] == last),
        key=lambda entry: entry["test_set"],
    )


def _top_k(results: dict[str, Any]) -> int:
    return int(results["config"]["top_k"])


def _shares(results: dict[str, Any], name: str) -> Array:
    """Percent of a test set's images for which each prompt is selected, (test sets, prompts)."""
    counts = np.array([entry[name] for entry in _usage(results)], dtype=np.float64)
    images = counts.sum(axis=1, keepdims=True) / _top_k(results)  # an image counts K times
    return 100 * counts / images


def _has_selection(results: dict[str, Any]) -> bool:
    """Whether the pool has more prompts than are selected for an image."""
    usage = results.get("prompt_usage") or []
    return bool(usage) and len(usage[0]["instance"]) > _top_k(results)


def _check_selection(results: dict[str, Any]) -> None:
    """Checks that prompts were selected.

    Raises:
        NothingToDrawError: If every image used the whole pool.
    """
    if not _has_selection(results):
        size = len(_usage(results)[0]["instance"])
        raise NothingToDrawError(f"every image used the whole pool of {size}: nothing was selected")


def _most_selected(usage: list[dict[str, Any]], top_k: int) -> list[tuple[int, int]]:
    """Row and column of the prompts that most images of each test set select."""
    orders = [np.argsort(-np.array(entry["instance"]), kind="stable") for entry in usage]
    return [(row, int(column)) for row, order in enumerate(orders) for column in order[:top_k]]


def _row_names(results: dict[str, Any]) -> list[str]:
    """Labels of the test sets: names, or numbers if the names are just `task1`, `task2`, ..."""
    number = len(results["batch"]["accuracy_matrix"])
    names = display_names(results.get("test_sets") or [], number, "{}")
    return [shortened(name, 13) for name in names]


def _used_names(results: dict[str, Any]) -> list[str]:
    """Labels of the test sets whose prompt usage is known, see `_usage`."""
    names = _row_names(results)
    return [names[entry["test_set"]] for entry in _usage(results)]


def _new_figure(results: dict[str, Any], width: float, height: float) -> Figure:
    """An empty figure that names its run at the top."""
    headline = _headline(results, most_letters(width - 0.14, HEADLINE_FONT))
    return new_figure(width, height, headline)


def _headline(results: dict[str, Any], most: int) -> str:
    """The settings of a run, its seed, and its last evaluated task if it is not finished."""
    matrix = metrics.from_lists(results["instance"]["accuracy_matrix"])
    end = f", seed {results['seed']}"
    if not metrics.is_finished(matrix):
        end += f", after task {_last_evaluated(matrix)} of {matrix.shape[1]}"
    command = command_words(results["command"]) if results.get("command") else ""
    return shortened(command or results["config"].get("dataset", ""), most - len(end)) + end


def _label_matrix(
    axes: Axes, results: dict[str, Any], matrix: metrics.Matrix, width: float, height: float
) -> None:
    label_rows(axes, _row_names(results), height)
    label_numbers(axes.xaxis, matrix.shape[1], 1, width)
    axes.set_xlabel("after training task")


def _color_limits(values: Array) -> tuple[float, float]:
    """Accuracies at the ends of the colour map: 100, and a multiple of ten below the lowest."""
    return min(80.0, 10 * math.floor(np.nanmin(values) / 10)), 100.0
