"""Finds stored runs, reads their results, and groups them by configuration.

A run is a folder with a results.json. Runs whose settings are equal but for the seed form a group;
settings of where and how fast a run is computed (roles `place` and `compute`) are not compared.
What cannot be used (damaged, unfinished, the same seed twice) is left out and reported.

The key of a configuration is written by hand: equal experiments may be written in several ways
(`--lr` and `--batch_size` that give one learning rate, aliases of a data set), and different ones
in the same way (an edited configuration, other weights or images under the same name).
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.parser import command_words, shown
from cli.settings import Settings, names_of
from reports import metrics

#: Names of folders in or beside those of runs; those below a run are not searched for runs.
NO_RUNS = ("previous", "checkpoint", "plots", "comparison", "tensorboard", "wandb")

_DEFAULTS = Settings().stored()

#: Settings in which runs of one configuration may differ.
_NOT_CONFIGURATION = frozenset(names_of("command", "compute", "place"))

#: Settings from which learning rate and images of a step follow.
_RATE = ("batch_size", "lr", "lr_scale")

#: Settings in whose place the key has what follows from them.
_COMPARED_OTHERWISE = {*_RATE, "dataset", "num_tasks", "class_order", "file_lists"}


class ResultsError(ValueError):
    """Results that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class StoredRun:
    """The part of a finished run that tables and figures need."""

    folder: Path
    written: float  # when its results were written, seconds since the epoch
    seed: int
    name: str  # configurations and flags as on a command line, without seed and places
    key: str  # equal for runs of the same configuration only
    digest: str | None  # of its training images; None: early versions did not store it
    settings: dict[str, Any]  # without those that are no part of a configuration
    matrices: dict[str, metrics.Matrix]  # accuracy by selection, percent

    @property
    def num_tasks(self) -> int:
        """How many tasks it learned."""
        return self.matrices["batch"].shape[1]

    def value(self, selection: str, metric: str) -> float | None:
        """A metric of `METRIC_NAMES` (or `accuracy`, the average) after the last task, percent."""
        name = "average_accuracy" if metric == "accuracy" else metric
        return metrics.summarize(self.matrices[selection], self.num_tasks - 1).get(name)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, one for each seed, in the order of seeds."""

    label: str  # short name of the configuration, unique among the groups
    settings: dict[str, Any]  # that the runs have in common
    runs: tuple[StoredRun, ...]  # at least one

    @property
    def seeds(self) -> str:
        """Seeds of the runs, ascending, for people."""
        return " ".join(str(run.seed) for run in self.runs)

    def shown(self, setting: str) -> str:
        """The value of a setting as on a command line."""
        return shown(self.settings.get(setting))

    def values(self, selection: str, metric: str) -> dict[int, float]:
        """`StoredRun.value` by seed; without runs where it is undefined."""
        found = {run.seed: run.value(selection, metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}


def find_groups(paths: Iterable[Path]) -> tuple[list[Path], list[Group], list[str]]:
    """Finds the runs in folders of runs, folders somewhere above them, or results.json files.

    Returns:
        The folders of runs with results, each once, sorted within each path; the finished runs in
        groups, see `group`; and one line for each path or run that is left out, with the reason.
    """
    found: dict[Path, Path] = {}
    runs, problems = [], []
    for path in map(folder_of, paths):
        folders = list(_walk(path))
        if not folders:
            why = "holds no results.json, nor does any folder below it"
            problems.append(f"{path}: {why if path.is_dir() else 'there is no such folder'}")
        for folder in folders:
            if (folder / "results.json").exists():
                found.setdefault(folder.resolve(), folder)
            else:
                why = "has no results.json yet, its first task is not finished"
                problems.append(f"{folder}: {why}")
    for folder in found.values():
        try:
            runs.append(read(folder))
        except ResultsError as error:
            problems.append(str(error))
    groups, twins = group(runs)
    return list(found.values()), groups, [*problems, *twins]


def folder_of(path: Path) -> Path:
    """The folder that a path stands for: that of a results.json, or the path itself."""
    return path.parent if path.name == "results.json" else path


def load_results(folder: Path) -> dict[str, Any]:
    """The content of a run's results.json, whose matrices are checked.

    Raises:
        ResultsError: If it is missing, damaged, or no such file.
    """
    with _errors_named(folder / "results.json") as path:
        content = json.loads(path.read_bytes())
        matrices = np.stack(list(metrics.matrices_of(content).values()))
        is_sound = matrices.ndim == 3 and matrices.size > 0
        is_sound &= isinstance(content["config"], dict) and isinstance(content["seed"], int)
        if not is_sound or np.any((matrices < 0) | (matrices > 100)):
            raise ValueError("no matrices of percentages, settings and seed")
        return content


def read(folder: Path) -> StoredRun:
    """Reads a finished run.

    Raises:
        ResultsError: If its results are missing, damaged, or those of an unfinished run.
    """
    results = load_results(folder)
    with _errors_named(folder / "results.json") as path:
        settings, key = _configuration(results)
        command = results.get("command")  # early versions did not store it
        run = StoredRun(
            folder=folder,
            written=path.stat().st_mtime,
            seed=results["seed"],
            name=command_words(command) or "defaults" if command else str(settings["dataset"]),
            key=key,
            digest=str(results.get("run", {}).get("train_digest") or "") or None,
            settings=settings,
            matrices=metrics.matrices_of(results),
        )
    if not all(map(metrics.is_finished, run.matrices.values())):
        last = max(metrics.evaluated_tasks(run.matrices["batch"]), default=-1) + 1
        raise ResultsError(
            f"{path}: the run is not finished, task {last} of {run.num_tasks} was the last: the "
            "command of the run with --resume auto resumes it"
        )
    return run


def group(runs: Iterable[StoredRun]) -> tuple[list[Group], list[str]]:
    """Groups runs by configuration, in the order in which configurations first occur.

    Returns:
        The groups; and one line for each run that is left out because there is a newer one of the
        same configuration and seed.
    """
    runs = list(runs)
    digests, members = defaultdict(set), defaultdict(list)
    for run in runs:
        digests[run.key].add(run.digest)
    for run in runs:
        # A run without a digest joins the others, unless these have different ones.
        known = digests[run.key] - {None}
        members[run.key, known.pop() if len(known) == 1 else run.digest].append(run)
    groups, problems = [], []
    labels = _labels([own[0] for own in members.values()])
    for label, own in zip(labels, members.values(), strict=True):
        newest = {run.seed: run for run in sorted(own, key=lambda run: run.written)}
        problems += [
            f"{run.folder}: has the configuration and the seed {run.seed} of "
            f"{newest[run.seed].folder}, which is newer and counts"
            for run in own
            if run is not newest[run.seed]
        ]
        groups.append(Group(label, own[0].settings, tuple(newest[s] for s in sorted(newest))))
    return groups, problems


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings in which several configurations differ, sorted."""
    names = sorted({name for one in settings for name in one})
    return [n for n in names if any(one.get(n) != settings[0].get(n) for one in settings)]


