"""`--dry_run`: one step of a run, and one batch of its evaluation, without results."""

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import engine
from experiment import describe, run_record
from experiment.build import Experiment
from experiment.resume import SavedRun
from training.evaluation import evaluate
from training.state import Loader, TrainState

logger = logging.getLogger(__name__)


def try_out(experiment: Experiment, saved: SavedRun | None) -> None:
    """Logs what a run will do, trains one step of it, evaluates one batch, and leaves no results.

    The step is that of the task at which it would resume from a saved state, if there is one.

    Raises:
        DataError: If an image cannot be read.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    describe.describe(experiment)
    first = 0 if saved is None else saved.state.position.task
    tasks = experiment.stream.tasks[first:]
    if not tasks:
        logger.info("Dry run: the run is complete already (%s)", saved and saved.path)
        return
    task, test_set = tasks[0], experiment.stream.test_sets[0]
    if experiment.buffer is not None and first == 0:  # the second task takes more memory
        experiment.buffer.add(task.data.indices)
        task = tasks[1]
    model, run = experiment.model, experiment.loop
    start = time.monotonic()
    loader, state = FirstBatch(run.train_loader(task)), TrainState(task.index)
    stats = engine.train_one_epoch(model, loader, engine.make_update(model, run), task, state, run)
    trained = time.monotonic()
    evaluate(model, FirstBatch(run.test_loader(test_set)), test_set, run)
    logger.info(
        "Dry run: one step with loss %.4f in %.1f s, one batch of test images in %.1f s; no "
        "results were written. Leave --dry_run out to start the run",
        stats["Loss"],
        trained - start,
        time.monotonic() - trained,
    )
    folder = experiment.settings.output_folder
    if saved is None and folder is not None and run_record.earlier_files(folder):
        logger.info("The run would move the earlier results in %s to previous/", folder)


class FirstBatch:
    """The first batch of a loader, as a loader; the sampler is that of one for training."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.batch_sampler = loader, getattr(loader, "batch_sampler", None)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, 1)
