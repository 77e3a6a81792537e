"""What all figures share: style, heat maps, and axes of tasks and of percentages.

Colour-blind readers can tell the colours apart; markers and lines differ without colour, too. Sizes
are in inches. All is plain matplotlib: seaborn would save a dozen lines, and importing it would add
0.7 s to the 2 s in which a run draws its figures.
"""

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.metrics import Matrix

#: The palette of Okabe and Ito, with grey in place of black and without yellow, which is hard to
#: see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")

_STYLE = Path(__file__).with_name("figures.mplstyle")


class NothingToDrawError(ValueError):
    """A figure cannot be drawn; the message says what the results lack for it."""


class Quantity(NamedTuple):
    """What the cells of a heat map show."""

    label: str
    columns: str  # what the columns are
    first: int  # number of the first column
    colors: str  # name of a colour map
    is_signed: bool  # zero is in the middle of the colours; else they go from 0 to 100
    decimals: int  # of the numbers in the cells


ACCURACY = Quantity("accuracy (%)", "after training task", 1, "viridis", False, 1)
SHARE = Quantity("selected by (% of images)", "prompt", 0, "Purples", False, 0)
CONFUSION = Quantity("% of the class", "predicted class", 1, "Purples", False, 0)
SIMILARITY = Quantity("mean cosine similarity", "key", 0, "RdBu_r", True, 2)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates a function: its figure gets our style, and one layout for all file formats."""

    @functools.wraps(draw)
    def draw_styled(*given: Any) -> Figure:
        with matplotlib.style.context(_STYLE):
            figure = draw(*given)
            figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
            figure.set_layout_engine("none")
        return figure

    return draw_styled


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure below a title of at most two lines."""
    figure = Figure(figsize=(width, height))
    lines = textwrap.fill(title, int(11 * width), max_lines=2, placeholder=" …")
    figure.suptitle(lines, x=0.07 / width, ha="left", fontsize=10, fontweight="bold")
    return figure


def room(number: int, least: float, most: float) -> float:
    """Size of a number of rows or columns that can hold numbers, within limits."""
    return min(most, max(least, 0.4 * number))


def heat_map(axes: Axes, values: Matrix, names: Sequence[str], shows: Quantity) -> QuadMesh:
    """Draws a row of values for each test set as colours, with their numbers if they are few.

    Not-a-number is hatched.
    """
    num_rows, num_columns = values.shape
    are_few = max(values.shape) <= 20
    colors = axes.pcolormesh(
        np.arange(num_columns + 1) + shows.first - 0.5,
        np.arange(num_rows + 1) + 0.5,
        values,
        cmap=shows.colors,
        norm=CenteredNorm() if shows.is_signed else Normalize(0, 100),
        edgecolors="white" if are_few else "none",
        rasterized=not are_few,
    )
    axes.invert_yaxis()
    axes.patch.set(facecolor="#f7f7f7", edgecolor="#d8d8d8", hatch="////")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(shows.columns)
    round_ticks(axes.xaxis)
    label_rows(axes, names)
    decimals = 0 if num_columns > 10 and not shows.is_signed else shows.decimals
    is_dark = np.asarray(colors.to_rgba(values))[..., :3] @ (0.299, 0.587, 0.114) < 0.52
    for (row, column), value in np.ndenumerate(values if are_few else values[:0]):
        if np.isfinite(value):
            text = f"{value:z.{decimals}f}".replace("100.0", "100").replace("-", "\u2212")
            color = "white" if is_dark[row, column] else "black"
            where: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
            axes.text(column + shows.first, row + 1, text, color=color, fontsize=7.5, **where)
    return colors


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Labels the test sets at 1, 2, ... on the y axis: by name, or by number if they are many."""
    if names[0].isdigit():
        axes.set_ylabel("test set of task")
    if len(names) <= 20:
        axes.set_yticks(range(1, len(names) + 1), names)
    else:
        round_ticks(axes.yaxis)


def label_tasks(axes: Axes, num_tasks: int, label: str = "tasks learned") -> None:
    """Puts the tasks on the x axis, and lines at the ticks of the other one."""
    axes.set(xlim=(0.5, num_tasks + 0.5), xlabel=label)
    round_ticks(axes.xaxis)
    axes.grid(True, axis="y")


def round_ticks(axis: Axis, most: int = 15, whole: bool = True) -> None:
    """Puts round numbers on an axis, at most so many."""
    axis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10], min_n_ticks=1))


def limit_percent(axes: Axes) -> None:
    """Keeps a y axis of percentages, and its ticks, within 0 to 100."""
    round_ticks(axes.yaxis, 7, whole=False)
    low, high = np.clip(axes.get_ylim(), -3, 103)
    axes.set_yticks([y for y in axes.get_yticks() if max(0, low) <= y <= min(100, high)])
    axes.set_ylim(low, high)


def legend_below(axes: Axes, title: str, num_columns: int = 2) -> None:
    """Puts the legend of a panel below its figure."""
    handles, labels = axes.get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": num_columns}
    axes.figure.legend(handles, labels, title=title, **where)
