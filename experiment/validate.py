"""Refuses contradictory settings, all at once and before anything is loaded."""

import argparse
import difflib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import timm.optim

import processes
import prompt
import utils
import vision_transformer
from cli import options
from continual_datasets import class_order, device_transforms, scenarios
from continual_datasets.images import DataError
from continual_datasets.readers import registry
from experiment import build, live_log, precision
from model.backbone import WEIGHT_SUFFIXES, without_memory

SCHEDULES = ("constant", "cosine", "tanh", "step", "multistep", "poly", "plateau")
LR_SCALES = ("none", "per-device", "global")

#: Flags with a fixed set of values.
_CHOICES = {
    "--head_type": vision_transformer.HEAD_TYPES,
    "--global_pool": vision_transformer.GLOBAL_POOLS,
    "--head_init": vision_transformer.HEAD_INITIALIZERS,
    "--embedding_key": vision_transformer.EMBEDDING_KEYS,
    "--initializer": prompt.INITIALIZERS,
    "--prompt_key_init": prompt.INITIALIZERS,
    "--vote_ties": prompt.VOTE_TIES,
    "--prompt_position": vision_transformer.PROMPT_POSITIONS,
    "--diversify": prompt.DIVERSIFY,
    "--scenario": scenarios.SCENARIOS,
    "--gaussian_reading": scenarios.GAUSSIAN_READINGS,
    "--sched": SCHEDULES,
    "--lr_scale": LR_SCALES,
    "--amp": (None, *precision.AMP_DTYPES),
}

#: What torch compiles with, on the CPU or around a GPU's kernels.
_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")

#: Flags that count something and need at least so many.
_AT_LEAST = {
    "--batch-size": 1,
    "--epochs": 1,
    "--size": 1,
    "--length": 1,
    "--top_k": 1,
    "--print_freq": 1,
    "--vote_group_size": 1,
    "--num_tasks": 1,
    "--eval_every": 1,
    "--steps_per_task": 1,
    "--buffer_size": 1,
    "--buffer_per_class": 1,
    "--replay_batch": 1,
    "--eval_batch_size": 1,
    "--num_workers": 0,
    "--warmup-epochs": 0,
    "--cooldown-epochs": 0,
}

_POSITIVE = ("--lr", "--clip-grad", "--opt-eps", "--decay-rate", "--gaussian_sigma")
_NOT_NEGATIVE = (
    "--weight-decay", "--pull_constraint_coeff", "--warmup-lr", "--min-lr", "--test_cache",
)  # fmt: skip
_SHARES = ("--drop", "--drop-path", "--smoothing", "--momentum")


def validate_args(
    args: argparse.Namespace, problems: Iterable[str] = (), *, elsewhere: bool = False
) -> None:
    """Checks settings against each other, the files they name, and the environment.

    Args:
        args: The settings.
        problems: What is known to be wrong already.
        elsewhere: Whether the run takes place on another machine, which may have other devices and
            other data.

    Raises:
        options.UsageError: With everything that is wrong, one problem a line.
    """
    of_the_model = [*_values(args), *_prompts(args), *_optimizer(args)]
    problems = [
        *problems,
        *of_the_model,
        *_schedule(args),
        *_transforms(args),
        *_speed(args),
        *_scenario(args),
        *_replay(args),
        *_votes(args),
        *(_pool(args) if elsewhere else _data(args)),
        *_model(args, sound=not of_the_model),
        *(() if elsewhere else _processes(args)),
        *_resume(args),
        *_evaluation(args),
        *_seeds(args),
        *_views(args),
        *_output(args),
    ]
    if problems:
        raise options.UsageError(problems)


def _value(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag[2:].replace("-", "_"))


