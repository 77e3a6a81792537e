"""Assembles what a run consists of: tasks, model, loaders, from the settings."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from timm.utils import random_seed
from torch import Tensor

from continual_dataloader import Loaders, TestBatches, TrainBatches
from continual_datasets import scenarios
from continual_datasets.class_order import check_split, class_order, read_class_order
from continual_datasets.images import DataError, ImageSource, join_names
from continual_datasets.pipeline import ImagePipeline, build_pipeline
from continual_datasets.readers import registry
from continual_datasets.replay import ReplayBuffer
from continual_datasets.scenarios import Preparation
from continual_datasets.stream import Task, TaskStream, TestSet
from engine import EngineOptions
from experiment import build, precision
from experiment.checkpoints import CheckpointError
from experiment.run_record import RunRecord
from model import backbone
from model.backbone import BackboneIdentity
from processes import Processes
from reports import metrics
from reports.metrics import SELECTIONS
from vision_transformer import PromptedVisionTransformer


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
        global_batch: Images of all processes in a training step, replayed ones not counted.
        buffer: Images of earlier tasks that are replayed; None: none are.
    """

    stream: TaskStream
    model: PromptedVisionTransformer
    identity: BackboneIdentity
    options: EngineOptions
    train_loader: Callable[[Task], TrainBatches]
    test_loader: Callable[[TestSet], TestBatches]
    record: RunRecord
    global_batch: int
    buffer: ReplayBuffer | None

    def buffered_images(self) -> Tensor | None:
        """Numbers of the images in the buffer, as checkpoints hold them; None without one."""
        return None if self.buffer is None else torch.from_numpy(self.buffer.indices)


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
    global_batch = global_batch or args.batch_size * processes.world_size
    stream, pipeline = build_stream(args, global_batch, processes.device, task_classes)
    if not args.eval:
        _check_steps(args, stream, global_batch)
    buffer = _build_buffer(args, stream)
    vit = build.build_backbone(args, pretrained=not weights_follow)
    identity = backbone.identify(vit, args.model, build.backbone_source(args))
    model = build.build_model(args, vit, stream.num_classes).to(processes.device)
    loading = build.loader_options(args, processes, global_batch)
    how = build.numerics(args)
    precision.apply(how, model, loading.full_batches, weights_follow)
    loaders = Loaders(stream, loading, processes.device, pipeline.to_images, buffer)
    shape = len(stream.test_sets), stream.num_tasks
    record = RunRecord(
        config={
            **build.resolved(args),
            "vote_group_size": build.vote_group_size(args),
        },
        backbone=identity.as_dict(),
        class_order=stream.class_order,
        class_names=list(stream.class_names),
        matrices={s: metrics.empty_matrix(*shape) for s in SELECTIONS},
        tasks=[task.name for task in stream.tasks],
        test_sets=[test_set.name for test_set in stream.test_sets],
        numerics={
            **how.as_dict(),
            "data_on_device": pipeline.on_device,
            "eval_batch_size": loading.test_batch,
        },
        command=build.command(args),
        run={
            "processes": processes.world_size,
            "images_per_step": global_batch,
            "learning_rate": build.learning_rate(args, global_batch),
            "train_digest": stream.train_digest,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    )
    return Experiment(
        stream=stream,
        model=model,
        identity=identity,
        options=build.engine_options(args, processes.device, stream.classes),
        train_loader=loaders.train,
        test_loader=loaders.test,
        record=record,
        global_batch=global_batch,
        buffer=buffer,
    )


def build_stream(
    args: argparse.Namespace,
    global_batch: int,
    device: torch.device,
    task_classes: list[list[int]] | None = None,
) -> tuple[TaskStream, ImagePipeline]:
    """The tasks that the settings describe, and the way of their images to the model.

    Args:
        args: The settings.
        global_batch: Images of all processes in a training step.
        device: Where the model is.
        task_classes: Class ids of each task; None: as the settings say.

    Raises:
        DataError: If the data are missing or damaged, do not fit the settings, or the file of
            `--class_order` does not fit.
    """
    try:
        train, test = _load_data(args)
        sources = [*train.values(), *test.values()]
        transforms = build.transform_options(args)
        pipeline, sources = build_pipeline(args.data_on_device, transforms, sources, device)
        train = dict(zip(train, sources, strict=False))
        test = dict(zip(test, sources[len(train) :], strict=True))
        prepare = Preparation(pipeline.train_transform, pipeline.test_transform, args.seed)
        stream = _scenario(args, train, test, prepare, global_batch, task_classes)
    except ValueError as error:
        raise DataError(str(error)) from error
    if args.joint:
        stream = scenarios.joint(stream, prepare)
    kept = stream if args.eval else scenarios.evaluate_every(stream, args.eval_every)
    return kept, pipeline


def _load_data(
    args: argparse.Namespace,
) -> tuple[Mapping[str, ImageSource], Mapping[str, ImageSource]]:
    """Training and test images by data set or domain."""
    path = Path(args.data_path)
    if args.scenario == "domain-incremental":
        lists = build.file_lists(args)
        return registry.load_domains(args.dataset, path, lists, args.domains)
    parts = registry.load_parts(args.dataset, path)
    return {n: train for n, (train, _) in parts.items()}, {n: t for n, (_, t) in parts.items()}


def _scenario(
    args: argparse.Namespace,
    train_parts: Mapping[str, ImageSource],
    test_parts: Mapping[str, ImageSource],
    prepare: Preparation,
    global_batch: int,
    task_classes: list[list[int]] | None,
) -> TaskStream:
    if args.scenario == "domain-incremental":
        return scenarios.domain_incremental(train_parts, test_parts, prepare)
    if len(train_parts) > 1:
        return scenarios.several_data_sets(train_parts, test_parts, prepare)
    (train,), (test,) = train_parts.values(), test_parts.values()
    if args.scenario == "gaussian":
        episodes = task_classes or _episodes(args, train.classes)
        num_images = build.images_per_episode(args, global_batch)
        return scenarios.gaussian(train, test, episodes, num_images, prepare)
    order = _flat_order(args, train.classes, task_classes)
    num_tasks = build.num_parts(args)
    classes_per_task = check_split(len(order), num_tasks, args.classes_per_task)
    return scenarios.class_incremental(train, test, order, num_tasks, classes_per_task, prepare)


def _episodes(args: argparse.Namespace, classes: Sequence[str]) -> list[tuple[int, ...]]:
    order = _flat_order(args, classes, None)
    if len(order) < len(classes):
        raise ValueError(
            f"--class_order {args.class_order} names {len(order)} of {len(classes)} classes: "
            "--scenario gaussian takes all of them"
        )
    return scenarios.gaussian_episodes(
        order,
        build.num_parts(args),
        build.schedule_steps(args),
        args.gaussian_sigma,
        args.seed,
    )


def _check_steps(args: argparse.Namespace, stream: TaskStream, global_batch: int) -> None:
    """Makes sure that every task has something to train on."""
    for task in stream.tasks:
        if args.drop_last and len(task.data) < global_batch:
            raise DataError(
                f"--drop_last leaves no step of {task.name}: it has {len(task.data)} images, a "
                f"step {global_batch}; lower --batch-size or leave --drop_last out"
            )


def _build_buffer(args: argparse.Namespace, stream: TaskStream) -> ReplayBuffer | None:
    if not build.has_buffer(args):
        return None
    sizes = {"size": args.buffer_size, "per_class": args.buffer_per_class}
    return ReplayBuffer(stream.train_targets, args.seed, **sizes)


def _flat_order(
    args: argparse.Namespace, classes: Sequence[str], given: list[list[int]] | None
) -> list[int]:
    """Class ids in the order of their appearance: given, from a file, or drawn."""
    if given is not None:
        order = [c for task_classes in given for c in task_classes]
        if len(set(order)) < len(order):
            raise ValueError(f"the class order {given} gives a class to more than one task")
        return order
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
    def test_sets(self) -> list[str] | None:
        """Name of each test set."""

    @property
    def backbone(self) -> dict[str, str] | None:
        """`name`, `source` and `sha256` of the frozen network."""


def check_same_run(run: Experiment, stored: Stored, path: Path) -> None:
    """Makes sure that a file was written by a run on the same data and the same backbone.

    Raises:
        CheckpointError: Naming what differs.
    """
    test_sets = run.record.test_sets
    if stored.test_sets is not None and stored.test_sets != test_sets:
        raise CheckpointError(
            f"{path} was trained on other data: its test sets are {join_names(stored.test_sets)}, "
            f"those of this run {join_names(test_sets)}"
        )
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
