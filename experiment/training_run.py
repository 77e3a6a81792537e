"""A training run: where it begins, what it saves and when, and how it ends."""

import argparse
import logging
import shlex
import time
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import engine
import utils
from cli import options
from continual_datasets.samplers import steps_per_epoch
from engine import NonFiniteLossError, Position, TaskReport
from experiment import build, checkpoints, describe, live_log, resume, run_record
from experiment.assemble import Experiment, assemble, check_same_run
from experiment.checkpoints import Checkpoint
from experiment.live_log import LiveLog
from experiment.resume import RunState
from experiment.signals import Preempted, StopSignals
from processes import Processes, is_main_process, wait_for_all
from reports import draw, files, metrics
from training.update import Updater

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


def is_complete(experiment: Experiment, found: tuple[Path, RunState] | None) -> bool:
    """Whether all tasks were learned by the state that a run goes on from, in its own folder."""
    if found is None or found[1].position.task < experiment.stream.num_tasks:
        return False
    return (found[0].parent.parent / "results.json").exists()


def run(
    args: argparse.Namespace,
    processes: Processes,
    signals: StopSignals,
    experiment: Experiment,
    found: tuple[Path, RunState] | None,
    seconds_to_load: float = 0.0,
) -> None:
    """Trains on all tasks, evaluating after each; writes everything to `--output_dir`.

    Args:
        args: Validated settings.
        processes: This process among all.
        signals: Tell that the run shall stop.
        experiment: The run.
        found: The state that it goes on from, and where that lies.
        seconds_to_load: Wall time that it took to prepare the run.

    Raises:
        Preempted: When it was asked to stop; what it has learned is saved.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    output_dir = Path(args.output_dir) if args.output_dir else None
    _start_output(args, output_dir, found)
    describe.describe(args, experiment, processes)
    start = time.monotonic()
    with closing(_open_live_log(args, experiment, output_dir, found)) as live:
        keeper = Keeper(experiment, output_dir, args.save_every, signals, found, live)
        _train(args, experiment, keeper, None if found is None else found[1])
    seconds = time.monotonic() - start
    logger.info("Total training time: %s", timedelta(seconds=int(seconds)))
    _finish(args, experiment, keeper, seconds_to_load, seconds)


class Keeper(engine.Monitor):
    """Saves a run as it goes on, tells how it goes, and stops it when it is asked to.

    Args:
        experiment: The run.
        output_dir: Its folder; None: nothing is saved.
        save_every: Seconds between two states inside an epoch.
        signals: Tell that the run shall stop.
        found: The state that it goes on from, and where that lies.
        live: Is told how training goes.
    """

    def __init__(
        self,
        experiment: Experiment,
        output_dir: Path | None,
        save_every: float,
        signals: StopSignals,
        found: tuple[Path, RunState] | None = None,
        live: LiveLog | None = None,
    ) -> None:
        self.live = live or LiveLog([])
        self.logged = {} if found is None else dict(found[1].position.meters)
        self.seconds_saving = 0.0
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
        self._log_steps(position)
        if self.output_dir is not None:
            start = time.monotonic()
            if start - self.saved >= self.save_every or stop or self._is_milestone(position):
                state = resume.take(self.experiment, position, updater)
                resume.save(self.output_dir, state, self.newest_is_good)
                self.saved, self.newest_is_good = time.monotonic(), True
                self.seconds_saving += self.saved - start
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
        if report.evaluations:
            step = steps_before(self.experiment, report.task + 1)
            self.live.log_task(step, self.experiment.record, report)

    def _log_steps(self, position: Position) -> None:
        """Tells the live log the means over the steps that were read since the last call."""
        if not self.live.writers:
            return
        before, self.logged = self.logged, position.meters
        if position.step == 0:
            return
        means = {}
        for name, (total, count) in position.meters.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            if count > old_count:
                means[name] = (total - old_total) / (count - old_count)
        step = steps_before(self.experiment, position.task, position.epoch) + position.step
        self.live.log_training(step, means)

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


def steps_before(run: Experiment, task: int, epoch: int = 0) -> int:
    """Steps of the run before an epoch of a task, both counted from 0."""
    sizes = [len(task.data) for task in run.stream.tasks[: task + 1]]
    drop_last = run.record.config["drop_last"]
    steps = [steps_per_epoch(size, run.global_batch, drop_last) for size in sizes]
    return sum(steps[:task]) * run.options.epochs + sum(steps[task:]) * epoch


def _open_live_log(
    args: argparse.Namespace,
    run: Experiment,
    output_dir: Path | None,
    found: tuple[Path, RunState] | None,
) -> LiveLog:
    """The live logs that the settings ask for, in the main process; another one's has none."""
    if output_dir is None or not is_main_process():
        return LiveLog([])
    position = Position() if found is None else found[1].position
    return live_log.open_live_log(
        tensorboard=args.tensorboard,
        wandb=args.wandb,
        output_dir=output_dir,
        record=run.record,
        first_step=steps_before(run, position.task, position.epoch) + position.step,
        resumed=found is not None and resume.belongs_to(found[0], output_dir),
    )


def _train(
    args: argparse.Namespace, experiment: Experiment, keeper: Keeper, state: RunState | None
) -> None:
    """The task loop, from a state on if there is one."""
    lr = build.learning_rate(args, experiment.global_batch)
    try:
        with keeper.signals.deferred():
            engine.train_and_evaluate(
                experiment.model,
                experiment.stream.tasks,
                experiment.train_loader,
                experiment.test_loader,
                partial(build.make_optimizer, args, experiment.model, lr),
                partial(build.make_scheduler, args),
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
    earlier = None if goes_on_here else run_record.set_aside(output_dir)
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
    files.write_text(output_dir / "config.yaml", options.to_yaml(build.resolved(args)))


def _tell_resumed(path: Path, state: RunState) -> None:
    position = state.position
    if position.task >= len(state.class_order or ()):
        logger.info("The run is complete already (%s)", path)
        return
    logger.info(
        "Going on from %s: task %d, %d of %d epochs and %d steps done",
        *(path, position.task + 1, position.epoch, state.config["epochs"], position.step),
    )


def _finish(
    args: argparse.Namespace,
    experiment: Experiment,
    keeper: Keeper,
    seconds_to_load: float,
    seconds_of_run: float,
) -> None:
    """Prints the results, writes them, draws them, and tells where all of it is."""
    record, output_dir = experiment.record, keeper.output_dir
    logger.info("%s", record.table())
    if output_dir is None:
        return
    record.write(output_dir)
    start = time.monotonic()
    if args.plots:
        _draw(record.as_dict(), output_dir)
    seconds = {
        "training": sum(report.train_seconds for report in record.reports),
        "evaluation": sum(report.eval_seconds for report in record.reports),
        "loading": seconds_to_load,
        "saving": keeper.seconds_saving,
        "pictures": time.monotonic() - start,
    }
    total = seconds_to_load + seconds_of_run + seconds["pictures"]
    describe.conclude(output_dir, seconds, total)


def _draw(content: dict[str, Any], output_dir: Path) -> None:
    """Draws the results; whatever goes wrong, the run is done and can be drawn again."""
    try:
        _, left_out = draw.draw_run(content, output_dir / "plots")
    except (OSError, ValueError) as error:
        logger.warning("The pictures are not drawn (%s)", utils.reason(error))
        logger.warning("Draw them again: python plots.py %s", shlex.quote(str(output_dir)))
        return
    for reason in left_out:
        logger.info("Not drawn: %s", reason)
