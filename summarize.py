"""Tables over seeds from finished runs, and differences between two configurations.

    python summarize.py OUTPUT_DIR ... [--flags]
    python summarize.py [OUTPUT_DIR ...] --compare A B [--flags]

OUTPUT_DIR is a run or a folder with runs somewhere below it. Runs that differ in nothing but the
seed make one row: mean and sample standard deviation over the seeds. What cannot be used is named
on standard error. Nothing here needs torch.

Exit code: 0 done, 1 no run could be used (or the file not written), 2 refused command line.
"""

import argparse
import csv
import difflib
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import files
import quoted
import stored_runs
from options import UsageError
from quoted import Quoted
from stored_runs import Group, ResultsError

#: What may be asked for: the names of `metrics.summarize` and `accuracy`, with names for people.
METRICS = {
    "accuracy": "accuracy",
    "average_accuracy": "average accuracy",
    "final_accuracy": "final accuracy",
    "forgetting": "forgetting",
    "forgetting_literature": "forgetting (literature)",
    "backward_transfer": "backward transfer",
    "learning_accuracy": "learning accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
}

#: `accuracy` is the average accuracy or, where there is one test set, the final one.
_ACCURACIES = ("average_accuracy", "final_accuracy")
_DEFAULT_METRICS = ("accuracy", "forgetting")

#: Ways of choosing prompts, the honest one first; `both` are all of them.
_SELECTIONS = {"instance": "instance-wise", "batch": "batch-wise"}

_FORMATS = ("text", "markdown", "csv", "latex")

#: Columns of a terminal, and of the label of a row that shares them with many numbers.
_WIDTH = 80
_LABEL_WIDTH = 21

#: Differences in percentage points that are rounding.
_ROUNDING = 1e-9


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
    """The table that the program prints unless told otherwise: a row for each group."""
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
        f"{', '.join(quoted.EXPERIMENTS.values())}",
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
    args.folders += args.compare[2:]
    args.compare = args.compare[:2]
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
    names = []
    for name in args.quoted or []:
        try:
            names.append(quoted.experiment_named(name))
        except ValueError as error:
            yield f"--quoted: {error}{_folder_hint(name)}"
    if args.quoted:
        args.quoted = list(dict.fromkeys(names))


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


# The table over seeds: numbers


@dataclass(frozen=True)
class Number:
    """A mean, and the standard deviation behind it if there is one."""

    mean: float
    sd: float | None = None


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
        values = {s: values_by_seed(group, s, metrics) for s in selections}
        numbers = {
            (selection, metric): Number(
                *stored_runs.mean_and_sd(values[selection][metric].values())
            )
            for selection in selections
            for metric in metrics
            if values[selection][metric]
        }
        rows.append(Row(group.label, tuple(group.seeds), numbers))
    return rows


