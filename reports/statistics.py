"""The difference between two configurations, and its significance."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reports.stored_runs import Group

#: Differences below this are rounding errors, percentage points.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """B - A in one metric, percentage points.

    Attributes:
        selection: How prompts were chosen for test images.
        metric: One of `METRICS`.
        seeds: Seeds of the runs of A and of B that are compared.
        means: Means over those of A and of B.
        paired: Whether it is the mean of the differences between runs of the same seed.
        error: Standard error of the difference; None if a side has one run.
        interval: 95 % confidence interval by Student's t; None likewise.
        p: Two-sided p-value of the t-test; None likewise.
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
        """Whether the interval includes zero, in words."""
        if self.interval is None:
            return "too little to tell"
        low, high = self.interval
        return "excludes zero" if low > 0 or high < 0 else "includes zero"


def differences(
    a: Group, b: Group, selections: Sequence[str], metrics: Sequence[str]
) -> list[Difference]:
    """B - A for each selection and metric that both have.

    With two or more seeds in common, a paired t-test over these; else Welch's t-test over all runs
    of both.
    """
    return [
        difference(selection, metric, ours, theirs)
        for selection, metric in itertools.product(selections, metrics)
        if (ours := a.values(selection, metric)) and (theirs := b.values(selection, metric))
    ]


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
    if all(np.ptp(part) < _ROUNDING for part in spread):  # a t-test would divide by zero
        p = 1.0 if abs(found.value) < _ROUNDING else 0.0
        value = 0.0 if p else found.value
        return replace(found, error=0.0, interval=(value, value), p=p)
    with warnings.catch_warnings(action="ignore"):  # scipy warns of a side without variance
        test = stats.ttest_rel(b, a) if found.paired else stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(0.95)
    interval = (float(low), float(high))
    return replace(found, error=error, interval=interval, p=float(test.pvalue))
