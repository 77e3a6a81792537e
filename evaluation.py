"""`--eval`: evaluates the checkpoints of a run again, with nothing but its output folder.

The checkpoint says which classes each task had and what the model looks like; the command line adds
where the data lie now and how to compute. Checkpoints of l2p-pytorch evaluate too.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np

import backbone
import checkpoints
import engine
import metrics
import utils
from checkpoints import Checkpoint, CheckpointError
from experiment import Experiment
from options import UsageError

logger = logging.getLogger(__name__)

#: Settings that a checkpoint fixes: the command line may repeat but not change them.
_FIXED = (
    "dataset", "num_tasks", "classes_per_task", "class_order", "model", "model_kwargs",
    "input_size", "norm", "prompt_pool", "size", "length", "top_k", "prompt_key", "embedding_key",
    "head_type", "global_pool",
)  # fmt: skip

#: What else is taken from a checkpoint of the original, because it decides what is evaluated.
_FROM_ORIGINAL = (
    *_FIXED,
    "shuffle",
    "seed",
    "batch_size",
    "batchwise_prompt",
    "task_inc",
    "freeze",
)

#: Settings of the machine and of the command at hand, never taken from a checkpoint.
_OF_THIS_COMMAND = (
    "output_dir", "device", "dist_url", "world_size", "num_workers", "pin_mem", "print_freq",
)  # fmt: skip


def find_checkpoints(args: argparse.Namespace) -> dict[int, Path]:
    """The checkpoints that `--eval` means, by task number (1-based), ascending.

    Raises:
        UsageError: If there is none.
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
    """
    known = vars(args)
    stored = {k: v for k, v in checkpoint.config.items() if k in known}
    if checkpoint.original:
        stored = {k: v for k, v in stored.items() if k in _FROM_ORIGINAL}
        stored["shuffle"] = bool(stored.get("shuffle", known["shuffle"]))
        stored["vote_ties"] = "topk"
    stored = {k: v for k, v in stored.items() if k not in _OF_THIS_COMMAND}
    given = {name: known[name] for name in args.explicit}
    clashes = [
        f"--{name} {given[name]} contradicts the checkpoint, which has {stored[name]}"
        for name in _FIXED
        if name in given and name in stored and not _same(name, given[name], stored[name])
    ]
    if clashes:
        raise UsageError(clashes)
    if args.checkpoint is not None and "output_dir" not in given:
        given["output_dir"] = str(Path(args.checkpoint).resolve().parent.parent)
    return argparse.Namespace(**{**known, **stored, **given})


def has_whole_model(args: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings the frozen backbone too, so that no other weights are needed."""
    frozen = {"blocks", "patch_embed", "cls_token", "norm", "pos_embed"} <= set(args.freeze)
    return checkpoint.original and (frozen or not args.prompt_pool)


def evaluate_checkpoints(run: Experiment, paths: dict[int, Path]) -> None:
    """Evaluates the model after each task.

    Args:
        run: The assembled run.
        paths: Checkpoints by task number.

    Raises:
        CheckpointError: If a checkpoint does not belong to the others.
        WeightsError: If it does not fit the model.
    """
    for number, path in paths.items():
        checkpoint = checkpoints.load(path)
        _check_belongs(run, checkpoint, number, path)
        _load(run, checkpoint, path)
        logger.info("Evaluating %s", path)
        start = time.monotonic()
        task = run.stream.tasks[number - 1]
        matrices = run.record.matrices
        evaluations = engine.evaluate_till_now(
            run.model, run.test_loader, task, matrices, run.options
        )
        seconds = time.monotonic() - start
        run.record.reports.append(engine.TaskReport(number - 1, {}, evaluations, 0.0, seconds))
        _compare(run, checkpoint, number)


def _load(run: Experiment, checkpoint: Checkpoint, path: Path) -> None:
    if not checkpoint.original:
        run.model.load_trained_state(checkpoint.model, str(path))
        return
    run.model.load_original_state(checkpoint.model, str(path))
    vit = run.model.query_backbone or run.model.backbone
    run.record.backbone.update(backbone.identify(vit, run.identity.name, path.name).as_dict())


def _check_belongs(run: Experiment, checkpoint: Checkpoint, number: int, path: Path) -> None:
    if not 1 <= checkpoint.task <= run.stream.num_tasks:
        raise CheckpointError(
            f"{path} is of task {checkpoint.task}, but the run has {run.stream.num_tasks} tasks"
        )
    if checkpoint.task != number:
        raise CheckpointError(f"{path} is of task {checkpoint.task}, expected {number}")
    order = checkpoint.class_order
    if order is not None and order != run.stream.class_order:
        raise CheckpointError(f"{path} has another class order than the other checkpoints")
    wanted = checkpoint.backbone
    if wanted is not None and wanted["sha256"] != run.identity.sha256:
        raise CheckpointError(
            f"{path} was trained on the backbone {wanted['name']} ({wanted['source']}, sha256 "
            f"{wanted['sha256'][:12]}), found {run.identity.name} ({run.identity.source}, "
            f"{run.identity.sha256[:12]}): give the same weights with --pretrained"
        )


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


def report_missing(run: Experiment, paths: dict[int, Path]) -> int:
    """Exit code of an evaluation of a whole run: 1, and a message, if checkpoints are missing."""
    missing = sorted(set(range(1, run.stream.num_tasks + 1)) - set(paths))
    if missing:
        names = ", ".join(f"task{n}_checkpoint.pth" for n in missing)
        folder = next(iter(paths.values())).parent
        logger.error("%s lacks %s: the tables above miss these columns", folder, names)
    return 1 if missing else 0


def write_results(run: Experiment, output_dir: Path) -> None:
    """Writes the evaluation beside the run's own results, which stay as they are."""
    if utils.is_main_process():
        run.record.write(output_dir, name="eval_results")
        logger.info("Wrote %s", output_dir / "eval_results.json")


def _same(name: str, given: object, stored: object) -> bool:
    if name == "model":
        return backbone.resolve_name(str(given)) == backbone.resolve_name(str(stored))
    return given == stored
