"""Rejects contradictory settings, all at once and before anything is loaded."""

import difflib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm.optim

import utils
from cli import configurations
from cli.parser import UsageError, shown
from cli.settings import OptimizerSettings, Settings, find_flag
from continual_datasets import pipeline, transforms
from continual_datasets.images import DataError
from continual_datasets.readers import registry
from continual_datasets.scenarios import Scenario, find_scenario
from experiment import build, live_log
from model.backbone import without_memory
from model.weights import WEIGHT_SUFFIXES
from prompt import find_selection_rule
from vision_transformer import PromptedVisionTransformer, find_pooling

#: What torch compiles with, on the CPU or around a GPU's kernels.
_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


def validate(settings: Settings, problems: Iterable[str] = (), *, elsewhere: bool = False) -> None:
    """Checks settings against each other, the files they name, and the environment.

    Args:
        settings: The settings.
        problems: What is known to be wrong already.
        elsewhere: Whether the run takes place on another machine, which may have other devices and
            other data.

    Raises:
        UsageError: With everything that is wrong, one problem a line.
    """
    problems = list(problems)
    of_the_model = [*_prompts(settings), *_optimizer(settings.optimizer)]
    problems = [
        *problems,
        *of_the_model,
        *_schedule(settings.optimizer),
        *_transforms(settings),
        *_replay(settings),
        *_votes(settings),
        *_scenario(settings, elsewhere),
        *_model(settings, sound=not of_the_model and not problems),
        *(() if elsewhere else _processes(settings)),
        *_commands(settings),
        *_seeds(settings),
        *_output(settings),
    ]
    if problems:
        raise UsageError(problems)


def _rejection(find: Callable[..., Any], *args: Any) -> list[str]:
    """What a registry says of a name that it rejects."""
    try:
        find(*args)
    except ValueError as error:
        return [str(error)]
    return []


def _prompts(settings: Settings) -> Iterator[str]:
    prompts = settings.prompts
    yield from _rejection(find_pooling, settings.model.head_type, prompts.prompt_pool)
    yield from _rejection(find_selection_rule, prompts.diversify)
    if not prompts.prompt_pool:
        for name in ("diversify", "shared_prompt_pool", "shared_prompt_key"):
            flag = find_flag(name)
            if settings[name] != flag.default:
                value = "" if flag.is_switch else f" {settings[name]}"
                yield f"{flag.spelling}{value} needs the prompt pool: leave --prompt_pool on"
        return
    if prompts.top_k > prompts.size:
        yield (
            f"--top_k {prompts.top_k} exceeds --size {prompts.size}: lower --top_k or enlarge the "
            "pool"
        )
    if prompts.shared_prompt_key and not prompts.prompt_key:
        yield "--shared_prompt_key needs keys of their own: leave --prompt_key on"


def _optimizer(settings: OptimizerSettings) -> Iterator[str]:
    name = settings.opt.lower().removeprefix("lookahead_")
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or ["adam", "adamw", "sgd", "lion"]
        yield f"--opt {settings.opt} is unknown to timm: did you mean {', '.join(near)}?"
        return
    info = timm.optim.get_optimizer_info(name)
    if getattr(info, "second_order", False):
        yield f"--opt {settings.opt} needs second derivatives, which the loop does not compute"
    if settings.opt_betas is not None and not info.has_betas:
        yield f"--opt-betas: --opt {settings.opt} has none, leave them out"


def _schedule(settings: OptimizerSettings) -> Iterator[str]:
    if settings.sched == "constant":
        if settings.lr_noise is not None:
            yield "--lr-noise needs a schedule: --sched constant has none"
    elif settings.warmup_epochs >= settings.epochs:
        yield (
            f"--warmup-epochs {settings.warmup_epochs} leaves nothing of --epochs "
            f"{settings.epochs} to --sched {settings.sched}: the schedule starts anew with each "
            "task; give fewer"
        )


def _transforms(settings: Settings) -> Iterator[str]:
    """A policy that timm does not know, and what images on the device exclude."""
    options = settings.transforms
    if options.aa and (problem := transforms.policy_problem(options.aa)):
        yield problem
    if settings.data.data_on_device is not True:
        return
    if reason := pipeline.why_not_on_device(options):
        yield f"--data_on_device true: {reason}"
    with suppress(ValueError):  # which `_scenario` reports
        for name, spec in registry.find_sources(settings.data.dataset).items():
            if spec.in_files:
                yield (
                    f"--data_on_device true: the images of {name} are files, opened when they are "
                    "needed; leave it out"
                )


