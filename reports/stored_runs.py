"""Finds stored runs, reads their results, and groups them by configuration.

A run is a folder with a results.json. Runs whose settings are equal but for the seed form a group;
settings of where and how fast a run is computed (roles `place` and `compute`) are not compared.
What cannot be used (damaged, unfinished, the same seed twice) is left out and reported.

Nothing here needs torch: thousands of runs are read in seconds.
"""

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.parser import command_words, shown
from cli.settings import Settings, names_of
from reports import metrics
from reports.metrics import SELECTIONS

#: Names of folders, in or beside those of runs, that are not searched for runs.
NO_RUNS = ("previous", "checkpoint", "plots", "comparison", "tensorboard", "wandb")

#: Settings in which runs of one configuration may differ.
_NOT_CONFIGURATION = (*names_of("compute"), *names_of("place"))

#: Settings from which learning rate and images of a step follow.
_RATE = ("batch_size", "lr", "lr_scale")

#: Settings in whose place `_key` compares what follows from them.
_COMPARED_OTHERWISE = (*_RATE, "dataset", "num_tasks", "class_order", "file_lists")

_DAMAGED = "is damaged, or not the results of a run"

#: Files of a run that has not finished its first task.
_BEGUN = ("config.yaml", "log.txt")


class ResultsError(ValueError):
    """Results that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class StoredRun:
    """The part of a finished run that tables and figures need.

    Attributes:
        folder: Its folder.
        written: When its results were written, seconds since the epoch.
        seed: Its seed.
        name: Its configurations and flags as on a command line, without seed and places.
        key: Text that is equal for runs of the same configuration only.
        digest: Digest of its training images; None: early versions did not store it.
        settings: Its settings as JSON text, without those that are no part of a configuration.
        matrices: Accuracy matrix for each of `SELECTIONS`, percent.
    """

    folder: Path
    written: float
    seed: int
    name: str
    key: str
    digest: str | None
    settings: str
    matrices: dict[str, metrics.Matrix]

    def value(self, selection: str, metric: str) -> float | None:
        """A metric of `metrics.summarize` after the last task, percent; None if undefined."""
        matrix = self.matrices[selection]
        return metrics.value(matrix, matrix.shape[1] - 1, metric)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, one for each seed, in the order of seeds.

    Attributes:
        label: Short name of the configuration, unique among the groups.
        settings: Settings that the runs have in common, by name.
        runs: At least one.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[StoredRun, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, ascending."""
        return [run.seed for run in self.runs]

    def values(self, selection: str, metric: str) -> dict[int, float]:
        """A metric of `metrics.summarize` by seed, percent; without runs where it is undefined."""
        found = {run.seed: run.value(selection, metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}


def mean_and_sd(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which is None for a single value.

    Raises:
        ValueError: If there is no value.
    """
    array = np.fromiter(values, np.float64)
    if len(array) == 0:
        raise ValueError("there is no mean of no values")
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def find(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Finds folders of runs.

    Args:
        paths: Folders of runs, folders with runs somewhere below them, or results.json files.

    Returns:
        The folders, each once, sorted within each path; and one line for each path or folder
        without the results that were expected there.
    """
    found: dict[Path, Path] = {}
    problems = []
    for path in paths:
        path = path.parent if path.name == "results.json" else path
        if not path.is_dir():
            problems.append(f"{path}: there is no such folder")
            continue
        before = len(problems)
        folders = list(_walk(path, problems))
        if not folders and len(problems) == before:
            problems.append(f"{path}: holds no results.json, nor does any folder below it")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values()), problems


def load_results(folder: Path) -> dict[str, Any]:
    """The content of a run's results.json, whose matrices are checked.

    Raises:
        ResultsError: If it is missing, damaged, or no such file.
    """
    path = folder / "results.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: is damaged, it is no JSON ({error})") from error
    try:
        shapes = {_checked_matrix(content[name]["accuracy_matrix"]).shape for name in SELECTIONS}
        is_sound = len(shapes) == 1 and isinstance(content["config"], dict)
        is_sound &= isinstance(content["seed"], int)
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise ResultsError(f"{path}: {_DAMAGED}")
    return content


def read(folder: Path) -> StoredRun:
    """Reads a finished run.

    Raises:
        ResultsError: If its results are missing, damaged, or those of an unfinished run.
    """
    results = load_results(folder)
    matrices = {n: metrics.from_lists(results[n]["accuracy_matrix"]) for n in SELECTIONS}
    if not all(metrics.is_finished(matrix) for matrix in matrices.values()):
        last = max(metrics.evaluated_tasks(matrices["batch"]), default=-1) + 1
        raise ResultsError(
            f"{folder / 'results.json'}: the run is not finished, task "
            f"{last} of {matrices['batch'].shape[1]} was the last: "
            "the command of the run with --resume auto resumes it"
        )
    config = {**_defaults(), **results["config"]}
    transient = set(names_of("command"))
    config = {name: value for name, value in config.items() if name not in transient}
    try:
        name, key = _name(results, config), _key(results, config)
        settings = _settings(results, config)
        digest = results.get("run", {}).get("train_digest")
    except (AttributeError, KeyError, TypeError) as error:
        raise ResultsError(f"{folder / 'results.json'}: {_DAMAGED}") from error
    return StoredRun(
        folder=folder,
        written=(folder / "results.json").stat().st_mtime,
        seed=results["seed"],
        name=sys.intern(name),
        key=sys.intern(key),
        digest=str(digest) if digest else None,
        settings=sys.intern(settings),
        matrices=matrices,
    )


