"""`--eval`: evaluates the checkpoints of a run again, with nothing but its output folder.

The checkpoint says which classes each task had and what the model looks like; the command line adds
where the data are now and how to compute. Checkpoints of l2p-pytorch evaluate too.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
from cli.parser import UsageError
from cli.settings import Settings
from continual_datasets import task_splits
from experiment import checkpoints, describe, network, predictions, run_record
from experiment.checkpoints import OF_A_COMMAND, Checkpoint, CheckpointError
from model import backbone
from reports import files
from training.state import Run, TrainState

logger = logging.getLogger(__name__)

#: What the command line may change although a checkpoint says otherwise: where things are, and how
#: to compute and evaluate.
_CHANGEABLE = (
    *OF_A_COMMAND, "data_path", "earlier_data", "pretrained", "file_lists", "batch_size",
    "vote_group_size", "vote_ties", "task_inc", "amp", "skip_damaged",
)  # fmt: skip

#: What decides the evaluation of a checkpoint of the original, which ignores `global_pool`.
_FROM_ORIGINAL = (
    "dataset", "num_tasks", "model", "model_kwargs", "input_size", "prompt_pool", "size", "length",
    "top_k", "prompt_key", "embedding_key", "head_type", "shuffle", "seed", "batch_size",
    "batchwise_prompt", "task_inc", "freeze",
)  # fmt: skip


def find(settings: Settings) -> tuple[dict[int, Path], Checkpoint]:
    """What `--eval` evaluates: checkpoints by task number (1-based), ascending; and the first.

    Raises:
        UsageError: If there is none.
        CheckpointError: If the first, or the one that `--checkpoint` names, is missing or damaged.
    """
    folder = settings.output_folder
    if settings.run.checkpoint is not None:
        path = Path(settings.run.checkpoint)
        first = checkpoints.load(path)
        return {first.task: path}, first
    if folder is None:
        raise UsageError(["--eval needs --output_dir, the folder of the run, or --checkpoint"])
    paths = checkpoints.in_folder(folder, "--eval")
    return paths, checkpoints.load(next(iter(paths.values())))


def adopt(settings: Settings, checkpoint: Checkpoint) -> Settings:
    """Settings of the run that wrote a checkpoint, with what the command line may change.

    Raises:
        UsageError: If the command line contradicts the checkpoint, with every contradiction.
        CheckpointError: If the settings in the checkpoint are no settings.
    """
    stored = dict(checkpoint.config)
    if checkpoint.original:
        stored = _adopt_original(settings, stored)
    stored = checkpoints.stored_settings(stored, checkpoint.path)
    given = checkpoints.given_settings(settings)
    free = (*_CHANGEABLE, "dataset") if checkpoint.original else _CHANGEABLE
    clashes = checkpoints.other_settings(given, stored, free)
    if problems := [f"{flag} contradicts the checkpoint, which has {old}" for flag, old in clashes]:
        raise UsageError(problems)
    stored = {k: v for k, v in stored.items() if k not in OF_A_COMMAND}
    if checkpoint.class_order is not None:
        stored["class_order"] = given["class_order"] = None  # the file may be gone
    return settings.replace(**{**stored, **given})


def has_whole_model(settings: Settings, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings the query's backbone too, so that no other weights are needed."""
    has_pool = settings.prompts.prompt_pool
    return checkpoint.original and not (has_pool and network.outline(settings).backbone_trains)


def evaluate_and_report(run: Run, paths: dict[int, Path]) -> int:
    """Evaluates the checkpoints, by task number, prints and writes the results.

    Returns:
        The exit code: 1 if checkpoints of the run are missing.

    Raises:
        CheckpointError: If a checkpoint does not belong to the others.
        WeightsError: If it does not fit the model.
    """
    describe.describe(run)
    for number, path in paths.items():
        _evaluate(run, number, path)
    logger.info("%s", run_record.table(run))
    if run.output_dir is not None:
        file = _result_file(run.output_dir, run.settings)
        earlier = file.with_name(f"{file.stem}_before.json")
        files.write_json(file, run_record.results(run), keep=earlier)
        logger.info("Wrote %s", file)
        if run.settings.output.save_predictions:
            name = file.stem.replace("results", "predictions", 1)
            before = file.with_name(f"{name}_before.csv")
            predictions.write(run, file.with_name(f"{name}.csv"), keep=before)
    every = run.settings.tasks.eval_every
    first = run.stream.num_earlier
    evaluated = task_splits.evaluated_tasks(run.stream.num_tasks - first, every)
    missing = sorted({first + index + 1 for index in evaluated} - paths.keys())
    if run.settings.run.checkpoint or not missing:
        return 0
    names = ", ".join(f"task{number}_checkpoint.pth" for number in missing)
    folder = next(iter(paths.values())).parent
    logger.error("%s lacks %s: the tables above miss these columns", folder, names)
    return 1


