"""`--continue_from`: a run that starts from what a finished run learned.

The checkpoint brings prompts, keys, head, prompt frequencies and the replay buffer, and the
settings of model and prompts. The classes of the new data that it does not know get new rows of the
head. Its accuracy matrix is the first part of the new one.
"""

import dataclasses
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

import engine
import utils
from cli.flags import flags_of
from cli.parser import UsageError
from cli.paths import open_regular
from cli.settings import ModelSettings, PromptSettings, Settings, names_of
from cli.terminal import said
from continual_datasets.continuation import own_ids
from continual_datasets.images import DataError, Parts, join_names, sha256
from continual_datasets.readers import registry
from continual_datasets.replay import ReplayBuffer
from continual_datasets.scenarios import Scenario, TaskClasses, find_scenario
from continual_datasets.stream import Earlier
from experiment import checkpoints, image_check
from experiment.checkpoints import Checkpoint
from reports import metrics
from reports.metrics import SELECTIONS
from training.state import Run, TrainState

logger = logging.getLogger(__name__)

#: Settings of the model and of its input, which stay those of the run that is continued.
_FIXED = {one.name for group in (ModelSettings, PromptSettings) for one in flags_of(group)}
_FIXED -= {"pretrained", "head_init", "vote_group_size", "vote_ties"}
_FIXED |= {"input_size", "norm"}

#: What describes the new data, and is not taken over.
_OF_DATA = {
    "scenario", "num_tasks", "classes_per_task", "first_task_classes", "class_order", "joint",
    "gaussian_reading", "steps_per_task", "gaussian_sigma", "domains", "file_lists",
    "images_per_class", "earlier_data",
}  # fmt: skip

#: Two ways to give the size of the replay buffer: either takes the place of the ancestor's.
_BUFFER = {"buffer_size", "buffer_per_class"}


def find(settings: Settings) -> Checkpoint:
    """The checkpoint that `--continue_from` names: of a task, or the last one of a finished run.

    Raises:
        UsageError: If there is none, the run is not finished, or l2p-pytorch wrote it.
        CheckpointError: If it is damaged, or no checkpoint of a task.
    """
    path = Path(settings.run.continue_from or "")
    found = checkpoints.find_one(path, "--continue_from")
    if path.is_dir() and found.task < (total := len(found.class_order or [])):
        raise UsageError([
            f"--continue_from {path}: the run has learned {found.task} of {total} tasks; finish it "
            f"with --resume auto, or name the checkpoint ({found.path})"
        ])  # fmt: skip
    if not _is_complete(found):
        raise UsageError([
            f"--continue_from {path} does not name its classes and test sets, as the checkpoints "
            "of l2p-pytorch and of early versions: it can only be evaluated"
        ])  # fmt: skip
    return found


def _is_complete(stored: Checkpoint) -> bool:
    """Whether a checkpoint has consistent classes, test sets and accuracies."""
    order, names, rows = stored.class_order, stored.class_names, stored.test_sets
    if not (order and names and rows):
        return False
    ids = [*chain(*order), *chain(*chain(*(one.tasks for one in stored.earlier)))]
    shapes = {metrics.from_lists(stored.accuracy.get(name, [])).shape for name in SELECTIONS}
    return max(ids, default=0) < len(names) and shapes == {(len(rows), len(order))}


def adopt(settings: Settings, ancestor: Checkpoint) -> tuple[Settings, list[str]]:
    """Settings of the ancestor, with what the command line may change; and what it may not.

    Raises:
        CheckpointError: If the settings in the checkpoint are no settings.
    """
    explicit, folder = settings.given.explicit, ancestor.path.absolute().parent.parent
    given = checkpoints.given_settings(settings)
    stored = checkpoints.stored_settings(ancestor.config, ancestor.path)
    fixed = {name: value for name, value in given.items() if name in _FIXED}
    problems = [
        f"{flag} contradicts the run of --continue_from, which has {old}"
        for flag, old in checkpoints.other_settings(fixed, stored, ())
    ]
    if not {"dataset", "data_path"} & explicit:
        problems.append(
            "--continue_from needs the new data: give --dataset or --data-path, or both"
        )
    if settings.run.output_dir and Path(settings.run.output_dir).absolute() == folder:
        problems.append(
            f"--output_dir {settings.run.output_dir} is the folder of the run of --continue_from: "
            "give another"
        )
    kept = {*names_of("method", "place")} - _OF_DATA
    values = {name: value for name, value in stored.items() if name in kept} | given
    if explicit & _BUFFER:
        values |= {name: given.get(name) for name in _BUFFER}
    if "batch_size" in explicit and stored.get("vote_group_size") == stored.get("batch_size"):
        values["vote_group_size"] = given.get("vote_group_size")
    split = {"num_tasks", "classes_per_task", "first_task_classes"}
    by_class = values.get("scenario") in (None, "class-incremental", "joint")
    several = len(str(values["dataset"]).split(",")) > 1
    if by_class and not split & explicit and not several:
        values["num_tasks"] = 1  # the new classes are one task
    return settings.replace(**values), problems


