"""Figures of one run: each function draws one from the content of results.json.

Each names its data set and run, and the last evaluated task if the run is not finished. A function
raises `NothingToDrawError` if the results lack what it shows.
"""

import math
from contextlib import suppress
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cli.parser import command_words, shown
from cli.terminal import one_line
from continual_datasets.stream import display_names
from reports import figure_style as style
from reports import metrics
from reports.figure_style import PALETTE, NothingToDrawError, new_figure, room, styled
from reports.metrics import SELECTIONS, Matrix

#: Where the curves coincide, the batch-wise one is seen by its larger, hollow markers.
_LINES: dict[str, dict[str, Any]] = {
    "batch": {"color": PALETTE[0], "marker": "o", "markersize": 8, "fillstyle": "none", "ls": "--"},
    "instance": {"color": PALETTE[1], "marker": "s", "markersize": 4},
}


@styled
def overview(results: dict[str, Any]) -> Figure:
    """A run at a glance: accuracy on each task, average accuracy, and the prompts selected.

    Panels without information are left out: the matrix of a single test set, and the prompts of a
    run that does not select any.
    """
    matrix, names = _matrices(results)["instance"], _names(results)
    maps = {"Accuracy (%)": (matrix, names, style.ACCURACY)} if len(matrix) > 1 else {}
    place = len(maps)  # of the average accuracy, between the heat maps
    with suppress(NothingToDrawError):
        shares, used = _shares(results)["instance"], _used_names(results)
        maps["Prompts selected (%)"] = (shares, used, style.SHARE)
    widths = [room(values.shape[1], 2.8, 4.0) for values, *_ in maps.values()]
    widths.insert(place, 3.0)
    labels = len(widths) * (0.5 + 0.06 * max(map(len, names)))
    figure = new_figure(_title(results), sum(widths) + labels, room(len(matrix), 2.2, 3.2) + 1.4)
    panels = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    _draw_averages(panels.pop(place), results)
    for axes, (title, content) in zip(panels, maps.items(), strict=True):
        colors = style.heat_map(axes, *content)
        axes.set_title(f"{title}, instance-wise")
        if not axes.texts:
            figure.colorbar(colors, ax=axes)
    return figure


@styled
def accuracy_matrix(results: dict[str, Any]) -> Figure:
    """The accuracy on every test set (rows) after every task; what was not evaluated is hatched."""
    matrices = _matrices(results)
    if len(matrices["batch"]) == 1:
        raise NothingToDrawError("these results have a single test set: see average_accuracy")
    return _heat_maps(results, matrices, _names(results), style.ACCURACY)


@styled
def average_accuracy(results: dict[str, Any]) -> Figure:
    """The accuracy over the tasks of a run: on average, and on each task if each has a test set."""
    matrix = _matrices(results)["instance"]
    num_panels = 2 if metrics.has_test_set_per_task(matrix) else 1
    figure = new_figure(_title(results), 4.5 * num_panels, 4.2)
    averages, *others = figure.subplots(1, num_panels, squeeze=False, sharey=True)[0]
    for axes in others:
        _draw_tasks(axes, matrix, _names(results))
    _draw_averages(averages, results)
    averages.set_ylabel("accuracy (%)")
    return figure


