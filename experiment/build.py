"""The parts of a run, each built from its settings: stream, model, optimizer, loaders."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

import utils
from cli.settings import OptimizerSettings, Settings
from continual_dataloader import Loaders
from continual_datasets import task_splits
from continual_datasets.images import DataError
from continual_datasets.pipeline import build_pipeline
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import LoaderOptions
from continual_datasets.scenarios import StreamSource, TaskClasses, find_scenario
from continual_datasets.stream import TaskStream
from continual_datasets.task_splits import Transforms
from experiment.run_record import RunRecord
from model import backbone
from model.backbone import BackboneIdentity
from model.weights import load_backbone_file
from prompt import find_selection_rule
from reports import metrics
from reports.metrics import SELECTIONS
from training.state import EngineOptions, Run, Scheduler
from utils import Processes
from vision_transformer import PromptedVisionTransformer

#: Optimizers that, fused, can skip a step on a GPU, see `OptimizerStep`.
_SKIP_STEPS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

#: Maximum of asynchronous steps on a GPU; a stop request takes effect after at most so many.
_MOST_UNREAD = 10


@dataclass(frozen=True)
class Experiment:
    """Everything that training and evaluation need."""

    settings: Settings
    processes: Processes  # this process among all
    stream: TaskStream
    model: PromptedVisionTransformer  # on its device
    loop: Run  # what the functions of `engine.py` need beside model, tasks and state
    record: RunRecord  # collects the results
    global_batch: int  # images of all processes in a training step, without replayed ones
    buffer: ReplayBuffer | None  # images of earlier tasks that are replayed; None: none are


def build_stream(
    settings: Settings,
    global_batch: int,
    device: torch.device,
    task_classes: TaskClasses | None = None,
) -> TaskStream:
    """Turns data into a stream of tasks; arguments as in `assemble` of main.py.

    Raises:
        DataError: If the data are missing or damaged, do not fit the settings, or the file of
            `--class_order` does not fit.
    """
    try:
        scenario = find_scenario(settings)
        train, test = scenario.load()
        sources = [*train.values(), *test.values()]
        on_device = settings.data.data_on_device
        pipeline, sources = build_pipeline(on_device, settings.transforms, sources, device)
        train = dict(zip(train, sources, strict=False))
        test = dict(zip(test, sources[len(train) :], strict=True))
        transforms = Transforms(
            pipeline.train_transform, pipeline.test_transform, settings.run.seed
        )
        source = StreamSource((train, test), transforms, global_batch, task_classes)
        stream = scenario.stream(source)
    except ValueError as error:
        raise DataError(str(error)) from error
    stream = dataclasses.replace(stream, pipeline=pipeline)
    if settings.run.eval:
        return stream
    _check_steps(settings.optimizer, stream, global_batch)
    return task_splits.evaluate_every(stream, settings.tasks.eval_every)


def build_backbone(settings: Settings, pretrained: bool = False) -> VisionTransformer:
    """The timm ViT that the settings name, with the weights that they name if `pretrained`.

    Raises:
        WeightsError: If it cannot be built, or its weights cannot be loaded.
    """
    vit = backbone.build_backbone(
        settings.model.model,
        input_size=settings.transforms.input_size,
        model_kwargs=settings.model.model_kwargs,
        drop=settings.model.drop,
        drop_path=settings.model.drop_path,
        pretrained=pretrained and settings.model.pretrained is True,
    )
    file = settings.model.weight_file
    if pretrained and file is not None:
        load_backbone_file(vit, file)
    return vit


def build_model(
    settings: Settings, vit: VisionTransformer, num_classes: int
) -> PromptedVisionTransformer:
    """Puts the prompt pool and the head around a backbone.

    Raises:
        ValueError: If head, pool and frozen names contradict.
    """
    pool, model = None, settings.model
    if settings.prompts.prompt_pool:
        rule = find_selection_rule(settings.prompts.diversify)
        pool = rule(settings.prompts, vit.embed_dim)
        if settings.prompts.prompt_key and not settings.prompts.pull_constraint:
            # Nothing else gives the keys a gradient.
            model = dataclasses.replace(model, freeze=(*model.freeze, "prompt.prompt_key"))
    key = settings.prompts.embedding_key
    return PromptedVisionTransformer(vit, num_classes, pool, model, key)


def backbone_trains(settings: Settings) -> bool:
    """Whether the settings leave anything of the backbone unfrozen, found out without weights."""
    with backbone.without_memory():
        return build_model(settings, build_backbone(settings), num_classes=2).backbone_trains


def make_optimizer(
    settings: OptimizerSettings, model: PromptedVisionTransformer, lr: float
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters; weight decay spares what timm spares."""
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


