"""Checkpoints: what was trained, and all that is needed to evaluate it again.

A checkpoint holds tensors and plain values only. It is read with `weights_only`, so reading runs
no code from it. Checkpoints of l2p-pytorch (full `model` state dict beside a pickled argparse
Namespace) are read too: the Namespace is taken as plain values.
"""

import argparse
import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Annotated, Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor

from cli import kinds
from cli.kinds import Finite, Natural
from cli.parser import UsageError, read_mapping, shown
from cli.paths import open_regular
from cli.settings import FLAGS, Settings, names_of, plain
from cli.terminal import printable, reason
from continual_datasets.images import join_names, sha256
from continual_datasets.readers import registry
from continual_datasets.replay import ReplayBuffer
from continual_datasets.stream import Earlier
from experiment.run_record import resolved
from model import backbone
from reports import files, metrics
from training.state import Run

FORMAT = "l2p checkpoint 3"
#: The earlier ones have no buffer.
_FORMATS = (FORMAT, "l2p checkpoint 2", "l2p checkpoint 1")
_NAME = re.compile(r"task(\d+)_checkpoint\.pth")

#: Settings of a command, which are never taken from a checkpoint.
OF_A_COMMAND = (*names_of("compute"), "tf32", "continue_from")

logger = logging.getLogger(__name__)


