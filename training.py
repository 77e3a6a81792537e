"""A training run: where it begins, what it saves and when, and how it ends."""

import argparse
import logging
import shlex
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import checkpoints
import engine
import files
import metrics
import options
import plots
import results
import resume
import settings
import utils
from checkpoints import Checkpoint
from engine import NonFiniteLossError, Position, TaskReport
from experiment import Experiment, assemble, check_same_run, describe
from preemption import Preempted, StopSignals
from processes import Processes, is_main_process, wait_for_all
from resume import RunState
from updates import Updater

logger = logging.getLogger(__name__)


def prepare(
    args: argparse.Namespace, processes: Processes
) -> tuple[Experiment, tuple[Path, RunState] | None]:
    """Assembles a run and brings it to where it begins.

    Returns:
        The run, and the state that it goes on from, if any, with where that lies.

    Raises:
        UsageError: If the state to go on from belongs to other settings.
        CheckpointError: If it is damaged, or belongs to other data or another backbone.
        DataError, WeightsError: See `experiment.assemble`.
    """
    output_dir = Path(args.output_dir) if args.output_dir else None
    found = resume.find(args, output_dir)
    if found is None:
        return assemble(args, processes), None
    resume.check_settings(args, processes.world_size, *found)
    global_batch = resume.global_batch(args, processes.world_size, found[1])
    experiment = assemble(args, processes, global_batch=global_batch)
    check_same_run(experiment, found[1], found[0])
    resume.restore(experiment, *found)
    return experiment, found


