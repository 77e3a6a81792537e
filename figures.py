"""What the pictures of runs show: each function makes a figure of plain data.

| function | shows |
|---|---|
| `overview` | a run at a glance: accuracy on each task, on average, and the prompts selected |
| `accuracy_matrix` | the accuracy on every test set after every task, both selections |
| `run_accuracy` | the accuracy over the tasks of one run, on average and on each task |
| `prompt_selection` | how often each prompt serves the images of each test set |
| `key_similarity` | how near the images of each test set are to each key |
| `training_curves` | loss, accuracy and learning rate over the epochs of a run |
| `average_accuracy` | the average accuracy over the tasks of several configurations |
| `accuracy_against` | the final average accuracy of configurations against a setting |

`results` is the content of results.json, `groups` come from `stored_runs.group`. What is not there
to be shown is told by a `NothingToDrawError`. Colours are told apart by colour-blind readers, and
lines, markers and hatches without any colour.

Sizes are in inches, and 100 pixels an inch make a picture for a web page; font sizes in points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

import metrics
import stored_runs
from metrics import SELECTIONS
from options import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from stored_runs import Group

Parameters = ParamSpec("Parameters")
Array = NDArray[np.float64]

#: Width of a picture that fills a page.
_WIDTH = 9.0
#: Test sets that get a panel each.
_MOST_PANELS = 20
#: Rows and columns of a heat map that may show their numbers.
_MOST_NUMBERED = 30
#: Sizes of the numbers in cells; decimals are left out where they would be smaller than readable.
_SMALLEST, _READABLE, _LARGEST = 6.0, 7.0, 8.5
#: Width of a digit over the size of the font.
_DIGIT = 0.64
#: Space between the labels of an axis.
_LABEL_ROOM = 5.0

_TITLES = {"batch": "batch-wise (as published)", "instance": "instance-wise"}
#: The colours of Okabe and Ito, without black and the yellow that is lost on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "////", "....", "xxxx", "----")
_COLORS = {"batch": _PALETTE[0], "instance": _PALETTE[1]}
#: The published curve lies under the other one where they meet: larger, hollow marks show it.
_STYLES: dict[str, dict[str, Any]] = {
    "batch": {"marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "--"},
    "instance": {"marker": "s", "markersize": 4},
}
_BARS: dict[str, dict[str, Any]] = {
    "batch": {"color": _COLORS["batch"], "hatch": "/////", "edgecolor": "white"},
    "instance": {"color": _COLORS["instance"], "edgecolor": "white"},
}
#: Light is little, dark is much: the same in grey.
_ACCURACY_MAP, _SHARE_MAP, _SIMILARITY_MAP = "YlGnBu", "Purples", "Purples"
_INK = "#262626"
#: Where numbers of an axis may stand.
_WHOLE: dict[str, Any] = {"steps": [1, 2, 5, 10], "integer": True, "nbins": 6}

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "xtick.color": "#808080",
    "ytick.color": "#808080",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


class NothingToDrawError(ValueError):
    """What the results lack for a picture."""


def _picture(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Gives a function's figure our style, and lays it out once for all formats."""

    @functools.wraps(draw)
    def styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            if (layout := figure.get_layout_engine()) is not None:
                layout.execute(figure)
                figure.set_layout_engine("none")
        return figure

    return styled


# One run