def _values(args: argparse.Namespace) -> Iterator[str]:
    for flag, allowed in _CHOICES.items():
        if (value := _value(args, flag)) not in allowed:
            known = ", ".join("none" if name is None else name for name in allowed)
            yield f"{flag} {value} is unknown: choose one of {known}"
    for flag, least in _AT_LEAST.items():
        value = _value(args, flag)
        if isinstance(value, int) and value < least:
            yield f"{flag} {value}: must be at least {least}"
    for flag in _POSITIVE:
        value = _value(args, flag)
        if isinstance(value, float) and not (0 < value < math.inf):
            hint = " (none: no limit)" if flag == "--clip-grad" else ""
            yield f"{flag} {value}: must be positive and finite{hint}"
    for flag in _NOT_NEGATIVE:
        value = _value(args, flag)
        if isinstance(value, float) and not (0 <= value < math.inf):
            yield f"{flag} {value}: must be a finite number that is not negative"
    for flag, seeds in (("--seed", [args.seed]), ("--seeds", args.seeds or [])):
        for seed in seeds:
            if not 0 <= seed < 2**32:
                yield f"{flag} {seed}: must be in [0, 2^32)"
    for flag in _SHARES:
        value = _value(args, flag)
        if isinstance(value, float) and not 0 <= value < 1:
            yield f"{flag} {value}: must be in [0, 1)"


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    if args.predefined_key:
        yield (
            "--predefined_key: the original accepts it and does nothing with it; "
            "keys start from --prompt_key_init"
        )
    if not args.prompt_pool:
        yield from _without_pool(args)
        return
    if args.top_k > args.size:
        yield f"--top_k {args.top_k} exceeds --size {args.size}: lower --top_k or enlarge the pool"
    if args.shared_prompt_key and not args.prompt_key:
        yield "--shared_prompt_key needs keys of their own: leave --prompt_key on"


def _without_pool(args: argparse.Namespace) -> Iterator[str]:
    if "prompt" in args.head_type:
        yield (
            f"--head_type {args.head_type} reads prompt tokens, but --prompt_pool is off: "
            "use --head_type token or gap"
        )
    if args.diversify != "none":
        yield f"--diversify {args.diversify} needs the prompt pool: leave --prompt_pool on"
    for flag in ("--shared_prompt_pool", "--shared_prompt_key"):
        if _value(args, flag):
            yield f"{flag} needs the prompt pool: leave --prompt_pool on"


def _optimizer(args: argparse.Namespace) -> Iterator[str]:
    name = args.opt.lower().removeprefix("lookahead_")
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or ["adam", "adamw", "sgd", "lion"]
        yield f"--opt {args.opt} is unknown to timm: did you mean {', '.join(near)}?"
        return
    info = timm.optim.get_optimizer_info(name)
    if getattr(info, "second_order", False):
        yield f"--opt {args.opt} needs second derivatives, which the loop does not compute"
    if args.opt_betas is not None and not info.has_betas:
        yield f"--opt-betas: --opt {args.opt} has none, leave them out"


def _schedule(args: argparse.Namespace) -> Iterator[str]:
    if args.sched == "constant":
        if args.lr_noise is not None:
            yield "--lr-noise needs a schedule: --sched constant has none"
    elif args.warmup_epochs >= args.epochs:
        yield (
            f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs} to "
            f"--sched {args.sched}: the schedule begins anew with each task; give fewer"
        )


def _transforms(args: argparse.Namespace) -> Iterator[str]:
    try:
        build.transform_options(args)
    except ValueError as error:
        yield from str(error).split("; ")


def _speed(args: argparse.Namespace) -> Iterator[str]:
    """What images on the device do not go with."""
    if args.data_on_device is not True:
        return
    with suppress(ValueError):  # which `_transforms` and `_data` tell
        if reason := device_transforms.why_not_on_device(build.transform_options(args)):
            yield f"--data_on_device true: {reason}"
        for name, spec in registry.find_sources(args.dataset).items():
            if spec.in_files:
                yield (
                    f"--data_on_device true: the images of {name} are files, opened when they are "
                    "needed; leave it out"
                )


