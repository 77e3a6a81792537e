"""Tables over seeds: of configurations, of published numbers, of differences and significance.

Each is a data frame that is written as it is (CSV), or with two decimals (text, Markdown, LaTeX).
pandas and tabulate are imported where there is a table: `--help` needs neither.
"""

import itertools
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reports import published
from reports.metrics import METRIC_NAMES
from reports.stored_runs import Group

if TYPE_CHECKING:
    from pandas import DataFrame

#: Metrics of a table, with their titles; accuracy is the average accuracy.
METRICS = {"accuracy": "accuracy", **METRIC_NAMES}

DEFAULT_METRICS = ("accuracy", "forgetting")

#: Ways of choosing prompts for test images; the one that depends on no other image comes first.
SELECTIONS = {"instance": "instance-wise", "batch": "batch-wise"}

FORMATS = ("text", "markdown", "csv", "latex")

#: Columns of a table of differences.
_COLUMNS = {"mean_a": "A", "mean_b": "B", "difference": "B - A",
            "standard_error": "standard error", "interval": "95 % interval",
            "verdict": "the interval"}  # fmt: skip

#: Differences below this are rounding errors, percentage points.
_ROUNDING = 1e-9


def seed_table(
    groups: Sequence[Group],
    selections: Collection[str] = SELECTIONS.keys(),
    metrics: Sequence[str] = DEFAULT_METRICS,
    quoted: Collection[str] = (),
    form: str = "text",
) -> str:
    """Mean and sample standard deviation (sd) over the seeds, a row for each group.

    Args:
        groups: At least one.
        selections: Some of `SELECTIONS`.
        metrics: Some of `METRICS`.
        quoted: Experiments whose published numbers are shown, too.
        form: One of `FORMATS`; CSV has a row for each group, selection and metric.
    """
    import pandas as pd

    keys = ["group", "label", "seeds", "n", "selection", "metric"]
    values = [
        (number, group.label, group.seeds, str(len(group.runs)), *name, run.value(*name))
        for (number, group), *name in itertools.product(enumerate(groups), selections, metrics)
        for run in group.runs
    ]
    frame = pd.DataFrame(values, columns=[*keys, "value"]).astype({"value": float})
    own = frame.groupby(keys, sort=False)["value"].agg(mean="mean", sd="std").reset_index()
    known = pd.DataFrame(published.load()).query("experiment in @quoted")
    if form == "csv":
        label = known["experiment"] + ": " + known["method"]
        both = pd.concat([own.assign(quoted="no"), known.assign(label=label, quoted="yes")])
        columns = ["label", "quoted", "seeds", "n", "selection", "metric", "mean", "sd", "source"]
        return _csv(both[columns])
    named = own.replace({"selection": SELECTIONS, "metric": METRICS})
    table = _by_column(named, ["group", "label", "n"], ["selection", "metric"])
    table = table.droplevel("group").reset_index(col_level="metric")
    document = ["Mean ± sample standard deviation over n seeds, percent.", table]
    for experiment, ones in known.groupby("experiment", sort=False):
        table = _by_column(ones, ["method", "source"], ["metric"]).reset_index()
        table = table.rename(columns={"source": "quoted from"})
        columns = ["method", "accuracy", "forgetting", "quoted from"]
        document.append(f"Quoted, not measured with this program: {experiment}, percent.")
        document.append(table.reindex(columns=columns, fill_value="-"))
    return _rendered(document, form)


def seeds_note(groups: Sequence[Group]) -> Iterator[str]:
    """A line if not all groups have the same seeds."""
    labels = defaultdict(list)
    for group in groups:
        labels[group.seeds].append(group.label)
    if len(labels) > 1:
        lists = [f"{seeds}: {', '.join(names)}" for seeds, names in labels.items()]
        text = textwrap.shorten("; ".join(lists), 200, placeholder=" ...")
        yield f"note: these were not run on the same seeds, which differ in difficulty: {text}"


def differences(
    a: Group, b: Group, selections: Sequence[str], metrics: Sequence[str]
) -> "DataFrame":
    """B - A, see `difference`: a row for each selection and metric that both have."""
    import pandas as pd

    return pd.DataFrame(
        {"a": a.label, "b": b.label, "selection": selection, "metric": metric}
        | difference(ours, theirs)
        for selection, metric in itertools.product(selections, metrics)
        if (ours := a.values(selection, metric)) and (theirs := b.values(selection, metric))
    )


def difference(a: dict[int, float], b: dict[int, float]) -> dict[str, Any]:
    """B - A in one metric, percentage points, from values by seed, at least one each.

    With two or more seeds in common, a paired t-test over these; else Welch's t-test over all.

    Returns:
        `method` (`paired` or `welch`), `seeds_a`, `seeds_b`, `mean_a`, `mean_b`, `difference`,
        `standard_error`, `low` and `high` (95 % confidence interval), `p` (two-sided), and
        `verdict`, in words. Without uncertainty there is no method, and its numbers are
        not-a-number: from one seed, or where no difference varies.
    """
    common = sorted(a.keys() & b.keys())
    is_paired = len(common) > 1 or len(a) == len(b) == len(common)
    seeds_a, seeds_b = (common, common) if is_paired else (sorted(a), sorted(b))
    ours, theirs = np.array([a[s] for s in seeds_a]), np.array([b[s] for s in seeds_b])
    parts = [theirs - ours] if is_paired else [ours, theirs]
    value = float(theirs.mean() - ours.mean())
    error = low = high = p = float("nan")
    method, verdict = "", "cannot be computed"
    # Equal values are chance, not certainty: accuracies are multiples of 1/images.
    has_spread = any(np.ptp(part) > _ROUNDING for part in parts)
    if min(map(len, parts)) > 1 and has_spread:
        method = "paired" if is_paired else "welch"
        error = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))
        low, high, p = _t_test(ours, theirs, is_paired)
        verdict = "excludes zero" if p < 0.05 else "includes zero"
    return {
        "method": method,
        "seeds_a": " ".join(map(str, seeds_a)), "seeds_b": " ".join(map(str, seeds_b)),
        "mean_a": float(ours.mean()), "mean_b": float(theirs.mean()), "difference": value,
        "standard_error": error, "low": low, "high": high, "p": p, "verdict": verdict,
    }  # fmt: skip


