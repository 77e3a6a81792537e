"""Writes the figures of one run, or of several compared, into files.

matplotlib and pandas take long to import, so only the functions that draw import the figures.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli.paths import command
from cli.terminal import reason
from reports import files
from reports.stored_runs import Group

logger = logging.getLogger(__name__)

#: Figures of one run, functions of `figures`.
RUN_FIGURES = (
    "overview", "accuracy_matrix", "average_accuracy", "forgetting", "prompt_selection",
    "key_similarity", "confusion_matrix", "training_curves",
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
    figures = load("figures")
    drawings = {name: partial(getattr(figures, name), results) for name in RUN_FIGURES}
    return _write(drawings, folder, **choice)


def draw_comparison(
    groups: Sequence[Group], folder: Path, *against: str, **choice: Collection[str]
) -> Drawn:
    """Draws all `COMPARISONS` of finished runs by configuration; `choice` is as above.

    `against` are the settings of `accuracy_against`, which is left out if there are none.
    """
    figures = load("comparison_figures")
    drawings = {name: partial(getattr(figures, name), groups) for name in COMPARISONS}
    accuracy_against = drawings.pop("accuracy_against")
    if against:
        drawings["accuracy_against"] = partial(accuracy_against, *against)
    return _write(drawings, folder, **choice)


def load(name: str) -> Any:
    """Imports a module of figures, with a matplotlib that needs no screen."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which commands inherit, may be missing
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a line for each letter
    return importlib.import_module(f"reports.{name}")


def _write(
    drawings: Mapping[str, Callable[[], Any]],
    folder: Path,
    only: Collection[str] = (),
    formats: Collection[str] = DEFAULT_FORMATS,
) -> Drawn:
    """Writes figures; those of an earlier call are replaced, or removed where there is none now.

    The same figure gives the same bytes. Figures that fail are one warning; files that cannot be
    written raise OSError.
    """
    import matplotlib

    from reports.figure_style import NothingToDrawError

    drawn, left_out, failed = list[str](), list[str](), dict[str, str]()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for name in [name for name in drawings if not only or name in only]:
            try:
                figure = drawings[name]()
                with matplotlib.rc_context({"svg.hashsalt": name, "pdf.fonttype": 42}):
                    for form in formats:
                        save = partial(figure.savefig, format=form, dpi=150, metadata=FORMATS[form])
                        files.write_whole(folder / f"{name}.{form}", save)
                drawn.append(name)
                continue
            except NothingToDrawError as error:
                left_out.append(f"{name}: {error}")
            except OSError:
                raise
            except Exception as error:  # libraries raise many kinds
                failed[name] = reason(error)
            for form in FORMATS:
                (folder / f"{name}.{form}").unlink(missing_ok=True)
    if failed:
        why, again = "; ".join(dict.fromkeys(failed.values())), command("plots.py", folder.parent)
        logger.warning("Not drawn: %s (%s); draw again: %s", ", ".join(failed), why, again)
    if any("missing from font" in str(one.message) for one in found):
        logger.warning("%s: the font lacks characters: name another in a matplotlibrc", folder)
    return drawn, left_out
