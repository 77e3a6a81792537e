"""Tables over seeds: of configurations, of published numbers, of differences.

Each is either a document to be rendered (see `reports.tables`), or records for a CSV file.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from reports import stored_runs
from reports.metrics import METRIC_NAMES
from reports.published import Quoted
from reports.statistics import Difference
from reports.stored_runs import Group
from reports.tables import Column, Document, Number, Range, rendered

#: Metrics of a table, with their titles.
METRICS = {"accuracy": "accuracy", **METRIC_NAMES}

#: What `accuracy` stands for: the average accuracy or, with one test set, the final accuracy.
ACCURACIES = ("average_accuracy", "final_accuracy")

DEFAULT_METRICS = ("accuracy", "forgetting")

#: Ways of choosing prompts for test images; the one that depends on no other image comes first.
SELECTIONS = {"instance": "instance-wise", "batch": "batch-wise"}


@dataclass(frozen=True)
class Row:
    """The metrics of one group.

    Attributes:
        label: Label of the group.
        seeds: Seeds of its runs.
        numbers: Mean over the seeds by selection and metric; without metrics that no run has.
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


def text_table(groups: Sequence[Group]) -> str:
    """The table that `summarize.py` prints by default.

    Args:
        groups: At least one; each becomes a row.

    Returns:
        Lines that fit the terminal, or else 80 columns, with a line break at the end.
    """
    rows = summarized(groups, list(SELECTIONS), DEFAULT_METRICS)
    return rendered(table_document(rows, list(SELECTIONS), DEFAULT_METRICS), "text")


def seeds_note(groups: Sequence[Group]) -> Iterator[str]:
    """A line if not all groups have the same seeds."""
    labels: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        labels.setdefault(tuple(group.seeds), []).append(group.label)
    if len(labels) > 1:
        lists = [f"{_shown(seeds)}: {_some(names, ', ')}" for seeds, names in labels.items()]
        yield (
            "note: these were not run on the same seeds, which differ in difficulty: "
            f"{_some(lists, '; ')}"
        )


def _some(names: Sequence[str], between: str) -> str:
    """All names, or the first two if there are more than three."""
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return between.join(names[:2] if more else names) + more


def table_document(
    rows: Sequence[Row], selections: Sequence[str], metrics: Sequence[str]
) -> Document:
    """A table to be rendered: a line for each row, a column for each selection and metric."""
    table = [
        Column("", [row.label for row in rows], is_text=True),
        Column("n", [str(len(row.seeds)) for row in rows]),
    ]
    for selection, metric in itertools.product(selections, metrics):
        cells = [row.numbers.get((selection, metric)) for row in rows]
        table.append(Column(METRICS[metric], cells, SELECTIONS[selection]))
    return ["Mean ± sample standard deviation over n seeds, percent.", table]


def table_records(
    rows: Sequence[Row], known: Sequence[Quoted], selections: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The same table for a CSV file: one record for each row, selection and metric."""
    empty = dict.fromkeys(
        ("label", "quoted", "seeds", "n", "selection", "metric", "mean", "sd", "source"), ""
    )
    records: list[dict[str, Any]] = []
    for row, selection, metric in itertools.product(rows, selections, metrics):
        own = {"label": row.label, "quoted": "no", "seeds": _shown(row.seeds), "n": len(row.seeds)}
        own |= {"selection": selection, "metric": metric}
        number = row.numbers.get((selection, metric))
        mean, sd = ("", "") if number is None else (number.mean, number.sd)
        records.append({**empty, **own, "mean": mean, "sd": sd})
    for one in known:
        label = f"{one.experiment}: {one.method}"
        for metric, number in _published(one).items():
            own = {"label": label, "quoted": "yes", "source": one.source, "metric": metric}
            records.append({**empty, **own, "mean": number.mean, "sd": number.sd})
    return records


def quoted_document(known: Sequence[Quoted]) -> Document:
    """Tables of published numbers, one for each experiment."""
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


def _published(one: Quoted) -> dict[str, Number]:
    numbers = {"accuracy": Number(one.accuracy, one.accuracy_sd)}
    if one.forgetting is not None:
        numbers["forgetting"] = Number(one.forgetting, one.forgetting_sd)
    return numbers


def difference_document(a: Group, b: Group, found: Sequence[Difference]) -> Document:
    """B - A: how it was computed, and a table for each selection."""
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
                Column(SELECTIONS[selection], [METRICS[o.metric] for o in ones], is_text=True),
                Column("A", [Number(one.means[0]) for one in ones]),
                Column("B", [Number(one.means[1]) for one in ones]),
                Column("B - A", [Number(one.value) for one in ones]),
                Column("standard error", errors),
                Column("95 % interval", ranges),
                Column("the interval", [one.verdict for one in ones], is_text=True),
            ]
        )
    return document


def difference_record(a: Group, b: Group, one: Difference) -> dict[str, Any]:
    """A difference for a CSV file."""
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


def _method(one: Difference) -> str:
    """A sentence on how a difference and its uncertainty were computed."""
    a, b = one.seeds
    if one.error is None:
        return "No uncertainty from one seed: the difference alone, too little to tell."
    how = "standard error and confidence interval by Student's t, percentage points."
    if one.paired:
        return f"Paired over the seeds {_shown(a)} (n = {len(a)}); {how}"
    return f"Not paired, by Welch (n = {len(a)} and {len(b)}: too few seeds in common); {how}"


def _shown(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))