def difference_table(found: "DataFrame", form: str) -> str:
    """What `differences` gives, in one of `FORMATS`: how it was computed, and the numbers."""
    if form == "csv":
        return _csv(found)
    document = [
        f"A: {found['a'][0]} (seeds {found['seeds_a'][0]})",
        f"B: {found['b'][0]} (seeds {found['seeds_b'][0]})",
        *dict.fromkeys(map(_method, found["method"], found["seeds_a"], found["seeds_b"])),
    ]
    cells = found.select_dtypes(float).map(_number)
    cells["interval"] = (cells["low"] + " to " + cells["high"]).replace("- to -", "-")
    cells["verdict"] = found["verdict"]
    for selection, ones in cells.groupby(found["selection"], sort=False):
        table = ones[[*_COLUMNS]].rename(columns=_COLUMNS)
        table.insert(0, SELECTIONS[selection], found["metric"].map(METRICS))
        document.append(table)
    return _rendered(document, form)


def _t_test(a: np.ndarray, b: np.ndarray, is_paired: bool) -> tuple[float, float, float]:
    """Ends of the 95 % confidence interval of B - A by Student's t, and the p-value."""
    from scipy import stats

    with warnings.catch_warnings(action="ignore"):  # scipy warns of a side without variance
        test = stats.ttest_rel(b, a) if is_paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)


def _method(method: str, seeds_a: str, seeds_b: str) -> str:
    """A sentence on how a difference and its uncertainty were computed."""
    how = "standard error and confidence interval by Student's t, percentage points."
    num_a, num_b = len(seeds_a.split()), len(seeds_b.split())
    if method == "paired":
        return f"Paired over the seeds {seeds_a} (n = {num_a}); {how}"
    if method == "welch":
        return f"Not paired, by Welch (n = {num_a} and {num_b}: too few seeds in common); {how}"
    few = "one seed" if min(num_a, num_b) < 2 else "differences that do not vary over the seeds"
    return f"No uncertainty can be computed from {few}: the difference alone."


def _by_column(long: "DataFrame", rows: list[str], columns: list[str]) -> "DataFrame":
    """Formatted numbers, in the order of their first occurrence."""
    cells = long.assign(cell=list(map(_number, long["mean"], long["sd"])))
    return cells.pivot_table("cell", rows, columns, aggfunc="first", sort=False).fillna("-")


def _number(mean: float, sd: float = float("nan")) -> str:
    """A number with its standard deviation; not-a-number where there is none."""
    text = "-" if mean != mean else f"{mean:z.2f}"
    return text if sd != sd else f"{text} ± {sd:.2f}"


def _rendered(document: "Iterable[str | DataFrame]", form: str) -> str:
    """Paragraphs and tables as `text`, `markdown` or `latex`, one below the other."""
    escapes: dict[str, Callable[[str], str]] = {"markdown": _markdown, "latex": _latex}
    escape = escapes.get(form, str)
    blocks = [
        escape(part) if isinstance(part, str) else _table(part.map(escape), form)
        for part in document
    ]
    return "\n\n".join(blocks) + "\n"


def _csv(table: "DataFrame") -> str:
    """A table with a `'` in front of text that a spreadsheet would take for a formula."""
    formula = re.compile(r"[=+@-](?!\d+(\.\d+)?$)")
    cells = table.map(lambda c: f"'{c}" if isinstance(c, str) and formula.match(c) else c)
    return cells.to_csv(index=False, lineterminator="\n")


def _table(cells: "DataFrame", form: str) -> str:
    """Labels on the left, all else aligned on the right."""
    if form == "latex":
        options = {"escape": False, "column_format": "l" + "r" * (cells.shape[1] - 1)}
        cells = cells.rename(columns=_latex)
        return cells.to_latex(index=False, multicolumn_format="c", **options).rstrip()
    between, kind = {"text": ("\n", "simple"), "markdown": (", ", "pipe")}[form]
    names = [n if isinstance(n, str) else between.join(filter(None, n[::-1])) for n in cells]
    options = {"disable_numparse": True, "stralign": "right", "colalign": ["left"]}
    return cells.set_axis(names, axis="columns").to_markdown(index=False, tablefmt=kind, **options)


def _markdown(text: str) -> str:
    """Text with Markdown's special characters escaped; underscores inside words are none."""
    return re.sub(r"[\\`*|<~\[\]&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _latex(text: str) -> str:
    """Numbers in math mode; text with LaTeX's special characters escaped, without ligatures."""
    from tabulate import LATEX_ESCAPE_RULES

    if re.fullmatch(r"-?\d+\.\d+( (±|to) -?\d+\.\d+)?", text):
        return "$" + text.replace("±", r"\pm").replace(" to ", "$ to $") + "$"
    if text == "-":
        return "--"
    special = {**LATEX_ESCAPE_RULES, "±": r"$\pm$", "|": r"\textbar{}"}
    start = "{}" * text.startswith(("[", "*"))  # else read as an option of the \\ before it
    return start + "".join(special.get(c, c) for c in text).replace("--", "-{}-")
