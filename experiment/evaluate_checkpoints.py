"""`--eval`: evaluates the checkpoints of a run again, with nothing but its output folder.

The checkpoint says which classes each task had and what the model looks like; the command line adds
where the data lie now and how to compute. Checkpoints of l2p-pytorch evaluate too.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np

import engine
from cli import options
from cli.options import UsageError
from continual_datasets import scenarios
from experiment import build, checkpoints
from experiment.assemble import Experiment, check_same_run
from experiment.checkpoints import Checkpoint, CheckpointError
from model import backbone
from reports import metrics
from training.evaluation import QueryCache

logger = logging.getLogger(__name__)

#: What is never taken from a checkpoint.
_OF_THIS_COMMAND = (*options.COMPUTE_ONLY, "tf32")

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


def find_checkpoints(args: argparse.Namespace) -> dict[int, Path]:
    """The checkpoints that `--eval` means, by task number (1-based), ascending.

    Raises:
        UsageError: If there is none.
        CheckpointError: If the one that `--checkpoint` names is missing or damaged.
    """
    if args.checkpoint is not None:
        path = Path(args.checkpoint)
        return {checkpoints.load(path).task: path}
    if not args.output_dir:
        raise UsageError(["--eval needs --output_dir, the folder of the run, or --checkpoint"])
    found = checkpoints.find(Path(args.output_dir))
    if not found:
        folder = Path(args.output_dir) / "checkpoint"
        raise UsageError(
            [
                f"--eval finds no checkpoint in {folder}: expected task1_checkpoint.pth, "
                "task2_checkpoint.pth, ...; name the run's --output_dir"
            ]
        )
    return found


def adopt(args: argparse.Namespace, checkpoint: Checkpoint) -> argparse.Namespace:
    """Settings of the run that wrote a checkpoint, with what the command line may change.

    Raises:
        UsageError: If the command line contradicts the checkpoint, with every contradiction.
        CheckpointError: If the settings in the checkpoint are no settings.
    """
    known = vars(args)
    stored = {k: v for k, v in checkpoint.config.items() if k in known}
    if checkpoint.original:
        stored = _adopt_original(args, stored)
    if problems := options.check_settings(stored):
        raise CheckpointError(f"the settings in the checkpoint are damaged: {'; '.join(problems)}")
    given = {name: known[name] for name in args.explicit}
    clashes = [
        f"--{name} {options.shown(given[name])} contradicts the checkpoint, which has "
        f"{options.shown(stored[name])}"
        for name in sorted(given)
        if name in stored
        and name not in _CHANGEABLE
        and not build.same(name, given[name], stored[name])
    ]
    if clashes:
        raise UsageError(clashes)
    stored = {k: v for k, v in stored.items() if k not in _OF_THIS_COMMAND}
    if checkpoint.class_order is not None:
        stored["class_order"] = given["class_order"] = None  # the file may be gone
    return argparse.Namespace(**{**known, **stored, **given})


def result_file(args: argparse.Namespace) -> Path | None:
    """Where the results go: into the run's folder, under a name of their own; None: nowhere."""
    if args.checkpoint is None:
        return Path(args.output_dir) / "eval_results.json"
    path = Path(args.checkpoint).absolute()
    beside = path.parent.parent if path.parent.name == "checkpoint" else path.parent
    folder = Path(args.output_dir) if "output_dir" in args.explicit else beside
    return folder / f"eval_results_{path.stem}.json" if str(args.output_dir) else None


def has_whole_model(args: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings the query's backbone too, so that no other weights are needed."""
    return checkpoint.original and not (args.prompt_pool and build.backbone_trains(args))


def evaluate_checkpoints(run: Experiment, paths: dict[int, Path]) -> None:
    """Evaluates the model after each task.

    Args:
        run: The assembled run.
        paths: Checkpoints by task number.

    Raises:
        CheckpointError: If a checkpoint does not belong to the others.
        WeightsError: If it does not fit the model.
    """
    queries = QueryCache()
    for number, path in paths.items():
        checkpoint = checkpoints.load(path)
        _check_belongs(run, checkpoint, number, path)
        _load(run, checkpoint, path)
        if checkpoint.original:  # it brought a network for the query
            queries.clear()
        logger.info("Evaluating %s", path)
        start = time.monotonic()
        task = run.stream.tasks[number - 1]
        matrices = run.record.matrices
        evaluations = engine.evaluate_till_now(
            run.model, run.test_loader, task, matrices, run.options, queries=queries
        )
        seconds = time.monotonic() - start
        run.record.reports.append(engine.TaskReport(number - 1, {}, evaluations, 0.0, seconds))
        _compare(run, checkpoint, number)


def report_missing(run: Experiment, paths: dict[int, Path]) -> int:
    """Exit code of an evaluation of a whole run: 1, and a message, if checkpoints are missing."""
    every = run.record.config["eval_every"]
    evaluated = scenarios.evaluated_tasks(run.stream.num_tasks, every)
    missing = sorted({index + 1 for index in evaluated} - set(paths))
    if missing:
        names = ", ".join(f"task{n}_checkpoint.pth" for n in missing)
        folder = next(iter(paths.values())).parent
        logger.error("%s lacks %s: the tables above miss these columns", folder, names)
    return 1 if missing else 0


def _adopt_original(args: argparse.Namespace, stored: dict) -> dict:
    """What counts of the original's Namespace; says what had to be assumed."""
    for name in ("shuffle", "seed"):
        if name not in stored:
            logger.warning(
                "The checkpoint does not tell %s: the classes are ordered with %s. "
                "If it was otherwise, give --seed, --no-shuffle or --class_order",
                *(name, getattr(args, name)),
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
            logger.info("Reproduces the stored accuracies (%s)", name)
        else:
            worst = np.nanmax(np.abs(stored - found))
            logger.warning("Differs from the stored accuracies (%s) by up to %.4f", name, worst)
