"""What a run says of itself: at its start what it will do, at its end where everything is."""

import argparse
import logging
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cli import options
from experiment import build
from experiment.assemble import Experiment
from model import backbone
from processes import Processes

#: Characters of a long list that the summary shows.
_WIDTH = 60

#: What of a trained tensor's name tells which part of the model it is.
_PARTS = {"prompt.prompt_key": "keys", "prompt.prompt": "prompts", "head": "head"}

#: What a folder of results holds, in the order in which people look at it.
_CONTENT = {
    "results.json": "accuracies, metrics, prompt usage, versions",
    "plots": "pictures, PNG and SVG; begin with overview.png",
    "log_stats.txt": "a JSON object for each task",
    "config.yaml": "every setting: python main.py {folder}/config.yaml runs it again",
    "log.txt": "what was printed",
    "checkpoint": "what was learned, after each task; last.pth: the state to go on from",
    "tensorboard": "tensorboard --logdir {folder}/tensorboard",
    "wandb": "the log of Weights & Biases",
}

logger = logging.getLogger(__name__)


def describe(args: argparse.Namespace, run: Experiment, processes: Processes) -> None:
    """Logs in a few lines what is about to happen.

    Args:
        args: The settings.
        run: The run.
        processes: This process among all.
    """
    lines = {
        "Data": _data(args, run),
        "Tasks": _tasks(args, run),
        "Replay": _replay(args, run),
        "Model": _model(args, run),
        "Backbone": _backbone(run),
        "Trains": _trained(run),
        "Training": _training(args, run),
        "Precision": _precision(run),
        "Processes": f"{processes.world_size} on {processes.device}",
        "Output": args.output_dir or "none: nothing is written",
    }
    command = options.command_words(build.command(args)) or "the defaults"
    _log_lines(f"L2P: {command}, seed {args.seed}", lines)
    _warn(args, run, processes)


def describe_evaluation(args: argparse.Namespace, run: Experiment, processes: Processes) -> None:
    """Logs in a few lines what `--eval` is about to evaluate; see `describe`."""
    lines = {
        "Data": _data(args, run),
        "Tasks": _tasks(args, run),
        "Model": _model(args, run),
        "Votes": _votes(args, run).removeprefix(", "),
        "Precision": _precision(run),
        "Processes": f"{processes.world_size} on {processes.device}",
    }
    _log_lines("L2P: evaluation of checkpoints", lines)


def conclude(output_dir: Path, seconds: Mapping[str, float], total: float) -> None:
    """Logs where everything lies, how long it took, and what can be done next.

    Args:
        output_dir: Folder of the run.
        seconds: Wall time of each stage.
        total: Wall time of this start of the program.
    """
    stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    logger.info("Time: %s; this start took %s", stages, _duration(total))
    folder = shlex.quote(str(output_dir))
    lines = [
        f"  {name:15s}{text.format(folder=folder)}"
        for name, text in _CONTENT.items()
        if (output_dir / name).exists()
    ]
    logger.info("%s", "\n".join([f"Written to {output_dir}:", *lines]))
    logger.info("Compare runs:   python summarize.py %s OTHER_FOLDER ...", folder)
    logger.info("Evaluate again: bash train.sh --eval --output_dir %s", folder)


def _log_lines(title: str, lines: Mapping[str, str]) -> None:
    rows = [f"  {name + ':':11s}{text}" for name, text in lines.items() if text]
    logger.info("%s", "\n".join([title, *rows]))


def _data(args: argparse.Namespace, run: Experiment) -> str:
    stream = run.stream
    num_test = sum(len(test_set.data) for test_set in stream.test_sets)
    return (
        f"{args.dataset}: {sum(len(task.data) for task in stream.tasks)} training images, "
        f"{num_test} test images in {_count(len(stream.test_sets), 'test set')}"
    )


def _tasks(args: argparse.Namespace, run: Experiment) -> str:
    tasks = run.stream.tasks
    sizes = sorted({len(task.classes) for task in tasks})
    classes = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    scenario = f"{args.scenario}{' (joint)' if args.joint else ''}"
    plural = "" if sizes == [1] else "es"
    return f"{len(tasks)} of {classes} class{plural}, {scenario}; {_order(run)}"


