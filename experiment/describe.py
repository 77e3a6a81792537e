"""Summary of a run: at its start what it will do, at its end where everything is."""

import logging
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cli.parser import command_words, shown
from continual_datasets.scenarios import find_scenario
from experiment.build import Experiment
from model import backbone

#: Characters of a long list that the summary shows.
_WIDTH = 60

#: Names of parts in the summary, by the prefix of their parameters.
_PARTS = {"prompt.prompt_key": "keys", "prompt.prompt": "prompts"}

#: What a folder of results holds, in the order in which people look at it.
_CONTENT = {
    "results.json": "accuracies, metrics, prompt usage, versions",
    "plots": "figures, PNG and SVG; begin with overview.png",
    "log_stats.txt": "a JSON object for each task",
    "config.yaml": "every setting: python main.py {folder}/config.yaml runs it again",
    "log.txt": "what was printed",
    "checkpoint": "what was learned, after each task; last.pth: the state that --resume loads",
    "tensorboard": "tensorboard --logdir {folder}/tensorboard",
    "wandb": "the log of Weights & Biases",
}

logger = logging.getLogger(__name__)


def describe(run: Experiment) -> None:
    """Logs in a few lines what is about to happen."""
    settings = run.settings
    lines = {
        "Data": _data(run),
        "Tasks": _tasks(run),
        "Replay": _replay(run),
        "Model": _model(run),
        "Backbone": _backbone(run),
        "Trains": _trained(run),
        "Training": _training(run),
        "Precision": _precision(run),
        "Processes": f"{run.processes.world_size} on {run.processes.device}",
        "Output": settings.run.output_dir or "none: nothing is written",
    }
    command = command_words(settings.command()) or "the defaults"
    _log_lines(f"L2P: {command}, seed {settings.run.seed}", lines)
    _warn(run)


def describe_evaluation(run: Experiment) -> None:
    """Logs in a few lines what `--eval` is about to evaluate; see `describe`."""
    lines = {
        "Data": _data(run),
        "Tasks": _tasks(run),
        "Model": _model(run),
        "Votes": _votes(run).removeprefix(", "),
        "Precision": _precision(run),
        "Processes": f"{run.processes.world_size} on {run.processes.device}",
    }
    _log_lines("L2P: evaluation of checkpoints", lines)


def conclude(output_dir: Path, seconds: Mapping[str, float], total: float) -> None:
    """Logs where everything is stored, how long it took, and what can be done next.

    Args:
        output_dir: Folder of the run.
        seconds: Wall time of each stage; training and evaluation of all starts of the run.
        total: Wall time since this start of the program; a resumed run has several starts.
    """
    stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    logger.info("Time: %s; %s since this start", stages, _duration(total))
    folder = shlex.quote(str(output_dir))
    lines = [
        f"  {name:15s}{text.format(folder=folder)}"
        for name, text in _CONTENT.items()
        if (output_dir / name).exists()
    ]
    logger.info("%s", "\n".join([f"Written to {output_dir}:", *lines]))
    logger.info("Compare runs:   python summarize.py %s OTHER_FOLDER ...", folder)
    logger.info("Evaluate again: python main.py --eval --output_dir %s", folder)


def _log_lines(title: str, lines: Mapping[str, str]) -> None:
    rows = [f"  {name + ':':11s}{text}" for name, text in lines.items() if text]
    logger.info("%s", "\n".join([title, *rows]))


def _data(run: Experiment) -> str:
    stream = run.stream
    num_test = sum(len(test_set.data) for test_set in stream.test_sets)
    num_train = sum(len(task.data) for task in stream.tasks)
    return (
        f"{run.settings.data.dataset}: {num_train} training images, "
        f"{num_test} test images in {_count(len(stream.test_sets), 'test set')}"
    )


