"""`--resume`: the state of a run between two steps; a resumed run equals one that never stopped.

The newest state is stored in `checkpoint/last.pth`, the one before it in
`checkpoint/last_but_one.pth`; each is written whole or not at all, so one of them is always intact.
A state holds tensors and plain values only and is read with `weights_only`.

It is the same in all processes of a run, so one process writes it, and any number may resume.
"""

import dataclasses
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import utils
from cli.parser import UsageError, shown
from cli.settings import Settings, find_flag, names_of, plain
from continual_datasets.images import join_names
from continual_datasets.readers import registry
from experiment import checkpoints
from experiment.build import Experiment
from experiment.checkpoints import CheckpointError, StoredModel
from model import backbone
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


@dataclass(frozen=True, kw_only=True)
class RunState(StoredModel):
    """A run between two steps."""

    optimizer: dict[str, Any]  # its state dict
    position: TrainState
    reports: list[TaskReport]  # one for each finished task
    global_batch: int  # images of all processes in a training step
    num_images: list[int]  # training images of each task
    train_digest: str | None  # identifies the training images; None: not known


@dataclass(frozen=True)
class SavedRun:
    """A state that a run resumes from, and its file."""

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
        results = self.path.parent.parent / "results.json"
        return self.state.position.task >= num_tasks and results.exists()


def newest_path(output_dir: Path) -> Path:
    """Where the newest state of a run is stored."""
    return output_dir / "checkpoint" / "last.pth"


def take(run: Experiment, position: TrainState, update: OptimizerStep) -> RunState:
    """The state of a run at a boundary between two steps."""
    return RunState(
        **stored_model(run),
        optimizer=update.state_dict(),
        position=position,
        reports=run.record.reports,
        global_batch=run.global_batch,
        num_images=_num_images(run),
        train_digest=run.stream.train_digest,
    )


def stored_model(run: Experiment) -> dict[str, Any]:
    """The entries that the checkpoints and the states of a run share, see `StoredModel`."""
    record = run.record
    return {
        "model": run.model.trained_state(),
        "config": record.config,
        "class_order": record.class_order,
        "class_names": record.class_names,
        "test_sets": record.test_sets,
        "backbone": record.backbone,
        "accuracy": {name: metrics.to_lists(matrix) for name, matrix in record.matrices.items()},
        "buffer": None if run.buffer is None else torch.from_numpy(run.buffer.indices),
    }


def save(output_dir: Path, state: RunState, keep_newest: bool = True) -> None:
    """Writes the newest state of a run, whole or not at all.

    What was the newest takes the place of the one before it, unless `keep_newest` is false: a
    damaged one is put aside.
    """
    content = {
        "format": FORMAT,
        **vars(state),
        "position": dataclasses.asdict(dataclasses.replace(state.position, optimizer=None)),
        "reports": [dataclasses.asdict(report) for report in state.reports],
    }
    del content["position"]["optimizer"]  # it has an entry of its own
    path = newest_path(output_dir)
    keep = _before(path) if keep_newest else path.with_name("last_damaged.pth")
    checkpoints.write(path, content, keep)


def find(settings: Settings, this: Processes) -> SavedRun | None:
    """The state that `--resume` names, the same in all processes; None: the run starts afresh.

    Raises:
        CheckpointError: If the state that it names, or every state there is, is damaged.
        UsageError: If it names no state, or one of a run with other settings.
    """
    if settings.run.resume is None:
        return None
    name, content = "", b""
    if utils.is_main_process():
        name, content = _read_newest(settings.run.resume, settings.output_folder)
    name, content = utils.share((name, content))
    if not content:
        return None
    saved = SavedRun(Path(name), _parse(content, name))
    if differences := list(_other_settings(settings, this.world_size, saved)):
        advice = "these would mix two runs: give the same, or start anew without --resume"
        title = f"--resume: {name} belongs to a run with other settings, and {advice}"
        raise UsageError([title, *differences])
    return saved


