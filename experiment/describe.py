"""Summary of a run: at its start what it will do, at its end where everything is."""

import logging
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cli import needs
from cli.parser import command_words, shown, words_of
from cli.paths import command
from cli.settings import Settings, names_of
from cli.terminal import printable
from continual_datasets.images import join_names
from continual_datasets.scenarios import find_scenario
from experiment import hardware, run_record
from model import backbone
from training.state import Run

#: What the summary calls the parameters of the pool.
_POOL = {"prompt_key": "keys", "prompt": "prompts"}

#: Lines that describe an evaluation.
_EVALUATED = ("Data", "Tasks", "Continues", "Model", "Votes", "Precision", "Processes")

#: What a folder of results holds, in the order in which people look at it.
_CONTENT = {
    "results.json": "accuracies, metrics, prompt usage, versions",
    "plots": "figures, PNG and SVG; begin with overview.png",
    "predictions.csv": "class, predictions and prompts of each test image",
    "log_stats.txt": "a JSON object for each task",
    "config.yaml": "every setting: {main} {folder}/config.yaml runs it again",
    "log.txt": "what was printed",
    "damaged.json": "image files that cannot be read, as found at the start",
    "checkpoint": "what was learned, after each task; last.pth: the state that --resume loads",
    "tensorboard": "tensorboard --logdir {folder}/tensorboard",
    "wandb": "the log of Weights & Biases",
}

logger = logging.getLogger(__name__)


def describe(run: Run) -> None:
    """Logs in a few lines what is about to happen: training, or the evaluation of checkpoints."""
    settings, lines = run.settings, _lines(run)
    for note in hardware.notes(settings, run.device):
        logger.warning("%s", note)
    if settings.run.eval:
        _log_lines("L2P: evaluation of checkpoints", {name: lines[name] for name in _EVALUATED})
        return
    usual = "the settings of the run that it continues" if run.stream.earlier else "the defaults"
    command = command_words(settings.command()) or usual
    del lines["Votes"]  # which are named in "Training"
    _log_lines(f"L2P: {command}, seed {settings.run.seed}", lines)
    _warn(run)


def conclude(
    settings: Settings, output_dir: Path, seconds: Mapping[str, float], total: float
) -> None:
    """Logs where everything is stored, how long it took, and what can be done next.

    Args:
        settings: Of the run; how it computes is repeated for an evaluation.
        output_dir: Folder of the run.
        seconds: Wall time of each stage; training and evaluation of all starts of the run.
        total: Wall time since this start of the program; a resumed run has several starts.
    """
    stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    logger.info("Time: %s; %s since this start", stages, _duration(total))
    folder, main = shlex.quote(str(output_dir)), command("main.py")
    lines = [
        f"  {name:16s}{text.format(folder=folder, main=main)}"
        for name, text in _CONTENT.items()
        if (output_dir / name).exists()
    ]
    logger.info("%s", "\n".join([f"Written to {output_dir}:", *lines]))
    logger.info("Compare runs:   %s OTHER_FOLDER ...", command("summarize.py", output_dir))
    logger.info("Predict:        %s IMAGES ...", command("predict.py", output_dir))
    more = ("--continue_from", output_dir, "--data-path")
    logger.info("Learn more:     %s NEW_DATA --output_dir NEW_FOLDER", command("main.py", *more))
    computed = [name for name in names_of("compute") if name in settings.given.explicit]
    flags = {**{name: settings[name] for name in computed}, "output_dir": output_dir}
    words = [word for name, value in flags.items() for word in (f"--{name}", *words_of(value))]
    logger.info("Evaluate again: %s", command("main.py", "--eval", *words))


def _log_lines(title: str, lines: Mapping[str, str]) -> None:
    rows = [f"  {name + ':':11s}{text}" for name, text in lines.items() if text]
    logger.info("%s", "\n".join([title, *rows]))


