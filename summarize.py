"""Tables over seeds from finished runs, and differences between two configurations.

    python summarize.py OUTPUT_DIR ... [--flags]
    python summarize.py [OUTPUT_DIR ...] --compare A B [--flags]

OUTPUT_DIR is a run or a folder with runs somewhere below it. Runs that differ in nothing but the
seed make one row: mean and sample standard deviation over the seeds. What cannot be used is named
on standard error. Nothing here needs torch.

Exit code: 0 done, 1 no run could be used (or the file not written), 2 refused command line.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cli.options import UsageError
from reports import files, published, seed_tables, stored_runs
from reports.published import Quoted
from reports.seed_tables import ACCURACIES, DEFAULT_METRICS, METRICS, SELECTIONS
from reports.statistics import Difference, differences
from reports.stored_runs import Group, ResultsError
from reports.tables import as_csv, rendered

_FORMATS = ("text", "markdown", "csv", "latex")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        args = _read(sys.argv[1:] if argv is None else argv)
        text = _comparison(args) if args.compare else _summary(args)
        _deliver(text, args.output)
    except UsageError as error:
        print(error.told_by("summarize.py"), end="", file=sys.stderr)
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
    add("--format", nargs="?", default="text", help=f"{', '.join(_FORMATS)} (default: text)")
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


def _read(argv: list[str]) -> argparse.Namespace:
    """The command line with names checked and resolved.

    Raises:
        UsageError: With all that is wrong.
    """
    parser = _parser()
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError([str(error).removeprefix("argument ")]) from error
    if args.compare is not None:
        args.compare, behind = args.compare[:2], args.compare[2:]
        args.folders += behind
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = [_unknown(token.split("=")[0], flags, "option") for token in unknown]
    problems += _wrong_choice("--format", args.format, _FORMATS)
    problems += _wrong_choice("--selection", args.selection, ("both", *SELECTIONS))
    problems += _wrong_compare(args)
    problems += _wrong_metrics(args)
    problems += _wrong_quoted(args)
    problems += _wrong_output(args.output)
    if problems:
        raise UsageError(problems)
    args.selections = list(SELECTIONS) if args.selection == "both" else [args.selection]
    if args.metrics == ["all"]:
        args.metrics = [name for name in METRICS if name not in ACCURACIES]
    args.metrics = list(dict.fromkeys(args.metrics))
    return args


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    return f"{name} is no {kind}: {hint}{_folder_hint(name)}"


def _folder_hint(name: str) -> str:
    return f" (folders with runs go first: {name} ...)" if Path(name).is_dir() else ""


def _wrong_choice(flag: str, value: str | None, allowed: Sequence[str]) -> Iterator[str]:
    if value not in allowed:
        given = flag if value is None else f"{flag} {value}"
        yield f"{given}: choose one of {', '.join(allowed)}"


def _wrong_compare(args: argparse.Namespace) -> Iterator[str]:
    if args.compare is None:
        if not args.folders:
            yield "there is nothing to summarize: name at least one OUTPUT_DIR"
        return
    if len(args.compare) < 2:
        yield "--compare takes two labels or folders: --compare A B shows B - A"
    if args.quoted is not None:
        yield "--quoted belongs to the table, which --compare does not show: leave one of them out"


def _wrong_metrics(args: argparse.Namespace) -> Iterator[str]:
    if not args.metrics:
        yield "--metrics takes at least one name: all, or some of " + ", ".join(METRICS)
    if args.metrics != ["all"]:
        for name in args.metrics:
            if name == "all":
                yield "--metrics all stands alone: leave the other names out"
            elif name not in METRICS:
                yield _unknown(name, METRICS, "metric")


def _wrong_quoted(args: argparse.Namespace) -> Iterator[str]:
    for name in args.quoted or []:
        try:
            published.experiment_named(name)
        except ValueError as error:
            yield f"--quoted: {error}{_folder_hint(name)}"


def _wrong_output(path: str | None) -> Iterator[str]:
    if path is None:
        yield "--output takes a file"
    elif path and Path(path).is_dir():
        yield f"--output {path} is a folder: name a file"


def _deliver(text: str, path: str) -> None:
    """Writes the text to a file, or to standard output, whose reader may have gone."""
    if path:
        files.write_text(Path(path), text)
        return
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


# The table over seeds


def _summary(args: argparse.Namespace) -> str:
    groups = _groups(args.folders)
    if not groups:
        raise ResultsError("no run could be used")
    _tell(seed_tables.seeds_note(groups))
    rows = seed_tables.summarized(groups, args.selections, args.metrics)
    known = _quoted(args.quoted, groups)
    if args.format == "csv":
        return as_csv(seed_tables.table_records(rows, known, args.selections, args.metrics))
    document = seed_tables.table_document(rows, args.selections, args.metrics)
    return rendered([*document, *seed_tables.quoted_document(known)], args.format)


def _groups(folders: Iterable[str]) -> list[Group]:
    """Groups of the runs in some folders; what is left out is told."""
    runs, problems = stored_runs.read_all([Path(folder) for folder in folders])
    groups, repeated = stored_runs.group(runs)
    _tell(problems + repeated)
    return groups


def _quoted(names: list[str] | None, groups: Sequence[Group]) -> list[Quoted]:
    """What was published about the named experiments; without names, about those of the groups."""
    if names is None:
        return []
    wanted = {published.experiment_named(name) for name in names} or {
        published.experiment_of(group.settings) for group in groups
    } - {None}
    if not wanted:
        _tell(["note: no published numbers are known for the experiments of these runs"])
    places = {experiment: place for place, experiment in enumerate(published.EXPERIMENTS)}
    known = [one for one in published.load() if one.experiment in wanted]
    return sorted(known, key=lambda one: places[one.experiment])


def _comparison(args: argparse.Namespace) -> str:
    a, b = _two_groups(args)
    found = differences(a, b, args.selections, args.metrics)
    if not found:
        raise ResultsError(f"A and B have no metric in common of {', '.join(args.metrics)}")
    _tell(_missing_note(found, args.metrics))
    if args.format == "csv":
        return as_csv([seed_tables.difference_record(a, b, one) for one in found])
    return rendered(seed_tables.difference_document(a, b, found), args.format)


def _two_groups(args: argparse.Namespace) -> tuple[Group, Group]:
    """A and B of `--compare`.

    Raises:
        UsageError: If they are not two different sets of runs.
        ResultsError: If a folder has no run that could be used.
    """
    groups = {group.label: group for group in _groups(args.folders)}
    problems: list[str] = []
    found = [_one_group(name, groups, problems) for name in args.compare]
    if problems:
        labels = [_choice_of(groups)] if None in found else []
        raise UsageError(f"--compare: {problem}" for problem in [*problems, *labels])
    a, b = (group for group in found if group is not None)
    if {run.folder for run in a.runs} == {run.folder for run in b.runs}:
        raise UsageError(["--compare: A and B are the same runs"])
    return a, b


def _one_group(name: str, groups: dict[str, Group], problems: list[str]) -> Group | None:
    """The group of a label, or the only one of a folder; else None, and the reason is noted."""
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
