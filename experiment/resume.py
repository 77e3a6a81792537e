"""`--resume`: the state of a run between two steps; a resumed run equals one that never stopped.

The newest state is stored in `checkpoint/last.pth`, the one before it in
`checkpoint/last_but_one.pth`; each is written whole or not at all, so one of them is always intact.
A state holds tensors and plain values only and is read with `weights_only`.

It is the same in all processes of a run, so one process writes it, and any number may resume.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import utils
from cli.parser import UsageError, shown
from cli.settings import Settings, find_flag, names_of
from experiment import checkpoints
from experiment.build import Experiment
from experiment.checkpoints import CheckpointError, Entries
from experiment.provenance import check_same_run, same_value
from reports import files, metrics
from training.state import Evaluation, TaskReport, TrainState
from training.update import OptimizerStep
from utils import Processes

FORMAT = "l2p run state 2"
#: The same without a buffer.
_FIRST_FORMAT = "l2p run state 1"

#: Settings that may differ in a resumed run: where things are, and how they are computed. What
#: follows from some of them (images of a step, learning rate, backbone, class order) is compared.
_FREE = (
    *names_of("compute"), "data_path", "pretrained", "batch_size", "lr", "lr_scale", "class_order",
    "replay_batch", "file_lists",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """A run between two steps.

    Attributes:
        model: Trained tensors by public name.
        optimizer: State dict of the optimizer.
        position: Where the run is.
        reports: One for each finished task.
        accuracy: Accuracy matrix so far for each selection, percent, None where not evaluated.
        buffer: Numbers of the training images to replay; None without replay.
        global_batch: Images of all processes in a training step.
        num_images: Training images of each task.
        train_digest: Identifies the training images; None: not known.
        config: Resolved settings of the run, plain values.
        class_order: Class ids of each task.
        class_names: Name of every class.
        test_sets: Name of each test set; None: not known.
        backbone: `name`, `source` and `sha256` of the frozen network.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    position: TrainState
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


@dataclass(frozen=True)
class SavedRun:
    """A state that a run resumes from.

    Attributes:
        path: Its file.
        state: What the file holds.
    """

    path: Path
    state: RunState

    def global_batch(self, settings: Settings, world_size: int) -> int:
        """Images of all processes in a training step.

        The same command in another number of processes keeps what the run had.
        """
        batch_size = settings.optimizer.batch_size
        if batch_size == self.state.config["batch_size"]:
            return self.state.global_batch
        return batch_size * world_size

    def belongs_to(self, output_dir: Path) -> bool:
        """Whether it is stored where a run in that folder stores its own."""
        return self.path.resolve().parent == newest_path(output_dir).resolve().parent

    def is_complete(self, num_tasks: int) -> bool:
        """Whether all tasks were learned, and the results written, in its own folder."""
        if self.state.position.task < num_tasks:
            return False
        return (self.path.parent.parent / "results.json").exists()


def newest_path(output_dir: Path) -> Path:
    """Where the newest state of a run is stored."""
    return output_dir / "checkpoint" / "last.pth"