@styled
def forgetting(results: dict[str, Any]) -> Figure:
    """The forgetting of each task after the last evaluated one; its mean is that of the tables."""
    matrices = _matrices(results)
    last = max(metrics.evaluated_tasks(matrices["batch"]))
    if not metrics.has_test_set_per_task(matrices["batch"]):
        why = "there is one task" if matrices["batch"].size == 1 else "tasks have no test sets"
        raise NothingToDrawError(f"these results have no forgetting: {why}")
    drops = {name: metrics.forgetting_by_task(matrix, last) for name, matrix in matrices.items()}
    if last == 0 or not np.isfinite(list(drops.values())).all():
        raise NothingToDrawError("these results have no forgetting: evaluations are missing")
    figure = new_figure(_title(results), 6.0, room(last, 1.2, 5.0) + 1.4)
    axes = figure.subplots()
    for name, side in (("batch", -0.2), ("instance", 0.2)):
        look = {"label": f"{name}-wise: {drops[name].mean():.1f}", "color": _LINES[name]["color"]}
        bars = axes.barh(np.arange(1, last + 1) + side, drops[name], 0.4, **look)
        if last <= 10:
            axes.bar_label(bars, fmt="{:.1f}", padding=2, fontsize=7)
    axes.margins(x=0.1)
    axes.set(xlim=(0, max(1.0, axes.get_xlim()[1])), ylim=(last + 0.6, 0.4))
    axes.set(xlabel="forgetting (%)", title=f"Forgetting of each task after task {last + 1}")
    style.label_rows(axes, _names(results)[:last])
    style.legend_below(axes, "mean")
    return figure


@styled
def prompt_selection(results: dict[str, Any]) -> Figure:
    """How often each prompt is selected for each test set, after the last evaluated task.

    Batch-wise counts the prompts after the vote, instance-wise each image's own choice. Percent of
    the images; K prompts are selected for each.
    """
    return _heat_maps(results, _shares(results), _used_names(results), style.SHARE)


@styled
def key_similarity(results: dict[str, Any]) -> Figure:
    """Mean cosine similarity of each test set's queries and each key, after the last task.

    The K prompts that most of its images select are outlined.
    """
    usage, top_k = _usage(results), results["config"]["top_k"]
    if any(not entry.get("key_similarity") for entry in usage):
        raise NothingToDrawError("these results were written before key similarities were stored")
    values = np.array([entry["key_similarity"] for entry in usage], dtype=np.float64)
    figure = _heat_maps(results, {"": values}, _used_names(results), style.SIMILARITY)
    axes, width = figure.axes[0], min(1.2, 30 / len(usage))
    axes.set_title(f"Similarity of queries and keys\n(outlined: the {top_k} most selected)")
    for row, entry in enumerate(usage):
        for key in np.argsort(-np.array(entry["instance"]), kind="stable")[:top_k]:
            axes.add_patch(Rectangle((key - 0.44, row + 0.56), 0.88, 0.88, fill=False, lw=width))
    return figure


@styled
def confusion_matrix(results: dict[str, Any]) -> Figure:
    """How often each class is predicted for the images of each class, after the last task.

    Percent of the images of the class (row). The classes are in the order in which they were
    learned, with lines between the tasks.
    """
    counts = {name: results[name].get("confusion_matrix") for name in SELECTIONS}
    if not all(counts.values()):
        raise NothingToDrawError("these results have no predictions by class after the last task")
    labels, order = metrics.class_labels(results["class_names"]), results["class_order"]
    learned = dict.fromkeys(labels[class_id] for task in order for class_id in task)
    classes = [*learned, *(label for label in counts["batch"] if label not in learned)]
    maps = {name: np.full((len(classes), len(classes)), np.nan) for name in SELECTIONS}
    for name, matrix in maps.items():
        for label, found in counts[name].items():
            shares = [100 * found.get(one, 0) / sum(found.values()) for one in classes]
            matrix[classes.index(label)] = shares
    names = [_short(label) for label in classes]
    figure = _heat_maps(results, maps, names, style.CONFUSION)
    figure.axes[0].set_ylabel("class" if len(names) <= 20 else "class, in the order of learning")
    ends = np.cumsum([len(task) for task in order])
    comes_once = ends[-1] == len(learned) > len(order)
    for axes in figure.axes[: len(maps)]:
        if len(names) <= 20:
            is_wide = max(map(len, names)) * len(names) > 32
            axes.set_xticks(range(1, len(names) + 1), names, rotation=90 * is_wide)
        for end in ends[:-1] + 0.5 if comes_once else ():
            axes.axhline(end, color=PALETTE[1], linewidth=0.6)
            axes.axvline(end, color=PALETTE[1], linewidth=0.6)
    return figure


