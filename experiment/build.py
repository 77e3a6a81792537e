"""From the resolved settings of a run to what its parts are built from.

Settings are read, never written: whatever is derived from them (learning rate, vote group, paths)
is returned.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from cli import options
from cli.paths import ROOT
from continual_datasets.readers import registry
from continual_datasets.readers.class_folders import DomainList
from continual_datasets.samplers import LoaderOptions
from continual_datasets.transforms import TransformOptions
from engine import EngineOptions, Scheduler
from experiment.precision import Numerics
from model import backbone
from processes import Processes
from prompt import Prompt
from vision_transformer import PromptedVisionTransformer

#: Steps that run ahead on a GPU: a signal to stop is heard by all processes that much later.
_MOST_UNREAD = 10


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that describe the run, as plain values for config.yaml and checkpoints."""
    return {k: v for k, v in vars(args).items() if k not in options.TRANSIENT}


def command(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line said of the run: names of configurations, and flags with values.

    What says where and how fast it is computed is left out.
    """
    left_out = (*options.TRANSIENT, *options.COMPUTE_ONLY)
    flags = {k: v for k, v in args.command["flags"].items() if k not in left_out}
    return {"configurations": args.command["configurations"], "flags": flags}


def for_seed(args: argparse.Namespace, seed: int) -> argparse.Namespace:
    """The settings of one run of `--seeds`, in a folder of its own."""
    folder = os.path.join(args.output_dir, f"seed{seed}")
    return argparse.Namespace(**{**vars(args), "seed": seed, "output_dir": folder})


def same(name: str, one: object, other: object) -> bool:
    """Whether two values of a setting mean the same."""
    if name == "model":
        return backbone.resolve_name(str(one)) == backbone.resolve_name(str(other))
    if name == "dataset":
        try:
            return list(registry.find_sources(str(one))) == list(registry.find_sources(str(other)))
        except ValueError:
            return False
    if name == "num_tasks":  # none leaves it to the data; what follows is compared by class order
        return one is None or other is None or one == other
    return one == other


def num_tasks(args: argparse.Namespace, parts: int | None = None) -> int:
    """T, the tasks of the run.

    Args:
        args: The settings.
        parts: What `num_parts` gives, if that is known.

    Raises:
        See `num_parts`.
    """
    if args.joint:
        return 1
    return num_parts(args) if parts is None else parts


def num_parts(args: argparse.Namespace) -> int:
    """Tasks before `--joint` puts them together; needs the data where their folders are the tasks.

    Raises:
        DataError: If such folders are missing.
        ValueError: If there is no such data set.
    """
    if args.scenario == "domain-incremental":
        return len(list_domains(args).names)
    if args.scenario == "gaussian":
        return args.num_tasks or 200
    num_data_sets = len(registry.find_sources(args.dataset))
    return num_data_sets if num_data_sets > 1 else args.num_tasks or 10


def list_domains(args: argparse.Namespace) -> DomainList:
    """Names of the domains, in the order in which they are learned, and their classes.

    Raises:
        See `num_parts`.
    """
    path = Path(args.data_path)
    return registry.list_domains(args.dataset, path, file_lists(args), args.domains)


def num_classes(args: argparse.Namespace) -> int:
    """C, the classes of the data.

    Raises:
        See `num_parts`.
    """
    if args.scenario == "domain-incremental":
        return list_domains(args).classes
    return registry.count_classes(args.dataset, Path(args.data_path))


def file_lists(args: argparse.Namespace) -> Path | None:
    """The folder of published file lists, if one is given."""
    return None if args.file_lists is None else Path(args.file_lists).expanduser()


def has_buffer(args: argparse.Namespace) -> bool:
    """Whether images of earlier tasks are replayed."""
    return args.buffer_size is not None or args.buffer_per_class is not None


def replayed_per_group(args: argparse.Namespace) -> int:
    """R, the replayed images that join each vote group; 0 without a buffer."""
    if not has_buffer(args):
        return 0
    return (args.replay_batch or args.batch_size) * vote_group_size(args) // args.batch_size


def images_per_episode(args: argparse.Namespace, global_batch: int) -> int | None:
    """Images drawn for an episode of the Gaussian schedule; None: all of its classes."""
    if args.gaussian_reading == "released" or args.joint:
        return None
    return args.steps_per_task * global_batch


def schedule_steps(args: argparse.Namespace) -> int:
    """Positions of the Gaussian schedule that an episode takes.

    The released configuration gives no number of steps, which its arithmetic takes for one.
    """
    return 1 if args.gaussian_reading == "released" else args.steps_per_task


def vote_group_size(args: argparse.Namespace) -> int:
    """Images that vote for prompts together: the batch of one process unless set."""
    return args.vote_group_size or args.batch_size


def learning_rate(args: argparse.Namespace, global_batch: int) -> float:
    """The rate that the optimizer gets: `--lr` scaled by the batch.

    Args:
        args: The settings.
        global_batch: Images of all processes in a training step.

    Source: l2p-pytorch multiplies by the batch of one process / 256.
    """
    if args.lr_scale == "none":
        return args.lr
    batch = global_batch if args.lr_scale == "global" else args.batch_size
    return args.lr * batch / 256


def weight_file(args: argparse.Namespace) -> Path | None:
    """The local file of `--pretrained PATH`; shipped weights are found from any folder."""
    if isinstance(args.pretrained, bool):
        return None
    path = Path(args.pretrained).expanduser()
    beside_program = ROOT / path
    return beside_program if not path.exists() and beside_program.exists() else path


def transform_options(args: argparse.Namespace) -> TransformOptions:
    """How images are cropped, flipped, resized and normalised.

    Raises:
        ValueError: On values out of range.
    """
    return TransformOptions(
        input_size=args.input_size,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        interpolation=args.train_interpolation,
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        norm=args.norm,
        train_resize=args.train_resize,
        train_jpeg=args.train_jpeg,
        test_interpolation=args.test_interpolation,
    )


def loader_options(
    args: argparse.Namespace, processes: Processes, global_batch: int
) -> LoaderOptions:
    """How images are put into batches; never more workers than there are cores."""
    return LoaderOptions(
        batch_size=args.batch_size,
        vote_group_size=vote_group_size(args),
        num_workers=min(args.num_workers, usable_cores()),
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        seed=args.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        global_batch=global_batch,
        drop_last=args.drop_last,
        replayed_per_group=replayed_per_group(args),
        eval_batch_size=_eval_batch_size(args, processes.device),
        test_cache_bytes=int(args.test_cache * 10**9),
    )


def _eval_batch_size(args: argparse.Namespace, device: torch.device) -> int:
    if args.eval_batch_size is not None:
        return args.eval_batch_size
    return max(args.batch_size, 256) if device.type == "cuda" else args.batch_size


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def engine_options(
    args: argparse.Namespace, device: torch.device, all_classes: tuple[int, ...]
) -> EngineOptions:
    """What the engine optimises and evaluates."""
    return EngineOptions(
        device=device,
        epochs=args.epochs,
        vote_group_size=vote_group_size(args),
        all_classes=all_classes,
        train_mask=args.train_mask,
        task_inc=args.task_inc,
        pull_coeff=args.pull_constraint_coeff if args.pull_constraint else 0.0,
        smoothing=args.smoothing,
        clip_grad=args.clip_grad,
        reinit_optimizer=args.reinit_optimizer,
        shared_prompt_pool=args.shared_prompt_pool,
        shared_prompt_key=args.shared_prompt_key,
        print_freq=args.print_freq,
        seed=args.seed,
        replayed_per_group=replayed_per_group(args),
        read_every=min(args.print_freq, _MOST_UNREAD) if device.type == "cuda" else 1,
        loss_scaling=numerics(args).loss_scaling,
    )


def numerics(args: argparse.Namespace) -> Numerics:
    """What the run trades for speed or memory."""
    return Numerics(args.amp, args.tf32, args.compile, args.grad_checkpointing)


def build_backbone(args: argparse.Namespace, pretrained: bool = False) -> VisionTransformer:
    """The timm ViT that the settings name.

    Args:
        args: The settings.
        pretrained: Whether to load the weights that the settings name, too.

    Raises:
        WeightsError: If it cannot be built, or its weights cannot be had.
    """
    vit = backbone.build_backbone(
        args.model,
        input_size=args.input_size,
        model_kwargs=args.model_kwargs,
        drop=args.drop,
        drop_path=args.drop_path,
        pretrained=pretrained and args.pretrained is True,
    )
    file = weight_file(args)
    if pretrained and file is not None:
        backbone.load_backbone_file(vit, file)
    return vit


def backbone_source(args: argparse.Namespace) -> str:
    """Where the backbone's weights come from, in a word or a file's name."""
    file = weight_file(args)
    if file is not None:
        return file.name
    return "timm" if args.pretrained else "random"


def build_model(
    args: argparse.Namespace, vit: VisionTransformer, num_classes: int
) -> PromptedVisionTransformer:
    """The prompted model around a backbone.

    Raises:
        ValueError: If head, pool and frozen names contradict.
    """
    pool = None
    freeze = list(args.freeze)
    if args.prompt_pool:
        pool = Prompt(
            size=args.size,
            length=args.length,
            top_k=args.top_k,
            embed_dim=vit.embed_dim,
            learnable_key=args.prompt_key,
            prompt_init=args.initializer,
            key_init=args.prompt_key_init,
            batchwise=args.batchwise_prompt,
            diversify=args.diversify,
            vote_ties=args.vote_ties,
        )
        if args.prompt_key and not args.pull_constraint:
            freeze.append("prompt.prompt_key")  # nothing else gives the keys a gradient
    return PromptedVisionTransformer(
        vit,
        num_classes,
        pool,
        head_type=args.head_type,
        global_pool=args.global_pool,
        embedding_key=args.embedding_key,
        head_init=args.head_init,
        prompt_position=args.prompt_position,
        freeze=freeze,
    )


def backbone_trains(args: argparse.Namespace) -> bool:
    """Whether the settings leave anything of the backbone unfrozen, told without weights."""
    with backbone.without_memory():
        return build_model(args, build_backbone(args), num_classes=2).backbone_trains


def make_optimizer(
    args: argparse.Namespace, model: PromptedVisionTransformer, lr: float
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters; weight decay spares what timm spares."""
    groups = partial(
        param_groups_weight_decay,
        weight_decay=args.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
    )
    kwargs = {**optimizer_kwargs(args), "lr": lr}
    return create_optimizer_v2(model, param_group_fn=groups, **kwargs)


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    """The learning rate schedule of one task; None: constant."""
    if args.sched == "constant":
        return None
    return create_scheduler_v2(optimizer, **scheduler_kwargs(args))[0]
