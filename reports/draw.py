"""Writes the figures of one run, or of several compared, into files.

matplotlib takes long to import, so only the functions that draw import it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import comparison_figures, figures, files
from reports.figure_style import NothingToDrawError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reports.stored_runs import Group

#: Figures of one run, by file name.
RUN_FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "overview": figures.overview,
    "accuracy_matrix": figures.accuracy_matrix,
    "average_accuracy": figures.run_accuracy,
    "prompt_selection": figures.prompt_selection,
    "key_similarity": figures.key_similarity,
    "training_curves": figures.training_curves,
}

#: Figures that compare runs.
COMPARISONS = ("average_accuracy", "accuracy_against")

#: File formats of each figure.
FORMATS = ("png", "svg")

_DPI = 150


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG and as SVG; the same figure gives the same bytes.

    Args:
        figure: The figure.
        folder: Where the files go; it is made.
        name: File name without an ending.

    Returns:
        The files.
    """
    import matplotlib

    def write(file: Any) -> None:
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(file, format=form, dpi=_DPI, metadata=metadata[form])

    metadata: dict[str, dict[Any, Any]] = {"png": {}, "svg": {"Date": None}}
    paths = []
    for form in FORMATS:
        paths.append(folder / f"{name}.{form}")
        files.write_whole(paths[-1], write)
    return paths


def draw_run(
    results: dict[str, Any], folder: Path, only: Collection[str] | None = None
) -> tuple[list[Path], list[str]]:
    """Draws every figure that the results of a run have the data for.

    Figures of an earlier call are replaced, or removed where there is nothing to draw now.

    Args:
        results: Content of results.json.
        folder: Where the figures go.
        only: Names of `RUN_FIGURES`; None: all.

    Returns:
        The files; and one line for each figure that is left out, with the reason.
    """
    paths, left_out = [], []
    for name, draw in RUN_FIGURES.items():
        if only is not None and name not in only:
            continue
        try:
            paths += write_figure(draw(results), folder, name)
        except NothingToDrawError as error:
            left_out.append(f"{name}: {error}")
            for form in FORMATS:
                (folder / f"{name}.{form}").unlink(missing_ok=True)
    return paths, left_out


def draw_comparison(
    groups: Sequence[Group],
    folder: Path,
    against: str | None = None,
    lines: str | None = None,
    only: Collection[str] | None = None,
) -> list[Path]:
    """Draws several configurations together.

    Args:
        groups: Finished runs by configuration.
        folder: Where the figures go.
        against: Setting on the x axis of `accuracy_against`; None: it is not drawn.
        lines: Setting whose values get a line each in that figure.
        only: Names of `COMPARISONS`; None: all.

    Returns:
        The files.

    Raises:
        NothingToDrawError: If the groups lack what a figure needs.
    """
    paths = []
    if only is None or "average_accuracy" in only:
        paths += write_figure(
            comparison_figures.average_accuracy(groups), folder, "average_accuracy"
        )
    if against is not None:
        figure = comparison_figures.accuracy_against(groups, against, lines)
        paths += write_figure(figure, folder, "accuracy_against")
    return paths