def _order(run: Experiment) -> str:
    """The order of the classes, task by task, or that of the tasks if all have the same classes."""
    order = run.stream.class_order
    if len(order) > 1 and all(sorted(classes) == sorted(order[0]) for classes in order):
        return "order " + _short(" ".join(task.name for task in run.stream.tasks))
    return "classes " + _short(" | ".join(" ".join(map(str, classes)) for classes in order))


def _replay(args: argparse.Namespace, run: Experiment) -> str:
    if run.buffer is None:
        return ""
    per_class = f"{args.buffer_per_class} images of each class"
    kept = f"{args.buffer_size} images" if args.buffer_size else per_class
    replayed = build.replayed_per_group(args)
    return f"{kept}, {replayed} replayed images with each vote group from the second task on"


def _model(args: argparse.Namespace, run: Experiment) -> str:
    head = f"head reads {args.head_type}"
    pool = run.model.prompt
    if pool is None:
        return f"{run.identity.name}, {args.input_size} pixels, no prompts; {head}"
    return (
        f"{run.identity.name}, {args.input_size} pixels; {_count(pool.size, 'prompt')} of "
        f"{_count(pool.length, 'token')}, {pool.top_k} for an image; {head}"
    )


def _backbone(run: Experiment) -> str:
    how = "trains, the query comes from an untouched copy"
    if run.model.prompt is None:
        how = "trains"
    identity = run.identity
    state = how if run.model.backbone_trains else "frozen"
    return f"weights {identity.source}, sha256 {identity.sha256[:12]}; {state}"


def _trained(run: Experiment) -> str:
    """How many numbers of each part are learned, of how many."""
    sizes = Counter[str]()
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            part = next((p for start, p in _PARTS.items() if name.startswith(start)), "backbone")
            sizes[part] += parameter.numel()
    parts = ", ".join(f"{part} {size}" for part, size in sizes.items())
    return f"number of params: {sizes.total()} ({parts})"


def _training(args: argparse.Namespace, run: Experiment) -> str:
    return (
        f"{args.opt}, learning rate {build.learning_rate(args, run.global_batch):g} "
        f"(--lr {args.lr:g}, scaled {args.lr_scale}), {args.sched}; "
        f"{_count(args.epochs, 'epoch')} a task, {run.global_batch} images a step"
        f"{_votes(args, run)}"
    )


def _votes(args: argparse.Namespace, run: Experiment) -> str:
    """How many images vote together, where a vote can change anything."""
    pool = run.model.prompt
    if pool is None or not pool.batchwise or pool.size == pool.top_k:
        return ""
    return f", votes of {build.vote_group_size(args)}"


def _precision(run: Experiment) -> str:
    how = dict(run.record.numerics)
    amp = how.pop("amp", None)
    others = [f"{name} {options.shown(value)}" for name, value in how.items() if value]
    return "; ".join([amp or "fp32", ", ".join(others)])


def _warn(args: argparse.Namespace, run: Experiment, processes: Processes) -> None:
    """Tells what people may not expect of these settings."""
    resolved = backbone.resolve_name(args.model)
    if resolved != args.model:
        logger.info("--model %s means %s: the weights that the original used", args.model, resolved)
    stream = run.stream
    if args.train_mask and {len(task.classes) for task in stream.tasks} == {1}:
        logger.warning(
            "A task is a single class, and --train_mask lets training predict no other: there is "
            "nothing to tell apart; give fewer --num_tasks, or the overlay no_class_mask"
        )
    if args.task_inc and all(t.classes == stream.classes for t in stream.test_sets):
        logger.info("--task_inc tells nothing here: the test images may be of any class")
    num_groups = -(-run.global_batch // build.vote_group_size(args))
    if processes.world_size > num_groups:
        logger.warning(
            "%d of %d processes have nothing to train on: %d images a step are %d vote groups, and "
            "a vote group stays in one process",
            *(
                processes.world_size - num_groups,
                processes.world_size,
                run.global_batch,
                num_groups,
            ),
        )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _short(words: str) -> str:
    return textwrap.shorten(words, _WIDTH, placeholder=" ...")


def _duration(seconds: float) -> str:
    """A time as people say it: 7.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
