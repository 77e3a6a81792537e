"""Results of a run: log_stats.txt, results.json, the final table."""

import dataclasses
import json
import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cli.settings import Settings
from continual_datasets.stream import display_names
from experiment import hardware
from reports import files, metrics
from reports.metrics import SELECTIONS
from training.evaluation import average_stats
from training.state import Run, TrainState

_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")

#: What a run writes into its folder.
_RUN_FILES = (
    "checkpoint", "config.yaml", "log.txt", "log_stats.txt", "plots", "predictions.csv",
    "results.json", "results.png", "tensorboard", "wandb",
)  # fmt: skip

#: Columns of the printed matrix that stand beside each other.
_COLUMNS = 20


def results(run: Run) -> dict[str, Any]:
    """The content of results.json."""
    stream, names = run.stream, [test_set.name for test_set in run.stream.test_sets]
    return {
        **{name: _selection(run, name) for name in SELECTIONS},
        "command": run.settings.command(),
        "run": {
            "processes": run.processes.world_size,
            "images_per_step": run.global_batch,
            "learning_rate": run.settings.optimizer.learning_rate(run.global_batch),
            "train_digest": stream.train_digest,
            "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        },
        "continues": [
            {"checkpoint": one.checkpoint, "sha256": one.sha256, "tasks": len(one.tasks)}
            for one in stream.earlier
        ],
        "class_order": stream.class_order,
        "class_names": stream.train.classes,
        "tasks": [task.name for task in stream.tasks],
        "test_sets": names,
        "backbone": run.backbone,
        "numerics": numerics(run),
        "training_curve": [
            {"task": report.task + 1, "epoch": epoch, **stats}
            for report in run.reports
            for epoch, stats in enumerate(report.epoch_stats, start=1)
        ],
        "prompt_usage": [
            {
                "after_task": report.task + 1,
                "test_set": evaluation.index,
                "name": names[evaluation.index],
                **evaluation.usage,
                "mean_similarity": evaluation.mean_similarity,
                "key_similarity": [round(value, 6) for value in evaluation.key_similarity],
            }
            for report in run.reports
            for evaluation in report.evaluations
            if evaluation.usage
        ],
        "timing": [
            {
                "task": report.task + 1,
                "train_seconds": round(report.train_seconds, 3),
                "eval_seconds": round(report.eval_seconds, 3),
            }
            for report in run.reports
        ],
        "versions": versions(),
        "hardware": hardware.record(run),
        "seed": run.settings.run.seed,
        "config": resolved(run.settings),
    }


def resolved(settings: Settings) -> dict[str, Any]:
    """What files hold of the settings: those that describe a run, and the size of a vote group."""
    return {**settings.stored(), "vote_group_size": settings.vote_group_size}


def numerics(run: Run) -> dict[str, Any]:
    """How numbers are computed."""
    return {
        **dataclasses.asdict(run.settings.precision),
        "data_on_device": run.stream.pipeline.on_device,
        "eval_batch_size": run.batching.test_batch,
    }


def log_lines(run: Run) -> str:
    """The content of log_stats.txt: one JSON object for each task."""
    return "".join(json.dumps(_log_stats(run, report)) + "\n" for report in run.reports)


def write(run: Run, output_dir: Path) -> None:
    """Writes results.json and log_stats.txt of a training run."""
    files.write_json(output_dir / "results.json", results(run))
    files.write_text(output_dir / "log_stats.txt", log_lines(run))


def table(run: Run) -> str:
    """Both accuracy matrices and all metrics as text, in percent."""
    names = [test_set.name for test_set in run.stream.test_sets]
    labels = display_names(names, len(names), "test set {}")
    blocks = []
    for name, title in zip(SELECTIONS, ("batch-wise, as published", "instance-wise"), strict=True):
        blocks.append(f"Accuracy in percent, {title} (row: test set, column: after task)")
        blocks.append(_format_matrix(run.matrices[name], labels))
    blocks.append(f"{'':30s}{'batch-wise':>12s}{'instance-wise':>15s}")
    batch, instance = (_selection(run, name) for name in SELECTIONS)
    for key, label in metrics.METRIC_NAMES.items():
        if key in batch:
            blocks.append(f"{label:30s}{_number(batch[key]):>12s}{_number(instance[key]):>15s}")
    return "\n".join(blocks)


def _selection(run: Run, name: str) -> dict[str, Any]:
    """Accuracy matrix and metrics of a selection after the last finished task.

    Where the predictions of each image are known, after the last task, also those by class.
    """
    matrix, last = run.matrices[name], run.reports[-1]
    numbers = {"accuracy_matrix": metrics.to_lists(matrix), **metrics.summarize(matrix, last.task)}
    images = [evaluation.images for evaluation in last.evaluations]
    known = [part[:, :3] for part in images if part is not None]
    if not known or len(known) < len(images):  # a state of an early version lacks some
        return numbers
    targets, *predicted = torch.cat(known).T.numpy()
    labels = metrics.class_labels(run.stream.train.classes)
    by_class = metrics.by_class(targets, predicted[SELECTIONS.index(name)], labels)
    return {**numbers, **by_class}


def _log_stats(run: Run, report: TrainState) -> dict[str, Any]:
    """One line of log_stats.txt; `test_*` is the last test set, as the original writes it.

    What the task did not evaluate, or the kind of experiment does not have, is left out.
    """
    stats: dict[str, Any] = {f"train_{k}": v for k, v in report.train_stats.items()}
    if report.evaluations:
        stats |= {f"test_{k}": v for k, v in report.evaluations[-1].stats["batch"].items()}
        for name, prefix in zip(SELECTIONS, ("", "instance_"), strict=True):
            means = average_stats(report.evaluations, name)
            stats |= {f"{prefix}average_{k}": v for k, v in means.items()}
            numbers = metrics.summarize(run.matrices[name], report.task)
            if "forgetting" in numbers:
                stats[f"{prefix}forgetting"] = numbers["forgetting"]
                stats[f"{prefix}backward"] = numbers["backward_transfer"]
    return {**stats, "task": report.task + 1, "epoch": run.settings.optimizer.epochs - 1}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in _LIBRARIES}}


def earlier_files(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder."""
    found = [output_dir / name for name in _RUN_FILES if os.path.lexists(output_dir / name)]
    of_evaluations = ("eval_results*.json", "eval_predictions*.csv")
    return found + [path for name in of_evaluations for path in output_dir.glob(name)]


def set_aside(output_dir: Path) -> Path | None:
    """Moves what an earlier run left in the folder into a folder of its own, so nothing is lost.

    Returns:
        The folder `previous/DATE`, or None if there was nothing.
    """
    found = earlier_files(output_dir)
    if not found:
        return None
    folder = output_dir / "previous" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    folder.mkdir(parents=True)
    for path in found:
        path.rename(folder / path.name)
    return folder


def _format_matrix(matrix: metrics.Matrix, labels: list[str]) -> str:
    """The matrix without tasks that nothing was evaluated after; many columns are folded."""
    width = max(12, *map(len, labels))
    evaluated = metrics.evaluated_tasks(matrix)
    lines = []
    for first in range(0, max(1, len(evaluated)), _COLUMNS):
        columns = evaluated[first : first + _COLUMNS]
        lines.append(" " * width + "".join(f"{t + 1:>7d}" for t in columns))
        for label, row in zip(labels, metrics.to_lists(matrix[:, columns]), strict=True):
            lines.append(f"{label:{width}s}" + "".join(f"{_number(value):>7s}" for value in row))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
