"""`--dry_run`: one step of a run, and one batch of its evaluation, without results."""

import argparse
import itertools
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engine
from engine import Position
from experiment import build, describe, run_record
from experiment.assemble import Experiment
from experiment.resume import RunState
from processes import Processes
from training import evaluation

logger = logging.getLogger(__name__)


def try_out(
    args: argparse.Namespace,
    processes: Processes,
    experiment: Experiment,
    found: tuple[Path, RunState] | None,
) -> None:
    """Says what a run will do, trains one step of it, evaluates one batch, and leaves no results.

    Args:
        args: Validated settings.
        processes: This process among all.
        experiment: The run.
        found: The state that it goes on from, and where that lies.

    Raises:
        DataError: If an image cannot be read.
        NonFiniteLossError: See `engine.train_one_epoch`.
    """
    describe.describe(args, experiment, processes)
    tasks, run = experiment.stream.tasks, experiment.options
    position = Position() if found is None else found[1].position
    if position.task >= len(tasks):
        logger.info("Dry run: the run is complete already (%s)", found and found[0])
        return
    task = tasks[position.task]
    if experiment.buffer is not None and task.index == 0:  # the next one takes more memory
        experiment.buffer.add(task.data.indices)
        task = tasks[1]
    lr = build.learning_rate(args, experiment.global_batch)
    make_optimizer = partial(build.make_optimizer, args, experiment.model, lr)
    updater = engine.make_updater(experiment.model, make_optimizer, run)
    start = time.monotonic()
    loader = FirstBatch(experiment.train_loader(task))
    stats = engine.train_one_epoch(experiment.model, loader, updater, task, 0, run)
    trained = time.monotonic()
    test_set = experiment.stream.test_sets[0]
    evaluation.evaluate(
        experiment.model, FirstBatch(experiment.test_loader(test_set)), test_set, run
    )
    logger.info(
        "Dry run: one step with loss %.4f in %.1f s, one batch of test images in %.1f s; there are "
        "no results of it. Without --dry_run it begins",
        *(stats["Loss"], trained - start, time.monotonic() - trained),
    )
    if found is None and args.output_dir and run_record.earlier_files(Path(args.output_dir)):
        logger.info("The earlier results in %s would move to previous/", args.output_dir)


class FirstBatch:
    """The first batch of a loader alone, as a loader.

    Args:
        loader: See `engine.Loader`.
    """

    def __init__(self, loader: engine.Loader) -> None:
        self.loader = loader

    @property
    def batch_sampler(self) -> Any:
        """That of the loader, if it is one for training."""
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), 1)
