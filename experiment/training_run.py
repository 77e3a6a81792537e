"""A training run: its folder, what it saves and when, what it reports at its end."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import utils
from cli import configurations
from cli.paths import command
from cli.terminal import tolerated
from experiment import checkpoints, describe, live_log, predictions, resume, run_record
from experiment.live_log import LiveLog
from experiment.resume import RunState
from experiment.signals import Preempted, StopSignals
from reports import draw, files
from training.state import Monitor, NonFiniteLossError, Run, TrainState
from training.update import OptimizerStep
from utils import wait_for_all

logger = logging.getLogger(__name__)


@contextmanager
def recorded(
    run: Run, signals: StopSignals, saved: RunState | None, seconds_to_load: float = 0
) -> Iterator[None]:
    """Saves and logs the training of the run in its body; reports the results after it.

    Args:
        run: The run.
        signals: Stop requests, which take effect at step boundaries meanwhile.
        saved: The state that it resumes from, if any.
        seconds_to_load: Wall time that it took to prepare the run.

    Raises:
        Preempted: When the run was asked to stop; what it has learned is saved.
    """
    if run.output_dir is not None:
        _start_output(run, saved, run.output_dir)
    describe.describe(run)
    start, position = time.monotonic(), saved.position if saved else TrainState()
    first_step = steps_before(run, position.task, position.epoch) + position.step
    with closing(live_log.open_live_log(run, first_step)) as live:
        run.monitor = checkpointer = Checkpointer(run, signals, saved, live)
        wait_for_all()  # the main process opened logs alone, perhaps over a network
        signals.idle = False
        try:
            yield
        except NonFiniteLossError:
            checkpointer.save_last_finite()
            raise
        finally:
            signals.idle = True
            run.monitor = Monitor()  # a cycle would keep the DataLoader's workers alive
    seconds = time.monotonic() - start
    logger.info("Total training time: %s", timedelta(seconds=int(seconds)))
    _report(run, checkpointer, seconds_to_load, seconds)


class Checkpointer(Monitor):
    """Saves a run as it proceeds, logs it, and stops it on request; arguments as of `recorded`."""

    def __init__(
        self, run: Run, signals: StopSignals, saved: RunState | None, live: LiveLog
    ) -> None:
        self.run, self.signals, self.live, self.output_dir = run, signals, live, run.output_dir
        self.seconds_saving, self.saved_at = 0.0, time.monotonic()
        self.logged = saved.position.meters if saved else {}
        newest = resume.newest_path(run.output_dir or Path()).resolve()
        self.newest_is_intact = saved is None or saved.path.resolve() == newest

    def wants_to_stop(self) -> bool:
        """Whether this process received a signal."""
        return bool(self.signals.received)

    def in_evaluation(self) -> None:
        """Ends an evaluation at once: the state of the boundary before it is saved."""
        if self.wants_to_stop():
            raise Preempted(self._stop_message("in an evaluation, which will be done again"))

    def at_boundary(self, state: TrainState, update: OptimizerStep, stop: bool = False) -> None:
        """Saves the state at milestones, when it is due, and before the run stops.

        No process stops before the state is saved: the others would be stopped with it.
        """
        self._log_steps(state)
        start = time.monotonic()
        is_due = start - self.saved_at >= self.run.settings.run.save_every
        if is_due or stop or self._is_milestone(state):
            if self.output_dir is not None:
                taken = resume.take(self.run, state, update)
                resume.save(self.output_dir, taken, self.newest_is_intact)
                self.newest_is_intact = True
            self.saved_at = time.monotonic()
            self.seconds_saving += self.saved_at - start
            self.signals.saved = self.run.settings.output_folder is not None
        if stop:
            wait_for_all()  # one that ended before would end the main process, too
            place = f"task {state.task + 1}, epoch {state.epoch + 1}, step {state.step}"
            raise Preempted(self._stop_message(f"after {place}"))

    def at_task_end(self, state: TrainState) -> None:
        """Stores images of a task for replay; writes its checkpoint, if evaluated, and results."""
        run, number = self.run, state.task + 1
        run.reports.append(state)
        if run.buffer is not None:
            run.buffer.add(run.stream.tasks[state.task].data.indices)
        if not state.evaluations:
            return
        if self.output_dir is not None:
            save_checkpoint(run, checkpoints.task_path(self.output_dir, number), number)
            run_record.write(run, self.output_dir)
        self.live.log_task(steps_before(run, number), run, state)
        wait_for_all()

    def save_last_finite(self) -> None:
        """Saves the model before the step whose loss is not finite."""
        if self.output_dir is not None:
            path = self.output_dir / "checkpoint" / "last_finite_checkpoint.pth"
            task = self.run.stream.num_earlier + len(self.run.reports)
            save_checkpoint(self.run, path, task)
            logger.error("Saved the state before that step to %s", path)
        wait_for_all()

    def _log_steps(self, state: TrainState) -> None:
        """Adds to the live log the means over the steps that were read since the last call."""
        before, self.logged = self.logged, state.meters
        means = {}
        for name, (total, count) in state.meters.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            if count > old_count:
                means[name] = (total - old_total) / (count - old_count)
        if means:
            step = steps_before(self.run, state.task, state.epoch) + state.step
            self.live.log_training(step, means)

    def _is_milestone(self, state: TrainState) -> bool:
        """Whether an epoch or a task has ended, of a task that an evaluation follows."""
        if state.step > 0 or state.evaluations:
            return False
        task = state.task if state.inside_task else state.task - 1
        return bool(self.run.stream.tasks[task].test_sets)

    def _stop_message(self, place: str) -> str:
        by = self.signals.received[0].name if self.signals.received else "another process"
        how = "resume it by the same command with --resume auto"
        return f"{by} stopped the run {place}: {how if self.signals.saved else 'nothing is saved'}"


def save_checkpoint(run: Run, path: Path, task: int) -> None:
    """Writes a checkpoint of the model as it is, after a task (1-based; 0: none is finished)."""
    entries = checkpoints.stored_model(run)
    checkpoints.write(path, {"format": checkpoints.FORMAT, **entries, "task": task})


def steps_before(run: Run, task: int, epoch: int = 0) -> int:
    """Steps of the run before an epoch of a task, both counted from 0."""
    steps = [run.batching.num_steps(len(one.data)) for one in run.stream.tasks[: task + 1]]
    return sum(steps[:task]) * run.settings.optimizer.epochs + sum(steps[task:]) * epoch


def _start_output(run: Run, saved: RunState | None, output_dir: Path) -> None:
    """Moves earlier results aside and writes the settings of this run."""
    own = resume.newest_path(output_dir).resolve().parent
    resumes_here = saved is not None and saved.path.resolve().parent == own
    earlier = None if resumes_here else run_record.set_aside(output_dir)
    utils.log_to_file(output_dir / "log.txt")
    if earlier is not None:
        logger.info("The results of an earlier run were moved to %s", earlier)
    if saved is not None:
        _log_resumed(saved)
        if not resumes_here:
            resume.copy_task_checkpoints(saved, output_dir)
    elif run.settings.run.resume is not None:
        logger.info("There is no state to resume from yet: the run starts at its first task")
    files.write_text(output_dir / "config.yaml", configurations.to_yaml(run.settings.stored()))


def _log_resumed(saved: RunState) -> None:
    at, epochs = saved.position, saved.config["epochs"]
    if at.task >= len(saved.class_order or ()):
        logger.info("The run is complete already (%s)", saved.path)
        return
    done = f"task {at.task + 1}, {at.epoch} of {epochs} epochs and {at.step} steps done"
    logger.info("Resuming from %s: %s", saved.path, done)


def _report(run: Run, checkpointer: Checkpointer, to_load: float, of_run: float) -> None:
    """Prints the results, writes them, draws them, and says where everything is."""
    logger.info("%s", run_record.table(run))
    describe.warn_of_single_classes(run)
    if (output_dir := run.output_dir) is None:
        return
    run_record.write(run, output_dir)
    if run.settings.output.save_predictions:
        predictions.write(run, output_dir / "predictions.csv")
    start = time.monotonic()
    if run.settings.output.plots:
        again = f"draw them again: {command('plots.py', output_dir)}"
        with tolerated("The figures are not drawn", again):
            content = run_record.results(run)
            for line in draw.draw_run(content, output_dir / "plots")[1]:
                logger.info("Not drawn: %s", line)
    seconds = {
        "training": sum(report.train_seconds for report in run.reports),
        "evaluation": sum(report.eval_seconds for report in run.reports),
        "loading": to_load,
        "saving": checkpointer.seconds_saving,
        "figures": time.monotonic() - start,
    }
    total = to_load + of_run + seconds["figures"]
    describe.conclude(run.settings, output_dir, seconds, total)