@_picture
def overview(results: dict[str, Any]) -> Figure:
    """A run at a glance: accuracy on each task, average accuracy, and the prompts selected.

    Panels that have nothing to say are left out: the matrix of a single test set, the prompts of a
    run that does not choose any. A run that learned all tasks at once gets bars.

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
    figure = _new_figure(sum(widths), 3.3)
    indent = 0.45 + 0.065 * max(map(len, _row_names(results)))
    for panel, axes, width in zip(panels, _row(figure, widths), widths, strict=True):
        panel(axes, results, width - indent)
    figure.suptitle(_headline(results), x=0.008, ha="left", fontsize=10, fontweight="bold")
    return figure


@_picture
def accuracy_matrix(results: dict[str, Any]) -> Figure:
    """The accuracy on every test set (rows) after every task (columns), in percent.

    What was not evaluated is hatched.

    Raises:
        NothingToDrawError: If there is a single test set: a curve says it all.
    """
    matrices = {name: _matrix(results, name) for name in SELECTIONS}
    num_rows = len(matrices["batch"])
    if num_rows == 1:
        raise NothingToDrawError(
            "these results have a single test set: average_accuracy shows its accuracy"
        )
    height = _heat_height(num_rows)
    figure = _new_figure(_WIDTH, height + 0.9)
    panels = _row(figure, [1, 1])
    limits = _color_limits(np.concatenate(list(matrices.values())))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image, _ = _heat_map(axes, matrix, _ACCURACY_MAP, limits, 3.6, height, "{:.1f}", "{:.0f}")
        _label_matrix(axes, results, matrix, 3.6, height)
        axes.set_title(_TITLES[name].capitalize())
    panels[1].set_ylabel("")
    _color_bar(figure, image, panels, "accuracy (%)")
    return figure


@_picture
def run_accuracy(results: dict[str, Any]) -> Figure:
    """The accuracy over the tasks of one run: on average, and on each task if each has a test set.

    Raises:
        NothingToDrawError: If no task was evaluated yet.
    """
    matrix = _matrix(results, "instance")
    figure = _new_figure(7.5, 3.6)
    axes = figure.subplots()
    if _is_evaluated_once(matrix):
        _draw_bars(axes, results, 6.7)
        return figure
    if metrics.has_test_set_per_task(matrix):
        _draw_task_lines(axes, matrix)
    single = len(matrix) == 1
    _draw_averages(axes, results, 6.7, "{title}" if single else "average, {title}")
    _limit_accuracy(axes, _drawn([axes]).min(), 90)
    axes.set_title("Accuracy over the tasks")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@_picture
def prompt_selection(results: dict[str, Any]) -> Figure:
    """How often each prompt serves the images of each test set, after the last evaluated task.

    A panel for each test set, or heat maps if they are too many. Percent of the images: every
    image is served by K prompts.

    Raises:
        NothingToDrawError: If the run had no prompt pool, or did not choose from it.
    """
    shares = {name: _shares(results, name) for name in SELECTIONS}
    if not _has_selection(results):
        size = shares["batch"].shape[1]
        raise NothingToDrawError(f"every image used the whole pool of {size}: nothing was selected")
    num_rows = len(shares["batch"])
    if num_rows > _MOST_PANELS:
        return _selection_heat_maps(results, shares)
    num_columns = num_rows if num_rows <= 5 else {6: 3, 7: 4, 8: 4}.get(num_rows, 5)
    figure, grid = _grid(num_rows, num_columns)
    for axes, name, *rows in zip(grid.flat, _used_names(results), *shares.values(), strict=False):
        title = f"test set {name}" if name.isdigit() else name
        for selection, share, side in zip(SELECTIONS, rows, (-0.4, 0.0), strict=True):
            _add_bars(axes, np.arange(len(share)) + side, 0.4, share, selection)
        axes.set_title(title if num_rows > 1 else "all test images", fontsize=8.5, pad=4)
        axes.grid(axis="y")
    size = shares["batch"].shape[1]
    grid[0, 0].set(xlim=(-0.7, size - 0.3), ylim=(0, 105), yticks=range(0, 101, 25))
    _label_numbers(grid[0, 0].xaxis, size, 0, 0.85 * figure.get_figwidth() / num_columns)
    figure.supxlabel("prompt", y=0.02, va="bottom", fontsize=9)
    figure.supylabel("selected by (% of images)", x=0.01, fontsize=9)
    handles, _ = grid[0, 0].get_legend_handles_labels()
    labels = ["after the vote (batch-wise)", "each image's own choice (instance-wise)"]
    figure.legend(handles, labels, loc="upper center", ncols=2)
    return figure


@_picture
def key_similarity(results: dict[str, Any]) -> Figure:
    """Mean cosine similarity of each test set's queries and each key, after the last task.

    The K prompts that most of its images select are outlined.

    Raises:
        NothingToDrawError: If the run had no prompt pool, or its results do not tell.
    """
    usage = _usage(results)
    if any(not entry.get("key_similarity") for entry in usage):
        raise NothingToDrawError("these results were written before key similarities were kept")
    values = np.array([entry["key_similarity"] for entry in usage], dtype=np.float64)
    num_rows, num_keys = values.shape
    height = _heat_height(num_rows)
    width = min(_WIDTH, max(4.5, 2.2 + 0.55 * num_keys))
    figure = _new_figure(width, height + 0.9)
    axes = figure.subplots()
    limits = (math.floor(values.min() * 20) / 20, math.floor(values.max() * 20 + 1) / 20)
    inner = width - 1.9
    image, _ = _heat_map(axes, values, _SIMILARITY_MAP, limits, inner, height, "{:.2f}")
    _label_rows(axes, _used_names(results), height)
    _label_numbers(axes.xaxis, num_keys, 0, inner)
    thickness = min(1.6, inner * 72 / num_keys / 6, height * 72 / num_rows / 6)
    _outline(axes, _most_selected(usage, _top_k(results)), thickness)
    axes.set_xlabel("key")
    axes.set_title(
        f"Similarity of queries and keys (outlined: the {_top_k(results)} most selected)"
    )
    _color_bar(figure, image, [axes], "mean cosine similarity")
    return figure


@_picture
def training_curves(results: dict[str, Any]) -> Figure:
    """Loss, training accuracy, and a learning rate that changes, over the epochs of the run.

    Raises:
        NothingToDrawError: If the results do not tell.
    """
    points = results.get("training_curve", [])
    if not points:
        raise NothingToDrawError("these results were written before training curves were kept")
    panels = {"Loss": "loss", "Acc@1": "accuracy (%)", "Lr": "learning rate"}
    rates = np.array([point["Lr"] for point in points])
    if np.allclose(rates, rates[0], rtol=1e-6, atol=0):
        del panels["Lr"]
    figure = _new_figure(_WIDTH, 0.6 + 1.5 * len(panels))
    rows = figure.subplots(len(panels), sharex=True)
    starts = [i for i, p in enumerate(points) if i == 0 or p["task"] != points[i - 1]["task"]]
    for axes, (name, label) in zip(rows, panels.items(), strict=True):
        _draw_epochs(axes, [point[name] for point in points], starts)
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(-0.06, 0.5)
    rows[0].set_title("Training")
    rows[-1].set_xlabel("epoch of the run")
    rows[-1].set_xlim(0.5, len(points) + 0.5)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    if len(starts) > 1:
        _name_tasks(rows[0], starts, points)
    return figure


# Several configurations


@_picture
def average_accuracy(groups: Sequence[Group]) -> Figure:
    """The average accuracy over the tasks of several configurations.

    Mean over the seeds, in a band of one sample standard deviation. A configuration that learns all
    tasks at once is a horizontal line where others take steps.

    Args:
        groups: Finished runs by configuration.

    Raises:
        NothingToDrawError: Without any.
    """
    if not groups:
        raise NothingToDrawError("there are no finished runs to compare")
    num_columns = max(group.runs[0].matrices["batch"].shape[1] for group in groups)
    labels = [f"{_short(group.label, 90)} (n = {len(group.runs)})" for group in groups]
    columns = _legend_columns(labels)
    lines = math.ceil(len(groups) / columns)
    figure = _new_figure(_WIDTH, 3.5 + 0.18 * lines)
    panels = figure.subplots(1, 2, sharey=True)
    lowest = []
    for axes, name in zip(panels, SELECTIONS, strict=True):
        for number, (group, label) in enumerate(zip(groups, labels, strict=True)):
            style = {**_style(number), "label": label}
            if num_columns == 1:
                _draw_group_bar(axes, group, name, number, style)
            else:
                lowest.append(_draw_group(axes, group, name, num_columns, style))
        axes.set_title(_TITLES[name].capitalize())
        _label_tasks_learned(axes, num_columns, 3.8)
    if num_columns > 1:
        _limit_accuracy(panels[0], min(lowest), 90)
    else:
        panels[0].set(ylim=(0, 110), yticks=range(0, 101, 20))
        for axes in panels:
            axes.set(xticks=[], xlabel="all tasks learned at once", xlim=(-0.8, len(groups) - 0.2))
    panels[0].set_ylabel("average accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


@_picture
def accuracy_against(groups: Sequence[Group], setting: str, lines: str | None = None) -> Figure:
    """The final average accuracy against the value of a setting.

    Mean over the seeds, with bars of one sample standard deviation.

    Args:
        groups: Finished runs by configuration.
        setting: Name of the setting on the x axis.
        lines: Name of another one, whose values get a line each.

    Raises:
        NothingToDrawError: If the groups do not have two values of the setting, or differ in more.
    """
    families = _families(groups, setting, lines)
    values = _sorted_values([group.settings.get(setting) for group in groups])
    is_numeric = all(map(_is_number, values))
    places = {shown(v): float(v) if is_numeric else i for i, v in enumerate(values)}
    labels = {
        value: f"{lines} {value} ({_count(members)})" if lines else _count(members)
        for value, members in families.items()
    }
    columns = _legend_columns(list(labels.values()))
    figure = _new_figure(_WIDTH, 3.3 + 0.18 * math.ceil(len(families) / columns))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, SELECTIONS, strict=True):
        for number, (value, members) in enumerate(families.items()):
            at = [places[shown(group.settings.get(setting))] for group in members]
            _draw_final(axes, at, members, name, label=labels[value], **_style(number))
        axes.set_title(_TITLES[name].capitalize())
        axes.set_xlabel(setting)
        axes.grid(axis="y")
        _tick_values(axes, values, list(places.values()), is_numeric)
    panels[0].set_ylabel("final average accuracy (%)")
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles, list(labels.values()), loc="outside lower center", ncols=columns)
    return figure


def check_against(groups: Sequence[Group], setting: str, lines: str | None = None) -> None:
    """Checks that `accuracy_against` can draw some groups.

    Raises:
        NothingToDrawError: As `accuracy_against` does.
    """
    _families(groups, setting, lines)


# Panels


def _draw_own_matrix(axes: Axes, results: dict[str, Any], width: float) -> None:
    matrix = _matrix(results, "instance")
    limits = _color_limits(matrix)
    image, has_numbers = _heat_map(
        axes, matrix, _ACCURACY_MAP, limits, width, 2.2, "{:.1f}", "{:.0f}"
    )
    _label_matrix(axes, results, matrix, width, 2.2)
    axes.set_title("Accuracy (%), instance-wise")
    if not has_numbers:
        _color_bar(axes.figure, image, [axes], None)


def _draw_averages(axes: Axes, results: dict[str, Any], width: float, label: str) -> None:
    """The average accuracy after each evaluated task, both selections."""
    for name in SELECTIONS:
        matrix = _matrix(results, name)
        tasks, averages = _curve(matrix)
        style = {**_STYLES[name], "color": _COLORS[name]}
        style["label"] = label.format(name, title=_TITLES[name], last=averages[-1])
        if len(tasks) > 30:
            style["markevery"] = 0.1
        axes.plot(tasks, averages, zorder=3, **style)
    _label_tasks_learned(axes, matrix.shape[1], width)
    axes.set_ylabel("accuracy (%)")


def _draw_average_panel(axes: Axes, results: dict[str, Any], width: float) -> None:
    """The average accuracy, with a legend in the corner that the lines leave free."""
    _draw_averages(axes, results, width, "{}-wise: {last:.1f}")
    heights = _drawn([axes])
    _limit_accuracy(axes, heights.min(), 80, room=0.45)
    axes.set_ylabel("")
    single = len(_matrix(results, "batch")) == 1
    axes.set_title("Accuracy (%)" if single else "Average accuracy (%)")
    axes.legend(
        loc="lower left" if heights[-1] <= heights[0] else "lower right",
        title="at the end:",
        alignment="left",
        title_fontsize=8,
    )


def _draw_bars(axes: Axes, results: dict[str, Any], width: float) -> None:
    """The accuracy on each test set, and on average, of a run that was evaluated once."""
    matrices = {name: _matrix(results, name) for name in SELECTIONS}
    rows, columns = np.nonzero(np.isfinite(matrices["batch"]))
    names = ["all test images"]
    if len(rows) > 1:
        names = [*(_row_names(results)[row] for row in rows), "mean"]
    bar = 0.4 * width * 72 / len(names)  # its width in points
    form, size = ("{:.1f}", bar / 2.8) if bar > 2.8 * _SMALLEST else ("{:.0f}", bar / 2.0)
    for name, side in zip(SELECTIONS, (-0.2, 0.2), strict=True):
        values = matrices[name][rows, columns]
        heights = np.append(values, values.mean()) if len(rows) > 1 else values
        places = np.arange(len(names)) + side
        label = f"{name}-wise: {values.mean():.1f}"
        axes.bar(places, heights, width=0.4, label=label, **_BARS[name])
        for place, value in zip(places, heights, strict=True):
            if size >= _SMALLEST:
                center: dict[str, Any] = {"ha": "center", "fontsize": min(size, _LARGEST)}
                axes.text(place, value + 1, _as_number(value, form), **center)
    axes.set(ylim=(0, 148), yticks=range(0, 101, 20), ylabel="accuracy (%)")
    axes.set_xlim(min(-0.7, len(names) / 2 - 1.5), max(len(names) - 0.3, 0.7))
    at_once = matrices["batch"].shape[1] == 1
    when = ", all tasks learned at once" if at_once else f" after task {columns[0] + 1}"
    axes.set_title(f"Accuracy{when}")
    _label_bars(axes, names, width)
    axes.legend(loc="upper left", title="mean:", alignment="left", title_fontsize=8)


def _label_bars(axes: Axes, names: list[str], width: float) -> None:
    """Names the test sets below their bars: numbers as there is room, words slanted if need be."""
    *sets, last = names
    if sets and sets[0].isdigit():
        step = _step(len(sets), _most_labels(len(sets), width))
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
    """How often images choose each prompt: a row for each test set, or bars for a single one."""
    shares = _shares(results, "instance")
    num_rows, size = shares.shape
    axes.set_title("Prompts selected (%)" if width < 2.3 else "Prompts selected (% of images)")
    if num_rows == 1:
        axes.bar(range(size), shares[0], width=0.8, **_BARS["instance"])
        axes.set_ylim(0, 100)
        axes.set_ylabel("selected by (% of images)")
        axes.grid(axis="y")
    else:
        image, has_numbers = _heat_map(axes, shares, _SHARE_MAP, (0, 100), width, 2.2, "{:.0f}")
        _label_rows(axes, _used_names(results), 2.2)
        if not has_numbers:
            _color_bar(axes.figure, image, [axes], None)
    _label_numbers(axes.xaxis, size, 0, width)
    axes.set_xlabel("prompt")


def _draw_task_lines(axes: Axes, matrix: metrics.Matrix) -> None:
    """The accuracy on each task from when it was learned, as thin lines with the task's number."""
    label = "each task, instance-wise"
    for row, values in enumerate(matrix):
        tasks = np.flatnonzero(np.isfinite(values))
        if len(tasks) == 0:
            continue
        marker = "." if len(tasks) == 1 else ""
        axes.plot(
            tasks + 1, values[tasks], color="#9a9a9a", linewidth=0.8, marker=marker, label=label,
            zorder=2, alpha=1.0 if len(matrix) <= 20 else 0.5,
        )  # fmt: skip
        label = "_"
        if len(matrix) <= 20:
            axes.annotate(
                str(row + 1), (tasks[0] + 1, values[tasks[0]]), xytext=(0, 5), fontsize=7,
                textcoords="offset points", color="#707070", ha="center",
            )  # fmt: skip