def _scenario(args: argparse.Namespace) -> Iterator[str]:
    """Flags that the scenario cannot follow."""
    if args.scenario != "gaussian":
        usual = options.defaults()
        for flag in ("--gaussian_reading", "--steps_per_task", "--gaussian_sigma"):
            if _value(args, flag) != usual[flag[2:]]:
                yield f"{flag} {_value(args, flag)}: needs --scenario gaussian"
    elif args.gaussian_reading == "paper" and args.epochs != 1 and not args.joint:
        yield (
            f"--epochs {args.epochs}: --gaussian_reading paper trains every batch once, give "
            "--epochs 1, or more --steps_per_task"
        )
    if args.file_lists is not None and args.scenario != "domain-incremental":
        yield "--file_lists tells domains: give --scenario domain-incremental"
    if args.domains is not None and args.scenario != "domain-incremental":
        yield "--domains names domains: give --scenario domain-incremental"
    if args.scenario != "class-incremental" and args.classes_per_task is not None:
        yield f"--classes_per_task: --scenario {args.scenario} does not split the classes"
    if args.scenario == "domain-incremental" and args.class_order is not None:
        yield "--class_order: every task of --scenario domain-incremental has all classes"


def _replay(args: argparse.Namespace) -> Iterator[str]:
    if not build.has_buffer(args):
        if args.replay_batch is not None:
            yield "--replay_batch needs a buffer: give --buffer_size or --buffer_per_class"
        return
    if args.buffer_size is not None and args.buffer_per_class is not None:
        yield "--buffer_size and --buffer_per_class are two ways to say one thing: give one"
    if args.joint:
        yield "--joint learns all tasks at once and has nothing to replay: leave the buffer out"


def _votes(args: argparse.Namespace) -> Iterator[str]:
    """Whether each vote group lies in one batch, with equally many replayed images."""
    batch, votes = args.batch_size, build.vote_group_size(args)
    if args.eval_batch_size is not None and 1 <= args.eval_batch_size < votes:
        yield (
            f"--eval_batch_size {args.eval_batch_size}: a vote group, {votes} images, must lie in "
            f"one batch; give at least {votes}, or a smaller --vote_group_size"
        )
    if args.eval or batch < 1 or votes < 1:
        return
    if (args.prompt_pool or build.has_buffer(args)) and batch % votes:
        yield (
            f"--vote_group_size {votes} does not divide --batch-size {batch}: "
            "a vote group must lie in one batch"
        )
    elif build.has_buffer(args) and (replayed := args.replay_batch or batch) * votes % batch:
        yield (
            f"--replay_batch {replayed} cannot be shared by the {batch // votes} vote groups of "
            f"--batch-size {batch}: give a multiple of {batch // votes}"
        )


def _data(args: argparse.Namespace) -> Iterator[str]:
    """Problems of the data, as far as can be seen without reading any of it."""
    if args.class_order is not None and not Path(args.class_order).is_file():
        yield f"--class_order {args.class_order}: there is no such file"
    path = Path(args.data_path).expanduser()
    try:
        specs = registry.find_sources(args.dataset)
    except ValueError as error:
        yield str(error)
        return
    missing = not path.is_dir() and any(spec.needs_data_path for spec in specs.values())
    if missing:
        downloadable = all(spec.downloadable for spec in specs.values())
        hint = ", or an empty one to download it into" if downloadable else ""
        given = "" if "data_path" in args.explicit else " (the default)"
        yield (
            f"--data-path {path}{given} does not exist: name the folder that holds "
            f"{args.dataset}{hint}"
        )
    yield from _one_data_set(args, list(specs))
    folders_are_domains = args.scenario == "domain-incremental" and "ImageFolder" in specs
    if folders_are_domains and Path(args.output_dir).absolute().parent == path.absolute():
        yield f"--output_dir {args.output_dir} would count as a domain of --data-path {path}"
    if len(specs) > 1 and args.scenario != "class-incremental":
        return
    try:
        parts = build.num_parts(args)
        yield from _tasks(args, parts)
        yield from _classes(args, build.num_classes(args), parts, several=len(specs) > 1)
    except DataError as error:
        if not missing:
            yield str(error)
    except ValueError as error:
        yield str(error)


