"""Checkpoints: what was trained, and all that is needed to evaluate it again.

A checkpoint holds tensors and plain values only. It is read with `weights_only`, so reading runs
no code from it. Checkpoints of l2p-pytorch (full `model` state dict beside a pickled argparse
Namespace) are read too: the Namespace is taken as plain values.
"""

import argparse
import hashlib
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import utils
from reports import files

FORMAT = "l2p checkpoint 3"
#: The same without a buffer, and before that without a checksum.
_SECOND_FORMAT, _FIRST_FORMAT = "l2p checkpoint 2", "l2p checkpoint 1"
_SEAL, _DIGEST = b"l2p sha256", hashlib.sha256().digest_size
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
        class_names: Name of every class; None in the original's files.
        test_sets: Name of each test set; None in the original's files and in early ones.
        backbone: `name`, `source` and `sha256` of the frozen network; None in the original's files.
        accuracy: Accuracy matrix so far for each selection, percent, None where not evaluated.
        buffer: Numbers of the training images to replay; None without replay.
        original: Whether l2p-pytorch wrote it.
    """

    model: dict[str, Tensor]
    task: int
    config: dict[str, Any]
    class_order: list[list[int]] | None = None
    class_names: list[str] | None = None
    test_sets: list[str] | None = None
    backbone: dict[str, str] | None = None
    accuracy: dict[str, list[list[float | None]]] = field(default_factory=dict)
    buffer: Tensor | None = None
    original: bool = False


def task_path(output_dir: Path, task: int) -> Path:
    """Path of the checkpoint after a task (1-based)."""
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
    content = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in _ENTRIES}}
    files.write_bytes(path, sealed(content))


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint of this program or of l2p-pytorch onto the CPU.

    Raises:
        CheckpointError: If it is missing or damaged, or is no checkpoint of either kind.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = _read(path, str(path))
    if content.get("format") in (FORMAT, _SECOND_FORMAT):
        _unsealed(path.read_bytes(), str(path))
    if content.get("format") in (_SECOND_FORMAT, _FIRST_FORMAT):
        content = {**upgraded(content), "format": FORMAT}
    if content.get("format") == FORMAT:
        return Checkpoint(**check_entries(content, _ENTRIES, str(path)))
    if isinstance(content.get("args"), argparse.Namespace) and "head.weight" in content["model"]:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path}: a checkpoint of the original does not say its task; its name must: "
                "task1_checkpoint.pth, task2_checkpoint.pth, ..."
            )
        return Checkpoint(content["model"], int(match[1]), vars(content["args"]), original=True)
    if str(content.get("format")).startswith("l2p run state"):
        raise CheckpointError(
            f"{path} is the state of a run, for --resume: give a checkpoint of a task, such as "
            f"{task_path(path.parent.parent, 1)}"
        )
    keys = ", ".join(sorted(map(str, content)))
    raise CheckpointError(f"{path} is no L2P checkpoint: expected a format mark, found {keys}")


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """What a file of an earlier format holds, under today's names."""
    config = dict(content["config"]) if isinstance(content.get("config"), dict) else {}
    if "use_prompt_mask" in config:
        config["diversify"] = "mask" if config.pop("use_prompt_mask") else "none"
    return {"buffer": None, "test_sets": None, **content, "config": config}


#: What the entries of a file must be: in words, and as a test.
Entries = dict[str, tuple[str, Callable[[Any], bool]]]


def sealed(content: dict[str, Any]) -> bytes:
    """What torch.save writes, and a checksum of it: torch.load does not notice every damage."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    return data + _SEAL + hashlib.sha256(data).digest()


def read_sealed(data: bytes, source: str) -> dict[str, Any]:
    """Reads what was sealed.

    Args:
        data: Content of the file.
        source: What to call it in messages.

    Raises:
        CheckpointError: If it is damaged or something else.
    """
    return _read(io.BytesIO(_unsealed(data, source)), source)


def _unsealed(data: bytes, source: str) -> bytes:
    """The content without its seal, which is checked."""
    content, digest = data[: -len(_SEAL) - _DIGEST], data[-_DIGEST:]
    is_sealed = data[:-_DIGEST].endswith(_SEAL)
    if not is_sealed or hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{source} is damaged or is no checkpoint: its checksum is wrong")
    return content


def _read(file: Path | BinaryIO, source: str) -> dict[str, Any]:
    """Reads what torch.save wrote: tensors and plain values, by name; a `model` among them."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = utils.reason(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text advises unsafe loading
            reason = "it does not hold tensors and plain values alone, as torch.save writes them"
        raise CheckpointError(f"{source} is damaged or is no checkpoint: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{source} is no L2P checkpoint: it holds no `model` state dict")
    return content


def check_entries(content: dict[str, Any], entries: Entries, source: str) -> dict[str, Any]:
    """The content without its format mark.

    Raises:
        CheckpointError: If an entry is missing, unknown, or not what it must be.
    """
    found = {name: value for name, value in content.items() if name != "format"}
    for name in entries.keys() ^ found.keys():
        state = "missing" if name in entries else "not expected there"
        raise CheckpointError(f"{source}: the entry {name} is {state}")
    for name, (expected, is_valid) in entries.items():
        if not is_valid(found[name]):
            shown = " ".join(repr(found[name]).split())[:60]
            raise CheckpointError(f"{source}: the entry {name} is {shown}, expected {expected}")
    return found


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values())


def _is_class_order(value: Any) -> bool:
    return _is_list(value, list) and all(
        _is_list(ids, int) and min(ids, default=0) >= 0 and len(set(ids)) == len(ids)
        for ids in value
    )


def _is_buffer(value: Any) -> bool:
    return value is None or (
        isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1
    )


def _is_matrices(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_list(rows, list) and len({len(row) for row in rows}) == 1 for rows in value.values()
    )


def _is_identity(value: Any) -> bool:
    return isinstance(value, dict) and {"name", "source", "sha256"} <= value.keys()


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


#: Entries that checkpoints and states share.
ORIGIN_ENTRIES: Entries = {
    "model": ("tensors by name", _is_tensors),
    "config": ("settings by name", lambda value: isinstance(value, dict) and bool(value)),
    "class_order": ("class ids of each task", _is_class_order),
    "class_names": ("names of classes", lambda value: _is_list(value, str)),
    "test_sets": ("names, or None", lambda value: value is None or _is_list(value, str)),
    "backbone": ("name, source and sha256", _is_identity),
    "accuracy": ("matrices by selection", _is_matrices),
    "buffer": ("numbers of images, or None", _is_buffer),
}

_ENTRIES: Entries = {
    **ORIGIN_ENTRIES,
    "task": ("a task number", lambda value: isinstance(value, int) and value >= 0),
}
