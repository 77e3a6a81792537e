"""`--resume`: the state of a run between two steps; a resumed run equals one that never stopped.

The newest state is stored in `checkpoint/last.pth`, the one before it in
`checkpoint/last_but_one.pth`; each is written whole or not at all, so one of them is always intact.
A state holds tensors and plain values only and is read with `weights_only`.

It is the same in all processes of a run, so one process writes it, and any number may resume.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

import utils
from cli import kinds
from cli.kinds import Natural
from cli.parser import UsageError
from cli.paths import open_regular
from cli.settings import Settings, names_of
from cli.terminal import reason, said
from experiment import checkpoints, continuation
from experiment.checkpoints import Checkpoint, CheckpointError, StoredModel
from experiment.run_record import resolved
from reports import files
from training.state import Evaluation, Run, TrainState
from training.update import OptimizerStep
from utils import Processes

FORMAT = "l2p run state 2"
#: The same without a buffer.
_FIRST_FORMAT = "l2p run state 1"

#: What is not saved of a finished task.
_PLACE = {"epoch": 0, "step": 0, "meters": {}, "optimizer": None}

#: What steps change in the groups of an optimizer, and what depends on the device.
_OF_STEPS = {"lr", "initial_lr", "step", "lookahead_step", "fused"}

#: Settings that may differ in a resumed run: where things are, and how they are computed. What
#: follows from some of them (images of a step, learning rate, backbone, class order) is compared.
_FREE = (
    *names_of("compute"), "data_path", "pretrained", "batch_size", "lr", "lr_scale", "class_order",
    "replay_batch", "file_lists", "earlier_data", "continue_from",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunState(StoredModel):
    """A run between two steps."""

    optimizer: dict[str, Any]  # its state dict
    position: TrainState
    reports: list[TrainState]  # of each finished task, at its end
    #: Images of all processes in a training step.
    global_batch: Annotated[int, ("must be in [1, 2^24]", lambda x: 1 <= x <= 2**24)]
    num_images: list[Natural]  # training images of each task
    train_digest: str | None  # identifies the training images; None: not known
    test_digest: str | None = None  # the same of the test images

    def batch_of(self, settings: Settings, world_size: int) -> int:
        """Images of all processes in a step of a run with these settings that resumes.

        The same command in another number of processes keeps what the run had.
        """
        batch_size = settings.optimizer.batch_size
        unchanged = batch_size == self.config["batch_size"]
        return self.global_batch if unchanged else batch_size * world_size

    def is_complete(self, num_tasks: int) -> bool:
        """Whether all tasks were learned, and the results written, in its own folder."""
        results = self.path.parent.parent / "results.json"
        return self.position.task >= num_tasks and results.exists()


def newest_path(output_dir: Path) -> Path:
    """Where the newest state of a run is stored."""
    return output_dir / "checkpoint" / "last.pth"


def take(run: Run, position: TrainState, update: OptimizerStep) -> dict[str, Any]:
    """What is saved of a run at a boundary between two steps; see `RunState`."""
    place = dataclasses.asdict(position)
    del place["optimizer"]  # it has an entry of its own
    reports = [{"train_stats": r.train_stats, **dataclasses.asdict(r)} for r in run.reports]
    return {
        "format": FORMAT,
        **checkpoints.stored_model(run),
        "optimizer": update.state_dict(),
        "position": place,
        "reports": [{k: v for k, v in r.items() if k not in _PLACE} for r in reports],
        "global_batch": run.global_batch,
        "num_images": _num_images(run),
        "train_digest": run.stream.train_digest,
        "test_digest": run.stream.test_digest,
    }


def save(output_dir: Path, content: dict[str, Any], keep_newest: bool = True) -> None:
    """Writes the newest state of a run, as `take` gives it, whole or not at all.

    What was the newest takes the place of the one before it, unless `keep_newest` is false: a
    damaged one is put aside.
    """
    path = newest_path(output_dir)
    keep = _before(path) if keep_newest else path.with_name("last_damaged.pth")
    checkpoints.write(path, content, keep)


def find(settings: Settings, this: Processes) -> RunState | None:
    """The state that `--resume` names, the same in all processes; None: the run starts afresh.

    Raises:
        CheckpointError: If the state that it names, or every state there is, is damaged.
        UsageError: If it names no state, or one of a run with other settings.
    """
    resume, output_dir = settings.run.resume, settings.output_folder
    if resume is None or settings.run.speed_test_only:
        return None
    state = _read_newest(resume, output_dir) if utils.is_main_process() else None
    if (state := utils.share(state)) is None:
        return None
    if differences := list(_differences(settings, this.world_size, state)):
        advice = "these would mix two runs: give the same, or start anew without --resume"
        title = f"--resume: {state.path} belongs to a run with other settings, and {advice}"
        raise UsageError([title, *differences])
    return state


def load(path: Path) -> RunState:
    """Reads a state onto the CPU.

    Raises:
        CheckpointError: If the file is damaged, or is no state of a run.
    """
    found = checkpoints.read(path)
    if found.get("format") == _FIRST_FORMAT:
        found = {"train_digest": None, **checkpoints.upgraded(found), "format": FORMAT}
    found = {"test_digest": None, "buffer_digest": None, "earlier": [], **found}  # added later
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no state of a run (a checkpoint of a task can only be evaluated): "
            "--resume reads last.pth"
        )
    state: RunState = checkpoints.from_entries(RunState, found, path, path=path)
    position = _train_state(state.position, path, optimizer=None)
    reports = [_train_state(one, path, **_PLACE) for one in state.reports]
    config = {**Settings().stored(), **checkpoints.stored_settings(state.config, path)}
    earlier = checkpoints.stored_lineage(state)
    return dataclasses.replace(
        state, position=position, reports=reports, config=config, earlier=earlier
    )


def _differences(settings: Settings, world_size: int, state: RunState) -> Iterator[str]:
    """Every setting of the command line that would change the mathematics of a saved run."""
    batch, given = state.batch_of(settings, world_size), resolved(settings)
    for flag, old in checkpoints.other_settings(given, state.config, _FREE):
        yield f"{flag}, where the run has {old}"
    earlier = Settings().replace(**{name: state.config[name] for name in given})
    own, replayed = settings.optimizer, settings.replayed_per_group
    lr, old_lr = own.learning_rate(batch), earlier.optimizer.learning_rate(state.global_batch)
    images = f"--batch-size {own.batch_size} in {world_size} processes, {batch} images a step"
    derived = {
        images: (batch, state.global_batch),
        f"{replayed} replayed images with each vote group": (replayed, earlier.replayed_per_group),
        f"a learning rate of {lr:g} (--lr {own.lr:g}, scaled {own.lr_scale})": (lr, old_lr),
    }
    for what, (value, old_value) in derived.items():
        if value != old_value:
            yield f"{what}, where the run has {old_value:g}"


def restore(run: Run, state: RunState | None, ancestor: Checkpoint | None = None) -> TrainState:
    """Brings model and results to where a state was saved; returns where training starts.

    Without a state that is where the run that it continues ended, or its first task.

    Raises:
        CheckpointError, WeightsError: If the state is of another run, or does not fit the model.
    """
    if state is None:
        return TrainState() if ancestor is None else continuation.begin(run, ancestor)
    checkpoints.check_same_run(run, state)
    if state.num_images != (found := _num_images(run)):
        raise CheckpointError(
            f"{state.path} belongs to a run on {state.num_images} training images in the tasks, "
            f"--data-path has {found}: give the same data"
        )
    train, test = run.stream.train_digest, run.stream.test_digest
    of_labels = train.rpartition("-")[-1]  # all that early states have
    same_train = state.train_digest in (None, train, of_labels)
    same_test = state.test_digest in (None, test)
    if not (same_train and same_test):
        raise CheckpointError(
            f"{state.path} belongs to a run on other {'test ' if same_train else ''}images, or on "
            "the same under other names: give the same data (--data-path, --file_lists, --domains)"
        )
    if not _is_within(run, state):
        raise CheckpointError(f"{state.path} is damaged: this run has no such task, epoch or step")
    _try_optimizer(run, state)
    run.model.load_trained_state(state.model, str(state.path))
    for name, matrix in checkpoints.stored_matrices(run, state).items():
        run.matrices[name][:] = matrix
    run.reports[:] = state.reports
    if (run.buffer is None) != (state.buffer is None):
        raise CheckpointError(f"{state.path}: its replay buffer is of another run")
    if run.buffer is not None:
        checkpoints.restore_buffer(run.buffer, state)
    return dataclasses.replace(state.position, optimizer=state.optimizer)


def copy_task_checkpoints(state: RunState, output_dir: Path) -> None:
    """Copies the checkpoints of finished tasks from beside a state into another run's folder."""
    path = state.path.resolve()
    if path.parent.name != "checkpoint":
        return
    for number, source in checkpoints.find(path.parent.parent).items():
        if number <= state.position.task:
            with open_regular(source) as file:
                files.write_bytes(checkpoints.task_path(output_dir, number), file.read())


