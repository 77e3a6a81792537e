"""Tables over seeds from finished runs, and differences between two configurations.

    python summarize.py OUTPUT_DIR ... [--flags]
    python summarize.py [OUTPUT_DIR ...] --compare A B [--flags]

OUTPUT_DIR is a run or a folder with runs somewhere below it. Runs that differ in nothing but the
seed make one row: mean and sample standard deviation over the seeds. Runs that cannot be used are
reported on standard error. Nothing here needs torch.

Exit code: 0 done, 1 no run could be used (or the file not written), 2 command line rejected.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cli.flags import flag
from cli.options import take_all
from cli.parser import UsageError
from cli.paths import PathStr
from cli.terminal import one_line, run_program
from reports import files, published, seed_tables, stored_runs
from reports.seed_tables import DEFAULT_METRICS, FORMATS, METRICS, SELECTIONS
from reports.stored_runs import Group, ResultsError


@dataclass(frozen=True)
class TableOptions:
    """Options of this program."""

    format: str = flag("text", f"one of {', '.join(FORMATS)}", choices=FORMATS)
    metrics: tuple[str, ...] = flag(
        (),
        f"all, or some of {', '.join(METRICS)} (default: {' '.join(DEFAULT_METRICS)})",
        choices=("all", *METRICS),
    )
    selection: str = flag(
        "both",
        "how test images choose prompts: instance (alone), batch (in vote groups, as published) "
        "or both",
        choices=("both", *SELECTIONS),
    )
    quoted: tuple[str, ...] | None = flag(
        None,
        "show published numbers, too: of the experiments of the runs, or of those named: "
        f"{', '.join(published.EXPERIMENTS.values())}",
        at_least_one=False,
    )
    compare: tuple[PathStr, PathStr] | None = flag(
        None,
        "show B - A with its uncertainty; A and B are labels of the table, or folders with runs "
        "of one configuration",
    )
    output: PathStr | None = flag(None, "file to write to, in place of the screen")

    @property
    def experiments(self) -> set[str]:
        """Full names of the experiments whose published numbers are named."""
        return set(map(published.experiment_named, self.quoted or ()))

    @property
    def selections(self) -> list[str]:
        """Ways of choosing prompts."""
        return list(SELECTIONS) if self.selection == "both" else [self.selection]

    @property
    def columns(self) -> list[str]:
        """The metrics, each once."""
        if "all" in self.metrics:  # the average accuracy is the accuracy
            return [name for name in METRICS if name != "average_accuracy"]
        return list(dict.fromkeys(self.metrics or DEFAULT_METRICS))

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        known = ", ".join(published.EXPERIMENTS.values())
        problems = [
            f"--quoted {name} is unknown: choose one of {known} (folders go before --quoted)"
            for name in sorted(self.experiments - published.EXPERIMENTS.keys())
        ]
        if self.quoted is not None and self.compare:
            problems.append("--quoted and --compare exclude each other: give one")
        if self.output and os.path.exists(self.output) and not os.path.isfile(self.output):
            problems.append(f"--output {self.output} is no regular file: name a file")
        return problems


def main(argv: list[str] | None = None) -> int:
    """Runs one command line, that of the process if `argv` is None; returns the exit code."""
    options, folders, problems = take_all(
        TableOptions,
        sys.argv[1:] if argv is None else argv,
        prog="summarize.py",
        usage="summarize.py OUTPUT_DIR ... [--compare A B] [--flags]",
        description="Mean and standard deviation over seeds, from results.json of finished runs.",
    )
    if not folders and not options.compare:
        problems.append("there is nothing to summarize: name at least one OUTPUT_DIR")
    try:
        if problems:
            raise UsageError(problems)
        groups = _groups(folders)
        text = _differences(options, groups) if options.compare else _over_seeds(options, groups)
        _write(text, options.output)
    except UsageError as error:
        return error.report("summarize.py")
    except (ResultsError, OSError, ImportError) as error:
        _print_notes([f"summarize.py: {error}"])
        return 1
    return 0


def _over_seeds(options: TableOptions, groups: Sequence[Group]) -> str:
    """The table over seeds, and that of published numbers."""
    if not groups:
        raise ResultsError("no run could be used")
    _print_notes(seed_tables.seeds_note(groups))
    quoted = options.experiments
    if options.quoted == ():
        quoted = {e for one in groups if (e := published.experiment_of(one.settings))}
        if not quoted:
            _print_notes(["note: no published numbers are known for the experiments of these runs"])
    return seed_tables.seed_table(
        groups, options.selections, options.columns, quoted, options.format
    )


def _differences(options: TableOptions, groups: Sequence[Group]) -> str:
    """The table of the differences between two groups, each named by its label or folder."""
    known = {group.label: group for group in groups}
    a, b = (known.get(name) or _group_in(name, known) for name in options.compare or ())
    if {run.folder for run in a.runs} == {run.folder for run in b.runs}:
        raise UsageError(["--compare: A and B are the same runs"])
    found = seed_tables.differences(a, b, options.selections, options.columns)
    if found.empty:
        raise ResultsError(f"A and B have no metric in common of {', '.join(options.columns)}")
    if missing := [name for name in options.columns if name not in set(found["metric"])]:
        _print_notes([f"note: not in both, left out: {', '.join(missing)}"])
    return seed_tables.difference_table(found, options.format)


def _groups(folders: Iterable[str]) -> list[Group]:
    """Groups of the runs in some folders; what is left out is reported."""
    _, groups, problems = stored_runs.find_groups(map(Path, folders))
    _print_notes(problems)
    return groups


def _group_in(name: str, labels: Iterable[str]) -> Group:
    """The only group of a folder.

    Raises:
        UsageError: If it is none, or has several; the message names the labels to choose from.
        ResultsError: If it has no run that could be used.
    """
    if not Path(name).is_dir():
        choice = "; ".join(labels) or "those of the runs in OUTPUT_DIR ..."
        raise UsageError([f"--compare: {name} is neither a folder nor a label; labels: {choice}"])
    groups = _groups([name])
    if not groups:
        raise ResultsError(f"no run in {name} could be used")
    if len(groups) > 1:
        problem = f"--compare: {name} has runs of {len(groups)} configurations: name the folder of "
        problem += f"one, or give {name} as OUTPUT_DIR and one of these labels: "
        raise UsageError([problem + "; ".join(group.label for group in groups)])
    return replace(groups[0], label=f"{groups[0].label} in {one_line(name)}")


def _print_notes(lines: Iterable[str]) -> None:
    for line in lines:
        print(one_line(line), file=sys.stderr)


def _write(text: str, path: str | None) -> None:
    """Writes the text to a file, or to standard output."""
    if path:
        files.write_text(Path(path), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_program(main)