#: Types of what files hold, see `cli.kinds`.
_Tensors = dict[str, Annotated[Tensor, ("must be a dense tensor", backbone.is_dense)]]
_Identity = Annotated[
    dict[str, str],
    ("must have name, source and sha256", lambda x: x.keys() >= {"name", "source", "sha256"}),
]
_Matrix = Annotated[
    list[list[Finite | None]],
    ("must have rows of one length", lambda rows: len({len(row) for row in rows}) < 2),
]
_Numbers = Annotated[
    Tensor,
    ("must be a row of whole numbers", lambda x: x.dtype == torch.int64 and x.ndim == 1),
]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or foreign; a line, which may repeat what it holds."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.replace("\n", " ")))


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What checkpoints of a task and states of a run share.

    The original's files hold `model` and `config` alone, early ones of this program no `test_sets`.
    """

    model: _Tensors  # trained tensors by public name; the original's: full state dict
    config: dict[str, Any]  # resolved settings of the run, plain values
    class_order: list[list[Natural]] | None = None  # class ids of each task
    class_names: list[str] | None = None
    test_sets: list[str] | None = None  # their names
    backbone: _Identity | None = None  # `name`, `source`, `sha256` of the frozen network
    #: Accuracy matrix so far for each selection, percent, None where not evaluated.
    accuracy: dict[str, _Matrix] = field(default_factory=dict)
    buffer: _Numbers | None = None  # numbers of the training images to replay; None without replay
    buffer_digest: str | None = None  # identifies these images, see `buffer_digest`
    earlier: list[Earlier] = field(default_factory=list)  # runs that this one continues
    path: Path = Path()  # of the file that it was read from

    @property
    def num_earlier(self) -> int:
        """How many of the tasks were learned in earlier runs."""
        return sum(len(one.tasks) for one in self.earlier)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(StoredModel):
    """The state after a task."""

    task: Natural  # 1-based number of the last task that was learned
    original: bool = False  # whether l2p-pytorch wrote it


def stored_model(run: Run) -> dict[str, Any]:
    """The entries that the checkpoints and the states of a run share, see `StoredModel`."""
    return {
        "model": run.model.trained_state(),
        "config": resolved(run.settings),
        "class_order": run.stream.class_order,
        "class_names": run.stream.train.classes,
        "test_sets": [test_set.name for test_set in run.stream.test_sets],
        "backbone": run.backbone,
        "accuracy": {name: metrics.to_lists(matrix) for name, matrix in run.matrices.items()},
        "buffer": None if run.buffer is None else torch.from_numpy(run.buffer.indices),
        "buffer_digest": buffer_digest(run),
        "earlier": [dataclasses.asdict(one) for one in run.stream.earlier],
    }


def check_same_run(run: Run, stored: StoredModel) -> None:
    """Makes sure that a file was written by a run on the same data and the same backbone.

    Raises:
        CheckpointError: Naming what differs.
    """
    path, other_data = stored.path, f"{stored.path} was trained on other data:"
    old, new = ([one.sha256 for one in own] for own in (stored.earlier, run.stream.earlier))
    if old != new:
        if not old:
            raise CheckpointError(f"{path} continues no other run: leave --continue_from out")
        parent = stored.earlier[-1]
        raise CheckpointError(
            f"{path} continues {parent.checkpoint} with the sha256 {parent.sha256[:12]}: give the "
            "same --continue_from"
        )
    found = [test_set.name for test_set in run.stream.test_sets]
    if stored.test_sets not in (None, found):
        names = join_names(stored.test_sets or [])
        raise CheckpointError(
            f"{other_data} its test sets are {names}, those of this run {join_names(found)}"
        )
    if stored.class_order != run.stream.class_order:
        raise CheckpointError(f"{path} has another class order than this run")
    found, wanted = run.stream.train.classes, stored.class_names or []
    if found != wanted:
        one, other = next(pair for pair in zip_longest(wanted, found) if pair[0] != pair[1])
        raise CheckpointError(
            f"{other_data} it knows {len(wanted)} classes, --data-path has {len(found)}; expected "
            f"the class {one!r}, found {other!r}"
        )
    check_same_backbone(run.backbone, stored)


def check_same_backbone(own: dict[str, str], stored: StoredModel) -> None:
    """Makes sure that a file belongs to this backbone, by its sha256; raises CheckpointError."""
    old = stored.backbone
    if old is not None and old["sha256"] != own["sha256"]:
        raise CheckpointError(
            f"{stored.path} was trained on the backbone {old['name']} ({old['source']}, sha256 "
            f"{old['sha256'][:12]}), found {own['name']} ({own['source']}, {own['sha256'][:12]}): "
            "give the same weights with --pretrained"
        )


def task_path(output_dir: Path, task: int) -> Path:
    """Path of the checkpoint after a task (1-based)."""
    return output_dir / "checkpoint" / f"task{task}_checkpoint.pth"


def find(output_dir: Path) -> dict[int, Path]:
    """Task checkpoints of a run by task number, ascending."""
    paths = (output_dir / "checkpoint").glob("task*_checkpoint.pth")
    found = {int(m[1]): path for path in paths if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def in_folder(output_dir: Path, flag: str) -> dict[int, Path]:
    """Task checkpoints as `find`; raises UsageError if there are none, naming a flag."""
    if paths := find(output_dir):
        return paths
    problem = (
        f"{flag} finds no checkpoint in {output_dir / 'checkpoint'}: expected "
        "task1_checkpoint.pth, task2_checkpoint.pth, ...; name the folder of a run"
    )
    for seed in sorted(output_dir.glob("seed*/checkpoint"))[:1]:
        problem += f", such as {seed.parent}"
    raise UsageError([problem])


def find_one(place: Path, flag: str, task: int | None = None) -> Checkpoint:
    """Reads a checkpoint: a file, or in the folder of a run that after a task (None: the last).

    Raises:
        UsageError: If there is none, naming a flag.
        CheckpointError: If it is damaged, or no checkpoint of a task.
    """
    if not place.exists():
        raise UsageError([f"{flag} {place}: neither the folder of a run nor a checkpoint"])
    if place.is_dir():
        paths = in_folder(place, flag)
        if task is not None and task not in paths:
            known = ", ".join(map(str, paths))
            raise UsageError([f"--checkpoint {task}: {place} has those of the tasks {known}"])
        return load(paths[max(paths) if task is None else task])
    if task is not None:
        raise UsageError([f"--checkpoint {task} needs the folder of a run, {place} is none"])
    return load(place)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint of this program or of l2p-pytorch onto the CPU.

    Raises:
        CheckpointError: If it is missing or damaged, or is no checkpoint of either kind.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = read(path)
    mark, args = content.get("format"), content.get("args")
    if mark in _FORMATS:
        content = upgraded(content)
        found = from_entries(Checkpoint, content, path, original=False, path=path)
        return dataclasses.replace(found, earlier=stored_lineage(found))
    if isinstance(args, argparse.Namespace) and "head.weight" in content["model"]:
        if (match := _NAME.fullmatch(path.name)) is None:
            raise CheckpointError(
                f"{path}: a checkpoint of the original does not say its task; its name must: "
                "task1_checkpoint.pth, task2_checkpoint.pth, ..."
            )
        found = {"model": content["model"], "config": vars(args), "task": int(match[1])}
        absent = ("class_order", "class_names", "test_sets", "backbone", "buffer", "buffer_digest")
        found |= {**dict.fromkeys(absent), "accuracy": {}, "earlier": []}
        return from_entries(Checkpoint, found, path, original=True, path=path)
    if str(mark).startswith("l2p run state"):
        raise CheckpointError(
            f"{path} is the state of a run, for --resume: give a checkpoint of a task, such as "
            f"{task_path(path.parent.parent, 1)}"
        )
    keys = ", ".join(sorted(key for key in content if isinstance(key, str))[:8])
    raise CheckpointError(f"{path} is no L2P checkpoint: expected a format mark, found {keys}")


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """What a file of an earlier format holds, under today's names."""
    config = content.get("config")
    if isinstance(config, dict) and "use_prompt_mask" in config:
        config = {**config, "diversify": "mask" if config["use_prompt_mask"] else "none"}
        del config["use_prompt_mask"]
    absent = dict.fromkeys(("buffer", "buffer_digest", "test_sets"))
    return {**absent, "earlier": [], **content, "config": config}


