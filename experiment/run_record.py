"""Results of a run: log_stats.txt, results.json, the final table."""

import json
import platform
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from continual_datasets.stream import display_names
from reports import files, metrics
from reports.metrics import SELECTIONS
from training.evaluation import average_stats
from training.state import TaskReport

_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")

#: What a run writes into its folder.
_RUN_FILES = (
    "checkpoint", "config.yaml", "log.txt", "log_stats.txt", "plots", "results.json", "results.png",
    "tensorboard", "wandb",
)  # fmt: skip

#: Columns of the printed matrix that stand beside each other.
_COLUMNS = 20


@dataclass
class RunRecord:
    """Collects what is known about a run and writes it after every task; plain values mostly."""

    config: dict[str, Any]  # resolved settings
    backbone: dict[str, str]  # `name`, `source`, `sha256`
    class_order: list[list[int]]  # class ids of each task
    class_names: list[str]
    matrices: dict[str, metrics.Matrix]  # accuracies for each selection, percent
    reports: list[TaskReport] = field(default_factory=list)  # one for each finished task
    tasks: list[str] = field(default_factory=list)  # their names
    test_sets: list[str] = field(default_factory=list)  # their names
    numerics: dict[str, Any] = field(default_factory=dict)  # how numbers were computed
    command: dict[str, Any] = field(default_factory=dict)  # its `configurations` and `flags`
    #: What follows from settings and data: `processes`, `images_per_step`, `learning_rate`,
    #: `train_digest` (identifies the training images), `trained_parameters`.
    run: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            **{name: self._selection(name) for name in SELECTIONS},
            "command": self.command,
            "run": self.run,
            "class_order": self.class_order,
            "class_names": self.class_names,
            "tasks": self.tasks,
            "test_sets": self.test_sets,
            "backbone": self.backbone,
            "numerics": self.numerics,
            "training_curve": [
                {"task": report.task + 1, "epoch": epoch, **stats}
                for report in self.reports
                for epoch, stats in enumerate(report.epoch_stats, start=1)
            ],
            "prompt_usage": [
                {
                    "after_task": report.task + 1,
                    "test_set": evaluation.index,
                    "name": self.test_sets[evaluation.index] if self.test_sets else None,
                    **evaluation.usage,
                    "mean_similarity": evaluation.mean_similarity,
                    "key_similarity": [round(value, 6) for value in evaluation.key_similarity],
                }
                for report in self.reports
                for evaluation in report.evaluations
                if evaluation.usage
            ],
            "timing": [
                {
                    "task": report.task + 1,
                    "train_seconds": round(report.train_seconds, 3),
                    "eval_seconds": round(report.eval_seconds, 3),
                }
                for report in self.reports
            ],
            "versions": versions(),
            "seed": self.config.get("seed"),
            "config": self.config,
        }

    def log_lines(self) -> str:
        """The content of log_stats.txt: one JSON object for each task."""
        return "".join(json.dumps(self._log_stats(report)) + "\n" for report in self.reports)

    def write(self, output_dir: Path) -> None:
        """Writes results.json and log_stats.txt of a training run."""
        files.write_json(output_dir / "results.json", self.as_dict())
        files.write_text(output_dir / "log_stats.txt", self.log_lines())

    def table(self) -> str:
        """Both accuracy matrices and all metrics as text, in percent."""
        labels = display_names(self.test_sets, len(self.matrices["batch"]), "test set {}")
        blocks = []
        for name, title in (("batch", "batch-wise, as published"), ("instance", "instance-wise")):
            blocks.append(f"Accuracy in percent, {title} (row: test set, column: after task)")
            blocks.append(_format_matrix(self.matrices[name], labels))
        blocks.append(f"{'':30s}{'batch-wise':>12s}{'instance-wise':>15s}")
        batch, instance = (self._selection(name) for name in SELECTIONS)
        for key, label in metrics.METRIC_NAMES.items():
            if key in batch:
                blocks.append(f"{label:30s}{_number(batch[key]):>12s}{_number(instance[key]):>15s}")
        return "\n".join(blocks)

    def _selection(self, name: str) -> dict[str, Any]:
        """Accuracy matrix and metrics of a selection after the last finished task."""
        matrix = self.matrices[name]
        numbers = metrics.summarize(matrix, self.reports[-1].task)
        return {"accuracy_matrix": metrics.to_lists(matrix), **numbers}

    def _log_stats(self, report: TaskReport) -> dict[str, Any]:
        """One line of log_stats.txt; `test_*` is the last test set, as the original writes it.

        What the task did not evaluate, or the kind of experiment does not have, is left out.
        """
        stats: dict[str, Any] = {f"train_{k}": v for k, v in report.train_stats.items()}
        if report.evaluations:
            stats |= {f"test_{k}": v for k, v in report.evaluations[-1].stats["batch"].items()}
            for name, prefix in zip(SELECTIONS, ("", "instance_"), strict=True):
                means = average_stats(report.evaluations, name)
                stats |= {f"{prefix}average_{k}": v for k, v in means.items()}
                numbers = metrics.summarize(self.matrices[name], report.task)
                if "forgetting" in numbers:
                    stats[f"{prefix}forgetting"] = numbers["forgetting"]
                    stats[f"{prefix}backward"] = numbers["backward_transfer"]
        return {**stats, "task": report.task + 1, "epoch": self.config["epochs"] - 1}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in _LIBRARIES}}


def earlier_files(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder."""
    found = [output_dir / name for name in _RUN_FILES if (output_dir / name).exists()]
    return found + list(output_dir.glob("eval_results*.json"))


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