def _selection_heat_maps(results: dict[str, Any], shares: dict[str, Array]) -> Figure:
    num_rows, size = shares["batch"].shape
    height = _heat_height(num_rows)
    figure = _new_figure(_WIDTH, height + 0.9)
    panels = _row(figure, [1, 1])
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        image, _ = _heat_map(axes, share, _SHARE_MAP, (0, 100), 3.6, height, "{:.0f}")
        _label_rows(axes, _used_names(results), height)
        _label_numbers(axes.xaxis, size, 0, 3.6)
        axes.set_xlabel("prompt")
        axes.set_title(_TITLES[name].capitalize())
    panels[1].set_ylabel("")
    _color_bar(figure, image, panels, "selected by (% of images)")
    return figure


def _grid(number: int, num_columns: int) -> tuple[Figure, NDArray[Any]]:
    """A figure with panels of fixed places, which takes a fraction of the time of a layout."""
    num_lines = math.ceil(number / num_columns)
    width, height = max(5.0, min(_WIDTH, 2.4 * num_columns)), 0.9 + 1.35 * num_lines
    figure = _new_figure(width, height)
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.55 / height,
        wspace=0.08, hspace=0.3,
    )  # fmt: skip
    grid = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < number)
        axes.xaxis.set_tick_params(labelbottom=place + num_columns >= number)
    return figure, grid