def values_by_seed(
    group: Group, selection: str, metrics: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Value of each metric by seed; without the runs that do not have it."""
    numbers = {run.seed: run.numbers(selection) for run in group.runs}
    keys = {name: "average_accuracy" if name == "accuracy" else name for name in metrics}
    return {
        name: {s: own[key] for s, own in numbers.items() if own.get(key) is not None}
        for name, key in keys.items()
    }


def _summary(args: argparse.Namespace) -> str:
    groups = _groups(args.folders)
    if not groups:
        raise ResultsError("no run could be used")
    _tell(_seeds_note(groups))
    rows = summarized(groups, args.selections, args.metrics)
    known = _quoted(args.quoted, groups)
    if args.format == "csv":
        return _csv(_records(rows, known, args.selections, args.metrics))
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
        told = "; ".join(f"{_shown(seeds)}: {_some(names)}" for seeds, names in labels.items())
        yield f"note: these were not run on the same seeds, which differ in difficulty: {told}"


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 2} more" if len(labels) > 3 else ""
    return ", ".join(labels[:2] if more else labels) + more


def _shown(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


def _quoted(names: list[str] | None, groups: Sequence[Group]) -> list[Quoted]:
    """What was published about the named experiments; without names, about those of the groups."""
    if names is None:
        return []
    wanted = names or {quoted.experiment_of(group.settings) for group in groups} - {None}
    if not wanted:
        _tell(["note: no published numbers are known for the experiments of these runs"])
    return [one for one in quoted.load() if one.experiment in wanted]


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


# The difference between two configurations: numbers


@dataclass(frozen=True)
class Difference:
    """B - A in one metric, percentage points.

    Attributes:
        selection: How test images chose prompts.
        metric: One of `METRICS`.
        seeds: Seeds of A's and of B's runs that count.
        means: Over those of A and of B.
        paired: Whether the runs of a seed were compared with each other.
        error: Standard error of the difference; None if there is too little to tell.
        interval: 95 % confidence interval by Student's t; None likewise.
        p: Two-sided probability of such a difference if there is none; None likewise.
    """

    selection: str
    metric: str
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    means: tuple[float, float]
    paired: bool
    error: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def value(self) -> float:
        """The difference."""
        return self.means[1] - self.means[0]

    @property
    def verdict(self) -> str:
        """What the interval says about zero, in words."""
        if self.interval is None:
            return "too little to tell"
        low, high = self.interval
        return "excludes zero" if low > 0 or high < 0 else "includes zero"


def differences(
    a: Group, b: Group, selections: Sequence[str], metrics: Sequence[str]
) -> list[Difference]:
    """B - A for each selection and metric that both have.

    Paired over the seeds that both have if there are two or more of them; else by Welch, from all
    runs of both.
    """
    found = []
    for selection in selections:
        ours, theirs = (values_by_seed(group, selection, metrics) for group in (a, b))
        found += [
            difference(selection, metric, ours[metric], theirs[metric])
            for metric in metrics
            if ours[metric] and theirs[metric]
        ]
    return found


def difference(selection: str, metric: str, a: dict[int, float], b: dict[int, float]) -> Difference:
    """B - A from values by seed, at least one each."""
    common = sorted(a.keys() & b.keys())
    paired = len(common) > 1 or len(a) == len(b) == len(common) == 1
    seeds = (tuple(common), tuple(common)) if paired else (tuple(sorted(a)), tuple(sorted(b)))
    values = (np.array([a[seed] for seed in seeds[0]]), np.array([b[seed] for seed in seeds[1]]))
    means = (float(values[0].mean()), float(values[1].mean()))
    found = Difference(selection, metric, seeds, means, paired)
    if min(map(len, seeds)) < 2:
        return found
    return _with_uncertainty(found, *values)


def _with_uncertainty(found: Difference, a: np.ndarray, b: np.ndarray) -> Difference:
    from scipy import stats

    spread = [b - a] if found.paired else [a, b]
    error = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in spread)))
    if all(np.ptp(part) < _ROUNDING for part in spread):  # the tests would divide by zero
        p = 1.0 if abs(found.value) < _ROUNDING else 0.0
        value = 0.0 if p else found.value
        return replace(found, error=0.0, interval=(value, value), p=p)
    with np.errstate(all="ignore"):
        test = stats.ttest_rel(b, a) if found.paired else stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(0.95)
    interval = (float(low), float(high))
    return replace(found, error=error, interval=interval, p=float(test.pvalue))


def _comparison(args: argparse.Namespace) -> str:
    a, b = _two_groups(args)
    found = differences(a, b, args.selections, args.metrics)
    if not found:
        raise ResultsError(f"A and B have no metric in common of {', '.join(args.metrics)}")
    _tell(_missing_note(found, args.metrics))
    if args.format == "csv":
        return _csv([_difference_record(a, b, one) for one in found])
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
        raise UsageError(f"--compare: {problem}" for problem in problems)
    a, b = (group for group in found if group is not None)
    if {run.folder for run in a.runs} == {run.folder for run in b.runs}:
        raise UsageError(["--compare: A and B are the same runs"])
    return a, b


def _one_group(name: str, groups: dict[str, Group], problems: list[str]) -> Group | None:
    """The group of a label, or the only one of a folder; else None, and the reason is noted."""
    if name in groups:
        return groups[name]
    if not Path(name).is_dir():
        problems.append(f"{name} is neither a folder nor a label: {_choice_of(groups)}")
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


# From numbers to tables


@dataclass(frozen=True)
class Range:
    """From one number to another."""

    low: float
    high: float


Cell = str | Number | Range | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its name.
        cells: Text, numbers, or None where there is nothing.
        over: What stands above several columns.
        is_text: Whether the cells are words, which are set on the left.
    """

    heading: str
    cells: Sequence[Cell]
    over: str = ""
    is_text: bool = False


#: Columns of equal length; the first one says what the rows are.
Table = list[Column]

#: Paragraphs and tables, one below the other.
Document = list[str | Table]


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


# From tables to text


def rendered(document: Document, form: str) -> str:
    """The document as `text`, `markdown` or `latex`, with a line break at its end."""
    table, paragraph = {
        "text": (_text, _wrapped),
        "markdown": (_markdown, _escaped_markdown),
        "latex": (_latex, _escaped_latex),
    }[form]
    blocks = [paragraph(part) if isinstance(part, str) else table(part) for part in document]
    text = blocks[0]
    for (one, other), block in zip(itertools.pairwise(document), blocks[1:], strict=True):
        are_lines = form == "text" and isinstance(one, str) and isinstance(other, str)
        text += ("\n" if are_lines else "\n\n") + block
    return text + "\n"


def _plain(cell: Cell) -> str:
    """A cell as people write it; hundredths are told."""
    match cell:
        case Number(mean, None):
            return f"{mean:z.2f}"
        case Number(mean, sd):
            return f"{mean:z.2f} ± {sd:.2f}"
        case Range(low, high):
            return f"{low:z.2f} to {high:z.2f}"
    return cell or "-"


def _csv(records: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _text(table: Table) -> str:
    """Aligned columns; what is too wide for a terminal goes into further blocks of rows."""
    labels, *columns = table
    laid = [_laid_out(column) for column in columns]
    room = _WIDTH - sum(column.width for column in laid)
    names = [_folded(_plain(cell), max(room, _LABEL_WIDTH), "  ") for cell in labels.cells]
    width = max(len(line) for lines in [[labels.heading], *names] for line in lines)
    blocks = _side_by_side(laid, _WIDTH - width)
    return "\n\n".join(_block(labels.heading, names, width, block) for block in blocks)


@dataclass(frozen=True)
class _LaidOut:
    """A column as lines of equal width, the space on its left included."""

    over: str
    head: list[str]
    body: list[str]

    @property
    def width(self) -> int:
        return len(self.body[0])


def _laid_out(column: Column) -> _LaidOut:
    body = [_plain(cell) for cell in column.cells]
    if any(isinstance(cell, Number) and cell.sd is not None for cell in column.cells):
        body = _in_line(column.cells)
    head = _folded(column.heading, max(12, *map(len, body)))
    width = max(map(len, [*head, *body, 12 * " " if column.over else ""]))
    sign = "<" if column.is_text else ">"
    lines = [f"  {line:{sign}{width}}" for line in [*head, *body]]
    return _LaidOut(column.over, lines[: len(head)], lines[len(head) :])


def _in_line(cells: Sequence[Cell]) -> list[str]:
    """Numbers with room behind those that have no spread, so that all means are in line."""
    pairs = [_plain(cell).partition(" ± ") for cell in cells]
    width = max(len(spread) for _, _, spread in pairs)
    return [f"{mean}{sign or '   '}{spread:>{width}}" for mean, sign, spread in pairs]


def _folded(text: str, width: int, indent: str = "") -> list[str]:
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return lines or [""]


def _side_by_side(columns: Sequence[_LaidOut], room: int) -> list[list[_LaidOut]]:
    """The columns in blocks that fit, each of at least one; what stands over them divides them."""
    if sum(column.width for column in columns) <= room:
        return [list(columns)]
    blocks: list[list[_LaidOut]] = [[]]
    for column in columns:
        width = sum(other.width for other in blocks[-1])
        belongs = not blocks[-1] or blocks[-1][-1].over in ("", column.over)
        if blocks[-1] and (width + column.width > room or not belongs):
            blocks.append([])
        blocks[-1].append(column)
    return blocks


def _block(heading: str, names: list[list[str]], width: int, columns: Sequence[_LaidOut]) -> str:
    lines = []
    if any(column.over for column in columns):
        runs = itertools.groupby(columns, key=lambda column: column.over)
        over = "".join(f"{name:^{sum(column.width for column in run)}}" for name, run in runs)
        lines.append(" " * width + over)
    depth = max(len(column.head) for column in columns)
    for level in range(depth):
        parts = [_line_of(column.head, level - depth + len(column.head)) for column in columns]
        parts = [part or " " * column.width for part, column in zip(parts, columns, strict=True)]
        lines.append(f"{heading if level == depth - 1 else '':{width}}" + "".join(parts))
    for number, name in enumerate(names):
        cells = "".join(column.body[number] for column in columns)
        lines += [f"{name[0]:{width}}{cells}", *name[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _line_of(lines: Sequence[str], number: int) -> str:
    return lines[number] if number >= 0 else ""


def _markdown(table: Table) -> str:
    headings = [", ".join(filter(None, (c.heading, c.over))) for c in table]
    lines = [headings, ["---" if column.is_text else "---:" for column in table]]
    lines += [
        [_escaped_markdown(_plain(cell)) for cell in row]
        for row in zip(*(column.cells for column in table), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped_markdown(text: str) -> str:
    """Text in which no character means anything but itself; inside words, underscores do not."""
    return re.sub(r"[\\`*|<~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _latex(table: Table) -> str:
    """A tabular in the style of booktabs."""
    kinds = "".join("l" if column.is_text else "r" for column in table)
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule"]
    if any(column.over for column in table):
        lines += _latex_over(table)
    lines += [_latex_row(column.heading for column in table), r"\midrule"]
    lines += map(_latex_row, zip(*(column.cells for column in table), strict=True))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_over(table: Table) -> Iterator[str]:
    """What stands above several columns, and the rules below it."""
    names, rules, first = [], [], 1
    for over, run in itertools.groupby(table, key=lambda column: column.over):
        last = first + len(list(run)) - 1
        names.append(rf"\multicolumn{{{last - first + 1}}}{{c}}{{{_escaped_latex(over)}}}")
        if over:
            rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
        first = last + 1
    yield rf"{' & '.join(names)} \\"
    yield " ".join(rules)


def _latex_row(cells: Iterable[Cell]) -> str:
    return rf"{' & '.join(map(_latex_cell, cells))} \\"


def _latex_cell(cell: Cell) -> str:
    match cell:
        case Number(mean, None):
            return f"${mean:z.2f}$"
        case Number(mean, sd):
            return rf"${mean:z.2f} \pm {sd:.2f}$"
        case Range(low, high):
            return f"${low:z.2f}$ to ${high:z.2f}$"
        case None:
            return "--"
    return _escaped_latex(cell)


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}  # fmt: skip


def _escaped_latex(text: str) -> str:
    """Text in which no character means anything but itself; two hyphens stay two."""
    return "".join(_LATEX.get(c, c) for c in text).replace("--", "-{}-")


if __name__ == "__main__":
    sys.exit(main())