def problem_against(groups: Sequence[Group], setting: str, lines: str = "") -> str:
    """Why groups cannot be compared by the values of a setting, or of two; empty if they can."""
    for name in filter(None, (setting, lines)):
        values = {group.shown(name) for group in groups}
        if len(values) < 2:
            found = f"all have {values.pop()}" if values else "there are none"
            return f"{name} needs at least two values among the finished runs: {found}"
    seen: dict[tuple[str, str], Group] = {}
    for group in groups:
        twin = seen.setdefault((group.shown(setting), group.shown(lines)), group)
        if twin is not group:
            differ = ", ".join(differing([twin.settings, group.settings]))
            return (
                f"several configurations have {setting} {group.shown(setting)}: they differ in "
                f"{differ}; name runs that differ in {setting} alone, or give --lines"
            )
    return ""


def _walk(path: Path) -> Iterator[Path]:
    """Folders of runs at or below a path, of those without results yet, too; links are followed."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder above it
            below.clear()
            continue
        seen.add(place)
        is_run = "results.json" in files or {"config.yaml", "log.txt"} <= set(files)
        left_out = NO_RUNS if is_run else ()
        below[:] = sorted(n for n in below if n not in left_out and not n.startswith("."))
        if is_run:
            yield Path(folder)


@contextmanager
def _errors_named(path: Path) -> Iterator[Path]:
    """Reports what fails as the fault of a results.json."""
    try:
        yield path
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: is damaged, it is no JSON ({error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: is damaged, or not the results of a run") from error


def _configuration(results: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings that make the configuration, for people; and its key.

    The key is the same however the configuration was written on the command line.
    """
    config = {**_DEFAULTS, **results["config"]}  # early versions lack settings that came later
    settings = {name: value for name, value in config.items() if name not in _NOT_CONFIGURATION}
    compared = {name: settings[name] for name in settings.keys() - _COMPARED_OTHERWISE}
    backbone, run = results.get("backbone", {}), results.get("run", {})
    is_random = backbone.get("source") == "random"  # drawn for each seed
    weights = "random" if is_random else str(backbone.get("sha256"))
    rate = ("learning_rate", "images_per_step")
    is_stored = run.keys() >= set(rate)
    names, order = sorted(results.get("class_names", [])), results.get("class_order", [])
    key = {
        **compared,
        "backbone": weights,
        "data": [str(settings["dataset"]).lower(), names, results.get("test_sets")],
        "tasks": len(order) if settings["class_order"] is None else order,
        "steps": [run[name] for name in rate] if is_stored else [settings[n] for n in _RATE],
    }
    settings["backbone"], settings["data"] = weights[:8], str(run.get("train_digest"))[:8]
    settings["images_per_step"] = run.get("images_per_step")
    return settings, json.dumps(key, sort_keys=True)


def _labels(runs: Sequence[StoredRun]) -> list[str]:
    """The names, followed by the settings in which configurations of the same name differ."""
    alike = defaultdict(list)
    for run in runs:
        alike[run.name].append(run.settings)
    names = {name: differing(ones) for name, ones in alike.items()}
    labels: dict[str, None] = {}
    for run in runs:
        values = ", ".join(f"{n} {shown(run.settings.get(n))}" for n in names[run.name])
        label = f"{run.name} ({values})" if values else run.name
        labels[label if label not in labels else f"{label} #{len(labels) + 1}"] = None
    return list(labels)