def _add_bars(axes: Axes, left: NDArray[Any], width: float, heights: Array, name: str) -> None:
    """Bars of a selection as one artist: hundreds of them are drawn at once."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x, 0), (x, height), (x + width, height), (x + width, 0)]
        for x, height in zip(left, heights, strict=True)
    ]
    style = {**_BARS[name], "facecolor": _COLORS[name], "linewidth": 0}
    del style["color"]
    axes.add_collection(PolyCollection(corners, label=name, **style), autolim=False)


def _draw_epochs(axes: Axes, values: list[float], starts: list[int]) -> None:
    """A line for each task, or one for all if they have an epoch each; a border between tasks."""
    ends = [*starts[1:], len(values)]
    if max(end - start for start, end in zip(starts, ends, strict=True)) == 1:
        lines = [(0, len(values))]
    else:
        lines = list(zip(starts, ends, strict=True))
    marker = "o" if len(values) <= 100 else ""
    for start, end in lines:
        epochs = range(start + 1, end + 1)
        axes.plot(
            epochs, values[start:end], color=_COLORS["batch"], marker=marker, markersize=3,
            linewidth=1.2,
        )  # fmt: skip
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
    step = _step(len(starts), 25)
    shown_tasks = range(step - 1 if step > 1 else 0, len(starts), step)
    names = [f"task {points[starts[i]]['task']}" for i in shown_tasks]
    if len(names) > 12:
        names = [name.removeprefix("task ") for name in names]
        axes.set_title("Training (above: tasks)")
    above.set_xticks([middles[i] for i in shown_tasks], names)


def _draw_group(
    axes: Axes, group: Group, name: str, num_columns: int, style: dict[str, Any]
) -> float:
    """Mean and band of a configuration over the tasks; gives where the band is lowest."""
    matrices = [run.matrices[name] for run in group.runs]
    tasks, _ = _curve(matrices[0])
    averages = np.stack([_curve(matrix)[1] for matrix in matrices])  # (seeds, evaluated tasks)
    mean = averages.mean(axis=0)
    if len(tasks) == 1 and matrices[0].shape[1] == 1 < num_columns:
        tasks, mean, averages = [1, num_columns], mean.repeat(2), averages.repeat(2, axis=1)
    every = max(1, len(tasks) // 15)
    axes.plot(tasks, mean, markersize=5, markevery=every, **style)
    if len(averages) == 1:
        return float(mean.min())
    sd = averages.std(axis=0, ddof=1)
    if len(tasks) == 1:
        axes.errorbar(tasks, mean, sd, color=style["color"], capsize=3)
    else:
        band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(tasks, mean - sd, mean + sd, **band)
    return float((mean - sd).min())


def _draw_group_bar(
    axes: Axes, group: Group, name: str, number: int, style: dict[str, Any]
) -> None:
    """Mean and standard deviation of a configuration that learns all tasks at once."""
    mean, sd = stored_runs.mean_and_sd(group.values(name, "average_accuracy").values())
    bar = {"color": style["color"], "hatch": _HATCHES[number % len(_HATCHES)], "edgecolor": "white"}
    axes.bar(number, mean, width=0.7, yerr=sd, capsize=3, label=style["label"], **bar)
    axes.text(number, mean + (sd or 0) + 2, f"{mean:.1f}", ha="center")


def _draw_final(
    axes: Axes, at: Sequence[float], members: Sequence[Group], name: str, **style: Any
) -> None:
    """Mean and standard deviation of configurations at their places on the x axis."""
    numbers = [
        stored_runs.mean_and_sd(group.values(name, "average_accuracy").values())
        for group in members
    ]
    order = np.argsort(at, kind="stable")
    mean = np.array([mean for mean, _ in numbers])[order]
    sd = np.array([np.nan if sd is None else sd for _, sd in numbers])[order]
    axes.errorbar(np.array(at)[order], mean, sd, capsize=3, markersize=5, **style)


# Data


def _matrix(results: dict[str, Any], name: str) -> metrics.Matrix:
    """The accuracy matrix of a selection, of which something is there."""
    matrix = metrics.from_lists(results[name]["accuracy_matrix"])
    if not np.isfinite(matrix).any():
        raise NothingToDrawError("these results have no accuracy: nothing was evaluated yet")
    return matrix


def _is_evaluated_once(matrix: metrics.Matrix) -> bool:
    return int(np.isfinite(matrix).any(axis=0).sum()) == 1


def _curve(matrix: metrics.Matrix) -> tuple[list[int], Array]:
    """Evaluated tasks, from 1, and the average accuracy after each."""
    points = metrics.accuracy_curve(matrix, matrix.shape[1] - 1)
    return (
        [int(point["after_task"]) for point in points],
        np.array([point["accuracy"] for point in points]),
    )


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
    """Percent of a test set's images that each prompt serves, (test sets, prompts)."""
    counts = np.array([entry[name] for entry in _usage(results)], dtype=np.float64)
    images = counts.sum(axis=1, keepdims=True) / _top_k(results)  # each counts K times
    return 100 * counts / images


