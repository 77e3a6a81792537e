"""`--resume`: the state of a run between two steps, from which it goes on as if never stopped.

The newest state lies in `checkpoint/last.pth`, the one before it in `checkpoint/last_but_one.pth`;
each is written whole or not at all, so one of them is always good. A state holds tensors and plain
values only and is read with `weights_only`.

All that the processes of a run need of it is the same in each of them, so one process writes it,
and any number may go on from it.
"""

import argparse
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import processes
import utils
from cli import options
from cli.options import UsageError
from engine import Evaluation, Position, TaskReport
from experiment import build, checkpoints
from experiment.assemble import Experiment
from experiment.checkpoints import CheckpointError, Entries
from reports import files, metrics
from training.update import Updater

FORMAT = "l2p run state 2"
#: The same without a buffer.
_FIRST_FORMAT = "l2p run state 1"

#: Settings that may differ when a run goes on: where things are, and how they are computed. What
#: follows from some of them (images of a step, learning rate, backbone, class order) is compared.
_FREE = (
    *options.COMPUTE_ONLY, "data_path", "pretrained", "batch_size", "lr", "lr_scale", "class_order",
    "replay_batch", "file_lists",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """A run between two steps.

    Attributes:
        model: Trained tensors by public name.
        optimizer: State dict of the optimizer.
        position: Where the run stands.
        reports: One for each finished task.
        accuracy: Accuracy matrix so far for each selection, percent, None where not evaluated.
        buffer: Numbers of the training images to replay; None without replay.
        global_batch: Images of all processes in a training step.
        num_images: Training images of each task.
        train_digest: What tells the training images from others; None: not known.
        config: Resolved settings of the run, plain values.
        class_order: Class ids of each task.
        class_names: Name of every class.
        test_sets: Name of each test set; None: not known.
        backbone: `name`, `source` and `sha256` of the frozen network.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    position: Position
    reports: list[TaskReport]
    accuracy: dict[str, list[list[float | None]]]
    buffer: Tensor | None
    global_batch: int
    num_images: list[int]
    train_digest: str | None
    config: dict[str, Any]
    class_order: list[list[int]] | None
    class_names: list[str] | None
    test_sets: list[str] | None
    backbone: dict[str, str] | None


def newest_path(output_dir: Path) -> Path:
    """Where the newest state of a run lies."""
    return output_dir / "checkpoint" / "last.pth"


def take(run: Experiment, position: Position, updater: Updater) -> RunState:
    """The state of a run at a boundary."""
    record = run.record
    return RunState(
        model=run.model.trained_state(),
        optimizer=updater.state_dict(),
        position=position,
        reports=record.reports,
        accuracy={name: metrics.to_lists(matrix) for name, matrix in record.matrices.items()},
        buffer=run.buffered_images(),
        global_batch=run.global_batch,
        num_images=_num_images(run),
        train_digest=run.stream.train_digest,
        config=record.config,
        class_order=record.class_order,
        class_names=record.class_names,
        test_sets=record.test_sets,
        backbone=record.backbone,
    )


def save(output_dir: Path, state: RunState, keep_newest: bool = True) -> None:
    """Writes the newest state, whole or not at all.

    Args:
        output_dir: Folder of the run.
        state: What to write.
        keep_newest: Whether what was the newest state takes the place of the one before it; a
            damaged one is put aside.
    """
    content = {"format": FORMAT, **{name: getattr(state, name) for name in _ENTRIES}}
    content["position"] = dataclasses.asdict(state.position)
    content["reports"] = [dataclasses.asdict(report) for report in state.reports]
    path = newest_path(output_dir)
    keep = _before(path) if keep_newest else path.with_name("last_damaged.pth")
    files.write_bytes(path, checkpoints.sealed(content), keep=keep)


def find(args: argparse.Namespace, output_dir: Path | None) -> tuple[Path, RunState] | None:
    """The state that `--resume` means, the same in all processes; None: the run begins.

    Raises:
        CheckpointError: If the state that it names, or every state there is, is damaged.
        UsageError: If it names no state.
    """
    if args.resume is None:
        return None
    path, content = None, b""
    if processes.is_main_process():
        path, content = _read_newest(args.resume, output_dir)
    content = processes.share_bytes(content)
    name = processes.share_bytes(str(path or "").encode()).decode()
    return (Path(name), _parse(content, name)) if content else None


def check_settings(args: argparse.Namespace, world_size: int, path: Path, state: RunState) -> None:
    """Makes sure that the command line describes the run that the state belongs to.

    Raises:
        UsageError: With every setting that would change the mathematics.
    """
    stored, given = {**options.defaults(), **state.config}, build.resolved(args)
    given["vote_group_size"] = build.vote_group_size(args)
    differences = [
        f"--{name} {options.shown(given[name])}, where the run has {options.shown(stored[name])}"
        for name in sorted(given.keys() & stored.keys())
        if name not in _FREE and not build.same(name, given[name], stored[name])
    ]
    batch = global_batch(args, world_size, state)
    if batch != state.global_batch:
        differences.append(
            f"--batch-size {args.batch_size} in {world_size} processes, {batch} images a step, "
            f"where the run has {state.global_batch}"
        )
    was = argparse.Namespace(**stored)
    replayed, stored_replayed = build.replayed_per_group(args), build.replayed_per_group(was)
    if replayed != stored_replayed:
        differences.append(
            f"{replayed} replayed images with each vote group, where the run has {stored_replayed}"
        )
    lr = build.learning_rate(args, batch)
    stored_lr = build.learning_rate(was, state.global_batch)
    if lr != stored_lr:
        differences.append(f"a learning rate of {lr:g}, where the run has {stored_lr:g}")
    if differences:
        raise UsageError(
            [
                f"--resume: {path} belongs to a run with other settings, and going on with these "
                "would mix two runs: give the same, or start anew without --resume",
                *differences,
            ]
        )


def global_batch(args: argparse.Namespace, world_size: int, state: RunState) -> int:
    """Images of all processes in a training step.

    The same command in another number of processes keeps what the run had.
    """
    if args.batch_size == state.config["batch_size"]:
        return state.global_batch
    return args.batch_size * world_size


def restore(run: Experiment, path: Path, state: RunState) -> None:
    """Brings model and results to where the state was taken.

    Raises:
        CheckpointError, WeightsError: If it belongs to another run or does not fit the model.
    """
    if state.num_images != _num_images(run):
        raise CheckpointError(
            f"{path} belongs to a run on {state.num_images} training images in the tasks, "
            f"--data-path has {_num_images(run)}: give the same data"
        )
    if state.train_digest not in (None, run.stream.train_digest):
        raise CheckpointError(
            f"{path} belongs to a run on other images, or on the same under other names: give the "
            "same data (--data-path, --file_lists, --domains)"
        )
    run.model.load_trained_state(state.model, str(path))
    for name, rows in state.accuracy.items():
        matrix = metrics.from_lists(rows)
        if name not in run.record.matrices or run.record.matrices[name].shape != matrix.shape:
            raise CheckpointError(f"{path}: its accuracy matrices are of another run")
        run.record.matrices[name][:] = matrix
    run.record.reports[:] = state.reports
    if (run.buffer is None) != (state.buffer is None):
        raise CheckpointError(f"{path}: its replay buffer is of another run")
    if run.buffer is not None and state.buffer is not None:
        run.buffer.indices = state.buffer.numpy()


def belongs_to(path: Path, output_dir: Path) -> bool:
    """Whether a state lies where a run in that folder keeps its own."""
    return path.resolve().parent == newest_path(output_dir).resolve().parent


def copy_task_checkpoints(path: Path, state: RunState, output_dir: Path) -> None:
    """Copies the checkpoints of finished tasks from beside a state into another run's folder."""
    path = path.resolve()
    if path.parent.name != "checkpoint":
        return
    for number, source in checkpoints.find(path.parent.parent).items():
        if number <= len(state.reports):
            files.write_bytes(checkpoints.task_path(output_dir, number), source.read_bytes())


def _num_images(run: Experiment) -> list[int]:
    return [len(task.data) for task in run.stream.tasks]


def _before(newest: Path) -> Path:
    return newest.with_name("last_but_one.pth")


def _read_newest(resume: str, output_dir: Path | None) -> tuple[Path | None, bytes]:
    """The newest state that is not damaged, and its bytes; (None, b"") if the run has none yet."""
    candidates = _candidates(resume, output_dir)
    if not candidates and resume == "auto":
        return None, b""
    if not candidates:
        raise UsageError([f"--resume {resume}: there is no state of a run, such as last.pth"])
    for path in candidates:
        try:
            content = path.read_bytes()
            _parse(content, str(path))
        except (CheckpointError, OSError) as error:
            logger.warning("Not used: %s", error)
        else:
            return path, content
    names = " and ".join(str(path) for path in candidates)
    raise CheckpointError(
        f"--resume: no state is left that could be read ({names}); without --resume the run starts "
        "anew, and what lies there is kept in previous/"
    )


def _candidates(resume: str, output_dir: Path | None) -> list[Path]:
    """States that `--resume` may mean, newest first."""
    if resume == "auto":
        folders = [] if output_dir is None else [newest_path(output_dir).parent]
    elif Path(resume).is_dir():
        folders = [newest_path(Path(resume)).parent, Path(resume)]
    else:
        return [Path(resume)] if Path(resume).exists() else []
    newest = [folder / newest_path(folder).name for folder in folders]
    return [path for last in newest for path in (last, _before(last)) if path.exists()]


def _parse(content: bytes, name: str) -> RunState:
    found = checkpoints.read_sealed(content, name)
    if found.get("format") == _FIRST_FORMAT:
        found = {"train_digest": None, **checkpoints.upgraded(found), "format": FORMAT}
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} is no state of a run (a checkpoint of a task can only be evaluated): "
            "--resume reads last.pth"
        )
    found = checkpoints.check_entries(found, _ENTRIES, name)
    try:
        found["position"] = _position(found["position"])
        found["reports"] = [_report(report) for report in found["reports"]]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{name} is damaged: {utils.reason(error)}") from error
    return RunState(**found)


def _position(content: dict[str, Any]) -> Position:
    if missing := {field.name for field in dataclasses.fields(Position)} - content.keys():
        raise KeyError(*missing)
    return Position(**{**content, "evaluations": _evaluations(content)})


def _report(content: dict[str, Any]) -> TaskReport:
    return TaskReport(**{**content, "evaluations": _evaluations(content)})


def _evaluations(content: dict[str, Any]) -> list[Evaluation]:
    return [Evaluation(**evaluation) for evaluation in content["evaluations"]]


_ENTRIES: Entries = {
    **checkpoints.ORIGIN_ENTRIES,
    "optimizer": (
        "the state of an optimizer",
        lambda value: isinstance(value, dict) and {"state", "param_groups"} <= value.keys(),
    ),
    "position": ("a place in the run", lambda value: isinstance(value, dict)),
    "reports": ("reports of tasks", lambda value: isinstance(value, list)),
    "global_batch": ("a number", lambda value: isinstance(value, int) and value > 0),
    "num_images": ("numbers", lambda value: isinstance(value, list)),
    "train_digest": ("a digest, or None", lambda value: isinstance(value, str | None)),
}