def _lines(run: Run) -> dict[str, str]:
    """The lines of a summary by name; empty where there is nothing to say."""
    settings, stream, pool = run.settings, run.stream, run.model.prompt
    optimizer, vit = settings.optimizer, run.backbone
    num_train, num_test = (
        sum(len(part.data) for part in parts) for parts in (stream.tasks, stream.test_sets)
    )
    prompts, votes, state = ", no prompts", "", "frozen"
    if pool is not None:
        counts = f"{_count(pool.size, 'prompt')} of {_count(pool.length, 'token')}"
        prompts = f"; {counts}, {pool.top_k} for an image"
        if pool.batchwise and pool.size != pool.top_k:  # else a vote changes nothing
            votes = f"vote group of {settings.vote_group_size}"
    if run.model.backbone_trains:
        state = "trains" + (", the query comes from an untouched copy" if pool is not None else "")
    numerics = run_record.numerics(run)
    amp = numerics.pop("amp", None) or "fp32"
    others = ", ".join(f"{name} {shown(value)}" for name, value in numerics.items() if value)
    return {
        "Data": f"{settings.data.dataset}: {num_train} training images, {num_test} test images in "
        + _count(sum(len(row.data) > 0 for row in stream.test_sets), "test set"),
        "Tasks": f"{_tasks(run)}; {_order(run)}",
        "Continues": _earlier(run),
        "Replay": _replay(run),
        "Model": f"{_network(run)}, {settings.transforms.input_size} pixels{prompts}; "
        f"head pools {settings.model.head_type}",
        "Pixels": _pixels(run),
        "Votes": votes,
        "Backbone": f"weights {vit['source']}, sha256 {vit['sha256'][:12]}; {state}",
        "Trains": _trained(run),
        "Training": _optimizer(run)
        + f"{_count(optimizer.epochs, 'epoch')} a task, {run.global_batch} images a step"
        + (f", {votes}" if votes else ""),
        "Precision": f"{amp}; {others}",
        "Processes": f"{run.processes.world_size} on {run.processes.device}",
        "Output": settings.run.output_dir or "none: nothing is written",
    }


def _network(run: Run) -> str:
    """The network that was built; a weights tag only where its weights are those of the tag."""
    model, source = run.settings.model, run.backbone["source"]
    name = run.backbone["name"] if source == "timm" else model.model.partition(".")[0]
    weights = "" if source == "timm" else f", {source} weights"
    kwargs = f" ({shown(model.model_kwargs)})" if model.model_kwargs else ""
    return printable(f"{name}{kwargs}{weights}")


def _pixels(run: Run) -> str:
    """How the pixels differ from those that timm's weights were trained on, if they do."""
    norm, name = run.settings.transforms.norm, run.backbone["name"]
    if run.backbone["source"] != "timm" or (own := backbone.own_norm(name)) == norm:
        return ""
    return f"--norm {norm}; {name} was pretrained with --norm {own} (--norm model)"


def _tasks(run: Run) -> str:
    sizes = [len(task.classes) for task in run.stream.tasks[run.stream.num_earlier :]]
    classes = " to ".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    scenario = find_scenario(run.settings)
    name = f"{scenario.name} (joint)" if scenario.is_joint else scenario.name
    more = " more" * (run.stream.num_earlier > 0)
    return f"{len(sizes)}{more} of {classes} class{'' if max(sizes) == 1 else 'es'}, {name}"


def _order(run: Run) -> str:
    """The order of the classes, task by task, or that of the tasks if all have the same classes."""
    tasks, names = run.stream.tasks[run.stream.num_earlier :], run.stream.train.classes
    order = [task.classes for task in tasks]
    comma = ", " if any(" " in name for name in names) else " "
    what, words = "classes", " | ".join(comma.join(names[c] for c in task) for task in order)
    if len(order) > 1 and all(sorted(classes) == sorted(order[0]) for classes in order):
        what, words = "order", " ".join(task.name for task in tasks)
    return f"{what} {textwrap.shorten(printable(words), 100, placeholder=' ...')}"


