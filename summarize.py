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
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli.options import UsageError
from reports import files, published, stored_runs
from reports.metrics import METRIC_NAMES
from reports.published import Quoted
from reports.statistics import Difference, differences
from reports.stored_runs import Group, ResultsError
from reports.tables import Column, Document, Number, Range, as_csv, rendered

#: What may be asked for, with names for people.
METRICS = {"accuracy": "accuracy", **METRIC_NAMES}

#: `accuracy` is the average accuracy or, where there is one test set, the final one.
_ACCURACIES = ("average_accuracy", "final_accuracy")
_DEFAULT_METRICS = ("accuracy", "forgetting")

#: Ways of choosing prompts, the honest one first; `both` are all of them.
_SELECTIONS = {"instance": "instance-wise", "batch": "batch-wise"}

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


def text_table(groups: Sequence[Group]) -> str:
    """The table that the program prints unless told otherwise.

    Args:
        groups: At least one; each becomes a row.

    Returns:
        Lines that fit the terminal, or else 80 columns, with a line break at the end.
    """
    rows = summarized(groups, list(_SELECTIONS), _DEFAULT_METRICS)
    return rendered(_document(rows, list(_SELECTIONS), _DEFAULT_METRICS), "text")


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
        default=list(_DEFAULT_METRICS),
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
    problems += _wrong_choice("--selection", args.selection, ("both", *_SELECTIONS))
    problems += _wrong_compare(args)
    problems += _wrong_metrics(args)
    problems += _wrong_quoted(args)
    problems += _wrong_output(args.output)
    if problems:
        raise UsageError(problems)
    args.selections = list(_SELECTIONS) if args.selection == "both" else [args.selection]
    if args.metrics == ["all"]:
        args.metrics = [name for name in METRICS if name not in _ACCURACIES]
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


@dataclass(frozen=True)
class Row:
    """What is told of one group.

    Attributes:
        label: That of the group.
        seeds: Those of its runs.
        numbers: Mean over the seeds by selection and metric; without what no run has.
    """

    label: str
    seeds: tuple[int, ...]
    numbers: dict[tuple[str, str], Number]


def summarized(
    groups: Sequence[Group], selections: Sequence[str], metrics: Sequence[str]
) -> list[Row]:
    """A row for each group."""
    rows = []
    for group in groups:
        numbers = {
            (selection, metric): Number(*stored_runs.mean_and_sd(values.values()))
            for selection, metric in itertools.product(selections, metrics)
            if (values := group.values(selection, metric))
        }
        rows.append(Row(group.label, tuple(group.seeds), numbers))
    return rows


def _summary(args: argparse.Namespace) -> str:
    groups = _groups(args.folders)
    if not groups:
        raise ResultsError("no run could be used")
    _tell(_seeds_note(groups))
    rows = summarized(groups, args.selections, args.metrics)
    known = _quoted(args.quoted, groups)
    if args.format == "csv":
        return as_csv(_records(rows, known, args.selections, args.metrics))
    document = _document(rows, args.selections, args.metrics)
    return rendered([*document, *_quoted_document(known)], args.format)


def _groups(folders: Iterable[str]) -> list[Group]:
    """Groups of the runs in some folders; what is left out is told."""
    runs, problems = stored_runs.read_all([Path(folder) for folder in folders])
    groups, repeated = stored_runs.group(runs)
    _tell(problems + repeated)
    return groups


def _seeds_note(groups: Sequence[Group]) -> Iterator[str]:
    """A line if not all groups have the same seeds."""
    labels: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        labels.setdefault(tuple(group.seeds), []).append(group.label)
    if len(labels) > 1:
        told = [f"{_shown(seeds)}: {_some(names, ', ')}" for seeds, names in labels.items()]
        yield (
            "note: these were not run on the same seeds, which differ in difficulty: "
            f"{_some(told, '; ')}"
        )


def _some(words: Sequence[str], between: str) -> str:
    """All words, or the first two if there are more than three."""
    more = f" and {len(words) - 2} more" if len(words) > 3 else ""
    return between.join(words[:2] if more else words) + more


