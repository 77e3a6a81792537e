"""Checkpoints: what was trained, and all that is needed to evaluate it again.

A checkpoint holds tensors and plain values only. It is read with `weights_only`, so reading runs
no code from it. Checkpoints of l2p-pytorch (full `model` state dict beside a pickled argparse
Namespace) are read too: the Namespace is taken as plain values.
"""

import argparse
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils

FORMAT = "l2p checkpoint 1"
_NAME = re.compile(r"task(\d+)_checkpoint\.pth")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or foreign."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after a task.

    Attributes:
        model: Trained tensors by public name; for the original's files the full state dict.
        task: 1-based number of the last task that was learned.
        config: Resolved settings of the run, plain values.
        class_order: Class ids of each task; None in the original's files.
        backbone: `name`, `source` and `sha256` of the frozen network; None in the original's files.
        accuracy: Accuracy matrix so far for each selection, percent, None where not evaluated.
        original: Whether l2p-pytorch wrote it.
    """

    model: dict[str, Tensor]
    task: int
    config: dict[str, Any]
    class_order: list[list[int]] | None = None
    backbone: dict[str, str] | None = None
    accuracy: dict[str, list[list[float | None]]] = field(default_factory=dict)
    original: bool = False


def task_path(output_dir: Path, task: int) -> Path:
    """Where the checkpoint after a task (1-based) lies."""
    return output_dir / "checkpoint" / f"task{task}_checkpoint.pth"


def find(output_dir: Path) -> dict[int, Path]:
    """Task checkpoints of a run by task number, ascending."""
    found = {}
    for path in (output_dir / "checkpoint").glob("task*_checkpoint.pth"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint whole or not at all."""
    content = {
        "format": FORMAT,
        "model": checkpoint.model,
        "task": checkpoint.task,
        "config": checkpoint.config,
        "class_order": checkpoint.class_order,
        "backbone": checkpoint.backbone,
        "accuracy": checkpoint.accuracy,
    }
    utils.write_whole(path, lambda file: torch.save(content, file))


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint of this program or of l2p-pytorch onto the CPU.

    Raises:
        CheckpointError: If it is missing or damaged, or is no checkpoint of either kind.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = _read(path)
    if content.get("format") == FORMAT:
        return _own(content, path)
    if isinstance(content.get("args"), argparse.Namespace) and "head.weight" in content["model"]:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path}: a checkpoint of the original does not say its task; its name must: "
                "task1_checkpoint.pth, task2_checkpoint.pth, ..."
            )
        return Checkpoint(content["model"], int(match[1]), vars(content["args"]), original=True)
    keys = ", ".join(sorted(map(str, content)))
    raise CheckpointError(f"{path} is no L2P checkpoint: expected a format mark, found {keys}")


def _own(content: dict[str, Any], path: Path) -> Checkpoint:
    names = {f.name for f in fields(Checkpoint)} - {"original"}
    if names != content.keys() - {"format"}:
        differing = ", ".join(sorted(names ^ (content.keys() - {"format"})))
        raise CheckpointError(f"{path} lacks, or has beyond what it should: {differing}")
    return Checkpoint(**{name: content[name] for name in names})


def _read(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = utils.reason(error)
        raise CheckpointError(f"{path} is damaged or is no checkpoint: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} is no L2P checkpoint: it holds no `model` state dict")
    return content
