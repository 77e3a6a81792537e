"""Writes the figures of one run, or of several compared, into files.

matplotlib and pandas take long to import, so only the functions that draw import the figures.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reports import files
from reports.stored_runs import Group

#: Figures of one run, functions of `figures`.
RUN_FIGURES = (
    "overview", "accuracy_matrix", "average_accuracy", "forgetting", "prompt_selection",
    "key_similarity", "training_curves",
)  # fmt: skip

#: Figures that compare runs, functions of `comparison_figures`.
COMPARISONS = ("average_accuracy", "forgetting", "accuracy_against")

#: File formats, each with the metadata that would differ from time to time; those by default.
FORMATS: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
DEFAULT_FORMATS = ("png", "svg")

#: Names of the figures drawn, and one line for each that is left out, with the reason.
Drawn = tuple[list[str], list[str]]


def draw_run(results: dict[str, Any], folder: Path, **choice: Collection[str]) -> Drawn:
    """Draws the figures of a run for which its results.json has the data.

    `choice`: `only` some figures, and `formats` of the files other than `DEFAULT_FORMATS`.
    """
    from reports import figures

    drawings = {name: partial(getattr(figures, name), results) for name in RUN_FIGURES}
    return _write(drawings, folder, **choice)


def draw_comparison(
    groups: Sequence[Group], folder: Path, *against: str, **choice: Collection[str]
) -> Drawn:
    """Draws all `COMPARISONS` of finished runs by configuration; `choice` is as above.

    `against` are the settings of `accuracy_against`, which is left out if there are none.
    """
    from reports import comparison_figures

    drawings = {name: partial(getattr(comparison_figures, name), groups) for name in COMPARISONS}
    accuracy_against = drawings.pop("accuracy_against")
    if against:
        drawings["accuracy_against"] = partial(accuracy_against, *against)
    return _write(drawings, folder, **choice)


def _write(
    drawings: Mapping[str, Callable[[], Any]],
    folder: Path,
    only: Collection[str] = (),
    formats: Collection[str] = DEFAULT_FORMATS,
) -> Drawn:
    """Writes figures; those of an earlier call are replaced, or removed where there is none now.

    The same figure gives the same bytes.
    """
    import matplotlib

    from reports.figure_style import NothingToDrawError

    drawn, left_out = [], []
    for name in [name for name in drawings if not only or name in only]:
        try:
            figure = drawings[name]()
        except NothingToDrawError as error:
            left_out.append(f"{name}: {error}")
            for form in FORMATS:
                (folder / f"{name}.{form}").unlink(missing_ok=True)
            continue
        with matplotlib.rc_context({"svg.hashsalt": name, "pdf.fonttype": 42}):
            for form in formats:
                save = partial(figure.savefig, format=form, dpi=150, metadata=FORMATS[form])
                files.write_whole(folder / f"{name}.{form}", save)
        drawn.append(name)
    return drawn, left_out