def _other_settings(settings: Settings, world_size: int, saved: SavedRun) -> Iterator[str]:
    """Every setting of the command line that would change the mathematics of a saved run."""
    state, batch = saved.state, saved.global_batch(settings, world_size)
    stored = {**Settings().stored(), **state.config}
    given = {**settings.stored(), "vote_group_size": settings.vote_group_size}
    for name in sorted(given.keys() & stored.keys()):
        if name not in _FREE and not same_value(name, given[name], stored[name]):
            flag, old = find_flag(name).spelling, shown(stored[name])
            yield f"{flag} {shown(given[name])}, where the run has {old}"
    if batch != state.global_batch:
        yield (
            f"--batch-size {settings.optimizer.batch_size} in {world_size} processes, {batch} "
            f"images a step, where the run has {state.global_batch}"
        )
    earlier = Settings().replace(**{name: stored[name] for name in given})
    replayed, old_replayed = settings.replayed_per_group, earlier.replayed_per_group
    if replayed != old_replayed:
        yield f"{replayed} replayed images with each vote group, where the run has {old_replayed}"
    lr = settings.optimizer.learning_rate(batch)
    old_lr = earlier.optimizer.learning_rate(state.global_batch)
    if lr != old_lr:
        given_lr = f"--lr {settings.optimizer.lr:g}, scaled {settings.optimizer.lr_scale}"
        yield f"a learning rate of {lr:g} ({given_lr}), where the run has {old_lr:g}"


def restore(run: Experiment, saved: SavedRun | None) -> TrainState:
    """Brings model and results to where a state was saved; returns where training starts.

    Raises:
        CheckpointError, WeightsError: If the state is of another run, or does not fit the model.
    """
    if saved is None:
        return TrainState()
    path, state = saved.path, saved.state
    check_same_run(run, state, path)
    if state.num_images != (found := _num_images(run)):
        raise CheckpointError(
            f"{path} belongs to a run on {state.num_images} training images in the tasks, "
            f"--data-path has {found}: give the same data"
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


def _read_newest(resume: str, output_dir: Path | None) -> tuple[str, bytes]:
    """Path and bytes of the newest state that is not damaged; empty if the run has none yet."""
    candidates = _candidates(resume, output_dir)
    if not candidates and resume == "auto":
        return "", b""
    if not candidates:
        raise UsageError([f"--resume {resume}: there is no state of a run, such as last.pth"])
    for path in candidates:
        try:
            content = path.read_bytes()
            _parse(content, str(path))
        except (CheckpointError, OSError) as error:
            logger.warning("Not used: %s", error)
        else:
            return str(path), content
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
    found = checkpoints.read(io.BytesIO(content), name)
    if found.get("format") == _FIRST_FORMAT:
        found = {"train_digest": None, **checkpoints.upgraded(found), "format": FORMAT}
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} is no state of a run (a checkpoint of a task can only be evaluated): "
            "--resume reads last.pth"
        )
    found = checkpoints.check_entries(found, RunState, name)
    try:
        position = {**found["position"], "optimizer": None}
        found["position"] = TrainState(**checkpoints.check_entries(position, TrainState, name))
        found["reports"] = [TaskReport(**report) for report in found["reports"]]
        for owner in (found["position"], *found["reports"]):
            owner.evaluations[:] = [Evaluation(**values) for values in owner.evaluations]
    except TypeError as error:
        raise CheckpointError(f"{name} is damaged: {utils.reason(error)}") from error
    return RunState(**found)


def check_same_run(run: Experiment, stored: StoredModel, path: Path) -> None:
    """Makes sure that a file was written by a run on the same data and the same backbone.

    Raises:
        CheckpointError: Naming what differs.
    """
    test_sets = run.record.test_sets
    if stored.test_sets is not None and stored.test_sets != test_sets:
        raise CheckpointError(
            f"{path} was trained on other data: its test sets are {join_names(stored.test_sets)}, "
            f"those of this run {join_names(test_sets)}"
        )
    if stored.class_order != run.stream.class_order:
        raise CheckpointError(f"{path} has another class order than this run")
    found, wanted = list(run.stream.class_names), stored.class_names or []
    if found != wanted:
        pairs = zip(wanted, found, strict=False)
        differing = next((f"{a!r}, found {b!r}" for a, b in pairs if a != b), "")
        raise CheckpointError(
            f"{path} was trained on other data: it knows {len(wanted)} classes, --data-path has "
            f"{len(found)}" + (f"; expected the class {differing}" if differing else "")
        )
    old, own = stored.backbone, run.record.backbone
    if old is not None and old["sha256"] != own["sha256"]:
        raise CheckpointError(
            f"{path} was trained on the backbone {old['name']} ({old['source']}, sha256 "
            f"{old['sha256'][:12]}), found {own['name']} ({own['source']}, {own['sha256'][:12]}): "
            "give the same weights with --pretrained"
        )


def same_value(name: str, one: object, other: object) -> bool:
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
