"""`--eval`: evaluates the checkpoints of a run again, with nothing but its output folder.

The checkpoint says which classes each task had and what the model looks like; the command line adds
where the data are now and how to compute. Checkpoints of l2p-pytorch evaluate too.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import engine
from cli.parser import UsageError, read_mapping, shown
from cli.settings import Settings, find_flag, is_setting, names_of
from continual_datasets import task_splits
from experiment import build, checkpoints, describe
from experiment.build import Experiment
from experiment.checkpoints import Checkpoint, CheckpointError
from experiment.provenance import check_same_run, same_value
from model import backbone
from reports import files, metrics
from training.state import TaskReport, TrainState
from utils import is_main_process

logger = logging.getLogger(__name__)

#: What is never taken from a checkpoint.
_OF_THIS_COMMAND = (*names_of("compute"), "tf32")

#: What the command line may change although a checkpoint says otherwise: where things are, and how
#: to compute and evaluate.
_CHANGEABLE = (
    *_OF_THIS_COMMAND, "data_path", "pretrained", "file_lists", "batch_size", "vote_group_size",
    "vote_ties", "task_inc", "amp",
)  # fmt: skip

#: What decides the evaluation of a checkpoint of the original.
_FROM_ORIGINAL = (
    "dataset", "num_tasks", "model", "model_kwargs", "input_size", "prompt_pool", "size", "length",
    "top_k", "prompt_key", "embedding_key", "head_type", "global_pool", "shuffle", "seed",
    "batch_size", "batchwise_prompt", "task_inc", "freeze",
)  # fmt: skip


@dataclass(frozen=True)
class StoredRun:
    """What `--eval` evaluates.

    Attributes:
        paths: Checkpoints by task number (1-based), ascending.
        first: The first of them.
    """

    paths: dict[int, Path]
    first: Checkpoint


def find(settings: Settings) -> StoredRun:
    """The checkpoints that `--eval` evaluates.

    Raises:
        UsageError: If there is none.
        CheckpointError: If the first, or the one that `--checkpoint` names, is missing or damaged.
    """
    if settings.run.checkpoint is not None:
        path = Path(settings.run.checkpoint)
        first = checkpoints.load(path)
        return StoredRun({first.task: path}, first)
    if settings.output_folder is None:
        raise UsageError(["--eval needs --output_dir, the folder of the run, or --checkpoint"])
    paths = checkpoints.find(settings.output_folder)
    if not paths:
        folder = settings.output_folder / "checkpoint"
        seeds = sorted(path.parent for path in settings.output_folder.glob("seed*/checkpoint"))
        example = f", such as {seeds[0]}" if seeds else ""
        raise UsageError(
            [
                f"--eval finds no checkpoint in {folder}: expected task1_checkpoint.pth, "
                f"task2_checkpoint.pth, ...; name the run's --output_dir{example}"
            ]
        )
    return StoredRun(paths, checkpoints.load(next(iter(paths.values()))))


def adopt(settings: Settings, checkpoint: Checkpoint) -> Settings:
    """Settings of the run that wrote a checkpoint, with what the command line may change.

    Raises:
        UsageError: If the command line contradicts the checkpoint, with every contradiction.
        CheckpointError: If the settings in the checkpoint are no settings.
    """
    stored = {k: v for k, v in checkpoint.config.items() if is_setting(k)}
    if checkpoint.original:
        stored = _adopt_original(settings, stored)
    stored, problems = read_mapping(stored)
    if problems:
        raise CheckpointError(f"the settings in the checkpoint are damaged: {'; '.join(problems)}")
    given = {name: settings[name] for name in settings.given.explicit}
    clashes = [
        f"{find_flag(name).spelling} {shown(given[name])} contradicts the checkpoint, which has "
        f"{shown(stored[name])}"
        for name in sorted(given)
        if name in stored
        and name not in _CHANGEABLE
        and not same_value(name, given[name], stored[name])
    ]
    if clashes:
        raise UsageError(clashes)
    stored = {k: v for k, v in stored.items() if k not in _OF_THIS_COMMAND}
    if checkpoint.class_order is not None:
        stored["class_order"] = given["class_order"] = None  # the file may be gone
    return settings.replace(**{**stored, **given})


def result_file(settings: Settings) -> Path | None:
    """Where the results go: into the run's folder, under a name of their own; None: nowhere."""
    if settings.output_folder is None:
        return None
    if settings.run.checkpoint is None:
        return settings.output_folder / "eval_results.json"
    path = Path(settings.run.checkpoint).absolute()
    beside = path.parent.parent if path.parent.name == "checkpoint" else path.parent
    folder = settings.output_folder if "output_dir" in settings.given.explicit else beside
    return folder / f"eval_results_{path.stem}.json"