@styled
def training_curves(results: dict[str, Any]) -> Figure:
    """Loss, training accuracy, and a learning rate that changes, over the epochs of the run."""
    points = results.get("training_curve", [])
    if not points:
        raise NothingToDrawError("these results were written before training curves were stored")
    has_pull = all(results["config"].get(name, True) for name in ("prompt_pool", "pull_constraint"))
    loss = "loss, including\nthe pull term" if has_pull else "loss"
    panels = {"Loss": loss, "Acc@1": "accuracy (%)", "Lr": "learning rate"}
    if np.ptp([point["Lr"] for point in points]) <= 1e-6 * points[0]["Lr"]:
        del panels["Lr"]
    figure = new_figure(_title(results), 9.0, 1.0 + 1.5 * len(panels))
    rows = figure.subplots(len(panels), sharex=True)
    tasks = [point["task"] for point in points]
    starts = [0, *np.flatnonzero(np.diff(tasks)) + 1]  # each task has a line of its own
    labelled = starts[:: math.ceil(len(starts) / 20)]  # at most twenty tasks
    for axes, (name, label) in zip(rows, panels.items(), strict=True):
        for epochs in np.split(np.arange(len(points)), starts[1:]):
            values = [points[epoch][name] for epoch in epochs]
            axes.plot(epochs + 1, values, ".-", color=PALETTE[0], linewidth=1.2)
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(-0.06, 0.5)
        axes.grid(True, axis="y")
        for start in labelled:
            axes.axvline(start + 0.5, color="#b0b0b0", linewidth=0.8)
    for start in labelled:
        text = f"task {tasks[start]}" if len(starts) <= 12 else tasks[start]
        rows[0].text(start + 0.6, 1.03, text, transform=rows[0].get_xaxis_transform())
    style.limit_percent(rows[1])
    rows[-1].set(xlabel="epoch of the run", xlim=(0.5, len(points) + 0.5))
    style.round_ticks(rows[-1].xaxis, 30)
    return figure


def _heat_maps(
    results: dict[str, Any], maps: dict[str, Matrix], names: list[str], shows: style.Quantity
) -> Figure:
    """Heat maps beside each other, by selection, with one scale of colours."""
    num_rows, num_columns = next(iter(maps.values())).shape
    width, height = room(num_columns, 2.4, 9.0 / len(maps)), room(num_rows, 1.6, 5.5)
    figure = new_figure(_title(results), width * len(maps) + 2.2, height + 1.2)
    panels = list(figure.subplots(1, len(maps), squeeze=False)[0])
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        colors = style.heat_map(axes, values, names, shows)
        axes.set_title(f"{name.capitalize()}-wise")
        axes.label_outer()
    figure.colorbar(colors, ax=panels, label=shows.label, fraction=0.05, pad=0.02)
    return figure