def _replay(settings: Settings) -> Iterator[str]:
    replay = settings.replay
    if not replay.has_buffer and replay.replay_batch is not None:
        yield "--replay_batch needs a buffer: give --buffer_size or --buffer_per_class"
    if replay.buffer_size is not None and replay.buffer_per_class is not None:
        yield "--buffer_size and --buffer_per_class are two ways to say one thing: give one"


def _votes(settings: Settings) -> Iterator[str]:
    """Whether each vote group is in one batch, with equally many replayed images."""
    batch, votes = settings.optimizer.batch_size, settings.vote_group_size
    eval_batch = settings.data.eval_batch_size
    if eval_batch is not None and eval_batch < votes:
        yield (
            f"--eval_batch_size {eval_batch}: a vote group, {votes} images, must be in one batch; "
            f"give at least {votes}, or a smaller --vote_group_size"
        )
    if settings.run.eval:
        return
    has_buffer = settings.replay.has_buffer
    if (settings.prompts.prompt_pool or has_buffer) and batch % votes:
        yield (
            f"--vote_group_size {votes} does not divide --batch-size {batch}: "
            "a vote group must be in one batch"
        )
    elif has_buffer and (replayed := settings.replay.replay_batch or batch) * votes % batch:
        yield (
            f"--replay_batch {replayed} cannot be shared by the {batch // votes} vote groups of "
            f"--batch-size {batch}: give a multiple of {batch // votes}"
        )


def _scenario(settings: Settings, elsewhere: bool) -> Iterator[str]:
    """Problems of scenario and data, as far as can be seen without reading any image."""
    tasks = settings.tasks
    if not elsewhere and tasks.class_order is not None and not Path(tasks.class_order).is_file():
        yield f"--class_order {tasks.class_order}: there is no such file"
    try:
        scenario = find_scenario(settings)
    except ValueError as error:
        yield str(error)
        return
    yield from scenario.problems()
    if not all(map(configurations.exists, settings.given.configurations)):
        return  # the missing configuration may name other data
    if elsewhere:
        with suppress(ValueError):
            yield from () if scenario.tasks_are_folders else _tasks(scenario)
        return
    missing = list(_missing_data(scenario))
    yield from missing
    try:
        yield from _tasks(scenario)
        yield from _buffer(scenario)
        scenario.check_classes()
    except ValueError as error:
        if not (missing and isinstance(error, DataError)):
            yield str(error)


def _missing_data(scenario: Scenario) -> Iterator[str]:
    """A data folder that does not exist, or that would get the results as one more task."""
    settings = scenario.settings
    data = settings.data
    path = Path(data.data_path).expanduser()
    specs = registry.find_sources(data.dataset)
    if not path.is_dir() and any(spec.needs_data_path for spec in specs.values()):
        downloadable = all(spec.downloadable for spec in specs.values())
        hint = ", or an empty one to download it into" if downloadable else ""
        given = "" if "data_path" in settings.given.explicit else " (the default)"
        yield (
            f"--data-path {path}{given} does not exist: name the folder that holds "
            f"{data.dataset}{hint}"
        )
    any_folder = any(spec.any_data for spec in specs.values())
    output_dir = settings.run.output_dir
    is_a_task = scenario.tasks_are_folders and any_folder
    if is_a_task and Path(output_dir).absolute().parent == path.absolute():
        yield f"--output_dir {output_dir} would count as a domain of --data-path {path}"


def _tasks(scenario: Scenario) -> Iterator[str]:
    """Whether their number fits the data and the pool."""
    settings = scenario.settings
    prompts, wanted = settings.prompts, settings.tasks.num_tasks
    num_parts = scenario.num_tasks()
    if wanted is not None and wanted != num_parts:
        yield (
            f"--num_tasks {wanted}: the data are {num_parts} tasks ({settings.data.dataset}, "
            f"{scenario.name}), give {num_parts} or none"
        )
    if num_parts == 1 and settings.replay.has_buffer:
        yield "--buffer_size and --buffer_per_class replay earlier tasks: one task has none"
    if prompts.prompt_pool and not _rejection(find_selection_rule, prompts.diversify):
        rule = find_selection_rule(prompts.diversify)
        yield from rule.problems(prompts, 1 if scenario.is_joint else num_parts)


def _buffer(scenario: Scenario) -> Iterator[str]:
    """Whether it has room for every class."""
    size = scenario.settings.replay.buffer_size
    if size is not None and size < (num_classes := scenario.num_classes()):
        yield (
            f"--buffer_size {size} is smaller than the number of classes: give at least "
            f"{num_classes}, an image for each"
        )