def _earlier(run: Run) -> str:
    """What the run continues, and which test sets of that it cannot evaluate."""
    if not run.stream.earlier:
        return ""
    parent, tasks = run.stream.earlier[-1], _count(run.stream.num_earlier, "task")
    missing = [row.name for row in run.stream.test_sets if not len(row.data)]
    absent = f"; not at hand: the images of {join_names(missing)}" if missing else ""
    return f"{parent.checkpoint}, sha256 {parent.sha256[:12]}, {tasks}{absent}"


def _replay(run: Run) -> str:
    if run.buffer is None:
        return ""
    replay, replayed = run.settings.replay, run.settings.replayed_per_group
    size = f"{replay.buffer_size or replay.buffer_per_class} images"
    each = "" if replay.buffer_size else " of each class"
    since = " from the second task on"
    if run.stream.earlier:
        since = f"; {len(run.buffer)} images of earlier tasks are stored"
    return f"{size}{each}, {replayed} replayed images with each vote group{since}"


def _trained(run: Run) -> str:
    """How many parameters of each part are trained."""
    sizes = Counter[str]()
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("prompt.").split(".")[0]
            sizes[_POOL.get(part, part)] += parameter.numel()
    parts = ", ".join(f"{part} {size}" for part, size in sizes.items())
    if not sizes:
        parts = f"head {run.settings.model.head} learns without gradients"
    return f"number of params: {sizes.total()} ({parts})"


def _optimizer(run: Run) -> str:
    """The optimizer and its learning rate, where there is something for it to do."""
    if not any(p.requires_grad for p in run.model.parameters()):
        return ""
    optimizer = run.settings.optimizer
    rate = f"{optimizer.learning_rate(run.global_batch):g}"
    scaled = f"(--lr {optimizer.lr:g}, scaled {optimizer.lr_scale})"
    return f"{optimizer.opt}, learning rate {rate} {scaled}, {optimizer.sched}; "


def _warn(run: Run) -> None:
    """Logs what people may not expect of these settings."""
    settings, stream, world_size = run.settings, run.stream, run.processes.world_size
    if note := needs.note(settings):
        logger.warning("%s", note)
    name = settings.model.model
    resolved = backbone.resolve_name(name)
    if resolved != name:
        logger.info("--model %s means %s: the weights that the original used", name, resolved)
    warn_of_single_classes(run)
    if settings.tasks.task_inc and all(t.classes == stream.classes for t in stream.test_sets):
        logger.info("--task_inc has no effect here: the test images may be of any class")
    num_groups = run.batching.num_groups(run.global_batch)
    if world_size > num_groups:
        logger.warning(
            "%d of %d processes have nothing to train on: %d images a step are %d vote groups, and "
            "a vote group stays in one process",
            world_size - num_groups,
            world_size,
            run.global_batch,
            num_groups,
        )


def warn_of_single_classes(run: Run) -> None:
    """Logs that a run learns nothing where every task is one class: at its start and its end."""
    tasks, learned = run.settings.tasks, run.stream.tasks[run.stream.num_earlier :]
    num_tasks = len(learned)
    if not tasks.train_mask or run.model.head_observes:
        return
    if any(len(task.classes) > 1 for task in learned):
        return
    fewer = "fewer --num_tasks, or "
    if tasks.scenario == "class-incremental":
        fewer = f"--num_tasks {num_tasks // 2} --classes_per_task 2, or " * (num_tasks > 1)
    logger.warning(
        "WARNING: %s a single class, and --train_mask lets training predict no other: there is "
        "nothing to learn. Give %sthe overlay no_class_mask (--no-train_mask)",
        *("the task is" if num_tasks == 1 else f"each of {num_tasks} tasks is", fewer),
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """A time as people say it: 7.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
