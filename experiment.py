"""Assembles what a run consists of: tasks, model, loaders, from the settings."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from timm.utils import random_seed
from torch.utils.data import DataLoader

import backbone
import continual_dataloader as data
import datasets
import metrics
import settings
from backbone import BackboneIdentity
from checkpoints import CheckpointError
from class_order import check_split, class_order, read_class_order
from datasets import DataError
from engine import SELECTIONS, EngineOptions
from image_transforms import build_transform
from processes import Processes
from results import RunRecord
from vision_transformer import PromptedVisionTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """Everything that training and evaluation need.

    Attributes:
        stream: The tasks.
        model: The prompted model, on its device.
        identity: Which backbone it has.
        options: What the engine optimises and evaluates.
        train_loader: Gives the training batches of a task.
        test_loader: Gives the batches of a test set.
        record: Collects the results.
        global_batch: Images of all processes in a training step.
    """

    stream: data.TaskStream
    model: PromptedVisionTransformer
    identity: BackboneIdentity
    options: EngineOptions
    train_loader: Callable[[data.Task], DataLoader]
    test_loader: Callable[[data.TestSet], DataLoader]
    record: RunRecord
    global_batch: int


def assemble(
    args: argparse.Namespace,
    processes: Processes,
    *,
    task_classes: list[list[int]] | None = None,
    weights_follow: bool = False,
    global_batch: int | None = None,
) -> Experiment:
    """Loads data and weights and puts the parts together.

    Args:
        args: Validated settings.
        processes: This process among all of the run.
        task_classes: Class ids of each task; None: as the settings say.
        weights_follow: Whether all weights come from a checkpoint later, so that the pretrained
            ones are not needed.
        global_batch: Images of all processes in a training step; None: `--batch-size` of each.

    Raises:
        DataError: If the data are missing or damaged.
        WeightsError: If weights are missing, damaged or do not fit.
    """
    random_seed(args.seed)
    stream = build_stream(args, task_classes)
    vit = settings.build_backbone(args, pretrained=not weights_follow)
    identity = backbone.identify(vit, args.model, settings.backbone_source(args))
    model = settings.build_model(args, vit, stream.num_classes).to(processes.device)
    global_batch = global_batch or args.batch_size * processes.world_size
    loading = settings.loader_options(args, processes, global_batch)
    num_test_sets = max(t.index for task in stream.tasks for t in task.test_sets) + 1
    record = RunRecord(
        config={
            **settings.resolved(args),
            "vote_group_size": settings.vote_group_size(args),
        },
        backbone=identity.as_dict(),
        class_order=stream.class_order,
        class_names=list(stream.class_names),
        matrices={s: metrics.empty_matrix(num_test_sets, stream.num_tasks) for s in SELECTIONS},
    )
    return Experiment(
        stream=stream,
        model=model,
        identity=identity,
        options=settings.engine_options(args, processes.device, stream.classes),
        train_loader=partial(data.build_train_loader, options=loading),
        test_loader=partial(data.build_test_loader, options=loading),
        record=record,
        global_batch=global_batch,
    )


def build_stream(
    args: argparse.Namespace, task_classes: list[list[int]] | None = None
) -> data.TaskStream:
    """The tasks that the settings describe.

    Raises:
        DataError: If the data are missing or damaged, or the file of `--class_order` does not fit.
    """
    train, test = datasets.load_source(args.dataset, Path(args.data_path))
    try:
        order = _flat_order(args, train.classes, task_classes)
        classes_per_task = check_split(len(order), args.num_tasks, args.classes_per_task)
    except ValueError as error:
        raise DataError(str(error)) from error
    transforms = settings.transform_options(args)
    return data.build_class_incremental(
        train,
        test,
        order=order,
        num_tasks=args.num_tasks,
        classes_per_task=classes_per_task,
        train_transform=build_transform(True, transforms),
        test_transform=build_transform(False, transforms),
        seed=args.seed,
    )


def _flat_order(
    args: argparse.Namespace, classes: Sequence[str], given: list[list[int]] | None
) -> list[int]:
    """Class ids in the order of their appearance: given, from a file, or drawn."""
    if given is not None:
        return [c for task_classes in given for c in task_classes]
    if args.class_order is not None:
        return read_class_order(Path(args.class_order), classes)
    return class_order(len(classes), args.seed, args.shuffle)


class Stored(Protocol):
    """What a file that a run wrote tells of its data and of its backbone."""

    @property
    def class_order(self) -> list[list[int]] | None:
        """Class ids of each task."""

    @property
    def class_names(self) -> list[str] | None:
        """Name of every class."""

    @property
    def backbone(self) -> dict[str, str] | None:
        """`name`, `source` and `sha256` of the frozen network."""


def check_same_run(run: Experiment, stored: Stored, path: Path) -> None:
    """Makes sure that a file was written by a run on the same data and the same backbone.

    Raises:
        CheckpointError: Naming what differs.
    """
    if stored.class_order != run.stream.class_order:
        raise CheckpointError(f"{path} has another class order than this run")
    found, wanted = list(run.stream.class_names), stored.class_names or []
    if found != wanted:
        pairs = zip(wanted, found, strict=False)
        differing = next((f"{a!r}, found {b!r}" for a, b in pairs if a != b), "")
        raise CheckpointError(
            f"{path} was trained on other data: it knows {len(wanted)} classes, --data-path has "
            f"{len(found)}" + (f"; expected the class {differing}" if differing else "")
        )
    if stored.backbone is not None and stored.backbone["sha256"] != run.identity.sha256:
        raise CheckpointError(
            f"{path} was trained on the backbone {stored.backbone['name']} "
            f"({stored.backbone['source']}, sha256 {stored.backbone['sha256'][:12]}), found "
            f"{run.identity.name} ({run.identity.source}, {run.identity.sha256[:12]}): "
            "give the same weights with --pretrained"
        )


def describe(args: argparse.Namespace, run: Experiment, processes: Processes) -> None:
    """Logs in a few lines what is about to happen."""
    if backbone.resolve_name(args.model) != args.model:
        logger.info(
            "--model %s means %s: the weights that the original used",
            args.model,
            backbone.resolve_name(args.model),
        )
    tasks = run.stream.tasks
    logger.info(
        "Data: %s, %d tasks of %d classes, %d training images; class order %s",
        args.dataset,
        len(tasks),
        len(tasks[0].classes),
        sum(len(task.data) for task in tasks),
        _short([c for classes in run.stream.class_order for c in classes]),
    )
    logger.info("Backbone: %s, weights %s, sha256 %.12s", *run.identity.as_dict().values())
    trained = [p.numel() for p in run.model.parameters() if p.requires_grad]
    logger.info(
        "Model: %d prompts of %d tokens, head %s; number of params: %d",
        0 if run.model.prompt is None else run.model.prompt.size,
        0 if run.model.prompt is None else run.model.prompt.length,
        args.head_type,
        sum(trained),
    )
    logger.info(
        "Training: %s, learning rate %g (--lr %g, scaled %s), %d images a step, votes of %d; "
        "%d process%s on %s",
        args.opt,
        settings.learning_rate(args, run.global_batch),
        args.lr,
        args.lr_scale,
        run.global_batch,
        settings.vote_group_size(args),
        processes.world_size,
        "" if processes.world_size == 1 else "es",
        processes.device,
    )
    idle = processes.world_size - -(-run.global_batch // settings.vote_group_size(args))
    if idle > 0:
        logger.warning(
            "%d of %d processes have nothing to train on: %d images a step are %d vote groups, and "
            "a vote group stays in one process",
            *(idle, processes.world_size, run.global_batch, processes.world_size - idle),
        )


def _short(values: list[int], limit: int = 20) -> str:
    shown = " ".join(map(str, values[:limit]))
    return shown + (" ..." if len(values) > limit else "")