def _draw_averages(axes: Axes, results: dict[str, Any]) -> None:
    """The average accuracy after each evaluated task; one line if both selections agree."""
    matrices = _matrices(results)
    if np.array_equal(matrices["batch"], matrices["instance"], equal_nan=True):
        matrices = {"batch- and instance": matrices["instance"]}
    num_rows, num_tasks = next(iter(matrices.values())).shape
    for name, matrix in matrices.items():
        curve = metrics.accuracy_curve(matrix, num_tasks - 1)
        tasks, averages = zip(*(point.values() for point in curve), strict=True)
        look = {**_LINES.get(name, _LINES["instance"]), "markevery": max(1, len(tasks) // 15)}
        axes.plot(tasks, averages, label=f"{name}-wise: {averages[-1]:.1f}", **look)
    style.label_tasks(axes, num_tasks)
    style.limit_percent(axes)
    what = "accuracy" if num_rows == 1 else "average accuracy"
    axes.set_title(f"{what.capitalize()} (%)")
    when = ", all tasks learned at once" if num_tasks == 1 else f" after task {tasks[-1]}"
    style.legend_below(axes, f"{what}{when}")


def _draw_tasks(axes: Axes, matrix: Matrix, names: list[str]) -> None:
    """The accuracy on each task since it was learned, lines from light (first) to dark."""
    shades = ListedColormap(colormaps["viridis_r"](np.linspace(0.15, 1, len(matrix))))
    for task, values in enumerate(matrix):
        tasks = np.flatnonzero(np.isfinite(values))
        axes.plot(tasks + 1, values[tasks], ".-", color=shades(task), linewidth=1.2)
    style.label_tasks(axes, len(matrix))
    axes.set_title("Accuracy (%) on each task, instance-wise")
    scale = ScalarMappable(Normalize(0.5, len(matrix) + 0.5), shades)
    style.label_rows(axes.figure.colorbar(scale, ax=axes).ax, names)


def _matrices(results: dict[str, Any]) -> dict[str, Matrix]:
    """The accuracy matrices by selection."""
    found = metrics.matrices_of(results)
    if not np.isfinite(found["batch"]).any():
        raise NothingToDrawError("these results have no accuracy: nothing was evaluated yet")
    return found


def _usage(results: dict[str, Any]) -> list[dict[str, Any]]:
    """How often prompts were selected after the last evaluated task, by test set."""
    usage = results.get("prompt_usage")
    if not usage:
        why = "the run had no prompt pool"
        if results["config"].get("prompt_pool", True):
            why = "nothing was evaluated with a prompt pool yet"
        raise NothingToDrawError(f"these results have no prompt usage: {why}")
    size = len(usage[0]["instance"])
    if size <= results["config"]["top_k"]:
        raise NothingToDrawError(f"every image used the whole pool of {size}: nothing was selected")
    last = max(entry["after_task"] for entry in usage)
    entries = [entry for entry in usage if entry["after_task"] == last]
    return sorted(entries, key=lambda entry: entry["test_set"])


def _shares(results: dict[str, Any]) -> dict[str, Matrix]:
    """Percent of a test set's images for which each prompt is selected, (test sets, prompts)."""
    counts = {name: np.array([own[name] for own in _usage(results)]) for name in SELECTIONS}
    whole = 100 * results["config"]["top_k"]  # an image counts K times
    return {name: whole * own / own.sum(axis=1, keepdims=True) for name, own in counts.items()}


def _names(results: dict[str, Any]) -> list[str]:
    """Labels of the test sets: names, or numbers if the names are just `task1`, `task2`, ..."""
    number = len(results["batch"]["accuracy_matrix"])
    if number == 1:
        return ["all test images"]
    names = display_names(results.get("test_sets") or [], number, "{}")
    return [_short(name) for name in names]


def _short(name: str) -> str:
    """A name as a label of an axis."""
    name = one_line(name)
    return name if len(name) <= 16 else f"{name[:15]}…"


def _used_names(results: dict[str, Any]) -> list[str]:
    """Labels of the test sets whose prompt usage is known, see `_usage`."""
    names = _names(results)
    return [names[entry["test_set"]] for entry in _usage(results)]


def _title(results: dict[str, Any]) -> str:
    """The data set, the seed, the last evaluated task if the run is not finished; the command."""
    matrix = metrics.matrices_of(results)["instance"]
    title = f"{shown(results['config'].get('dataset', ''))}, seed {results['seed']}"
    if not metrics.is_finished(matrix):
        last = max(metrics.evaluated_tasks(matrix), default=-1) + 1
        title += f", after task {last} of {matrix.shape[1]}"
    command = command_words(results["command"]) if results.get("command") else ""
    return f"{title}: {command}".removesuffix(": ")