def has_whole_model(settings: Settings, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings the query's backbone too, so that no other weights are needed."""
    if not checkpoint.original:
        return False
    return not (settings.prompts.prompt_pool and build.backbone_trains(settings))


def evaluate_and_report(experiment: Experiment, paths: dict[int, Path]) -> int:
    """Evaluates checkpoints, prints and writes the results.

    Args:
        experiment: The assembled run.
        paths: Checkpoints by task number.

    Returns:
        The exit code: 1 if checkpoints of the run are missing.
    """
    settings = experiment.settings
    describe.describe_evaluation(experiment)
    evaluate_checkpoints(experiment, paths)
    logger.info("%s", experiment.record.table())
    path = result_file(settings)
    if path is not None and is_main_process():
        earlier = path.with_name(f"{path.stem}_before.json")
        files.write_json(path, experiment.record.as_dict(), keep=earlier)
        logger.info("Wrote %s", path)
    return 0 if settings.run.checkpoint else report_missing(experiment, paths)


def evaluate_checkpoints(run: Experiment, paths: dict[int, Path]) -> None:
    """Evaluates the model after each task.

    Args:
        run: The assembled run.
        paths: Checkpoints by task number.

    Raises:
        CheckpointError: If a checkpoint does not belong to the others.
        WeightsError: If it does not fit the model.
    """
    engine_run = run.loop()
    for number, path in paths.items():
        checkpoint = checkpoints.load(path)
        _check_belongs(run, checkpoint, number, path)
        _load(run, checkpoint, path)
        logger.info("Evaluating %s", path)
        start = time.monotonic()
        task = run.stream.tasks[number - 1]
        state = TrainState(task.index)
        evaluations = engine.evaluate_till_now(run.model, task, state, None, engine_run)
        seconds = time.monotonic() - start
        run.record.reports.append(TaskReport(number - 1, {}, evaluations, 0.0, seconds))
        _compare(run, checkpoint, number)


def report_missing(run: Experiment, paths: dict[int, Path]) -> int:
    """Exit code of an evaluation of a whole run: 1, and a message, if checkpoints are missing."""
    every = run.settings.tasks.eval_every
    evaluated = task_splits.evaluated_tasks(run.stream.num_tasks, every)
    missing = sorted({index + 1 for index in evaluated} - set(paths))
    if missing:
        names = ", ".join(f"task{n}_checkpoint.pth" for n in missing)
        folder = next(iter(paths.values())).parent
        logger.error("%s lacks %s: the tables above miss these columns", folder, names)
    return 1 if missing else 0


def _adopt_original(settings: Settings, stored: dict[str, Any]) -> dict[str, Any]:
    """What counts of the original's settings; logs what had to be assumed."""
    for name in ("shuffle", "seed"):
        if name not in stored:
            logger.warning(
                "The checkpoint does not say %s: the classes are ordered with %s. "
                "If it was otherwise, give --seed, --no-shuffle or --class_order",
                name,
                settings[name],
            )
    stored = {k: v for k, v in stored.items() if k in _FROM_ORIGINAL}
    if "shuffle" in stored:
        stored["shuffle"] = bool(stored["shuffle"])  # any text counts as yes there
    return {**stored, "vote_ties": "topk", "vote_group_size": stored.get("batch_size")}


def _load(run: Experiment, checkpoint: Checkpoint, path: Path) -> None:
    if not checkpoint.original:
        run.model.load_trained_state(checkpoint.model, str(path))
        return
    run.model.load_original_state(checkpoint.model, str(path))
    if run.model.prompt is not None and run.model.backbone_trains:
        return  # the query comes from the weights that the settings name
    vit = run.model.query_backbone or run.model.backbone
    run.record.backbone.update(backbone.identify(vit, run.identity.name, path.name).as_dict())


def _check_belongs(run: Experiment, checkpoint: Checkpoint, number: int, path: Path) -> None:
    if not 1 <= checkpoint.task <= run.stream.num_tasks:
        raise CheckpointError(
            f"{path} is of task {checkpoint.task}, but the run has {run.stream.num_tasks} tasks"
        )
    if checkpoint.task != number:
        raise CheckpointError(f"{path} is of task {checkpoint.task}, expected {number}")
    if checkpoint.original:
        return
    check_same_run(run, checkpoint, path)


def _compare(run: Experiment, checkpoint: Checkpoint, number: int) -> None:
    """Says whether the accuracies are those that the run stored."""
    for name, rows in checkpoint.accuracy.items():
        stored = metrics.from_lists(rows)[:, number - 1]
        found = run.record.matrices[name][:, number - 1]
        if np.array_equal(stored, found, equal_nan=True):
            logger.info("Reproduces the stored accuracies (%s-wise)", name)
        else:
            worst = np.nanmax(np.abs(stored - found))
            logger.warning(
                "Differs from the stored accuracies (%s-wise) by up to %.4f", name, worst
            )