def lineage(
    settings: Settings, stored: Checkpoint | None
) -> tuple[TaskClasses | None, Sequence[Earlier]]:
    """The classes of a run's own tasks, where a checkpoint has them; and the runs before it.

    `stored` is the checkpoint that the run evaluates, or continues.
    """
    if stored is None:
        return None, ()
    own = stored.class_order and stored.class_order[stored.num_earlier :]
    if settings.run.eval:
        return own, stored.earlier
    matrix = metrics.from_lists(stored.accuracy["instance"])
    last = 1 + max(np.flatnonzero(np.isfinite(matrix).any(axis=1)), default=-1)
    first = sum(len(one.test_sets) for one in stored.earlier)
    with open_regular(stored.path) as file:
        digest = sha256(file.read())
    parent = Earlier(
        checkpoint=str(stored.path),
        sha256=digest,
        config=stored.config,
        class_names=stored.class_names or [],
        tasks=(own or [])[: stored.task - stored.num_earlier],
        test_sets=(stored.test_sets or [])[first:last],
    )
    return None, [*stored.earlier, parent]


def find_data(earlier: Earlier, settings: Settings) -> tuple[Scenario | None, Parts]:
    """The data of an earlier run, in a folder of `--earlier_data` or where they were.

    Where they are not at hand, the scenario is None, and the reason is logged.
    """
    values = checkpoints.stored_settings(earlier.config, Path(earlier.checkpoint))
    before = Settings().replace(**values)
    reasons: list[str] = []
    for folder in (*(settings.data.earlier_data or ()), before.data.data_path):
        reason = ""
        try:
            scenario = find_scenario(before.replace(data_path=folder))
            readers = registry.find_sources(before.data.dataset).values()
            if not Path(folder).is_dir() and any(one.needs_data_path for one in readers):
                raise DataError(f"there is no folder {folder}")
            parts = scenario.part()
            names = scenario.class_names(parts)
            own_ids(earlier.tasks, earlier.class_names, names)
            if foreign := [name for name in names if name not in earlier.class_names]:
                raise DataError(f"{folder} has the other classes {join_names(foreign)}")
        except (ValueError, OSError) as error:
            reason = said(error)
        if not any(of_all := utils.gather(reason)):  # or a process would evaluate alone
            return scenario, image_check.without_damaged(parts, settings)
        reasons += filter(None, of_all)
    if utils.is_main_process():
        logger.warning(
            "The test sets %s of %s are not evaluated: their data are not at hand (%s). Give "
            "their folder with --earlier_data",
            join_names(earlier.test_sets),
            earlier.checkpoint,
            "; ".join(dict.fromkeys(reasons)),
        )
    return None, ({}, {})


def begin(run: Run, ancestor: Checkpoint) -> TrainState:
    """Brings model and results to where the ancestor ended; returns where training starts.

    Evaluates the earlier test sets that are at hand, and compares with the ancestor's accuracy.

    Raises:
        CheckpointError, WeightsError: If the backbone is another, or the checkpoint does not fit.
    """
    checkpoints.check_same_backbone(run.backbone, ancestor)
    names, num_tasks = ancestor.class_names or [], run.stream.num_earlier
    run.model.load_trained_state(ancestor.model, str(ancestor.path), num_known=len(names))
    last = run.stream.tasks[num_tasks - 1]
    missing = [row.name for row in last.test_sets if not len(row.data)]
    place = slice(len(last.test_sets)), slice(num_tasks)
    stored = {n: metrics.from_lists(rows)[place] for n, rows in ancestor.accuracy.items()}
    for name, matrix in stored.items():
        run.matrices[name][place] = matrix
    if run.buffer is not None:
        at_hand = not missing and bool(np.isfinite(stored["instance"][:, -1]).all())
        _fill_buffer(run, run.buffer, ancestor, at_hand)
    _check_accuracy(run, ancestor, stored)
    return TrainState(num_tasks)


def _fill_buffer(run: Run, buffer: ReplayBuffer, ancestor: Checkpoint, at_hand: bool) -> None:
    """Takes over the ancestor's replay buffer, if its images are the same and `at_hand`."""
    why = "the run that it continues has none"
    if ancestor.buffer is not None:
        why = "not all of its images are at hand"
    if ancestor.buffer is not None and at_hand:
        checkpoints.restore_buffer(buffer, ancestor)
        if ancestor.buffer_digest in (None, checkpoints.buffer_digest(run)):
            return
        why = "the training images of earlier runs are no longer the same"
        buffer.indices = buffer.indices[:0]
    if utils.is_main_process():
        logger.warning("The replay buffer starts empty: %s", why)


def _check_accuracy(run: Run, ancestor: Checkpoint, stored: dict[str, metrics.Matrix]) -> None:
    """Evaluates the earlier test sets among the ancestor's classes; logs how they compare."""
    *before, last = run.stream.tasks[: run.stream.num_earlier]
    last = dataclasses.replace(
        last,
        classes=tuple(chain(*(ancestor.class_order or []))),
        test_sets=tuple(row for row in last.test_sets if len(row.data)),
    )
    stream = dataclasses.replace(run.stream, tasks=(*before, last))
    matrices = {name: metrics.empty_matrix(*matrix.shape) for name, matrix in stored.items()}
    earlier = dataclasses.replace(run, stream=stream, matrices=matrices, reports=[])
    if last.test_sets:
        logger.info("Continuing %s: evaluating its test sets first", ancestor.path)
    engine.evaluate_till_now(earlier, last, TrainState(last.index))
    for name, matrix in stored.items():
        checkpoints.compare_accuracy(name, matrix[:, -1], matrices[name][:, -1])