def take(run: Experiment, position: TrainState, update: OptimizerStep) -> RunState:
    """The state of a run at a boundary."""
    record = run.record
    return RunState(
        model=run.model.trained_state(),
        optimizer=update.state_dict(),
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
    content["position"] = {
        name: value
        for name, value in dataclasses.asdict(state.position).items()
        if name in _POSITION_ENTRIES
    }
    content["reports"] = [dataclasses.asdict(report) for report in state.reports]
    path = newest_path(output_dir)
    keep = _before(path) if keep_newest else path.with_name("last_damaged.pth")
    files.write_bytes(path, checkpoints.sealed(content), keep=keep)


def find(settings: Settings, this: Processes) -> SavedRun | None:
    """The state that `--resume` names, the same in all processes; None: the run starts afresh.

    Args:
        settings: Settings of the run.
        this: This process among all.

    Raises:
        CheckpointError: If the state that it names, or every state there is, is damaged.
        UsageError: If it names no state, or one of a run with other settings.
    """
    if settings.run.resume is None:
        return None
    path, content = None, b""
    if utils.is_main_process():
        path, content = _read_newest(settings.run.resume, settings.output_folder)
    content = utils.share_bytes(content)
    name = utils.share_bytes(str(path or "").encode()).decode()
    if not content:
        return None
    saved = SavedRun(Path(name), _parse(content, name))
    _check_settings(settings, this.world_size, saved)
    return saved


def _check_settings(settings: Settings, world_size: int, saved: SavedRun) -> None:
    """Makes sure that the command line describes the run that the state belongs to.

    Raises:
        UsageError: With every setting that would change the mathematics.
    """
    state, batch = saved.state, saved.global_batch(settings, world_size)
    stored = {**Settings().stored(), **state.config}
    given = {**settings.stored(), "vote_group_size": settings.vote_group_size}
    differences = [
        f"{find_flag(name).spelling} {shown(given[name])}, where the run has {shown(stored[name])}"
        for name in sorted(given.keys() & stored.keys())
        if name not in _FREE and not same_value(name, given[name], stored[name])
    ]
    if batch != state.global_batch:
        differences.append(
            f"--batch-size {settings.optimizer.batch_size} in {world_size} processes, {batch} "
            f"images a step, where the run has {state.global_batch}"
        )
    was = Settings().replace(**{name: stored[name] for name in given})
    replayed, stored_replayed = settings.replayed_per_group, was.replayed_per_group
    if replayed != stored_replayed:
        differences.append(
            f"{replayed} replayed images with each vote group, where the run has {stored_replayed}"
        )
    lr = settings.optimizer.learning_rate(batch)
    stored_lr = was.optimizer.learning_rate(state.global_batch)
    if lr != stored_lr:
        given_lr = f"--lr {settings.optimizer.lr:g}, scaled {settings.optimizer.lr_scale}"
        differences.append(
            f"a learning rate of {lr:g} ({given_lr}), where the run has {stored_lr:g}"
        )
    if differences:
        raise UsageError(
            [
                f"--resume: {saved.path} belongs to a run with other settings, and these would mix "
                "two runs: give the same, or start anew without --resume",
                *differences,
            ]
        )


def restore(run: Experiment, saved: SavedRun | None) -> TrainState:
    """Brings model and results to where a state was saved.

    Args:
        run: The run, as it was built.
        saved: The state; None: the run starts afresh.

    Returns:
        Where training starts.

    Raises:
        CheckpointError, WeightsError: If the state is of another run, or does not fit the model.
    """
    if saved is None:
        return TrainState()
    path, state = saved.path, saved.state
    check_same_run(run, state, path)
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
    return dataclasses.replace(state.position, optimizer=state.optimizer)


def copy_task_checkpoints(saved: SavedRun, output_dir: Path) -> None:
    """Copies the checkpoints of finished tasks from beside a state into another run's folder."""
    path = saved.path.resolve()
    if path.parent.name != "checkpoint":
        return
    for number, source in checkpoints.find(path.parent.parent).items():
        if number <= len(saved.state.reports):
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
        "anew, and the files there are moved to previous/"
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


def _position(content: dict[str, Any]) -> TrainState:
    if missing := set(_POSITION_ENTRIES) - content.keys():
        raise KeyError(*missing)
    return TrainState(**{**content, "evaluations": _evaluations(content)})


def _report(content: dict[str, Any]) -> TaskReport:
    return TaskReport(**{**content, "evaluations": _evaluations(content)})


def _evaluations(content: dict[str, Any]) -> list[Evaluation]:
    return [Evaluation(**evaluation) for evaluation in content["evaluations"]]


#: What a file stores of a `TrainState`; the optimizer has an entry of its own.
_POSITION_ENTRIES = [f.name for f in dataclasses.fields(TrainState) if f.name != "optimizer"]

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
