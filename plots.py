"""Draws the figures of runs from their results.json.

    python plots.py OUTPUT_DIR [OUTPUT_DIR ...]

The figures of a run are drawn again into the folder `plots` of the run. A folder of runs stands for
all of them. Several runs are compared: those of one configuration are drawn as mean and standard
deviation over the seeds.

Exit code: 0 something was drawn, 1 nothing was drawn, 2 command line rejected.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli.flags import flag
from cli.options import near, take_all
from cli.parser import UsageError
from cli.paths import PathStr
from cli.settings import Settings
from cli.terminal import one_line, run_program
from reports import draw, stored_runs
from reports.stored_runs import Group

#: Names of all figures.
_NAMES = tuple(dict.fromkeys((*draw.RUN_FIGURES, *draw.COMPARISONS)))

_WHERE = "--output_dir is where the comparison goes:"


@dataclass(frozen=True)
class PlotOptions:
    """Options of this program."""

    only: tuple[str, ...] = flag(
        (), f"draw these figures, of {', '.join(_NAMES)} (default: all)", choices=_NAMES
    )
    output_dir: PathStr | None = flag(
        None, "where the comparison goes (default: comparison, in what holds all the runs)"
    )
    against: str | None = flag(
        None, "compare the accuracy against the values of a setting, such as size"
    )
    lines: str | None = flag(
        None, "with --against: a line for each value of another setting, such as length"
    )
    label: tuple[str, ...] = flag(
        (), "call a configuration NEW, not OLD as in the tables: OLD=NEW; may be repeated"
    )
    format: tuple[str, ...] = flag(
        draw.DEFAULT_FORMATS,
        f"file formats, of {', '.join(draw.FORMATS)}",
        choices=tuple(draw.FORMATS),
    )

    @property
    def axes(self) -> dict[str, str]:
        """Names of settings by the flags that name them."""
        named = {"against": self.against, "lines": self.lines}
        return {name: value.replace("-", "_") for name, value in named.items() if value}

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        problems, only = [], set(self.only or _NAMES)
        if "accuracy_against" in self.only and not self.against:
            problems.append("--only accuracy_against needs --against, the setting to draw against")
        if self.against and "accuracy_against" not in only:
            problem = "--against draws accuracy_against, which --only leaves out: name it there"
            problems.append(problem)
        if self.lines and not self.against:
            problems.append("--lines needs --against, the setting to draw against")
        if self.output_dir and only.isdisjoint(draw.COMPARISONS):
            names = " or ".join(draw.COMPARISONS)
            problems.append(f"{_WHERE} --only leaves it out: name {names} there")
        return problems


def main(argv: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process; returns the exit code."""
    options, folders, problems = take_all(
        PlotOptions,
        sys.argv[1:] if argv is None else argv,
        once=("label",),
        prog="plots.py",
        usage="plots.py OUTPUT_DIR [OUTPUT_DIR ...] [--flags]",
        description="Draws the figures of runs, each into its own plots/; compares several. "
        "OUTPUT_DIR is a run, or holds runs somewhere below it: these are compared, not redrawn.",
    )
    if not folders:
        problems.append("there is nothing to draw: name at least one OUTPUT_DIR")
    try:
        return _run(options, [stored_runs.folder_of(Path(name)) for name in folders], problems)
    except UsageError as error:
        return error.report("plots.py")
    except (OSError, ImportError) as error:
        print(f"plots.py: {one_line(str(error))}", file=sys.stderr)
        return 1


def _run(options: PlotOptions, paths: Sequence[Path], problems: list[str]) -> int:
    """Draws what a command line asks for; prints the files, and what was left out."""
    folders, groups, unusable = stored_runs.find_groups(paths)
    _print_problems(unusable)
    groups.sort(key=_in_numerical_order)
    problems += [*_unfit(options, folders, groups), *_rename(groups, options.label)]
    if problems:
        raise UsageError(problems)
    is_drawn = False
    for place, (drawn, left_out) in _draw(options, paths, folders, groups):
        for name in drawn:
            print(one_line(f"{place / name}.{', .'.join(options.format)}"))
        for line in left_out:
            print(one_line(f"{place}: without {line}"))
        is_drawn |= bool(drawn)
    if not is_drawn:
        _print_problems(["there is nothing to draw"])
    return 0 if is_drawn else 1


def _draw(
    options: PlotOptions, paths: Sequence[Path], folders: Sequence[Path], groups: Sequence[Group]
) -> Iterator[tuple[Path, draw.Drawn]]:
    """Draws the runs that the command line names, and the comparison; gives the folders, too."""
    choice = {"only": options.only, "formats": options.format}
    for folder in folders:
        if folder in paths or len(folders) == 1:
            with suppress(stored_runs.ResultsError):  # which was reported before
                results, place = stored_runs.load_results(folder), folder / "plots"
                yield place, draw.draw_run(results, place, **choice)
    if len(folders) > 1 and groups:
        shared = Path(os.path.commonpath([path.absolute() for path in paths]))
        place = Path(options.output_dir or shared / "comparison")
        yield place, draw.draw_comparison(groups, place, *options.axes.values(), **choice)


def _print_problems(problems: Iterable[str]) -> None:
    for problem in dict.fromkeys(problems):
        print(f"plots.py: {one_line(problem)}", file=sys.stderr)


def _in_numerical_order(group: Group) -> list[Any]:
    """What sorts configurations by the words and the numbers in their labels."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", group.label)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def _unfit(options: PlotOptions, folders: Sequence[Path], groups: Sequence[Group]) -> Iterator[str]:
    """What is wrong with a command line, given the runs that it names."""
    if options.output_dir and len(folders) == 1:
        yield f"{_WHERE} there is one run, whose figures go into its own plots/"
    known = {name for group in groups for name in group.settings} or set(Settings().stored())
    unknown = {flag: name for flag, name in options.axes.items() if name not in known}
    for flag_name, name in unknown.items():
        hint = near(name, sorted(known))
        yield f"--{flag_name} {name}: no configuration has such a setting{hint}"
    axes = options.axes.values()
    if options.against and not unknown and (why := stored_runs.problem_against(groups, *axes)):
        yield f"--against {options.against}: {why}"


def _rename(groups: list[Group], changes: Sequence[str]) -> list[str]:
    """Gives configurations the labels of --label; returns what is wrong with it."""
    problems = []
    places = {group.label: place for place, group in enumerate(groups)}
    for change in changes:
        old = next((label for label in places if change.startswith(f"{label}=")), None)
        if old is not None:
            groups[places[old]] = replace(groups[places[old]], label=change[len(old) + 1 :])
        else:
            hint = near(change.rpartition("=")[0], list(places), 99)
            problems.append(f"--label {change} is no OLD=NEW with a label of the tables{hint}")
    if len({group.label for group in groups}) < len(groups):
        problems.append("--label gives two configurations one label: choose another for one")
    return problems


if __name__ == "__main__":
    run_program(main)
