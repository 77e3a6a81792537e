"""Draws the figures of runs from their results.json.

    python plots.py OUTPUT_DIR [OUTPUT_DIR ...]

The figures of a run are drawn again into the folder `plots` of the run. A folder of runs stands for
all of them. Several runs are compared: those of one configuration are drawn as mean and standard
deviation over the seeds.

Exit code: 0 something was drawn, 1 nothing was drawn, 2 command line rejected.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cli.parser import UsageError
from cli.settings import Settings
from reports import comparison_figures, draw, stored_runs
from reports.figure_style import NothingToDrawError
from reports.stored_runs import Group


@dataclass(frozen=True)
class PlotOptions:
    """Options of this program.

    Attributes:
        paths: Folders of runs, or folders with runs somewhere below them.
        only: Names of the figures to draw; None: all.
        output_dir: Folder of the comparison; None: `comparison`, beside the runs.
        against: Setting on the x axis of `accuracy_against`; None: it is not drawn.
        lines: Setting whose values get a line each in it.
    """

    paths: Sequence[Path]
    only: Sequence[str] | None
    output_dir: Path | None
    against: str | None
    lines: str | None


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        return _run(_parse(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(error.message("plots.py"), end="", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 1


def _run(options: PlotOptions) -> int:
    """Draws what a command line asks for; prints the files, and what was left out."""
    folders, problems = stored_runs.find(options.paths)
    runs, unusable = stored_runs.read_all(folders)
    groups, twins = stored_runs.group(runs)
    is_comparison = len(folders) > 1
    _print_problems([*problems, *twins, *unusable])
    _check(options, folders, groups)
    paths = []
    for folder in folders:
        if folder in options.paths or not is_comparison:
            paths += _redraw(folder, options.only)
    if is_comparison and groups:
        folder = options.output_dir or _common(options.paths) / "comparison"
        compared = draw.draw_comparison(
            groups, folder, options.against, options.lines, options.only
        )
        _print_files(compared)
        paths += compared
    if not paths:
        _print_problems(["there is nothing to draw"])
    return 0 if paths else 1


def _redraw(folder: Path, only: Collection[str] | None) -> list[Path]:
    """Draws one run into its own folder, unless it is damaged, which was reported before."""
    try:
        results = stored_runs.load_results(folder)
    except stored_runs.ResultsError:
        return []
    paths, left_out = draw.draw_run(results, folder / "plots", only)
    _print_files(paths)
    for line in left_out:
        print(f"{folder / 'plots'}: without {line}")
    return paths


def _print_files(paths: Sequence[Path]) -> None:
    """Prints one line for each figure."""
    for first, *others in zip(*[iter(paths)] * len(draw.FORMATS), strict=True):
        print(", ".join([str(first), *(path.suffix for path in others)]))


def _print_problems(problems: Iterable[str]) -> None:
    for problem in dict.fromkeys(problems):
        print(f"plots.py: {problem}", file=sys.stderr)


def _common(paths: Sequence[Path]) -> Path:
    """The innermost folder that contains all paths; a single path itself."""
    return Path(os.path.commonpath([path.absolute() for path in paths]))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in the same form as the other programs."""

    def error(self, message: str) -> NoReturn:
        """Rejects the command line."""
        raise UsageError([message])


def _parse(argv: list[str]) -> PlotOptions:
    """Reads a command line; `_check` compares it with the runs later.

    Raises:
        UsageError: If it cannot be read.
    """
    parser = _Parser(
        prog="plots.py",
        usage="plots.py OUTPUT_DIR [OUTPUT_DIR ...] [--flags]",
        description="Draws the figures of runs, each into its own plots/; compares several.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=_folder,
        metavar="OUTPUT_DIR",
        help="folder of a run, or of runs somewhere below it: these are compared, not redrawn",
    )
    add("--only", nargs="+", metavar="NAME", help=f"of {', '.join(_names())} (default: all)")
    add(
        *("--output_dir", "--output-dir"),
        type=Path,
        metavar="DIR",
        help="where the comparison goes (default: comparison, in what holds all the runs)",
    )
    add(
        "--against",
        type=_setting,
        metavar="SETTING",
        help="compare the final accuracy against the values of a setting, such as size",
    )
    add(
        "--lines",
        type=_setting,
        metavar="SETTING",
        help="with --against: a line for each value of another setting, such as length",
    )
    return PlotOptions(**vars(parser.parse_args(argv)))


def _folder(text: str) -> Path:
    path = Path(text)
    return path.parent if path.name == "results.json" else path


def _setting(text: str) -> str:
    return text.replace("-", "_")


def _names() -> list[str]:
    """Names of all figures."""
    return list(dict.fromkeys((*draw.RUN_FIGURES, *draw.COMPARISONS)))


def _check(options: PlotOptions, folders: Sequence[Path], groups: Sequence[Group]) -> None:
    """Checks a command line against the runs, of which the finished ones are grouped.

    Raises:
        UsageError: With everything that is wrong.
    """
    problems = [
        f"--only {name} is no figure{_near_figure(name)} (folders go before --only)"
        for name in options.only or []
        if name not in _names()
    ]
    is_named = options.only is not None and "accuracy_against" in options.only
    if is_named and options.against is None:
        problems.append("--only accuracy_against needs --against, the setting to draw against")
    if options.against is not None and options.only is not None and not is_named:
        problems.append("--against draws accuracy_against, which --only leaves out: name it there")
    if options.lines is not None and options.against is None:
        problems.append("--lines needs --against, the setting to draw against")
    problems += _check_output_dir(options, folders)
    problems += _check_settings(options, groups)
    if problems:
        raise UsageError(problems)


def _check_output_dir(options: PlotOptions, folders: Sequence[Path]) -> list[str]:
    """Why there is no comparison that could be written to --output_dir."""
    if options.output_dir is None:
        return []
    problems = []
    if len(folders) == 1:
        problems.append("there is one run, whose figures go into its own plots/")
    if options.only is not None and not set(options.only) & set(draw.COMPARISONS):
        problems.append(f"--only leaves it out: name {' or '.join(draw.COMPARISONS)} there")
    return [f"--output_dir is where the comparison goes: {problem}" for problem in problems]


def _check_settings(options: PlotOptions, groups: Sequence[Group]) -> list[str]:
    """What is wrong with the settings of --against and --lines."""
    known = {name for group in groups for name in group.settings} or set(Settings().stored())
    problems = [
        f"--{flag} {name}: no configuration has such a setting{_near(name, sorted(known))}"
        for flag, name in (("against", options.against), ("lines", options.lines))
        if name is not None and name not in known
    ]
    if options.against is not None and not problems:
        try:
            comparison_figures.check_against(groups, options.against, options.lines)
        except NothingToDrawError as error:
            problems.append(f"--against {options.against}: {error}")
    return problems


def _near_figure(name: str) -> str:
    """A hint for a name that is no figure: the one that was probably meant, or all names."""
    holding = [known for known in _names() if name in known]
    if len(holding) == 1:
        return f": did you mean {holding[0]}?"
    return _near(name, _names()) or f": there are {', '.join(_names())}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
