"""What all figures share: style, heat maps, axes of tasks and of numbers.

Colour-blind readers can tell the colours apart; lines, markers and hatches differ without colour,
too. Sizes are in inches, font sizes in points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from reports import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Parameters = ParamSpec("Parameters")
Array = NDArray[np.float64]

#: Width of a figure that fills a page.
PAGE_WIDTH = 9.0
#: Most rows or columns of a heat map with numbers in its cells.
_MOST_NUMBERED = 30
#: Font sizes of the numbers in cells. Numbers smaller than `_READABLE_FONT` lose their decimals,
#: and numbers smaller than `SMALLEST_FONT` are left out.
SMALLEST_FONT, _READABLE_FONT, LARGEST_FONT = 6.0, 7.0, 8.5
#: Width of a digit, as a multiple of the font size.
_DIGIT = 0.64
#: Height and font size of the line that names the run of a figure.
HEADLINE_HEIGHT, HEADLINE_FONT = 0.2, 7.5
#: Space between the labels of an axis, points.
_LABEL_ROOM = 5.0

TITLES = {"batch": "batch-wise (as published)", "instance": "instance-wise"}
#: The palette of Okabe and Ito, with grey in place of black and without yellow, which is hard to
#: see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_INK = "#262626"
#: Tick locator of an axis of accuracies.
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
    """A figure cannot be drawn; the message says what the results lack for it."""


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Decorates a function: its figure gets our style, and one layout for all file formats."""

    @functools.wraps(draw)
    def draw_styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            if (layout := figure.get_layout_engine()) is not None:
                layout.execute(figure)
                figure.set_layout_engine("none")
        return figure

    return draw_styled


def accuracy_over_tasks(matrix: metrics.Matrix) -> tuple[list[int], Array]:
    """Evaluated tasks, from 1, and the average accuracy after each."""
    points = metrics.accuracy_curve(matrix, matrix.shape[1] - 1)
    return (
        [int(point["after_task"]) for point in points],
        np.array([point["accuracy"] for point in points]),
    )


def shortened(text: str, length: int) -> str:
    """Text, cut to a number of characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def new_figure(width: float, height: float, headline: str = "") -> Figure:
    """An empty figure with an automatic layout of its panels, below a headline if there is one."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    whole = height + HEADLINE_HEIGHT * bool(headline)
    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.05, rect=(0, 0, 1, height / whole))
    figure = Figure(figsize=(width, whole), layout=layout)
    if headline:
        figure.text(
            1 - 0.07 / width, 1 - 0.06 / whole, headline, ha="right", va="top",
            fontsize=HEADLINE_FONT, color="#707070",
        )  # fmt: skip
    return figure


def most_letters(width: float, size: float) -> int:
    """How many letters of a font size fit into a width."""
    return int(width * 72 / (size * _DIGIT))


def side_by_side(figure: Figure, widths: Sequence[float]) -> list[Axes]:
    """Panels beside each other; `widths` are relative."""
    return list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])


def heat_height(num_rows: int) -> float:
    """Height of all cells of a heat map that has a figure of its own."""
    return min(5.5, max(1.2, 0.36 * num_rows))


def heat_map(
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
        values: Values of the cells; not-a-number is hatched.
        colors: Name of a colour map.
        limits: Values at the ends of the colour map.
        width: Width of all cells together, about.
        height: Height of all cells together, about.
        forms: Formats of the numbers, the longest first.

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
    """Writes values into cells (width, height in points) if they fit; returns whether they do."""
    sizes = [_number_size(values, form, cell) for form in forms]
    readable = [size for size in sizes if size >= _READABLE_FONT]
    size = readable[0] if readable else sizes[-1]
    form = forms[sizes.index(size)]
    if size < SMALLEST_FONT or max(values.shape) > _MOST_NUMBERED:
        return False
    colors = np.asarray(image.cmap(image.norm(values)))[..., :3]
    shades = colors @ np.array([0.299, 0.587, 0.114])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column, row, as_number(value, form), ha="center", va="center", fontsize=size,
                in_layout=False, color="white" if shades[row, column] < 0.52 else _INK,
            )  # fmt: skip
    return True


