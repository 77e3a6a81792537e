"""`--dry_run`: one step of a run, and one batch of its evaluation, without results."""

import itertools
import logging
import time
from typing import Any

import engine
from experiment import describe, run_record
from experiment.resume import RunState
from training.evaluation import evaluate
from training.state import Loader, Run, TrainState
from training.update import OptimizerStep

logger = logging.getLogger(__name__)


def try_out(run: Run, saved: RunState | None) -> None:
    """Logs what a run will do, trains one step of it, evaluates one batch, and leaves no results.

    The step is that of the task at which it would resume from a saved state, if there is one.

    Raises:
        DataError: If an image cannot be read.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    describe.describe(run)
    earlier = run.stream.num_earlier
    first = earlier if saved is None else saved.position.task
    tasks = run.stream.tasks[first:]
    if not tasks:
        logger.info("Dry run: the run is complete already (%s)", saved and saved.path)
        return
    task, test_set = tasks[0], next(row for row in run.stream.test_sets if len(row.data))
    if run.buffer is not None and first == earlier and len(tasks) > 1:  # the next takes more memory
        run.buffer.add(task.data.indices)
        task = tasks[1]
    start = time.monotonic()
    loader, state = FirstBatch(run.train_loader(task)), TrainState(task.index)
    stats = engine.train_one_epoch(run, loader, OptimizerStep(run), task, state)
    trained = time.monotonic()
    evaluate(run, FirstBatch(run.test_loader(test_set)), test_set)
    logger.info(
        "Dry run: one step with loss %.4f in %.1f s, one batch of test images in %.1f s; no "
        "results were written. Leave --dry_run out to start the run",
        stats["Loss"],
        trained - start,
        time.monotonic() - trained,
    )
    folder = run.settings.output_folder
    if saved is None and folder is not None and run_record.earlier_files(folder):
        logger.info("The run would move the earlier results in %s to previous/", folder)


class FirstBatch(list[Any]):
    """The first batch of a loader, as a loader; the sampler is that of one for training."""

    def __init__(self, loader: Loader) -> None:
        super().__init__(itertools.islice(loader, 1))
        self.batch_sampler = getattr(loader, "batch_sampler", None)