def _tasks(run: Experiment) -> str:
    tasks = run.stream.tasks
    sizes = sorted({len(task.classes) for task in tasks})
    classes = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    scenario = find_scenario(run.settings)
    splitting = scenario.splitting
    name = splitting.name if splitting is scenario else f"{splitting.name} ({scenario.name})"
    plural = "" if sizes == [1] else "es"
    return f"{len(tasks)} of {classes} class{plural}, {name}; {_order(run)}"


def _order(run: Experiment) -> str:
    """The order of the classes, task by task, or that of the tasks if all have the same classes."""
    order = run.stream.class_order
    if len(order) > 1 and all(sorted(classes) == sorted(order[0]) for classes in order):
        return "order " + _short(" ".join(task.name for task in run.stream.tasks))
    return "classes " + _short(" | ".join(" ".join(map(str, classes)) for classes in order))


def _replay(run: Experiment) -> str:
    if run.buffer is None:
        return ""
    replay = run.settings.replay
    per_class = f"{replay.buffer_per_class} images of each class"
    size = f"{replay.buffer_size} images" if replay.buffer_size else per_class
    replayed = run.settings.replayed_per_group
    return f"{size}, {replayed} replayed images with each vote group from the second task on"


def _model(run: Experiment) -> str:
    head = f"head pools {run.settings.model.head_type}"
    pool, size = run.model.prompt, run.settings.transforms.input_size
    if pool is None:
        return f"{run.identity.name}, {size} pixels, no prompts; {head}"
    return (
        f"{run.identity.name}, {size} pixels; {_count(pool.size, 'prompt')} of "
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
    """How many parameters of each part are trained."""
    sizes = Counter[str]()
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("prompt.").split(".")[0]
            part = next((p for start, p in _PARTS.items() if name.startswith(start)), module)
            sizes[part] += parameter.numel()
    parts = ", ".join(f"{part} {size}" for part, size in sizes.items())
    return f"number of params: {sizes.total()} ({parts})"


def _training(run: Experiment) -> str:
    optimizer = run.settings.optimizer
    return (
        f"{optimizer.opt}, learning rate {optimizer.learning_rate(run.global_batch):g} "
        f"(--lr {optimizer.lr:g}, scaled {optimizer.lr_scale}), {optimizer.sched}; "
        f"{_count(optimizer.epochs, 'epoch')} a task, {run.global_batch} images a step"
        f"{_votes(run)}"
    )


def _votes(run: Experiment) -> str:
    """How many images vote together, where a vote can change anything."""
    pool = run.model.prompt
    if pool is None or not pool.batchwise or pool.size == pool.top_k:
        return ""
    return f", vote group of {run.settings.vote_group_size}"


def _precision(run: Experiment) -> str:
    how = dict(run.record.numerics)
    amp = how.pop("amp", None)
    others = [f"{name} {shown(value)}" for name, value in how.items() if value]
    return "; ".join([amp or "fp32", ", ".join(others)])


def _warn(run: Experiment) -> None:
    """Logs what people may not expect of these settings."""
    settings, world_size = run.settings, run.processes.world_size
    name = settings.model.model
    resolved = backbone.resolve_name(name)
    if resolved != name:
        logger.info("--model %s means %s: the weights that the original used", name, resolved)
    stream = run.stream
    if settings.tasks.train_mask and {len(task.classes) for task in stream.tasks} == {1}:
        logger.warning(
            "A task is a single class, and --train_mask lets training predict no other: there is "
            "nothing to learn; give fewer --num_tasks, or the overlay no_class_mask"
        )
    if settings.tasks.task_inc and all(t.classes == stream.classes for t in stream.test_sets):
        logger.info("--task_inc has no effect here: the test images may be of any class")
    num_groups = -(-run.global_batch // settings.vote_group_size)
    if world_size > num_groups:
        logger.warning(
            "%d of %d processes have nothing to train on: %d images a step are %d vote groups, and "
            "a vote group stays in one process",
            world_size - num_groups,
            world_size,
            run.global_batch,
            num_groups,
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