def engine_options(
    settings: Settings, device: torch.device, all_classes: tuple[int, ...]
) -> EngineOptions:
    """What the engine optimises and evaluates."""
    optimizer, tasks, prompts = settings.optimizer, settings.tasks, settings.prompts
    print_freq = settings.output.print_freq
    return EngineOptions(
        device=device,
        epochs=optimizer.epochs,
        vote_group_size=settings.vote_group_size,
        all_classes=all_classes,
        train_mask=tasks.train_mask,
        task_inc=tasks.task_inc,
        pull_coeff=prompts.pull_coeff,
        smoothing=optimizer.smoothing,
        clip_grad=optimizer.clip_grad,
        reinit_optimizer=optimizer.reinit_optimizer,
        shared_prompt_pool=prompts.shared_prompt_pool,
        shared_prompt_key=prompts.shared_prompt_key,
        print_freq=print_freq,
        seed=settings.run.seed,
        replayed_per_group=settings.replayed_per_group,
        read_every=min(print_freq, _MOST_UNREAD) if device.type == "cuda" else 1,
        loss_scaling=settings.precision.loss_scaling,
    )


def loader_options(settings: Settings, processes: Processes, global_batch: int) -> LoaderOptions:
    """How images are put into batches; never more workers than there are cores."""
    data, batch_size = settings.data, settings.optimizer.batch_size
    on_cuda = processes.device.type == "cuda"
    return LoaderOptions(
        batch_size=batch_size,
        vote_group_size=settings.vote_group_size,
        num_workers=min(data.num_workers, utils.usable_cores()),
        pin_memory=data.pin_mem and on_cuda,
        seed=settings.run.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        global_batch=global_batch,
        drop_last=settings.optimizer.drop_last,
        replayed_per_group=settings.replayed_per_group,
        eval_batch_size=data.eval_batch_size or (max(batch_size, 256) if on_cuda else batch_size),
        test_cache_bytes=int(data.test_cache * 10**9),
    )


def build_experiment(
    settings: Settings,
    processes: Processes,
    global_batch: int,
    stream: TaskStream,
    model: PromptedVisionTransformer,
    identity: BackboneIdentity,
) -> Experiment:
    """Adds loaders, replay buffer and record to a stream and a model."""
    assert stream.pipeline is not None
    loading = loader_options(settings, processes, global_batch)
    replay, buffer = settings.replay, None
    if replay.has_buffer:
        sizes = {"size": replay.buffer_size, "per_class": replay.buffer_per_class}
        buffer = ReplayBuffer(stream.train_targets, settings.run.seed, **sizes)
    loaders = Loaders(stream, loading, processes.device, stream.pipeline, buffer)
    lr = settings.optimizer.learning_rate(global_batch)
    shape = len(stream.test_sets), stream.num_tasks
    record = RunRecord(
        config={**settings.stored(), "vote_group_size": settings.vote_group_size},
        backbone=identity.as_dict(),
        class_order=stream.class_order,
        class_names=list(stream.class_names),
        matrices={s: metrics.empty_matrix(*shape) for s in SELECTIONS},
        tasks=[task.name for task in stream.tasks],
        test_sets=[test_set.name for test_set in stream.test_sets],
        numerics={
            **dataclasses.asdict(settings.precision),
            "data_on_device": stream.pipeline.on_device,
            "eval_batch_size": loading.test_batch,
        },
        command=settings.command(),
        run={
            "processes": processes.world_size,
            "images_per_step": global_batch,
            "learning_rate": lr,
            "train_digest": stream.train_digest,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    )
    loop = Run(
        options=engine_options(settings, processes.device, stream.classes),
        train_loader=loaders.train,
        test_loader=loaders.test,
        make_optimizer=partial(make_optimizer, settings.optimizer, model, lr),
        make_scheduler=partial(make_scheduler, settings.optimizer),
        matrices=record.matrices,
    )
    return Experiment(settings, processes, stream, model, loop, record, global_batch, buffer)


def _check_steps(settings: OptimizerSettings, stream: TaskStream, global_batch: int) -> None:
    """Makes sure that every task has something to train on."""
    for task in stream.tasks:
        if settings.drop_last and len(task.data) < global_batch:
            raise DataError(
                f"--drop_last leaves no step of {task.name}: it has {len(task.data)} images, a "
                f"step {global_batch}; lower --batch-size or leave --drop_last out"
            )