def run(
    args: argparse.Namespace,
    processes: Processes,
    signals: StopSignals,
    experiment: Experiment,
    found: tuple[Path, RunState] | None,
) -> None:
    """Trains on all tasks, evaluating after each; writes everything to `--output_dir`.

    Args:
        args: Validated settings.
        processes: This process among all.
        signals: Tell that the run shall stop.
        experiment: The run.
        found: The state that it goes on from, and where that lies.

    Raises:
        Preempted: When it was asked to stop; what it has learned is saved.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    output_dir = Path(args.output_dir) if args.output_dir else None
    _start_output(args, output_dir, found)
    describe(args, experiment, processes)
    start = time.monotonic()
    keeper = Keeper(experiment, output_dir, args.save_every, signals, found)
    _train(args, experiment, keeper, None if found is None else found[1])
    logger.info("Total training time: %s", timedelta(seconds=int(time.monotonic() - start)))
    _finish(experiment, output_dir)


class Keeper(engine.Monitor):
    """Saves a run as it goes on, and stops it when it is asked to.

    Args:
        experiment: The run.
        output_dir: Its folder; None: nothing is saved.
        save_every: Seconds between two states inside an epoch.
        signals: Tell that the run shall stop.
        found: The state that it goes on from, and where that lies.
    """

    def __init__(
        self,
        experiment: Experiment,
        output_dir: Path | None,
        save_every: float,
        signals: StopSignals,
        found: tuple[Path, RunState] | None = None,
    ) -> None:
        self.experiment, self.signals = experiment, signals
        self.saves = output_dir is not None
        self.output_dir = output_dir if is_main_process() else None
        self.save_every = save_every
        self.saved = time.monotonic()
        self.newest_is_good = True
        if found is not None and self.output_dir is not None:
            newest = resume.newest_path(self.output_dir)
            self.newest_is_good = found[0].resolve() == newest.resolve()

    def wants_to_stop(self) -> bool:
        """Whether a signal came to this process."""
        return self.signals.received is not None

    def in_evaluation(self) -> None:
        """Ends an evaluation at once: the state of the boundary before it is saved."""
        if self.wants_to_stop():
            raise Preempted(self._word("in an evaluation, which will be done again"))

    def at_boundary(self, position: Position, updater: Updater, stop: bool = False) -> None:
        """Saves the state at milestones, when it is due, and before the run stops.

        No process stops before the state is saved: the others would be stopped with it.
        """
        if self.output_dir is not None:
            due = time.monotonic() - self.saved >= self.save_every
            if due or stop or self._is_milestone(position):
                state = resume.take(self.experiment, position, updater)
                resume.save(self.output_dir, state, self.newest_is_good)
                self.saved, self.newest_is_good = time.monotonic(), True
        if stop:
            wait_for_all("saved")  # one that ended before would end the main process, too
            place = f"task {position.task + 1}, epoch {position.epoch + 1}, step {position.step}"
            raise Preempted(self._word(f"after {place}"))

    def at_task_end(self, report: TaskReport) -> None:
        """Keeps images of a task for replay; writes its checkpoint, if evaluated, and results."""
        self.experiment.record.reports.append(report)
        if self.experiment.buffer is not None:
            task = self.experiment.stream.tasks[report.task]
            self.experiment.buffer.add(task.data.indices)
        if self.output_dir is not None and report.evaluations:
            number = report.task + 1
            path = checkpoints.task_path(self.output_dir, number)
            save_checkpoint(self.experiment, path, number)
            self.experiment.record.write(self.output_dir)

    def _is_milestone(self, position: Position) -> bool:
        """Whether an epoch or a task has ended, of a task that an evaluation follows."""
        if position.step > 0 or position.evaluations:
            return False
        tasks = self.experiment.stream.tasks
        return bool(tasks[position.task - (not position.inside_task)].test_sets)

    def _word(self, place: str) -> str:
        signal = self.signals.received
        by = "another process" if signal is None else signal.name
        how = "the same command with --resume auto goes on" if self.saves else "nothing is saved"
        return f"{by} stopped the run {place}: {how}"


def save_checkpoint(experiment: Experiment, path: Path, task: int) -> None:
    """Writes a checkpoint of the model as it is.

    Args:
        experiment: The run.
        path: The file.
        task: 1-based number of the last finished task; 0: none.
    """
    record = experiment.record
    checkpoint = Checkpoint(
        model=experiment.model.trained_state(),
        task=task,
        config=record.config,
        class_order=record.class_order,
        class_names=record.class_names,
        test_sets=record.test_sets,
        backbone=record.backbone,
        accuracy={name: metrics.to_lists(matrix) for name, matrix in record.matrices.items()},
        buffer=experiment.buffered_images(),
    )
    checkpoints.save(path, checkpoint)


def _train(
    args: argparse.Namespace, experiment: Experiment, keeper: Keeper, state: RunState | None
) -> None:
    """The task loop, from a state on if there is one."""
    lr = settings.learning_rate(args, experiment.global_batch)
    try:
        with keeper.signals.deferred():
            engine.train_and_evaluate(
                experiment.model,
                experiment.stream.tasks,
                experiment.train_loader,
                experiment.test_loader,
                partial(settings.make_optimizer, args, experiment.model, lr),
                partial(settings.make_scheduler, args),
                experiment.record.matrices,
                experiment.options,
                keeper,
                position=None if state is None else state.position,
                optimizer_state=None if state is None else state.optimizer,
            )
    except NonFiniteLossError:
        if keeper.output_dir is not None:
            path = keeper.output_dir / "checkpoint" / "last_finite_checkpoint.pth"
            save_checkpoint(experiment, path, len(experiment.record.reports))
            logger.error("Saved the state before that step to %s", path)
        wait_for_all("saved")
        raise


def _start_output(
    args: argparse.Namespace, output_dir: Path | None, found: tuple[Path, RunState] | None
) -> None:
    """Makes room for the results of this run and writes down its settings."""
    if output_dir is None or not is_main_process():
        return
    goes_on_here = found is not None and resume.belongs_to(found[0], output_dir)
    earlier = None if goes_on_here else results.set_aside(output_dir)
    utils.log_to_file(output_dir / "log.txt")
    if earlier is not None:
        logger.info("The results of an earlier run were moved to %s", earlier)
    if found is not None:
        _tell_resumed(*found)
        if goes_on_here:
            files.remove_unfinished(found[0].parent)
        else:
            resume.copy_task_checkpoints(*found, output_dir)
    elif args.resume is not None:
        logger.info("There is no state to go on from yet: the run begins")
    files.write_text(output_dir / "config.yaml", options.to_yaml(settings.resolved(args)))


def _tell_resumed(path: Path, state: RunState) -> None:
    position = state.position
    if position.task >= len(state.class_order or ()):
        logger.info("The run is complete already (%s)", path)
        return
    logger.info(
        "Going on from %s: task %d, %d of %d epochs and %d steps done",
        *(path, position.task + 1, position.epoch, state.config["epochs"], position.step),
    )


def _finish(experiment: Experiment, output_dir: Path | None) -> None:
    logger.info("%s", experiment.record.table())
    if output_dir is None or not is_main_process():
        return
    experiment.record.write(output_dir)
    picture = output_dir / "results.png"
    plots.draw_results(experiment.record.as_dict(), picture)
    logger.info("Results: %s and %s", output_dir / "results.json", picture)
    folder = shlex.quote(str(output_dir))
    logger.info("Evaluate again: bash train.sh --eval --output_dir %s", folder)
