"""Tables over seeds from finished runs, and differences between two configurations.

    python summarize.py OUTPUT_DIR ... [--flags]
    python summarize.py [OUTPUT_DIR ...] --compare A B [--flags]

OUTPUT_DIR is a run or a folder with runs somewhere below it. Runs that differ in nothing but the
seed make one row: mean and sample standard deviation over the seeds. Runs that cannot be used are
reported on standard error. Nothing here needs torch.

Exit code: 0 done, 1 no run could be used (or the file not written), 2 command line rejected.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cli.parser import UsageError
from reports import files, published, seed_tables, stored_runs
from reports.published import Quoted
from reports.seed_tables import ACCURACIES, DEFAULT_METRICS, METRICS, SELECTIONS
from reports.statistics import Difference, differences
from reports.stored_runs import Group, ResultsError
from reports.tables import as_csv, rendered

_FORMATS = ("text", "markdown", "csv", "latex")


@dataclass(frozen=True)
class SummaryOptions:
    """Options of this program.

    Attributes:
        folders: Folders of runs, or folders with runs somewhere below them.
        format: One of `_FORMATS`.
        metrics: Names of `METRICS`, or `all` alone.
        selection: One of `SELECTIONS`, or both.
        quoted: Experiments whose published numbers are shown; empty: those of the runs; None: no
            such numbers are shown.
        compare: Labels or folders of A and B; None: there is a table instead.
        output: File to write; empty: standard output; None: `--output` without a file.
    """

    folders: Sequence[str]
    format: str
    metrics: Sequence[str]
    selection: str
    quoted: Sequence[str] | None
    compare: Sequence[str] | None
    output: str | None

    @property
    def selections(self) -> list[str]:
        """The ways of choosing prompts that are shown."""
        return list(SELECTIONS) if self.selection == "both" else [self.selection]

    @property
    def metric_names(self) -> list[str]:
        """The metrics that are shown, each once."""
        if list(self.metrics) == ["all"]:
            return [name for name in METRICS if name not in ACCURACIES]
        return list(dict.fromkeys(self.metrics))


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        options = _read(sys.argv[1:] if argv is None else argv)
        text = _summary(options) if options.compare is None else _comparison(options)
        _write(text, options.output)
    except UsageError as error:
        print(error.message("summarize.py"), end="", file=sys.stderr)
        return 2
    except (ResultsError, OSError) as error:
        print(f"summarize.py: {error}", file=sys.stderr)
        return 1
    return 0


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="summarize.py",
        usage="summarize.py OUTPUT_DIR ... [--compare A B] [--flags]",
        description="Mean and standard deviation over seeds, from results.json of finished runs.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="OUTPUT_DIR", help="runs, or folders with runs below them")
    add(
        "--format",
        nargs="?",
        const="",
        default="text",
        help=f"{', '.join(_FORMATS)} (default: text)",
    )
    add(
        "--metrics",
        nargs="*",
        metavar="NAME",
        default=list(DEFAULT_METRICS),
        help=f"all, or some of {', '.join(METRICS)} (default: accuracy forgetting)",
    )
    add(
        "--selection",
        nargs="?",
        const="",
        default="both",
        help="how test images choose prompts: instance (alone), batch (in vote groups, as "
        "published) or both (default: both)",
    )
    add(
        "--quoted",
        nargs="*",
        metavar="EXPERIMENT",
        help="show published numbers, too: of the experiments of the runs, or of those named: "
        f"{', '.join(published.EXPERIMENTS.values())}",
    )
    add(
        "--compare",
        nargs="*",
        metavar=("A", "B"),
        help="show B - A with its uncertainty; A and B are labels of the table, or folders with "
        "runs of one configuration",
    )
    add("--output", nargs="?", default="", metavar="FILE", help="write here, not to the screen")
    return parser


def _read(argv: list[str]) -> SummaryOptions:
    """Reads a command line, and checks its names.

    Raises:
        UsageError: With all that is wrong.
    """
    parser = _parser()
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError([str(error).removeprefix("argument ")]) from error
    options = SummaryOptions(**vars(args))
    if options.compare is not None:  # folders may follow A and B
        folders = [*options.folders, *options.compare[2:]]
        options = replace(options, compare=options.compare[:2], folders=folders)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = [_unknown(token.split("=")[0], flags, "option") for token in unknown]
    problems += _wrong_choice("--format", options.format, _FORMATS)
    problems += _wrong_choice("--selection", options.selection, ("both", *SELECTIONS))
    problems += _wrong_compare(options)
    problems += _wrong_metrics(options.metrics)
    problems += _wrong_quoted(options.quoted or [])
    problems += _wrong_output(options.output)
    if problems:
        raise UsageError(problems)
    return options


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    return f"{name} is no {kind}: {hint}{_folder_hint(name)}"


def _folder_hint(name: str) -> str:
    return f" (folders with runs go first: {name} ...)" if Path(name).is_dir() else ""


def _wrong_choice(flag: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
    if value not in allowed:
        given = f"{flag} {value}" if value else flag
        yield f"{given}: choose one of {', '.join(allowed)}"


def _wrong_compare(options: SummaryOptions) -> Iterator[str]:
    if options.compare is None:
        if not options.folders:
            yield "there is nothing to summarize: name at least one OUTPUT_DIR"
        return
    if len(options.compare) < 2:
        yield "--compare takes two labels or folders: --compare A B shows B - A"
    if options.quoted is not None:
        yield "--quoted belongs to the table, which --compare does not show: leave one of them out"


def _wrong_metrics(names: Sequence[str]) -> Iterator[str]:
    if not names:
        yield "--metrics takes at least one name: all, or some of " + ", ".join(METRICS)
    if list(names) != ["all"]:
        for name in names:
            if name == "all":
                yield "--metrics all stands alone: leave the other names out"
            elif name not in METRICS:
                yield _unknown(name, METRICS, "metric")


def _wrong_quoted(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            published.experiment_named(name)
        except ValueError as error:
            yield f"--quoted: {error}{_folder_hint(name)}"


def _wrong_output(path: str | None) -> Iterator[str]:
    if path is None:
        yield "--output takes a file"
    elif path and Path(path).is_dir():
        yield f"--output {path} is a folder: name a file"


def _write(text: str, path: str | None) -> None:
    """Writes the text to a file, or to standard output; a closed pipe is no error."""
    if path:
        files.write_text(Path(path), text)
        return
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Else Python would report the pipe once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_notes(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


# The table over seeds


def _summary(options: SummaryOptions) -> str:
    groups = _groups(options.folders)
    if not groups:
        raise ResultsError("no run could be used")
    _print_notes(seed_tables.seeds_note(groups))
    selections, metrics = options.selections, options.metric_names
    rows = seed_tables.summarized(groups, selections, metrics)
    known = _quoted(options.quoted, groups)
    if options.format == "csv":
        return as_csv(seed_tables.table_records(rows, known, selections, metrics))
    document = seed_tables.table_document(rows, selections, metrics)
    return rendered([*document, *seed_tables.quoted_document(known)], options.format)


def _groups(folders: Iterable[str]) -> list[Group]:
    """Groups of the runs in some folders; what is left out is reported."""
    runs, problems = stored_runs.read_all([Path(folder) for folder in folders])
    groups, repeated = stored_runs.group(runs)
    _print_notes(problems + repeated)
    return groups


def _quoted(names: Sequence[str] | None, groups: Sequence[Group]) -> list[Quoted]:
    """Published numbers of the named experiments.

    Args:
        names: Names of experiments; empty: those of the groups; None: no numbers.
        groups: Groups of the table.
    """
    if names is None:
        return []
    wanted = {published.experiment_named(name) for name in names} or {
        published.experiment_of(group.settings) for group in groups
    } - {None}
    if not wanted:
        _print_notes(["note: no published numbers are known for the experiments of these runs"])
    places = {experiment: place for place, experiment in enumerate(published.EXPERIMENTS)}
    known = [one for one in published.load() if one.experiment in wanted]
    return sorted(known, key=lambda one: places[one.experiment])


def _comparison(options: SummaryOptions) -> str:
    a, b = _two_groups(options.compare or [], _groups(options.folders))
    metrics = options.metric_names
    found = differences(a, b, options.selections, metrics)
    if not found:
        raise ResultsError(f"A and B have no metric in common of {', '.join(metrics)}")
    _print_notes(_missing_note(found, metrics))
    if options.format == "csv":
        return as_csv([seed_tables.difference_record(a, b, one) for one in found])
    return rendered(seed_tables.difference_document(a, b, found), options.format)


def _two_groups(names: Sequence[str], known: Sequence[Group]) -> tuple[Group, Group]:
    """A and B of `--compare`.

    Args:
        names: Label or folder of each.
        known: The groups that labels may name.

    Raises:
        UsageError: If they are not two different sets of runs.
        ResultsError: If a folder has no run that could be used.
    """
    groups = {group.label: group for group in known}
    problems: list[str] = []
    found = [_one_group(name, groups, problems) for name in names]
    if problems:
        labels = [_choice_of(groups)] if None in found else []
        raise UsageError(f"--compare: {problem}" for problem in [*problems, *labels])
    a, b = (group for group in found if group is not None)
    if {run.folder for run in a.runs} == {run.folder for run in b.runs}:
        raise UsageError(["--compare: A and B are the same runs"])
    return a, b


def _one_group(name: str, groups: dict[str, Group], problems: list[str]) -> Group | None:
    """The group of a label, or the only one of a folder; else None, and a problem is added."""
    if name in groups:
        return groups[name]
    if not Path(name).is_dir():
        problems.append(f"{name} is neither a folder nor a label")
        return None
    own = _groups([name])
    if not own:
        raise ResultsError(f"no run in {name} could be used")
    if len(own) > 1:
        labels = "; ".join(group.label for group in own)
        problems.append(
            f"{name} has runs of {len(own)} configurations: name the folder of one, or give {name} "
            f"as OUTPUT_DIR and one of these labels: {labels}"
        )
        return None
    return replace(own[0], label=f"{own[0].label} in {name}")


def _choice_of(labels: Iterable[str]) -> str:
    shown = "; ".join(labels)
    return f"the labels are {shown}" if shown else "labels are those of the runs in OUTPUT_DIR ..."


def _missing_note(found: Sequence[Difference], metrics: Sequence[str]) -> list[str]:
    missing = [name for name in metrics if name not in {one.metric for one in found}]
    return [f"note: not in both, left out: {', '.join(missing)}"] if missing else []


if __name__ == "__main__":
    sys.exit(main())