def _try_optimizer(run: Run, state: RunState) -> None:
    """Makes sure that an optimizer can step from a state; the step is lost with its weights."""
    update = OptimizerStep(run)
    fresh = update.optimizer.state_dict()["param_groups"]
    try:
        for group, stored in zip(fresh, state.optimizer["param_groups"], strict=True):
            for name in group.keys() - _OF_STEPS:
                assert stored.get(name, group[name]) == group[name], f"{name} is another"
        update.load_state_dict(copy.deepcopy(state.optimizer))
        for parameter in update.parameters:
            parameter.grad = torch.zeros_like(parameter)
        update.optimizer.step()
        assert all(p.isfinite().all() for p in update.parameters), "a step ends in no number"
    except Exception as error:  # torch checks little of a state
        if utils.is_out_of_memory(error):
            raise
        problem = f"its optimizer is damaged or does not fit: {reason(error)}"
        raise CheckpointError(f"{state.path}: {problem}") from error
    update.begin()


def _is_within(run: Run, state: RunState) -> bool:
    """Whether a run has the task, epoch, step and test sets where a state was saved."""
    position, tasks = state.position, run.stream.tasks
    for number, one in enumerate([*state.reports, position], start=run.stream.num_earlier):
        if one.task != number or number > len(tasks):
            return False
        sets = tasks[number].test_sets if number < len(tasks) else ()
        found = [evaluation.index for evaluation in one.evaluations]
        if found != [test_set.index for test_set in sets][: len(found)]:
            return False
    if position.task == len(tasks):
        return not position.inside_task
    steps = run.batching.num_steps(len(tasks[position.task].data))
    is_inside = position.epoch <= run.settings.optimizer.epochs and position.step <= steps
    return is_inside and bool(position.meters) == (position.step > 0)