def _has_selection(results: dict[str, Any]) -> bool:
    """Whether there were more prompts than an image is served by."""
    usage = results.get("prompt_usage") or []
    return bool(usage) and len(usage[0]["instance"]) > _top_k(results)


def _most_selected(usage: list[dict[str, Any]], top_k: int) -> list[tuple[int, int]]:
    """Row and column of the prompts that most images of each test set choose."""
    orders = [np.argsort(-np.array(entry["instance"]), kind="stable") for entry in usage]
    return [(row, int(column)) for row, order in enumerate(orders) for column in order[:top_k]]


def _families(
    groups: Sequence[Group], setting: str, lines: str | None
) -> dict[str | None, list[Group]]:
    """Groups by their value of `lines`, each with one configuration a value of `setting`."""
    for name in filter(None, (setting, lines)):
        values = {shown(group.settings.get(name)) for group in groups}
        if len(values) < 2:
            said = f"all have {values.pop()}" if values else "there are none"
            raise NothingToDrawError(
                f"{name} needs at least two values among the finished runs: {said}"
            )
    families: dict[str | None, dict[str, Group]] = {}
    for value in _sorted_values([group.settings.get(lines) for group in groups]) if lines else []:
        families[shown(value)] = {}
    for group in groups:
        family = families.setdefault(shown(group.settings.get(lines)) if lines else None, {})
        value = shown(group.settings.get(setting))
        twin = family.setdefault(value, group)
        if twin is not group:
            differ = stored_runs.differing([twin.settings, group.settings])
            raise NothingToDrawError(
                f"several configurations have {setting} {value}: they differ in "
                f"{', '.join(differ)}; name runs that differ in {setting} alone, or say --lines"
            )
    return {value: list(family.values()) for value, family in families.items()}