def _one_data_set(args: argparse.Namespace, names: list[str]) -> Iterator[str]:
    """Flags that several data sets in a row, or data sets without domains, cannot follow."""
    if args.file_lists is not None and names != ["CORe50"]:
        yield f"--file_lists are those of CORe50: leave them out with --dataset {args.dataset}"
    if len(names) == 1:
        return
    if args.scenario != "class-incremental":
        yield (
            f"--scenario {args.scenario} takes one data set; several ({args.dataset}) are learned "
            "one after the other: leave --scenario out"
        )
    for flag in ("--classes_per_task", "--class_order"):
        if _value(args, flag) is not None:
            yield f"{flag}: each of {', '.join(names)} is one task with all its classes"


def _pool(args: argparse.Namespace) -> Iterator[str]:
    """Whether the number of tasks fits the pool, as far as can be told without the data."""
    if args.scenario != "domain-incremental":
        with suppress(ValueError):
            yield from _tasks(args, build.num_parts(args))


def _tasks(args: argparse.Namespace, parts: int) -> Iterator[str]:
    """Whether their number fits the data and the pool."""
    if args.num_tasks is not None and args.num_tasks >= 1 and args.num_tasks != parts:
        yield (
            f"--num_tasks {args.num_tasks}: the data are {parts} tasks ({args.dataset}, "
            f"{args.scenario}), give {parts} or none"
        )
    if parts == 1 and build.has_buffer(args):
        yield "--buffer_size and --buffer_per_class replay earlier tasks: one task has none"
    num_tasks = build.num_tasks(args, parts)
    needed = num_tasks * args.top_k
    if args.prompt_pool and args.diversify == "mask" and args.size < needed:
        yield (
            f"--diversify mask gives each of {num_tasks} tasks its own {args.top_k} prompts: "
            f"--size {args.size} is too small, use at least {needed}, or lower --top_k"
        )


def _classes(
    args: argparse.Namespace, num_classes: int, parts: int, several: bool
) -> Iterator[str]:
    """Whether their number fits the tasks, the schedule and the buffer."""
    if args.buffer_size is not None and 1 <= args.buffer_size < num_classes:
        yield (
            f"--buffer_size {args.buffer_size} is smaller than the number of classes: give at "
            f"least {num_classes}, an image for each"
        )
    steps = build.schedule_steps(args)
    if args.scenario == "gaussian":
        if steps >= 1 and args.gaussian_sigma > 0:
            scenarios.presence(num_classes, parts, steps, args.gaussian_sigma)
    elif args.scenario == "class-incremental" and not several:
        class_order.check_split(num_classes, parts, args.classes_per_task)


def _model(args: argparse.Namespace, sound: bool) -> Iterator[str]:
    """Problems of weights and backbone; of the whole model where its settings are sound."""
    file = build.weight_file(args)
    if file is not None and not file.is_file():
        yield f"--pretrained {args.pretrained}: neither true, false, nor a file that exists"
    elif file is not None and file.suffix not in WEIGHT_SUFFIXES:
        yield f"--pretrained {file}: must end in {', '.join(WEIGHT_SUFFIXES)}"
    if args.input_size < 1:
        return
    try:
        with without_memory():
            vit = build.build_backbone(args)
            if sound:
                yield from _trained(args, build.build_model(args, vit, num_classes=2))
    except ValueError as error:
        yield str(error)


