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
    """Says what a run will do, trains one step of it, evaluates one batch, and leaves no results.

    Args:
        experiment: The run.
        saved: The state that it would resume from, if any.

    Raises:
        DataError: If an image cannot be read.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    describe.describe(experiment)
    tasks = experiment.stream.tasks
    first = 0 if saved is None else saved.state.position.task
    if first >= len(tasks):
        logger.info("Dry run: the run is complete already (%s)", saved and saved.path)
        return
    task = tasks[first]
    if experiment.buffer is not None and task.index == 0:  # the next one takes more memory
        experiment.buffer.add(task.data.indices)
        task = tasks[1]
    run = experiment.loop()
    update = engine.make_update(experiment.model, run)
    start = time.monotonic()
    loader, state = FirstBatch(experiment.train_loader(task)), TrainState(task.index)
    stats = engine.train_one_epoch(experiment.model, loader, update, task, state, run)
    trained = time.monotonic()
    test_set = experiment.stream.test_sets[0]
    evaluate(experiment.model, FirstBatch(experiment.test_loader(test_set)), test_set, run)
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
    """The first batch of a loader, as a loader.

    Args:
        loader: See `training.state.Loader`.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    @property
    def batch_sampler(self) -> Any:
        """That of the loader, if it is one for training."""
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), 1)
