"""The parts of a run but its model (`network`): stream, optimizer, loaders."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs

from cli.settings import OptimizerSettings, Settings
from continual_dataloader import Loaders
from continual_datasets import task_splits
from continual_datasets.continuation import all_classes, joined, own_ids, stream_of_earlier
from continual_datasets.images import ArraySource, DataError
from continual_datasets.pipeline import ImagePipeline, build_pipeline
from continual_datasets.readers import registry
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import Batching
from continual_datasets.scenarios import Scenario, StreamSource, TaskClasses, find_scenario
from continual_datasets.stream import Earlier, TaskStream
from experiment import continuation, image_check, precision
from reports import metrics
from reports.metrics import SELECTIONS
from training.objective import Objective
from training.state import Run
from utils import Processes
from vision_transformer import PromptedVisionTransformer

#: Optimizers that, fused, can skip a step on a GPU, see `OptimizerStep`.
_SKIP_STEPS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def build_stream(
    settings: Settings,
    global_batch: int,
    device: torch.device,
    task_classes: TaskClasses | None = None,
    earlier: Sequence[Earlier] = (),
) -> TaskStream:
    """Turns data into a stream of tasks, behind those of the runs that it continues.

    With `--speed_test_only` it has the classes of the data, but no images of theirs.

    Args:
        settings: Of the run.
        global_batch: Images of all processes in a training step.
        device: Where images may be stored.
        task_classes: Class ids of each task of this run; None: as the settings say.
        earlier: The runs that this one continues.

    Raises:
        DataError: If the data are missing or damaged, do not fit the settings, or the file of
            `--class_order` does not fit.
    """
    try:
        scenario = find_scenario(settings)
        if settings.run.speed_test_only:
            return _blank_stream(scenario, device)
        found = [continuation.find_data(one, settings) for one in earlier]
        own = image_check.without_damaged(scenario.part(), settings)
        pipeline, (own, *others) = build_pipeline(
            settings.data.data_on_device,
            settings.transforms,
            [own, *(data for _, data in found)],
            device,
        )
        names = scenario.class_names(own)
        classes = all_classes(earlier[-1].class_names, names) if earlier else names
        if earlier and task_classes is not None:
            task_classes = own_ids(task_classes, classes, names)
        stream = scenario.stream(StreamSource(own, pipeline, global_batch, task_classes))
        if not settings.run.eval:
            _check_steps(settings.optimizer, stream, global_batch)
            stream = task_splits.evaluate_every(stream, settings.tasks.eval_every)
        if not earlier:
            return stream
        streams = [
            stream_of_earlier(one, kind, StreamSource(parts, pipeline, global_batch))
            for one, (kind, _), parts in zip(earlier, found, others, strict=True)
        ]
        return joined(earlier, [*streams, stream], classes, settings.replay.has_buffer)
    except ValueError as error:
        raise DataError(str(error)) from error


def _blank_stream(scenario: Scenario, device: torch.device) -> TaskStream:
    """One task of a single black image, with as many classes as the data have."""
    try:
        num_classes = scenario.num_classes()
    except DataError:  # they are not there
        readers = registry.find_sources(scenario.settings.data.dataset).values()
        num_classes = sum(reader.num_classes for reader in readers)
    source = ArraySource(np.zeros((1, 1, 1), np.uint8), [0], map(str, range(num_classes)))
    pipeline = ImagePipeline(scenario.settings.transforms, device)
    return task_splits.by_parts({"": source}, {"": source}, pipeline)


def make_optimizer(
    settings: OptimizerSettings, model: PromptedVisionTransformer, lr: float
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters; weight decay spares what timm spares.

    Without any, as where the head learns without gradients, it is one with nothing to do.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return torch.optim.SGD([{"params": []}], lr)
    groups = partial(
        param_groups_weight_decay,
        weight_decay=settings.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
    )
    kwargs = {**optimizer_kwargs(settings), "lr": lr}
    make = partial(create_optimizer_v2, model, param_group_fn=groups, **kwargs)
    optimizer = make()
    on_cuda = next(model.parameters()).is_cuda
    return make(fused=True) if on_cuda and type(optimizer) in _SKIP_STEPS else optimizer


def make_scheduler(
    settings: OptimizerSettings, optimizer: torch.optim.Optimizer
) -> Scheduler | None:
    """The learning rate schedule of one task; None: constant."""
    if settings.sched == "constant":
        return None
    return create_scheduler_v2(optimizer, **scheduler_kwargs(settings))[0]


def build_run(
    settings: Settings,
    processes: Processes,
    global_batch: int,
    stream: TaskStream,
    model: PromptedVisionTransformer,
    identity: dict[str, str],
) -> Run:
    """Adds loaders, replay buffer and what makes optimizers to a stream and a model."""
    buffer = None
    if settings.replay.has_buffer:
        buffer = ReplayBuffer(stream.train.targets, settings.run.seed, settings.replay)
    batching = Batching(settings, processes, global_batch)
    objective: Any = Objective(model, settings).compute
    if settings.precision.compile:
        on_cuda, sizes = processes.device.type == "cuda", batching.full_batches
        objective = precision.Compiled(objective, sizes, on_cuda)
        stream.pipeline.graph_sizes = sizes if on_cuda else set()
    loaders = Loaders(stream, batching, buffer)
    lr = settings.optimizer.learning_rate(global_batch)
    shape = len(stream.test_sets), stream.num_tasks
    return Run(
        settings=settings,
        processes=processes,
        stream=stream,
        model=model,
        backbone=identity,
        global_batch=global_batch,
        buffer=buffer,
        train_loader=loaders.train,
        test_loader=loaders.test,
        objective=objective,
        make_optimizer=partial(make_optimizer, settings.optimizer, model, lr),
        make_scheduler=partial(make_scheduler, settings.optimizer),
        matrices={name: metrics.empty_matrix(*shape) for name in SELECTIONS},
        queries_ahead=batching.queries_ahead,
        read_every=batching.read_every,
    )


def _check_steps(settings: OptimizerSettings, stream: TaskStream, global_batch: int) -> None:
    """Makes sure that every task has something to train on."""
    for task in stream.tasks:
        if settings.drop_last and len(task.data) < global_batch:
            raise DataError(
                f"--drop_last leaves no step of {task.name}: it has {len(task.data)} images, a "
                f"step {global_batch}; lower --batch-size or leave --drop_last out"
            )