def _sorted_values(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers by size, others in front of them as they come."""
    once = list({shown(value): value for value in values}.values())
    numbers = sorted(value for value in once if _is_number(value))
    return [value for value in once if not _is_number(value)] + numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(members: Sequence[Group]) -> str:
    numbers = sorted({len(group.runs) for group in members})
    return "n = " + " to ".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))


def _row_names(results: dict[str, Any]) -> list[str]:
    """What to call the test sets: by name, or by number if the names say no more."""
    number = len(results["batch"]["accuracy_matrix"])
    names = results.get("test_sets") or []
    if list(names) in ([], [f"task{row + 1}" for row in range(number)]):
        return [str(row + 1) for row in range(number)]
    return [_short(name, 13) for name in names]


def _used_names(results: dict[str, Any]) -> list[str]:
    """The same of the test sets whose prompt usage is known, see `_usage`."""
    names = _row_names(results)
    return [names[entry["test_set"]] for entry in _usage(results)]


def _headline(results: dict[str, Any]) -> str:
    words = results.get("command", {}).get("configurations")
    name = " ".join(words) if words else results["config"].get("dataset", "")
    return f"{_short(name, 80)}, seed {results['seed']}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


# Parts of pictures


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.05)
    return Figure(figsize=(width, height), layout=layout)


def _row(figure: Figure, widths: Sequence[float]) -> list[Axes]:
    return list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])


def _heat_height(num_rows: int) -> float:
    """Height of the cells of a heat map that has a picture of its own."""
    return min(5.5, max(1.2, 0.36 * num_rows))


def _heat_map(
    axes: Axes,
    values: Array,
    colors: str,
    limits: tuple[float, float],
    width: float,
    height: float,
    *forms: str,
) -> tuple[AxesImage, bool]:
    """Draws values as colours, with their numbers in the first form that fits into the cells.

    Args:
        axes: Where to draw.
        values: Not-a-number is hatched.
        colors: Name of a colour map.
        limits: Values of its ends.
        width: What the cells have together, about.
        height: The same.
        forms: Of the numbers.

    Returns:
        The image, and whether it shows numbers.
    """
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    axes.patch.set(facecolor="#f7f7f7", edgecolor="#d8d8d8", hatch="////")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    num_rows, num_columns = values.shape
    cell = (width * 72 / num_columns, height * 72 / num_rows)
    if min(cell) >= 5:
        style: dict[str, Any] = {"colors": "white", "linewidth": min(1.0, min(cell) / 15)}
        axes.vlines(np.arange(1, num_columns) - 0.5, -0.5, num_rows - 0.5, **style)
        axes.hlines(np.arange(1, num_rows) - 0.5, -0.5, num_columns - 0.5, **style)
        axes.set(xlim=(-0.5, num_columns - 0.5), ylim=(num_rows - 0.5, -0.5))
    return image, _write_numbers(axes, image, values, cell, forms)


def _write_numbers(
    axes: Axes, image: AxesImage, values: Array, cell: tuple[float, float], forms: Sequence[str]
) -> bool:
    """Writes values into cells of some points, if they fit; tells whether they do."""
    sizes = [_number_size(values, form, cell) for form in forms]
    readable = [size for size in sizes if size >= _READABLE]
    size = readable[0] if readable else sizes[-1]
    form = forms[sizes.index(size)]
    if size < _SMALLEST or max(values.shape) > _MOST_NUMBERED:
        return False
    colors = np.asarray(image.cmap(image.norm(values)))[..., :3]
    shades = colors @ np.array([0.299, 0.587, 0.114])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column, row, _as_number(value, form), ha="center", va="center", fontsize=size,
                in_layout=False, color="white" if shades[row, column] < 0.52 else _INK,
            )  # fmt: skip
    return True


def _number_size(values: Array, form: str, cell: tuple[float, float]) -> float:
    """The size of font at which the longest number fits into a cell of some points."""
    longest = max(
        (len(_as_number(value, form)) for value in values[np.isfinite(values)]), default=1
    )
    return min(_LARGEST, cell[0] / (longest * _DIGIT + 0.3), cell[1] / 1.3)


def _as_number(value: float, form: str) -> str:
    """A value in a form, with a true minus; -0.00 is 0.00."""
    text = form.format(value)
    text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "\u2212")
    return "100" if text == "100.0" else text


def _outline(axes: Axes, cells: Sequence[tuple[int, int]], thickness: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((column - 0.45, row - 0.43), 0.9, 0.86) for row, column in cells]
    axes.add_collection(
        PatchCollection(boxes, facecolor="none", edgecolor=_PALETTE[1], linewidth=thickness)
    )


def _drawn(panels: Sequence[Axes]) -> Array:
    """Heights of all points of all lines."""
    return np.concatenate([np.asarray(line.get_ydata()) for axes in panels for line in axes.lines])


def _label_matrix(
    axes: Axes, results: dict[str, Any], matrix: metrics.Matrix, width: float, height: float
) -> None:
    _label_rows(axes, _row_names(results), height)
    _label_numbers(axes.xaxis, matrix.shape[1], 1, width)
    axes.set_xlabel("after training task")


def _label_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Names the test sets on the y axis; not all of them if they are many, nor a single one."""
    step = _step(len(names), int(height * 72 / 11))
    are_numbers = names[0].isdigit()
    places = list(range(0, len(names), step))
    if are_numbers:
        places = [place for place, name in enumerate(names) if step == 1 or int(name) % step == 0]
        axes.set_ylabel("test set of task")
    axes.set_yticks(places, [names[place] for place in places])
    if len(names) == 1:
        axes.set(yticks=[], ylabel="all test images")


def _label_numbers(axis: Axis, number: int, first: int, room: float) -> None:
    """Labels the places 0, 1, ... with numbers from `first` on, as many as have room."""
    step = _step(number, _most_labels(number, room))
    places = [place for place in range(number) if step == 1 or (place + first) % step == 0]
    axis.set_ticks(places, [str(place + first) for place in places])


def _label_tasks_learned(axes: Axes, num_tasks: int, width: float) -> None:
    step = _step(num_tasks, min(20, _most_labels(num_tasks, width)))
    axes.set_xticks(range(step, num_tasks + 1, step))
    margin = 0.04 * (num_tasks - 1) + 0.1
    axes.set_xlim(1 - margin, num_tasks + margin)
    axes.set_xlabel("tasks learned")
    axes.grid(axis="y")


def _most_labels(number: int, room: float) -> int:
    """How many numbers up to `number` have room beside each other."""
    return int(room * 72 / (8 * _DIGIT * len(str(number - 1)) + _LABEL_ROOM))


def _step(number: int, most: int) -> int:
    """Distance of at most `most` labels of `number` places: 1, 2, 5, 10, 20, ..."""
    steps = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return next(step for step in steps if number <= step * max(1, most))


def _tick_values(
    axes: Axes, values: Sequence[Any], places: Sequence[float], is_numeric: bool
) -> None:
    """Exactly the tried values on the x axis."""
    if is_numeric and min(places) > 0 and max(places) > 20 * min(places):
        axes.set_xscale("log")
    axes.set_xticks(places, [shown(value) for value in values])
    axes.minorticks_off()
    axes.margins(x=0.06)


def _color_limits(values: Array) -> tuple[float, float]:
    """Accuracies at the ends of the colours: a hundred, and the tens below the lowest."""
    return min(80.0, 10 * math.floor(np.nanmin(values) / 10)), 100.0


def _limit_accuracy(axes: Axes, lowest: float, most: float, room: float = 0.1) -> None:
    """Ends an axis of accuracies at 100 and at fives that leave a part of it free at the bottom.

    Args:
        axes: What has the axis.
        lowest: What is to be seen.
        most: The highest that the axis may begin at.
        room: The part.
    """
    free = 100 - (100 - lowest) / (1 - room)
    lower = max(0.0, min(most, 5 * math.floor(free / 5)))
    axes.set_ylim(lower, 100 + 0.05 * (100 - lower))
    axes.yaxis.get_major_locator().set_params(**_WHOLE)


def _color_bar(figure: Any, image: AxesImage, panels: Sequence[Axes], label: str | None) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=25)
    bar.ax.yaxis.get_major_locator().set_params(steps=[1, 2, 5, 10], nbins=7)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7.5)
    if label is not None:
        bar.set_label(label)


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(4, len(labels), 150 // (max(map(len, labels)) + 9)))


def _style(number: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th configuration: no two alike among many."""
    return {
        "color": _PALETTE[number % len(_PALETTE)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
    }