def _number_size(values: Array, form: str, cell: tuple[float, float]) -> float:
    """The font size at which the longest number fits into a cell (width, height in points)."""
    longest = max((len(as_number(value, form)) for value in values[np.isfinite(values)]), default=1)
    return min(LARGEST_FONT, cell[0] / (longest * _DIGIT + 0.3), cell[1] / 1.3)


def as_number(value: float, form: str) -> str:
    """A formatted value with a typographic minus; -0.00 becomes 0.00, and 100.0 becomes 100."""
    text = form.format(value)
    text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "\u2212")
    return "100" if text == "100.0" else text


def outline_cells(axes: Axes, cells: Sequence[tuple[int, int]], thickness: float) -> None:
    """Draws a box inside each of some cells (row, column) of a heat map."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((column - 0.45, row - 0.43), 0.9, 0.86) for row, column in cells]
    axes.add_collection(
        PatchCollection(boxes, facecolor="none", edgecolor=PALETTE[1], linewidth=thickness)
    )


def spread(values: Array, gap: float, highest: float) -> Array:
    """Moves values apart, so that neighbours have a gap and none is above the highest place."""
    order = np.argsort(values, kind="stable")
    places = values[order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places = np.minimum(places, highest - gap * np.arange(len(places))[::-1])
    moved = np.empty_like(places)
    moved[order] = places
    return moved


def heights_of_lines(axes: Axes) -> Array:
    """Heights of all points of all lines."""
    return np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines])


def label_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Labels the test sets on the y axis, as many as fit; a single one gets an axis title."""
    step = label_step(len(names), int(height * 72 / 11))
    are_numbers = names[0].isdigit()
    places = list(range(0, len(names), step))
    if are_numbers:
        places = [place for place, name in enumerate(names) if step == 1 or int(name) % step == 0]
        axes.set_ylabel("test set of task")
    axes.set_yticks(places, [names[place] for place in places])
    if len(names) == 1:
        axes.set(yticks=[], ylabel="all test images")


def label_numbers(axis: Axis, number: int, first: int, room: float) -> None:
    """Labels the places 0, 1, ... with numbers from `first` on, as many as fit into `room`."""
    step = label_step(number, most_labels(number, room))
    places = [place for place in range(number) if step == 1 or (place + first) % step == 0]
    axis.set_ticks(places, [str(place + first) for place in places])


def label_tasks_learned(axes: Axes, num_tasks: int, width: float) -> None:
    """Labels the tasks, from 1, on an x axis of a width."""
    step = label_step(num_tasks, min(20, most_labels(num_tasks, width)))
    axes.set_xticks(range(step, num_tasks + 1, step))
    margin = 0.04 * (num_tasks - 1) + 0.1
    axes.set_xlim(1 - margin, num_tasks + margin)
    axes.set_xlabel("tasks learned")
    axes.grid(axis="y")


def most_labels(number: int, room: float) -> int:
    """How many labels of numbers up to `number` fit beside each other into `room`."""
    return int(room * 72 / (8 * _DIGIT * len(str(number - 1)) + _LABEL_ROOM))


def label_step(number: int, most: int) -> int:
    """Step between the labels of `number` places, at most `most` of them: 1, 2, 5, 10, 20, ..."""
    steps = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return next(step for step in steps if number <= step * max(1, most))


def limit_accuracy(axes: Axes, lowest: float, most: float, room: float = 0.1) -> None:
    """Sets a y axis of accuracies: from a multiple of five, with free space below, to 100.

    It begins a little below 0 if it must, so that markers at 0 are not cut off.

    Args:
        axes: The panel.
        lowest: Lowest accuracy that is drawn.
        most: Highest value at which the axis may begin.
        room: Share of the axis that is free below `lowest`.
    """
    free = 100 - (100 - lowest) / (1 - room)
    lower = max(0.0, min(most, 5 * math.floor(free / 5)))
    span = 100 - lower
    axes.set_ylim(min(lower, max(0.0, lowest) - 0.04 * span), 100 + 0.05 * span)
    axes.yaxis.get_major_locator().set_params(**_WHOLE)


def color_bar(figure: Any, image: AxesImage, panels: Sequence[Axes], label: str | None) -> None:
    """Adds the colour bar of a heat map beside some panels."""
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=25)
    bar.ax.yaxis.get_major_locator().set_params(steps=[1, 2, 5, 10], nbins=7)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7.5)
    if label is not None:
        bar.set_label(label)