def _model(settings: Settings, sound: bool) -> Iterator[str]:
    """Problems of weights and backbone; of the whole model where its settings are sound."""
    file = settings.model.weight_file
    if file is not None and not file.is_file():
        given = settings.model.pretrained
        yield f"--pretrained {given}: neither true, false, nor a file that exists"
    elif file is not None and file.suffix not in WEIGHT_SUFFIXES:
        yield f"--pretrained {file}: must end in {', '.join(WEIGHT_SUFFIXES)}"
    try:
        with without_memory():
            vit = build.build_backbone(settings)
            if sound:
                yield from _trained(settings, build.build_model(settings, vit, num_classes=2))
    except ValueError as error:
        yield str(error)


def _trained(settings: Settings, model: PromptedVisionTransformer) -> Iterator[str]:
    """Whether something trains, and an optimizer takes its settings."""
    if not any(p.requires_grad for p in model.parameters()):
        yield f"--freeze {' '.join(settings.model.freeze)} leaves nothing to train"
        return
    if settings.precision.grad_checkpointing and not (
        settings.prompts.prompt_pool or model.backbone_trains
    ):
        yield "--grad_checkpointing: only the head trains, no activation is stored for it"
    try:
        build.make_optimizer(settings.optimizer, model, lr=settings.optimizer.lr)
    except Exception as error:  # timm's optimizers check their settings in many ways
        opt, betas = settings.optimizer.opt, settings.optimizer.opt_betas
        given = f"--opt {opt}" if betas is None else f"--opt {opt} --opt-betas {shown(betas)}"
        yield f"{given}: the optimizer rejects its settings: {utils.reason(error)}"


def _processes(settings: Settings) -> Iterator[str]:
    try:
        device = utils.choose_device(settings.run.device, utils.find_launch())
        if settings.precision.tf32 and device.type == "cpu":
            yield "--tf32 is for CUDA, and the run would take place on the CPU: leave it out"
        if settings.precision.compile and not any(map(shutil.which, _COMPILERS)):
            yield f"--compile needs a C++ compiler: install one of {', '.join(_COMPILERS)}"
    except ValueError as error:
        yield str(error)


def _commands(settings: Settings) -> Iterator[str]:
    """What excludes each other, and what needs something else, of resuming, evaluating, logging."""
    run, output = settings.run, settings.output
    for name in ("resume", "speed_test", "speed_test_only"):
        if run.eval and settings[name]:
            yield f"--{name} and --eval are two commands: give one of them"
    if run.checkpoint is not None and not run.eval:
        yield "--checkpoint names what --eval evaluates: give --eval too"
    if run.resume == "auto" and not run.output_dir:
        yield "--resume auto looks for the state in --output_dir, which is empty: give it"
    elif run.resume not in (None, "auto") and not Path(run.resume).exists():
        yield f"--resume {run.resume}: neither auto nor a state of a run that exists"
    yield from live_log.missing_packages(tensorboard=output.tensorboard, wandb=output.wandb)
    for name in ("tensorboard", "wandb"):
        if settings[name] and run.eval:
            yield f"--{name} logs training: leave it out with --eval"
        elif settings[name] and not run.output_dir:
            yield f"--{name} writes into --output_dir, which is empty: give it"
    for name in ("eval", "speed_test", "speed_test_only"):
        if run.dry_run and settings[name]:
            yield f"--dry_run tries out training: leave --{name} out"


def _seeds(settings: Settings) -> Iterator[str]:
    """What a command for several seeds excludes."""
    seeds, resume = settings.run.seeds, settings.run.resume
    if seeds is None:
        return
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield f"--seeds {shown(seeds)}: seed {shown(twice)} is given twice, give each once"
    if "seed" in settings.given.flags:
        yield "--seed and --seeds are two ways to say one thing: give one"
    if settings.run.eval:
        yield "--seeds trains; --eval evaluates one run: name its folder with --output_dir"
    if not settings.run.output_dir:
        yield "--seeds needs --output_dir, in which each seed gets a folder: give it"
    if resume not in (None, "auto"):
        yield f"--resume {resume} is one run's state: --seeds takes --resume auto"


def _output(settings: Settings) -> Iterator[str]:
    if not settings.run.output_dir:
        return
    folder = Path(settings.run.output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        yield f"--output_dir {settings.run.output_dir}: {nearest} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"--output_dir {settings.run.output_dir}: {nearest} cannot be written to"
