"""Rejects contradictory settings, all at once and before anything is loaded.

A check yields a line for each problem; a ValueError ends it, and its text is one of them.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import timm.optim
import torch

import utils
from cli import configurations, needs, terminal
from cli.flags import choose
from cli.options import near
from cli.parser import UsageError, shown
from cli.settings import FLAGS, OptimizerSettings, Settings
from continual_datasets import pipeline, transforms
from continual_datasets.images import DataError
from continual_datasets.readers import registry
from continual_datasets.scenarios import Scenario, find_scenario
from experiment import build, hardware, live_log, network
from model.backbone import WEIGHT_SUFFIXES, build_backbone, without_memory
from model.heads import HEADS
from prompt import SELECTION_RULES, Prompt, find_selection_rule
from vision_transformer import PromptedVisionTransformer, find_pooling

#: Settings that exclude others, and why.
_EXCLUDE = (
    ("eval", "resume speed_test speed_test_only dry_run", "are two commands"),
    ("eval", "seeds", "are two commands, and --eval evaluates the one run of --output_dir"),
    ("eval", "tensorboard wandb", "exclude each other, since only training is logged"),
    ("dry_run", "speed_test speed_test_only", "are two commands"),
    ("continue_from", "eval speed_test_only", "are two commands"),
    ("save_predictions", "dry_run speed_test_only", "exclude each other, nothing is predicted"),
    ("buffer_size", "buffer_per_class", "are two ways to say one thing"),
)

#: Highest learning rate that a schedule may reach.
_HIGHEST_RATE = 1e6

#: What torch compiles with, on the CPU or around a GPU's kernels.
_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


def validate(
    settings: Settings,
    problems: Iterable[str] = (),
    *,
    elsewhere: bool = False,
    num_earlier: int = 0,
) -> None:
    """Checks settings against each other, the files they name, and the environment.

    Args:
        settings: The settings.
        problems: What is known to be wrong already.
        elsewhere: Whether the run takes place on another machine, which may have other devices and
            other data.
        num_earlier: Tasks that the run continues.

    Raises:
        UsageError: With everything that is wrong, one problem a line.
    """
    found = [*problems]
    found += _found_by(_head(settings), _prompts(settings), _optimizer(settings.optimizer))
    found += _found_by(
        _combinations(settings),
        _schedule(settings.optimizer),
        _transforms(settings),
        _votes(settings),
        _scenario(settings, elsewhere, num_earlier),
        _model(settings, is_sound=not found, elsewhere=elsewhere),
        _commands(settings),
        _output(settings),
        iter(()) if elsewhere else _processes(settings),
    )
    if found:
        raise UsageError(dict.fromkeys(found))


def _found_by(*checks: Iterator[str]) -> Iterator[str]:
    for check in checks:
        try:
            yield from check
        except ValueError as error:
            yield str(error)


def _combinations(settings: Settings) -> Iterator[str]:
    """Settings that need each other, or exclude each other."""

    def given(names: str) -> list[str]:
        return [name for name in names.split() if settings[name] != FLAGS[name].default]

    yield from needs.problems(settings)
    for one, others, reason in _EXCLUDE:
        if given(one):
            yield from (f"--{name} and --{one} {reason}: give one" for name in given(others))


def _head(settings: Settings) -> Iterator[str]:
    choose(HEADS, "--head", settings.model.head)
    find_pooling(settings.model.head_type, settings.prompts.prompt_pool)
    yield from ()


def _prompts(settings: Settings) -> Iterator[str]:
    size, top_k = settings.prompts.size, settings.prompts.top_k
    if settings.prompts.prompt_pool and top_k > size:
        yield f"--top_k {top_k} exceeds --size {size}: lower --top_k or enlarge the pool"
    find_selection_rule(settings.prompts.diversify)


def _optimizer(settings: OptimizerSettings) -> Iterator[str]:
    name = settings.opt.lower().removeprefix("lookahead_")
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        hint = near(name, known) or ": timm.optim.list_optimizers() names all"
        raise ValueError(f"--opt {settings.opt} is unknown to timm{hint}")
    info = timm.optim.get_optimizer_info(name)
    if getattr(info, "second_order", False):
        yield f"--opt {settings.opt} needs second derivatives, which the loop does not compute"
    betas, number = settings.opt_betas, info.num_betas if info.has_betas else 0
    if betas is not None and len(betas) != number:
        wanted = f"takes {number}" if number else "has none, leave them out"
        yield f"--opt-betas {shown(betas)}: --opt {settings.opt} {wanted}"


def _schedule(settings: OptimizerSettings) -> Iterator[str]:
    sched, noise = settings.sched, settings.lr_noise
    if noise is not None and (len(noise) > 2 or list(noise) != sorted(noise)):
        yield f"--lr-noise {shown(noise)}: give its start, or its start and then its end"
    if sched != "constant" and settings.warmup_epochs >= settings.epochs:
        yield (
            f"--warmup-epochs {settings.warmup_epochs} leaves nothing of --epochs "
            f"{settings.epochs} to --sched {settings.sched}: the schedule starts anew with each "
            "task; give fewer"
        )
        return
    given = f"--sched {sched} with --decay-rate {settings.decay_rate:g}"
    try:
        highest = max(_rates(settings))
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{given} cannot be computed: {terminal.reason(error)}") from error
    if not highest <= _HIGHEST_RATE:
        yield f"{given} makes the learning rate {highest:g}: give another, or lower --min-lr"


def _rates(settings: OptimizerSettings) -> Iterator[float]:
    """The learning rate of each epoch of a task, unscaled."""
    optimizer = torch.optim.SGD([torch.zeros(1)], settings.lr)
    scheduler = build.make_scheduler(settings, optimizer)
    for epoch in range(settings.epochs):
        yield optimizer.param_groups[0]["lr"]
        if scheduler is not None:
            scheduler.step(epoch + 1, metric=0.0)


def _transforms(settings: Settings) -> Iterator[str]:
    """A policy that timm does not know, and what images on the device exclude."""
    options = settings.transforms
    if options.aa and (problem := transforms.policy_problem(options.aa)):
        yield problem
    if settings.data.data_on_device is not True:
        return
    if reason := pipeline.why_not_on_device(options):
        yield f"--data_on_device true: {reason}"
    for name, spec in registry.find_sources(settings.data.dataset).items():
        if spec.in_files:
            yield (
                f"--data_on_device true: the images of {name} are files, opened when they are "
                "needed; leave it out"
            )


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


def _scenario(settings: Settings, elsewhere: bool, num_earlier: int) -> Iterator[str]:
    """Problems of scenario and data, as far as can be seen without reading any image."""
    order = settings.tasks.class_order
    if order is not None and not elsewhere and not Path(order).is_file():
        problem = "it is no regular file" if Path(order).exists() else "there is no such file"
        yield f"--class_order {order}: {problem}"
    scenario = find_scenario(settings)
    yield from scenario.problems()
    if not all(map(configurations.exists, settings.given.configurations)):
        return  # the missing configuration may name other data
    if elsewhere or settings.run.speed_test_only:
        with suppress(DataError):  # their number may follow from the classes
            yield from () if scenario.tasks_are_folders else _tasks(scenario, num_earlier)
        return
    missing, size = list(_missing_data(scenario)), settings.replay.buffer_size
    yield from missing
    try:
        yield from _tasks(scenario, num_earlier)
        if (num_classes := scenario.num_classes()) + num_earlier == 1:
            yield (
                f"--data-path {settings.data.data_path}: only one class there, at least two "
                "needed, each in a folder of its own (docs/data.md, Data preparation)"
            )
        if size is not None and size < num_classes:
            yield (
                f"--buffer_size {size} is smaller than the number of classes: give at least "
                f"{num_classes}, an image for each"
            )
        scenario.check_classes()
    except DataError:
        if not missing:
            raise


def _missing_data(scenario: Scenario) -> Iterator[str]:
    """A data folder that does not exist, or that would get the results as one more task."""
    settings, data = scenario.settings, scenario.settings.data
    path = Path(data.data_path)
    specs = registry.find_sources(data.dataset).values()
    if not path.is_dir() and any(spec.needs_data_path for spec in specs):
        downloadable = all(spec.downloadable or not spec.needs_data_path for spec in specs)
        hint = ", or an empty one to download it into" if downloadable else ""
        given = " (the default)" if data.data_path == FLAGS["data_path"].default else ""
        yield (
            f"--data-path {path}{given} does not exist: name the folder that holds "
            f"{data.dataset}{hint}"
        )
    output_dir = settings.run.output_dir
    is_inside = Path(output_dir).absolute().parent == path.absolute()
    if is_inside and scenario.tasks_are_folders and any(spec.any_data for spec in specs):
        yield f"--output_dir {output_dir} would count as a domain of --data-path {path}"


def _tasks(scenario: Scenario, num_earlier: int) -> Iterator[str]:
    """Whether their number fits the data and the pool."""
    settings = scenario.settings
    prompts, wanted = settings.prompts, settings.tasks.num_tasks
    num_parts = scenario.num_tasks()
    if wanted is not None and wanted != num_parts:
        yield (
            f"--num_tasks {wanted}: the data are {num_parts} tasks ({settings.data.dataset}, "
            f"{scenario.name}), give {num_parts} or none"
        )
    if prompts.prompt_pool:
        rule = SELECTION_RULES.get(prompts.diversify, Prompt)
        fixed = "; the pool stays that of --continue_from: start anew with a larger one"
        number = num_earlier + (1 if scenario.is_joint else num_parts)
        for problem in rule.problems(prompts, number):
            yield problem + fixed * (num_earlier > 0)


def _model(settings: Settings, is_sound: bool, elsewhere: bool) -> Iterator[str]:
    """Problems of weights and backbone; of the whole model where its settings are sound."""
    file = settings.model.weight_file
    if file is not None and not file.is_file():
        given = settings.model.pretrained
        yield f"--pretrained {given}: neither true, false, nor a file that exists"
    elif file is not None and file.suffix not in WEIGHT_SUFFIXES:
        yield f"--pretrained {file}: must end in {', '.join(WEIGHT_SUFFIXES)}"
    with without_memory():
        vit = build_backbone(settings.model, settings.transforms.input_size)
        if is_sound:
            model = network.build_model(settings, vit, num_classes=2)
            yield from _trained(settings, model)
            yield from () if elsewhere else _memory(model)


def _memory(model: PromptedVisionTransformer) -> Iterator[str]:
    tensors = {*model.state_dict(keep_vars=True).values()}  # some are shared
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > found:
        yield (
            f"--model, --model-kwargs, --size, --length: the network would take {needed / 1e9:.0f} "
            f"GB, and this machine has {found / 1e9:.0f} GB of memory: give smaller ones"
        )


def _trained(settings: Settings, model: PromptedVisionTransformer) -> Iterator[str]:
    """Whether something trains, and an optimizer takes its settings."""
    trained = {n.split(".")[0] for n, p in model.public_parameters() if p.requires_grad}
    if not trained and not model.head_observes:
        yield f"--freeze {' '.join(settings.model.freeze)} leaves nothing to train"
        return
    if trained and model.head_observes and not [*model.head.parameters()]:
        yield (
            f"--head {settings.model.head} takes means of features that do not change, and "
            f"{', '.join(sorted(trained))} would train: turn off --prompt_pool, and --freeze the "
            "rest, as the overlay ncm does"
        )
    if settings.precision.grad_checkpointing and not (
        settings.prompts.prompt_pool or model.backbone_trains
    ):
        yield "--grad_checkpointing: only the head trains, no activation is stored for it"
    try:
        build.make_optimizer(settings.optimizer, model, lr=settings.optimizer.lr)
    except Exception as error:  # timm's optimizers check their settings in many ways
        opt, betas = settings.optimizer.opt, settings.optimizer.opt_betas
        given = f"--opt {opt}" if betas is None else f"--opt {opt} --opt-betas {shown(betas)}"
        yield f"{given}: the optimizer rejects its settings: {terminal.reason(error)}"


def _processes(settings: Settings) -> Iterator[str]:
    """Variables of a launcher that are missing or impossible; what a device lacks."""
    launch = utils.find_launch()
    if launch is not None and launch.world_size > 1:
        utils.find_meeting_point(launch, settings.run.dist_url)
    device = utils.choose_device(settings.run.device, launch)
    if why := hardware.problem(device):
        yield why
    if settings.precision.tf32 and device.type == "cpu":
        yield "--tf32 is for CUDA, and the run would take place on the CPU: leave it out"
    if settings.precision.compile and not any(map(shutil.which, _COMPILERS)):
        yield f"--compile needs a C++ compiler: install one of {', '.join(_COMPILERS)}"


def _commands(settings: Settings) -> Iterator[str]:
    """What a run resumes from, its logs, and its seeds."""
    run = settings.run
    if run.resume == "auto" and not run.output_dir:
        yield "--resume auto looks for the state in --output_dir, which is empty: give it"
    elif run.resume not in (None, "auto") and not Path(run.resume).exists():
        yield f"--resume {run.resume}: neither auto nor a state of a run that exists"
    yield from live_log.missing_packages(settings.output)
    if run.seeds is None:
        return
    if twice := sorted({seed for seed in run.seeds if run.seeds.count(seed) > 1}):
        yield f"--seeds {shown(run.seeds)}: seed {shown(twice)} is given twice, give each once"
    if "seed" in settings.given.flags:
        yield "--seed and --seeds are two ways to say one thing: give one"
    if run.resume not in (None, "auto"):
        yield f"--resume {run.resume} is one run's state: --seeds takes --resume auto"


def _output(settings: Settings) -> Iterator[str]:
    """Whether results can be written."""
    output_dir = settings.run.output_dir
    folder = Path(output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if output_dir and not os.path.isdir(nearest):
        yield f"--output_dir {output_dir}: {nearest} is a file or a link to nothing, not a folder"
    elif output_dir and not os.access(nearest, os.W_OK | os.X_OK):
        yield f"--output_dir {output_dir}: {nearest} cannot be written to"
