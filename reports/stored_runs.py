"""Finds stored runs, reads their results, and groups them by configuration.

A run is a folder with a results.json. Runs whose settings are equal but for the seed form a group;
settings of where and how fast a run is computed (roles `place` and `compute`) are not compared.
What cannot be used (damaged, unfinished, the same seed twice) is left out and reported.

The key of a configuration is written by hand: equal experiments may be written in several ways
(`--lr` and `--batch_size` that give one learning rate, aliases of a data set, settings without
effect, see `cli.needs`), and different ones in the same way (an edited configuration, other weights
or images under the same name).
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

from cli import needs
from cli.parser import command_words, shown
from cli.paths import open_regular
from cli.settings import Settings, names_of
from reports import metrics

_NUMBER = int | float

#: The parts of a results.json that tables and figures read, by type, as far as it has them. A list
#: holds any number of such items.
_FORM = {
    **{name: {"accuracy_matrix": [[_NUMBER | None]]} for name in metrics.SELECTIONS},
    "config": {"dataset": str, "data_path": str, "batch_size": int, "top_k": int},
    "command": {"configurations": [str], "flags": {}},
    "run": {"learning_rate": _NUMBER, "images_per_step": int},
    "backbone": {},
    "continues": [{"tasks": int}],
    "class_order": [[int]],
    "class_names": [str],
    "test_sets": [str],
    "training_curve": [{"task": int, "Loss": _NUMBER, "Acc@1": _NUMBER, "Lr": _NUMBER}],
    "prompt_usage": [
        {"after_task": int, "test_set": int, "batch": [int], "instance": [int]}
        | {"key_similarity": [_NUMBER]}
    ],
    "seed": int,
}

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
    problems: list[str] = []
    for path in map(folder_of, paths):
        folders, left_out = _walk(path)
        problems += left_out
        if not folders + left_out:
            why = "holds no results.json, nor does any folder below it"
            problems.append(f"{path}: {why if path.is_dir() else 'there is no such folder'}")
        for folder in folders:
            if os.path.lexists(folder / "results.json"):
                found.setdefault(folder.resolve(), folder)
            else:
                why = "has no results.json yet, its first task is not finished"
                problems.append(f"{folder}: {why}")
    runs, damaged = read_all(found.values())
    groups, twins = group(runs)
    return list(found.values()), groups, [*problems, *damaged, *twins]


def folder_of(path: Path) -> Path:
    """The folder that a path stands for: that of a results.json, or the path; ~ is the home."""
    path = Path(os.path.expanduser(path))
    return path.parent if path.name == "results.json" else path


def load_results(folder: Path) -> dict[str, Any]:
    """The content of a run's results.json, in which what tables and figures read is checked.

    Raises:
        ResultsError: If it is missing, damaged, or no such file.
    """
    with _errors_named(folder / "results.json") as path:
        with open_regular(path) as file:
            content = json.load(file)
        if not _fits(content, _FORM):
            raise ValueError("a part is of another type")
        matrices = np.stack(list(metrics.matrices_of(content).values()))
        if matrices.size == 0 or "seed" not in content or np.any((matrices < 0) | (matrices > 100)):
            raise ValueError("no matrices of percentages and seed")
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
        # With --images_per_class each seed trains on other images of the same data.
        is_part = settings.get("images_per_class") is not None
        run = StoredRun(
            folder=folder,
            written=path.stat().st_mtime,
            seed=results["seed"],
            name=command_words(command) or "defaults" if command else str(settings["dataset"]),
            key=key,
            digest=None if is_part else results.get("run", {}).get("train_digest") or None,
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


def read_all(folders: Iterable[Path]) -> tuple[list[StoredRun], list[str]]:
    """Reads finished runs; and one line for each that cannot be used, see `read`."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read(folder))
        except ResultsError as error:
            problems.append(str(error))
    return runs, problems


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
        # A run without a digest, or with that of the labels alone (early versions), joins the
        # others, unless these have different ones.
        digest, others = run.digest or "", {one or "" for one in digests[run.key]}
        known = {one for one in others if digest in ("", one, one.rpartition("-")[-1])}
        known -= {one.rpartition("-")[-1] for one in known if "-" in one} | {""}
        members[run.key, known.pop() if len(known) == 1 else digest].append(run)
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


def _walk(path: Path) -> tuple[list[Path], list[str]]:
    """Folders of runs at or below a path, those without results yet, too; links are followed.

    Folders that hold runs which do not count, or that cannot be read, are a line each.
    """
    found, problems, seen = list[Path](), list[str](), set[str]()
    unreadable: list[OSError] = []
    for folder, below, files in os.walk(path, followlinks=True, onerror=unreadable.append):
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder above it
            below.clear()
            continue
        seen.add(place)
        is_run = "results.json" in files or {"config.yaml", "log.txt"} <= set(files)
        if is_run:
            found.append(Path(folder))
        else:
            links = [os.path.join(folder, name) for name in files]
            gone = [link for link in links if os.path.islink(link) and not os.path.exists(link)]
            problems += [f"{link}: is a link to nothing" for link in gone]
        aside = sorted(n for n in below if n.startswith(".") or (is_run and n == "previous"))
        below[:] = sorted(set(below) - set(aside))
        for inner in (Path(folder, name) for name in aside):
            if any(any(inner.glob("*/" * depth + "results.json")) for depth in range(4)):
                why = "earlier results of a run" if inner.name == "previous" else "hidden runs"
                problems.append(f"{inner}: {why}, left out: name this folder to count them")
    problems += [f"{error.filename}: cannot be read ({error.strerror})" for error in unreadable]
    return found, problems if path.is_dir() else []


@contextmanager
def _errors_named(path: Path) -> Iterator[Path]:
    """Reports any error in its body as one of a results.json."""
    try:
        yield path
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: is damaged, it is no JSON ({error})") from error
    except (AttributeError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise ResultsError(f"{path}: is damaged, or not the results of a run") from error


def _fits(value: Any, form: Any) -> bool:
    """Whether the content of a file has a form, see `_FORM`."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _fits(value[name], inner) for name, inner in form.items() if name in value
        )
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(one, form[0]) for one in value)
    is_large = isinstance(value, int | float) and not abs(value) < 1e300  # or not-a-number
    return isinstance(value, form) and not isinstance(value, bool) and not is_large


def _configuration(results: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings that make the configuration, for people; and its key.

    The key is the same however the configuration was written on the command line.
    """
    # Early versions lack settings that came later.
    config = needs.effective({**_DEFAULTS, **results["config"]})
    if isinstance(size := config["classes_per_task"], int):
        config["classes_per_task"] = [size]
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
        "continues": [one.get("tasks") for one in results.get("continues", [])],
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
