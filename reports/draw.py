"""Writes the figures of one run, or of several compared, into files.

matplotlib takes long to import, so only the functions that draw import it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
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
    "average_accuracy": figures.average_accuracy,
    "forgetting": figures.forgetting,
    "prompt_selection": figures.prompt_selection,
    "key_similarity": figures.key_similarity,
    "training_curves": figures.training_curves,
}

#: Figures that compare runs.
COMPARISONS = ("average_accuracy", "forgetting", "accuracy_against")

#: File formats, each with the metadata that would differ from time to time; those by default.
FORMATS: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
DEFAULT_FORMATS = ("png", "svg")

#: Files, and one line for each figure that is left out, with the reason.
Drawn = tuple[list[Path], list[str]]


def draw_run(
    results: dict[str, Any],
    folder: Path,
    only: Collection[str] = (),
    formats: Collection[str] = DEFAULT_FORMATS,
) -> Drawn:
    """Draws every figure of a run, or `only` some, for which its results.json has the data."""
    drawings = {name: partial(draw, results) for name, draw in RUN_FIGURES.items()}
    return _draw_all(drawings, folder, only, formats)


def draw_comparison(
    groups: Sequence[Group],
    folder: Path,
    *against: str,
    only: Collection[str] = (),
    formats: Collection[str] = DEFAULT_FORMATS,
) -> Drawn:
    """Draws several configurations together, all of `COMPARISONS` or `only` some.

    Args:
        groups: Finished runs by configuration.
        folder: Where the files go.
        *against: Settings of `accuracy_against`, see there; none: it is not drawn.
        only: Names of `COMPARISONS`.
        formats: Names of `FORMATS`.
    """
    names = COMPARISONS if against else COMPARISONS[:-1]
    own = {"accuracy_against": against}
    drawings = {
        name: partial(getattr(comparison_figures, name), groups, *own.get(name, ()))
        for name in names
    }
    return _draw_all(drawings, folder, only, formats)


def _draw_all(
    drawings: dict[str, partial[Figure]],
    folder: Path,
    only: Collection[str],
    formats: Collection[str],
) -> Drawn:
    """Draws figures; those of an earlier call are replaced, or removed where there is none now.

    The same figure gives the same bytes.
    """
    paths, left_out = [], []
    for name in [name for name in drawings if not only or name in only]:
        try:
            figure = drawings[name]()
        except NothingToDrawError as error:
            left_out.append(f"{name}: {error}")
            for form in FORMATS:
                (folder / f"{name}.{form}").unlink(missing_ok=True)
            continue
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": name, "pdf.fonttype": 42}):
            for form in formats:
                save = partial(figure.savefig, format=form, dpi=150, metadata=FORMATS[form])
                paths.append(folder / f"{name}.{form}")
                files.write_whole(paths[-1], save)
    return paths, left_out
