"""Figures that compare several configurations, each with its runs over seeds.

| function | shows |
|---|---|
| `average_accuracy` | the average accuracy over the tasks |
| `accuracy_against` | the final average accuracy against a setting |

`groups` come from `stored_runs.group`. Each function raises `NothingToDrawError` if the runs lack
what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.parser import shown
from reports import stored_runs
from reports.figure_style import (
    PAGE_WIDTH,
    PALETTE,
    TITLES,
    NothingToDrawError,
    accuracy_over_tasks,
    label_tasks_learned,
    limit_accuracy,
    new_figure,
    shortened,
    styled,
)
from reports.metrics import SELECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from reports.stored_runs import Group

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "////", "....", "xxxx", "----")


@styled
def average_accuracy(groups: Sequence[Group]) -> Figure:
    """The average accuracy over the tasks of several configurations.

    Mean over the seeds, in a band of one sample standard deviation. A configuration that learns all
    tasks at once is a horizontal line among others that do not.

    Args:
        groups: Finished runs by configuration.

    Raises:
        NothingToDrawError: If there is no group.
    """
    if not groups:
        raise NothingToDrawError("there are no finished runs to compare")
    num_columns = max(group.runs[0].matrices["batch"].shape[1] for group in groups)
    labels = [f"{shortened(group.label, 90)} (n = {len(group.runs)})" for group in groups]
    columns = _legend_columns(labels)
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(PAGE_WIDTH, 3.5 + 0.18 * lines)
    panels = figure.subplots(1, 2, sharey=True)
    lowest = []
    for axes, name in zip(panels, SELECTIONS, strict=True):
        for number, (group, label) in enumerate(zip(groups, labels, strict=True)):
            style = {**_style(number), "label": label}
            if num_columns == 1:
                _draw_group_bar(axes, group, name, number, style)
            else:
                lowest.append(_draw_group(axes, group, name, num_columns, style))
        axes.set_title(TITLES[name].capitalize())
        label_tasks_learned(axes, num_columns, 3.8)
    if num_columns > 1:
        limit_accuracy(panels[0], min(lowest), 90)
    else:
        panels[0].set(ylim=(0, 110), yticks=range(0, 101, 20))
        for axes in panels:
            axes.set(xticks=[], xlabel="all tasks learned at once", xlim=(-0.8, len(groups) - 0.2))
    panels[0].set_ylabel("average accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


@styled
def accuracy_against(groups: Sequence[Group], setting: str, lines: str | None = None) -> Figure:
    """The final average accuracy against the value of a setting.

    Mean over the seeds, with bars of one sample standard deviation.

    Args:
        groups: Finished runs by configuration.
        setting: Name of the setting on the x axis.
        lines: Name of another setting, whose values get a line each.

    Raises:
        NothingToDrawError: If the groups do not have two values of a setting, or differ in others.
    """
    families = _families(groups, setting, lines)
    values = _sorted_values([group.settings.get(setting) for group in groups])
    is_numeric = all(map(_is_number, values))
    places = {shown(v): float(v) if is_numeric else i for i, v in enumerate(values)}
    labels = {
        value: f"{lines} {value} ({_count(members)})" if lines else _count(members)
        for value, members in families.items()
    }
    columns = _legend_columns(list(labels.values()))
    figure = new_figure(PAGE_WIDTH, 3.3 + 0.18 * math.ceil(len(families) / columns))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, SELECTIONS, strict=True):
        for number, (value, members) in enumerate(families.items()):
            at = [places[shown(group.settings.get(setting))] for group in members]
            _draw_final(axes, at, members, name, label=labels[value], **_style(number))
        axes.set_title(TITLES[name].capitalize())
        axes.set_xlabel(setting)
        axes.grid(axis="y")
        _tick_values(axes, values, list(places.values()), is_numeric)
    panels[0].set_ylabel("final average accuracy (%)")
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles, list(labels.values()), loc="outside lower center", ncols=columns)
    return figure


def check_against(groups: Sequence[Group], setting: str, lines: str | None = None) -> None:
    """Checks that `accuracy_against` can draw some groups.

    Raises:
        NothingToDrawError: As `accuracy_against` does.
    """
    _families(groups, setting, lines)


def _draw_group(
    axes: Axes, group: Group, name: str, num_columns: int, style: dict[str, Any]
) -> float:
    """Draws mean and band of a configuration over the tasks; returns the lowest accuracy drawn."""
    matrices = [run.matrices[name] for run in group.runs]
    tasks, _ = accuracy_over_tasks(matrices[0])
    # One row for each seed, one column for each evaluated task.
    averages = np.stack([accuracy_over_tasks(matrix)[1] for matrix in matrices])
    mean = averages.mean(axis=0)
    if len(tasks) == 1 and matrices[0].shape[1] == 1 < num_columns:
        tasks, mean, averages = [1, num_columns], mean.repeat(2), averages.repeat(2, axis=1)
    every = max(1, len(tasks) // 15)
    axes.plot(tasks, mean, markersize=5, markevery=every, **style)
    if len(averages) == 1:
        return float(mean.min())
    sd = averages.std(axis=0, ddof=1)
    if len(tasks) == 1:
        axes.errorbar(tasks, mean, sd, color=style["color"], capsize=3)
    else:
        band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(tasks, mean - sd, mean + sd, **band)
    return float((mean - sd).min())


def _draw_group_bar(
    axes: Axes, group: Group, name: str, number: int, style: dict[str, Any]
) -> None:
    """Mean and standard deviation of a configuration that learns all tasks at once."""
    mean, sd = stored_runs.mean_and_sd(group.values(name, "average_accuracy").values())
    bar = {"color": style["color"], "hatch": _HATCHES[number % len(_HATCHES)], "edgecolor": "white"}
    axes.bar(number, mean, width=0.7, yerr=sd, capsize=3, label=style["label"], **bar)
    axes.text(number, mean + (sd or 0) + 2, f"{mean:.1f}", ha="center")


def _draw_final(
    axes: Axes, at: Sequence[float], members: Sequence[Group], name: str, **style: Any
) -> None:
    """Mean and standard deviation of configurations at their places on the x axis."""
    numbers = [
        stored_runs.mean_and_sd(group.values(name, "average_accuracy").values())
        for group in members
    ]
    order = np.argsort(at, kind="stable")
    mean = np.array([mean for mean, _ in numbers])[order]
    sd = np.array([np.nan if sd is None else sd for _, sd in numbers])[order]
    axes.errorbar(np.array(at)[order], mean, sd, capsize=2.5, elinewidth=0.8, markersize=5, **style)


def _families(
    groups: Sequence[Group], setting: str, lines: str | None
) -> dict[str | None, list[Group]]:
    """The groups by their value of `lines`; in each list, values of `setting` are unique."""
    for name in filter(None, (setting, lines)):
        values = {shown(group.settings.get(name)) for group in groups}
        if len(values) < 2:
            found = f"all have {values.pop()}" if values else "there are none"
            raise NothingToDrawError(
                f"{name} needs at least two values among the finished runs: {found}"
            )
    families: dict[str | None, dict[str, Group]] = {}
    for value in _sorted_values([group.settings.get(lines) for group in groups]) if lines else []:
        families[shown(value)] = {}
    for group in groups:
        family = families.setdefault(shown(group.settings.get(lines)) if lines else None, {})
        value = shown(group.settings.get(setting))
        twin = family.setdefault(value, group)
        if twin is not group:
            differ = stored_runs.differing([twin.settings, group.settings])
            raise NothingToDrawError(
                f"several configurations have {setting} {value}: they differ in "
                f"{', '.join(differ)}; name runs that differ in {setting} alone, or give --lines"
            )
    return {value: list(family.values()) for value, family in families.items()}


def _sorted_values(values: Sequence[Any]) -> list[Any]:
    """Each value once: first those that are no numbers, in their order, then numbers, ascending."""
    once = list({shown(value): value for value in values}.values())
    numbers = sorted(value for value in once if _is_number(value))
    return [value for value in once if not _is_number(value)] + numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(members: Sequence[Group]) -> str:
    numbers = sorted({len(group.runs) for group in members})
    return "n = " + " to ".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))


def _tick_values(
    axes: Axes, values: Sequence[Any], places: Sequence[float], is_numeric: bool
) -> None:
    """Puts a tick at each value of the x axis, and nowhere else."""
    if is_numeric and min(places) > 0 and max(places) > 20 * min(places):
        axes.set_xscale("log")
    axes.set_xticks(places, [shown(value) for value in values])
    axes.minorticks_off()
    axes.margins(x=0.06)


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(4, len(labels), 150 // (max(map(len, labels)) + 9)))


def _style(number: int) -> dict[str, Any]:
    """Colour, marker and line style of the n-th configuration; they repeat after 56."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
    }