def read_all(paths: Sequence[Path]) -> tuple[list[StoredRun], list[str]]:
    """Reads every finished run in some folders, see `find`.

    Returns:
        The runs; and one line for each that is left out, with the reason.
    """
    folders, problems = find(paths)
    runs = []
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
    digests: dict[str, set[str | None]] = {}
    for run in runs:
        digests.setdefault(run.key, set()).add(run.digest)
    members: dict[tuple[str, str | None], dict[int, StoredRun]] = {}
    problems = []
    for run in runs:
        known = digests[run.key] - {None}
        # A run without a digest joins the others, unless these have different ones.
        same_data = next(iter(known)) if len(known) == 1 else run.digest
        seeds = members.setdefault((run.key, same_data), {})
        twin = seeds.get(run.seed)
        if twin is not None:
            older, newer = sorted((run, twin), key=lambda run: run.written)
            problems.append(
                f"{older.folder}: has the configuration and the seed {run.seed} of "
                f"{newer.folder}, which is newer and counts"
            )
            seeds[run.seed] = newer
        else:
            seeds[run.seed] = run
    firsts = [next(iter(seeds.values())) for seeds in members.values()]
    settings = [json.loads(run.settings) for run in firsts]
    names = [run.name for run in firsts]
    return [
        Group(label, own, tuple(seeds[seed] for seed in sorted(seeds)))
        for label, own, seeds in zip(
            _labels(names, settings), settings, members.values(), strict=True
        )
    ], problems


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings in which several configurations differ, sorted."""
    names = sorted({name for one in settings for name in one})
    return [n for n in names if any(one.get(n) != settings[0].get(n) for one in settings)]


def _walk(path: Path, problems: list[str]) -> Iterator[Path]:
    """Folders with results at or below a path; runs without results are added to `problems`."""
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if name not in NO_RUNS)
        if "results.json" in files:
            yield Path(folder)
        elif all(name in files for name in _BEGUN):
            problems.append(f"{folder}: has no results.json yet, its first task is not finished")


def _checked_matrix(rows: Any) -> metrics.Matrix:
    """Reads a matrix of percentages with at least one row and one column.

    Raises:
        ValueError, TypeError: If it is no such matrix.
    """
    matrix = metrics.from_lists(rows)
    if matrix.ndim != 2 or 0 in matrix.shape or np.any((matrix < 0) | (matrix > 100)):
        raise ValueError("no matrix of percentages")
    return matrix


@functools.cache
def _defaults() -> dict[str, Any]:
    return Settings().stored()


def _name(results: dict[str, Any], config: dict[str, Any]) -> str:
    """Configurations and flags as on a command line; early versions did not store them."""
    command = results.get("command")
    if not command:
        return str(config["dataset"])
    return command_words(command) or "defaults"


def _settings(results: dict[str, Any], config: dict[str, Any]) -> str:
    settings = {name: value for name, value in config.items() if name not in _NOT_CONFIGURATION}
    run = results.get("run", {})
    settings["backbone"] = _backbone(results)[:8]
    settings["images_per_step"] = run.get("images_per_step")
    settings["data"] = str(run.get("train_digest"))[:8]
    return json.dumps(settings, sort_keys=True)


def _key(results: dict[str, Any], config: dict[str, Any]) -> str:
    """What identifies a configuration, however it was written on the command line."""
    left_out = (*_NOT_CONFIGURATION, *_COMPARED_OTHERWISE)
    key = {name: value for name, value in config.items() if name not in left_out}
    run = results.get("run", {})
    key["backbone"] = _backbone(results)
    key["data"] = [
        str(config["dataset"]).lower(),
        sorted(results.get("class_names", [])),
        results.get("test_sets"),
    ]
    order = results.get("class_order", [])
    key["tasks"] = len(order) if config["class_order"] is None else order
    rate = ("learning_rate", "images_per_step")
    is_stored = run.keys() >= set(rate)
    key["steps"] = [run[name] for name in rate] if is_stored else [config[n] for n in _RATE]
    return json.dumps(key, sort_keys=True)


def _backbone(results: dict[str, Any]) -> str:
    """The checksum of the backbone, or `random` if its weights depend on the seed."""
    backbone = results.get("backbone", {})
    return "random" if backbone.get("source") == "random" else str(backbone.get("sha256"))


def _labels(names: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names, followed by the settings in which configurations of the same name differ."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for name, own in zip(names, settings, strict=True):
        alike.setdefault(name, []).append(own)
    shown_settings = {name: differing(ones) for name, ones in alike.items()}
    labels: dict[str, None] = {}
    for name, own in zip(names, settings, strict=True):
        values = [f"{n} {shown(own.get(n))}" for n in shown_settings[name]]
        label = f"{name} ({', '.join(values)})" if values else name
        labels[label if label not in labels else f"{label} #{len(labels) + 1}"] = None
    return list(labels)