def _shown(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


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


def _records(
    rows: Sequence[Row], known: Sequence[Quoted], selections: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The table for programs: one record for each row, selection and metric."""
    empty = dict.fromkeys(
        ("label", "quoted", "seeds", "n", "selection", "metric", "mean", "sd", "source"), ""
    )
    records: list[dict[str, Any]] = []
    for row, selection, metric in itertools.product(rows, selections, metrics):
        own = {"label": row.label, "quoted": "no", "seeds": _shown(row.seeds), "n": len(row.seeds)}
        number = row.numbers.get((selection, metric))
        mean, sd = ("", "") if number is None else (number.mean, number.sd)
        of_what = {"selection": selection, "metric": metric}
        records.append({**empty, **own, **of_what, "mean": mean, "sd": sd})
    for one in known:
        label = f"{one.experiment}: {one.method}"
        for metric, number in _published(one).items():
            own = {"label": label, "quoted": "yes", "source": one.source, "metric": metric}
            records.append({**empty, **own, "mean": number.mean, "sd": number.sd})
    return records


def _published(one: Quoted) -> dict[str, Number]:
    numbers = {"accuracy": Number(one.accuracy, one.accuracy_sd)}
    if one.forgetting is not None:
        numbers["forgetting"] = Number(one.forgetting, one.forgetting_sd)
    return numbers


def _comparison(args: argparse.Namespace) -> str:
    a, b = _two_groups(args)
    found = differences(a, b, args.selections, args.metrics)
    if not found:
        raise ResultsError(f"A and B have no metric in common of {', '.join(args.metrics)}")
    _tell(_missing_note(found, args.metrics))
    if args.format == "csv":
        return as_csv([_difference_record(a, b, one) for one in found])
    return rendered(_difference_document(a, b, found), args.format)


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


def _difference_record(a: Group, b: Group, one: Difference) -> dict[str, Any]:
    low, high = one.interval or (None, None)
    return {
        "a": a.label,
        "b": b.label,
        "selection": one.selection,
        "metric": one.metric,
        "method": "" if one.error is None else "paired" if one.paired else "welch",
        "seeds_a": _shown(one.seeds[0]),
        "seeds_b": _shown(one.seeds[1]),
        "mean_a": one.means[0],
        "mean_b": one.means[1],
        "difference": one.value,
        "standard_error": one.error,
        "low": low,
        "high": high,
        "p": one.p,
        "verdict": one.verdict,
    }


def _document(rows: Sequence[Row], selections: Sequence[str], metrics: Sequence[str]) -> Document:
    table = [
        Column("", [row.label for row in rows], is_text=True),
        Column("n", [str(len(row.seeds)) for row in rows]),
    ]
    for selection, metric in itertools.product(selections, metrics):
        cells = [row.numbers.get((selection, metric)) for row in rows]
        table.append(Column(METRICS[metric], cells, _SELECTIONS[selection]))
    return ["Mean ± sample standard deviation over n seeds, percent.", table]


def _quoted_document(known: Sequence[Quoted]) -> Document:
    document: Document = []
    for experiment, group in itertools.groupby(known, key=lambda one: one.experiment):
        ones = list(group)
        numbers = [_published(one) for one in ones]
        document += [
            f"Quoted, not measured with this program: {experiment}, percent.",
            [
                Column("", [one.method for one in ones], is_text=True),
                Column("accuracy", [own["accuracy"] for own in numbers]),
                Column("forgetting", [own.get("forgetting") for own in numbers]),
                Column("quoted from", [one.source for one in ones], is_text=True),
            ],
        ]
    return document


def _difference_document(a: Group, b: Group, found: Sequence[Difference]) -> Document:
    document: Document = [
        f"A: {a.label} (seeds {_shown(a.seeds)})",
        f"B: {b.label} (seeds {_shown(b.seeds)})",
        *dict.fromkeys(_method(one) for one in found),
    ]
    for selection, group in itertools.groupby(found, key=lambda one: one.selection):
        ones = list(group)
        ranges = [None if one.interval is None else Range(*one.interval) for one in ones]
        errors = [None if one.error is None else Number(one.error) for one in ones]
        document.append(
            [
                Column(_SELECTIONS[selection], [METRICS[o.metric] for o in ones], is_text=True),
                Column("A", [Number(one.means[0]) for one in ones]),
                Column("B", [Number(one.means[1]) for one in ones]),
                Column("B - A", [Number(one.value) for one in ones]),
                Column("standard error", errors),
                Column("95 % interval", ranges),
                Column("the interval", [one.verdict for one in ones], is_text=True),
            ]
        )
    return document


def _method(one: Difference) -> str:
    """How a difference was computed and how sure it is, in a sentence."""
    a, b = one.seeds
    if one.error is None:
        return "No uncertainty from one seed: the difference alone, too little to tell."
    how = "standard error and confidence interval by Student's t, percentage points."
    if one.paired:
        return f"Paired over the seeds {_shown(a)} (n = {len(a)}); {how}"
    return f"Not paired, by Welch (n = {len(a)} and {len(b)}: too few seeds in common); {how}"


if __name__ == "__main__":
    sys.exit(main())