def _num_images(run: Run) -> list[int]:
    return [len(task.data) for task in run.stream.tasks]


def _before(newest: Path) -> Path:
    return newest.with_name("last_but_one.pth")


def _read_newest(resume: str, output_dir: Path | None) -> RunState | None:
    """The newest state that is not damaged; None if the run has none yet."""
    candidates = _candidates(resume, output_dir)
    if not candidates and resume == "auto":
        return None
    if not candidates:
        raise UsageError([f"--resume {resume}: there is no state of a run, such as last.pth"])
    for path in candidates:
        try:
            return load(path)
        except (CheckpointError, OSError) as error:
            logger.warning("Not used: %s", said(error))
    names = " and ".join(str(path) for path in candidates)
    raise CheckpointError(
        f"--resume: no state is left that could be read ({names}); without --resume the run starts "
        "anew, and the files there are moved to previous/"
    )


def _candidates(resume: str, output_dir: Path | None) -> list[Path]:
    """States that `--resume` may mean, newest first."""
    if resume == "auto":
        newest = [] if output_dir is None else [newest_path(output_dir)]
    elif Path(resume).is_dir():
        newest = [newest_path(Path(resume)), Path(resume, "last.pth")]
    else:
        return [Path(resume)] if Path(resume).exists() else []
    return [path for last in newest for path in (last, _before(last)) if path.exists()]


def _train_state(saved: Any, path: Path, **known: Any) -> TrainState:
    """A state of a task, out of plain values and what is known beside them."""
    entries = {**saved}
    if "train_stats" in entries:  # the last of `epoch_stats`, which the first files lack
        entries = {"epoch_stats": [entries.pop("train_stats")], **entries}
    state: TrainState = checkpoints.from_entries(TrainState, entries, path, **known)
    values: Any = state.evaluations
    try:
        state.evaluations = [Evaluation(**one) for one in values]
    except TypeError as error:
        raise CheckpointError(f"{path} is damaged: {reason(error)}") from error
    for one in state.evaluations:
        for problem in kinds.problems(kinds.of_fields(Evaluation), vars(one)):
            raise CheckpointError(f"{path} is damaged: {problem} (an evaluation)")
    return state