def _adopt_original(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """What counts of the original's settings; logs what is assumed, and what it did otherwise."""
    if isinstance(config.get("shuffle"), str):
        config = {**config, "shuffle": bool(config["shuffle"])}  # any text counts as yes there
    for name in sorted({"shuffle", "seed"} - config.keys()):
        logger.warning(
            "The checkpoint does not say %s: the classes are ordered with %s. If it was otherwise, "
            "give --seed, --no-shuffle or --class_order",
            name,
            settings[name],
        )
    for difference in _unlike_original(config):
        logger.warning("The accuracy may not be what l2p-pytorch printed: %s", difference)
    stored = {k: v for k, v in config.items() if k in _FROM_ORIGINAL}
    group = stored.get("batch_size")
    return {**stored, "global_pool": "token", "vote_ties": "topk", "vote_group_size": group}


def _unlike_original(config: dict[str, Any]) -> Iterator[str]:
    """What the original did otherwise with these settings."""
    dataset, embedding_key = str(config.get("dataset")), config.get("embedding_key", "cls")
    if config.get("use_prompt_mask") is True:
        yield "with --use_prompt_mask it gave test images the prompts of their true task until 2023"
    if config.get("prompt_key") is False:
        yield "with --prompt_key false its keys, means of the initial prompts, are not in the file"
    if embedding_key != "cls" and "patch_embed" not in str(config.get("freeze")):
        yield f"for --embedding_key {embedding_key} it took the query from trained patch embeddings"
    if "imagenet-r" in dataset.lower():
        yield "Imagenet-R was divided at random, so it may have trained on some of the test images"
    if config.get("shuffle") is True and ("," in dataset or dataset == "5-datasets"):
        yield "--shuffle drew an order of the data sets: give the one of its log with --dataset"


def _evaluate(run: Run, number: int, path: Path) -> None:
    """Evaluates the checkpoint of a task, and compares with the accuracies that it stores."""
    checkpoint = checkpoints.load(path)
    if not 1 <= checkpoint.task <= run.stream.num_tasks:
        raise CheckpointError(
            f"{path} is of task {checkpoint.task}, but the run has {run.stream.num_tasks} tasks"
        )
    if checkpoint.task != number:
        raise CheckpointError(f"{path} is of task {checkpoint.task}, expected {number}")
    if checkpoint.original:
        run.model.load_original_state(checkpoint.model, str(path))
        if run.model.prompt is None or not run.model.backbone_trains:
            # Else the query comes from the weights that the settings name.
            vit = run.model.query_backbone or run.model.backbone
            run.backbone = backbone.identify(vit, run.backbone["name"], path.name)
    else:
        checkpoints.check_same_run(run, checkpoint)
        run.model.load_trained_state(checkpoint.model, str(path))
    logger.info("Evaluating %s", path)
    task, state = run.stream.tasks[number - 1], TrainState(number - 1)
    engine.evaluate_till_now(run, task, state)
    run.reports.append(state)
    for name, stored in checkpoints.stored_matrices(run, checkpoint).items():
        found = run.matrices[name]
        found[:, : run.stream.num_earlier] = stored[:, : run.stream.num_earlier]
        checkpoints.compare_accuracy(name, stored[:, task.index], found[:, task.index])


def _result_file(folder: Path, settings: Settings) -> Path:
    """Where the results go: into the run's folder, under a name of their own."""
    if settings.run.checkpoint is None:
        return folder / "eval_results.json"
    path = Path(settings.run.checkpoint).absolute()
    if "output_dir" not in settings.given.explicit:
        folder = path.parent.parent if path.parent.name == "checkpoint" else path.parent
    return folder / f"eval_results_{path.stem}.json"
