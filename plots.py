"""Draws the pictures of runs, from what results.json holds.

    python plots.py OUTPUT_DIR [OUTPUT_DIR ...]

A folder of a run gets its pictures anew, in `plots` in it. A folder of runs stands for all of them.
Several runs are compared: those of one configuration are drawn together, as mean and standard
deviation over the seeds.

Exit code: 0 something was drawn, 1 nothing was, 2 refused command line.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from cli import options
from reports import comparison_figures, draw, stored_runs
from reports.figure_style import NothingToDrawError
from reports.stored_runs import Group


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        return _run(_parse(sys.argv[1:] if argv is None else argv))
    except options.UsageError as error:
        print(error.told_by("plots.py"), end="", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    """Draws what a command line asks for; tells what it wrote and what it left out."""
    folders, problems = stored_runs.find(args.paths)
    runs, unusable = stored_runs.read_all(folders)
    groups, twins = stored_runs.group(runs)
    is_comparison = len(folders) > 1
    _tell([*problems, *twins, *unusable])
    _check(args, folders, groups)
    paths = []
    for folder in folders:
        if folder in args.paths or not is_comparison:
            paths += _redraw(folder, args.only)
    if is_comparison and groups:
        folder = args.output_dir or _common(args.paths) / "comparison"
        compared = draw.draw_comparison(groups, folder, args.against, args.lines, args.only)
        _list(compared)
        paths += compared
    if not paths:
        _tell(["there is nothing to draw"])
    return 0 if paths else 1


def _redraw(folder: Path, only: Collection[str] | None) -> list[Path]:
    """Draws one run into its own folder, unless it is damaged, which was told."""
    try:
        results = stored_runs.load_results(folder)
    except stored_runs.ResultsError:
        return []
    paths, left_out = draw.draw_run(results, folder / "plots", only)
    _list(paths)
    for line in left_out:
        print(f"{folder / 'plots'}: without {line}")
    return paths


def _list(paths: Sequence[Path]) -> None:
    """One line for each picture."""
    for first, *others in zip(*[iter(paths)] * len(draw.FORMATS), strict=True):
        print(", ".join([str(first), *(path.suffix for path in others)]))


def _tell(problems: Iterable[str]) -> None:
    for problem in dict.fromkeys(problems):
        print(f"plots.py: {problem}", file=sys.stderr)


def _common(paths: Sequence[Path]) -> Path:
    """The folder that holds all that was named: the folder itself if it is one."""
    return Path(os.path.commonpath([path.absolute() for path in paths]))


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong as every program here does."""

    def error(self, message: str) -> NoReturn:
        """Refuses the command line."""
        raise options.UsageError([message])


def _parse(argv: list[str]) -> argparse.Namespace:
    """Reads a command line; whether it makes sense depends on the runs, see `_check`.

    Raises:
        options.UsageError: If it cannot be read.
    """
    parser = _Parser(
        prog="plots.py",
        usage="plots.py OUTPUT_DIR [OUTPUT_DIR ...] [--flags]",
        description="Draws the pictures of runs, each into its own plots/; compares several.",
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
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    path = Path(text)
    return path.parent if path.name == "results.json" else path


def _setting(text: str) -> str:
    return text.replace("-", "_")


def _names() -> list[str]:
    """Names of all pictures."""
    return list(dict.fromkeys((*draw.RUN_PICTURES, *draw.COMPARISONS)))


def _check(args: argparse.Namespace, folders: Sequence[Path], groups: Sequence[Group]) -> None:
    """Checks a command line against the runs, of which the finished ones are grouped.

    Raises:
        options.UsageError: With everything that is wrong.
    """
    problems = [
        f"--only {name} is no picture{_near_picture(name)} (folders stand before --only)"
        for name in args.only or []
        if name not in _names()
    ]
    is_named = args.only is not None and "accuracy_against" in args.only
    if is_named and args.against is None:
        problems.append("--only accuracy_against needs --against, the setting to draw against")
    if args.against is not None and args.only is not None and not is_named:
        problems.append("--against draws accuracy_against, which --only leaves out: name it there")
    if args.lines is not None and args.against is None:
        problems.append("--lines needs --against, the setting to draw against")
    problems += _check_output_dir(args, folders)
    problems += _check_settings(args, groups)
    if problems:
        raise options.UsageError(problems)


def _check_output_dir(args: argparse.Namespace, folders: Sequence[Path]) -> list[str]:
    """Why there is no comparison that could go to --output_dir."""
    if args.output_dir is None:
        return []
    problems = []
    if len(folders) == 1:
        problems.append("there is one run, whose pictures go into its own plots/")
    if args.only is not None and not set(args.only) & set(draw.COMPARISONS):
        problems.append(f"--only leaves it out: name {' or '.join(draw.COMPARISONS)} there")
    return [f"--output_dir is where the comparison goes: {problem}" for problem in problems]


def _check_settings(args: argparse.Namespace, groups: Sequence[Group]) -> list[str]:
    """What is wrong with the settings of --against and --lines."""
    known = {name for group in groups for name in group.settings} or set(options.defaults())
    problems = [
        f"--{flag} {name}: no configuration has such a setting{_near(name, sorted(known))}"
        for flag in ("against", "lines")
        if (name := getattr(args, flag)) is not None and name not in known
    ]
    if args.against is not None and not problems:
        try:
            comparison_figures.check_against(groups, args.against, args.lines)
        except NothingToDrawError as error:
            problems.append(f"--against {args.against}: {error}")
    return problems


def _near_picture(name: str) -> str:
    """What was meant, if that is clear; or all there is."""
    holding = [known for known in _names() if name in known]
    if len(holding) == 1:
        return f": did you mean {holding[0]}?"
    return _near(name, _names()) or f": there are {', '.join(_names())}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