def write(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Writes tensors and plain values whole or not at all, see `files.write_whole`."""

    def save_to(file: IO[bytes]) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch complains of an unfinished file: a full disk, say
            raise error.__context__ or error from None

    files.write_whole(path, save_to, keep)


def read(path: Path) -> dict[str, Any]:
    """Reads what torch.save wrote: tensors and plain values, by name; a `model` among them.

    Bytes behind the content are ignored: earlier versions added a checksum there.

    Raises:
        CheckpointError: If the file is damaged or something else.
        OSError: If it cannot be read.
    """
    with open_regular(path) as file:
        try:
            backbone.check_checksums(file)
            with torch.serialization.safe_globals([argparse.Namespace]), catch_warnings():
                simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make the reader raise anything
            said = f"{path} is damaged or is no checkpoint: {reason(error)}"
            raise CheckpointError(said) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} is no L2P checkpoint: it holds no `model` state dict")
    return content


def from_entries(kind: type, content: Mapping[str, Any], source: Path, **known: Any) -> Any:
    """An object of a dataclass out of what a file holds, and what is known beside it.

    Raises:
        CheckpointError: If an entry is missing, unknown, or not of the type of its field.
    """
    names = {field.name for field in dataclasses.fields(kind)} - known.keys()
    found = {name: value for name, value in content.items() if name != "format"}
    for name in sorted(found.keys() ^ names, key=str):
        state = "missing" if name in names else "not expected there"
        raise CheckpointError(f"{source}: the entry {name} is {state}")
    for problem in kinds.problems(kinds.of_fields(kind), found):
        raise CheckpointError(f"{source} is damaged: {problem}")
    return kind(**found, **known)


def stored_lineage(stored: StoredModel) -> list[Earlier]:
    """The runs that the run of a file continues, of plain values; raises as `from_entries`."""
    entries: Any = stored.earlier
    return [from_entries(Earlier, one, stored.path) for one in entries]


def restore_buffer(buffer: ReplayBuffer, stored: StoredModel) -> None:
    """Puts the images of a stored buffer into a buffer; CheckpointError if there are no such."""
    indices = stored.buffer.numpy() if stored.buffer is not None else buffer.indices
    if len(np.intersect1d(indices, np.arange(len(buffer.targets)))) < len(indices):
        raise CheckpointError(f"{stored.path} is damaged: its replay buffer has unknown images")
    buffer.indices = indices


def buffer_digest(run: Run) -> str | None:
    """Identifies the images to replay by their classes, and names of folder and file or numbers."""
    if run.buffer is None:
        return None
    indices, train = run.buffer.indices, run.stream.train
    names = [Path(train.name_of(index)).parts[-2:] for index in indices.tolist()]
    return sha256(train.targets[indices], repr(names).encode())


def compare_accuracy(name: str, stored: metrics.Matrix, found: metrics.Matrix) -> None:
    """Logs whether the accuracies of test sets, as far as they were found, are those stored."""
    differences = np.abs(stored - found)[np.isfinite(found)]
    if len(differences) and not differences.any():
        logger.info("Reproduces the stored accuracies (%s-wise)", name)
    elif len(differences):
        worst = np.nanmax(differences)
        logger.warning("Differs from the stored accuracies (%s-wise) by up to %.4f", name, worst)


def stored_settings(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The settings in a file; raises CheckpointError if some of them can be none."""
    settings, problems = read_mapping({k: v for k, v in config.items() if k in FLAGS})
    if problems:
        raise CheckpointError(f"{source} is damaged: its settings: {'; '.join(problems)}")
    return settings


def stored_matrices(run: Run, stored: StoredModel) -> dict[str, metrics.Matrix]:
    """The accuracy matrices in a file; raises CheckpointError if they are of another run."""
    matrices = {name: metrics.from_lists(rows) for name, rows in stored.accuracy.items()}
    for name, matrix in matrices.items():
        if name not in run.matrices or run.matrices[name].shape != matrix.shape:
            raise CheckpointError(f"{stored.path}: its accuracy matrices are of another run")
    return matrices


def given_settings(settings: Settings) -> dict[str, Any]:
    """What a command line sets; not `--norm model`, of which a checkpoint has the numbers."""
    given = {name: settings[name] for name in settings.given.explicit}
    return {name: value for name, value in given.items() if (name, value) != ("norm", "model")}


def other_settings(
    given: Mapping[str, Any], stored: Mapping[str, Any], free: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Each setting that is not free and that a file has otherwise: as a flag, and the file's."""
    for name in sorted((given.keys() & stored.keys()).difference(free)):
        if not _same_value(name, given[name], stored[name]):
            yield f"{FLAGS[name].spelling} {shown(given[name])}", printable(shown(stored[name]))


def _same_value(name: str, one: object, other: object) -> bool:
    """Whether two values of a setting mean the same."""
    if name == "model":
        return backbone.resolve_name(str(one)) == backbone.resolve_name(str(other))
    if name == "dataset":
        try:
            return list(registry.find_sources(str(one))) == list(registry.find_sources(str(other)))
        except ValueError:
            return False
    if name == "num_tasks":  # none leaves it to the data; what follows is compared by class order
        return one is None or other is None or one == other
    return plain(one) == plain(other)