def _trained(
    args: argparse.Namespace, model: vision_transformer.PromptedVisionTransformer
) -> Iterator[str]:
    """Whether something trains, and an optimizer takes its settings."""
    if not any(p.requires_grad for p in model.parameters()):
        yield f"--freeze {' '.join(args.freeze)} leaves nothing to train"
        return
    if args.grad_checkpointing and not (args.prompt_pool or model.backbone_trains):
        yield "--grad_checkpointing: only the head trains, no activation is kept for it"
    try:
        build.make_optimizer(args, model, lr=args.lr)
    except Exception as error:  # timm's optimizers check their settings in many ways
        yield f"--opt {args.opt} does not take its settings: {utils.reason(error)}"


def _processes(args: argparse.Namespace) -> Iterator[str]:
    launch = processes.find_launch()
    try:
        device = processes.choose_device(args.device, launch)
        if args.tf32 and device.type == "cpu":
            yield "--tf32 is for CUDA, and the run would take place on the CPU: leave it out"
        if args.compile and not any(map(shutil.which, _COMPILERS)):
            yield f"--compile needs a C++ compiler: install one of {', '.join(_COMPILERS)}"
    except ValueError as error:
        yield str(error)
    launched = 1 if launch is None else launch.world_size
    if args.world_size is not None and args.world_size != launched:
        yield (
            f"--world_size {args.world_size}: the launcher started {launched} processes; "
            f"use its own option, such as --nproc_per_node={args.world_size}"
        )


def _resume(args: argparse.Namespace) -> Iterator[str]:
    if not args.save_every > 0:
        yield f"--save_every {args.save_every}: must be positive"
    if args.resume is None:
        return
    if args.eval:
        yield "--resume and --eval are two commands: give one of them"
    elif args.resume == "auto" and not args.output_dir:
        yield "--resume auto looks for the state in --output_dir, which is empty: give it"
    elif args.resume != "auto" and not Path(args.resume).exists():
        yield f"--resume {args.resume}: neither auto nor a state of a run that exists"


def _evaluation(args: argparse.Namespace) -> Iterator[str]:
    if args.checkpoint is not None and not args.eval:
        yield "--checkpoint names what --eval evaluates: give --eval too"
    for flag in ("--speed_test", "--speed_test_only"):
        if args.eval and _value(args, flag):
            yield f"{flag} and --eval are two commands: give one of them"


def _seeds(args: argparse.Namespace) -> Iterator[str]:
    """What a command for several seeds does not go with."""
    if args.seeds is None:
        return
    if len(set(args.seeds)) < len(args.seeds):
        yield f"--seeds {options.shown(args.seeds)}: each seed once, they are runs of their own"
    if "seed" in args.command["flags"]:
        yield "--seed and --seeds are two ways to say one thing: give one"
    if args.eval:
        yield "--seeds trains; --eval evaluates one run: name its folder with --output_dir"
    if not args.output_dir:
        yield "--seeds needs --output_dir, in which each seed gets a folder: give it"
    if args.resume not in (None, "auto"):
        yield f"--resume {args.resume} is one run's state: --seeds goes on with --resume auto"


def _views(args: argparse.Namespace) -> Iterator[str]:
    """What is shown of training, and what shows it."""
    yield from live_log.missing_packages(tensorboard=args.tensorboard, wandb=args.wandb)
    for flag in ("--tensorboard", "--wandb"):
        if _value(args, flag) and args.eval:
            yield f"{flag} logs training: leave it out with --eval"
        elif _value(args, flag) and not args.output_dir:
            yield f"{flag} writes into --output_dir, which is empty: give it"
    if args.dry_run:
        for flag in ("--eval", "--speed_test", "--speed_test_only"):
            if _value(args, flag):
                yield f"--dry_run tries out training: leave {flag} out"


def _output(args: argparse.Namespace) -> Iterator[str]:
    if not args.output_dir:
        return
    folder = Path(args.output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        yield f"--output_dir {args.output_dir}: {nearest} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"--output_dir {args.output_dir}: {nearest} cannot be written to"
