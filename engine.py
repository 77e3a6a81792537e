"""One step, one epoch, and the loop over tasks with an evaluation after each.

The engine is given a model, a stream of tasks and loaders; it imports neither models nor data sets
and knows no scenario. Every evaluation gives two accuracies: batch-wise, where the images of a vote
group share the prompts that most of them choose (as published), and instance-wise, each image
alone (`accuracy.py`).

A step does not wait for the device: what it gives stays there until it is read, for several steps
at once (`read_every`). A scaled loss (fp16) is the exception.

Shapes: B images, C classes, K prompts chosen, M pool size.

Source: Wang et al., CVPR 2022, equation 5 and section 5; the order of events as in l2p-pytorch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import utils
from continual_datasets.random_streams import seed_model
from continual_datasets.stream import title
from processes import is_alone, rank, sum_over_processes
from reports import metrics
from reports.metrics import SELECTIONS
from training.evaluation import (
    Evaluation,
    QueryCache,
    class_mask,
    count_correct,
    count_ids,
    evaluate,
    restrict,
)
from training.update import MakeOptimizer, Updater

if TYPE_CHECKING:
    from continual_datasets.stream import Task, TestSet
    from vision_transformer import PromptedVisionTransformer

logger = logging.getLogger(__name__)


class Scheduler(Protocol):
    """A timm learning rate scheduler."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Sets the learning rate of an epoch (0-based)."""


#: Batches of (images, targets) on the device, and their number as its length. For training its
#: `batch_sampler` has `set_epoch(epoch, first_step)` and `global_batch_size(step)`; a batch that
#: holds replayed images tells which ones by a third tensor, bool (B,).
Loader = Any
MakeScheduler = Callable[[torch.optim.Optimizer], Scheduler | None]


@dataclass(frozen=True)
class EngineOptions:
    """What holds for the whole run.

    Attributes:
        device: Where to compute.
        epochs: Epochs of each task.
        vote_group_size: Images that vote for prompts together.
        replayed_per_group: Replayed images that join each vote group, where a batch has any.
        all_classes: Classes of the whole stream; test images may be given any of them.
        train_mask: Whether training may predict the task's own classes only.
        task_inc: Whether evaluation may predict the test set's own classes only.
        pull_coeff: Weight of the pull term; 0 leaves it out.
        smoothing: Label smoothing, spread over the classes that may be predicted.
        clip_grad: Largest norm of the gradient; None: no clipping.
        reinit_optimizer: Whether each task starts with a fresh optimizer.
        shared_prompt_pool: Whether a task's prompts start from those of the task before.
        shared_prompt_key: The same for the keys.
        print_freq: Steps between two progress lines.
        seed: Seed of what the model draws in training (dropout).
        read_every: Steps after which loss, accuracy and the wish to stop are read from the device,
            which waits for it.
        loss_scaling: Whether the loss is scaled against underflow, see `updates.Updater`.
    """

    device: torch.device
    epochs: int
    vote_group_size: int
    all_classes: tuple[int, ...]
    train_mask: bool = True
    task_inc: bool = False
    pull_coeff: float = 0.1
    smoothing: float = 0.0
    clip_grad: float | None = 1.0
    reinit_optimizer: bool = True
    shared_prompt_pool: bool = False
    shared_prompt_key: bool = False
    print_freq: int = 10
    seed: int = 42
    replayed_per_group: int = 0
    read_every: int = 1
    loss_scaling: bool = False


@dataclass(frozen=True)
class TaskReport:
    """What is known after a task.

    Attributes:
        task: 0-based number of the task.
        train_stats: Averages over the last epoch: `Lr`, `Loss`, `Acc@1`, `Acc@5`.
        evaluations: One for each test set.
        train_seconds: Wall time of training.
        eval_seconds: Wall time of evaluation.
        epoch_stats: The same averages over each epoch.
    """

    task: int
    train_stats: dict[str, float]
    evaluations: list[Evaluation]
    train_seconds: float
    eval_seconds: float
    epoch_stats: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Position:
    """Where a run stands: what comes next, and what the task has given so far.

    Attributes:
        task: 0-based number of the task; T when the run is complete.
        epoch: Finished epochs of the task; all of them when it is being evaluated.
        step: Finished steps of the epoch.
        meters: Sum and count of every meter of the epoch.
        epoch_stats: Averages over each finished epoch.
        evaluations: Of the test sets that are evaluated already.
        train_seconds: Wall time of training.
        eval_seconds: Wall time of evaluation.
    """

    task: int = 0
    epoch: int = 0
    step: int = 0
    meters: dict[str, list[float]] = field(default_factory=dict)
    epoch_stats: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0

    @property
    def inside_task(self) -> bool:
        """Whether the task has begun."""
        return self.epoch > 0 or self.step > 0

    def end_epoch(self, stats: dict[str, float]) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch_stats.append(stats)
        self.epoch, self.step, self.meters = self.epoch + 1, 0, {}

    def report(self) -> TaskReport:
        """What is known after the task."""
        return TaskReport(
            self.task,
            self.epoch_stats[-1],
            self.evaluations,
            self.train_seconds,
            self.eval_seconds,
            self.epoch_stats,
        )


class Monitor:
    """Watches a run, saves it, stops it; this one does nothing."""

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop; if one was, all stop when steps are read."""
        return False

    def at_boundary(self, position: Position, updater: Updater, stop: bool = False) -> None:
        """Called when steps are read, after every epoch, test set and task: a run can go on here.

        Args:
            position: Where it stands.
            updater: Has the state of the optimizer.
            stop: Whether the run shall end here, by an exception that this raises.
        """

    def in_evaluation(self) -> None:
        """Called before every batch of an evaluation; may end the run by an exception."""

    def at_task_end(self, report: TaskReport) -> None:
        """Called after the evaluation of a task."""


class NonFiniteLossError(RuntimeError):
    """The loss is no number any more; the model still holds the values before that step."""


def train_one_epoch(
    model: PromptedVisionTransformer,
    loader: Loader,
    updater: Updater,
    task: Task,
    epoch: int,
    options: EngineOptions,
    position: Position | None = None,
    monitor: Monitor | None = None,
) -> dict[str, float]:
    """Trains one epoch of one task, or what is left of it.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`.
        loader: Batches of (images, targets) of this process.
        updater: Updates the trainable parameters.
        task: The task, for its class mask and prompt mask.
        epoch: 0-based epoch inside the task.
        options: See there.
        position: Where in the epoch to begin; kept up to date.
        monitor: Is told whenever steps are read.

    Returns:
        Averages over the epoch: `Lr`, `Loss` (mean over batches, pull term included), `Acc@1` and
        `Acc@5` (percent, among the classes that may be predicted).

    Raises:
        NonFiniteLossError: Naming task, epoch, step and value; the model holds what it had before
            that step.
    """
    position = position or Position(task.index, epoch)
    monitor = monitor or Monitor()
    model.train()
    mask = class_mask(task.classes, model.num_classes, options.device)
    allowed = mask if options.train_mask else None
    width = len(str(options.epochs))
    header = f"Train: Epoch[{epoch + 1:{width}d}/{options.epochs}]"
    progress = utils.Progress(header, options.print_freq, position.meters)
    sampler = loader.batch_sampler
    sampler.set_epoch(epoch, position.step)
    unread: list[Tensor] = []
    since = time.monotonic()
    for step, batch in progress.over(loader, len(loader), position.step):
        seed_model(options.device, options.seed, task.index, epoch, step, rank())
        size = sampler.global_batch_size(step)
        stop = monitor.wants_to_stop()
        unread.append(train_step(model, updater, batch, task.index, allowed, size, options, stop))
        due = step % options.read_every == 0 or step + 1 == len(loader)
        if not due and not (stop and is_alone()):
            continue
        sizes = [sampler.global_batch_size(s) for s in range(position.step, step + 1)]
        stop = _read_steps(unread, sizes, updater, progress, position)
        unread.clear()
        now = time.monotonic()
        position.step, position.meters = step + 1, progress.sums()
        position.train_seconds += now - since
        monitor.at_boundary(position, updater, stop=stop)
        since = time.monotonic()
    averages = progress.averages()
    logger.info("Averaged stats: %s", "  ".join(f"{k}: {v:.4f}" for k, v in averages.items()))
    return averages


def _read_steps(
    steps: Sequence[Tensor],
    sizes: Sequence[int],
    updater: Updater,
    progress: utils.Progress,
    position: Position,
) -> bool:
    """Reads what steps gave, waiting for the device; returns whether a process shall stop.

    Raises:
        NonFiniteLossError: Naming the first step whose loss or gradient is not finite.
    """
    stopping = 0.0
    rows = torch.stack(list(steps)).tolist()  # each as `train_step` returns it
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True), position.step + 1):
        loss, correct1, correct5, stop, norm = row
        if problem := _not_finite(loss, norm, updater):
            place = f"task {position.task + 1}, epoch {position.epoch + 1}, step {number}"
            raise NonFiniteLossError(f"{problem} in {place}: lower --lr, or set --clip-grad")
        progress.update({"Lr": updater.lr, "Loss": loss})
        progress.update(
            {"Acc@1": 100 * correct1 / size, "Acc@5": 100 * correct5 / size}, count=size
        )
        stopping += stop
    return stopping > 0


def _not_finite(loss: float, norm: float, updater: Updater) -> str | None:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(norm) and not updater.may_overflow:
        return f"the norm of the gradient is {norm} (loss {loss})"
    return None


def train_step(
    model: PromptedVisionTransformer,
    updater: Updater,
    batch: Sequence[Tensor],
    task_id: int,
    allowed: Tensor | None,
    global_size: int,
    options: EngineOptions,
    stop: bool = False,
) -> Tensor:
    """One step of all processes; does not wait for the device, unless the loss is scaled.

    If the loss or its gradient is not finite, neither this step nor a later one changes the model.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`, in training mode.
        updater: Updates the trainable parameters.
        batch: This process's images (B, 3, S, S) and targets (B,), on the device, and which of them
            are replayed (B,), if any are; B may be 0.
        task_id: 0-based number of the task.
        allowed: Which classes may be predicted, bool (C,); None: all. Any for replayed images.
        global_size: Images of all processes in this step.
        options: See there.
        stop: Whether this process was asked to stop.

    Returns:
        Loss, correct@1 and correct@5 over all processes, how many of them were asked to stop, and
        the norm of the gradient before it is clipped, (5,), on the device.
    """
    updater.begin()
    values, served = _forward_backward(
        model, updater, batch, task_id, allowed, global_size, options
    )
    stopping = values.new_full((1,), float(stop))
    sums = sum_over_processes(torch.cat([values, stopping, served]))
    norm = updater.step(sums[0])
    if model.prompt is not None:
        model.prompt.count_served(torch.where(updater.sound, sums[4:], 0))
    return torch.cat([sums[:4], norm[None]])


def evaluate_till_now(
    model: PromptedVisionTransformer,
    test_loader: Callable[[TestSet], Loader],
    task: Task,
    matrices: dict[str, metrics.Matrix],
    options: EngineOptions,
    position: Position | None = None,
    monitor: Monitor | None = None,
    on_test_set: Callable[[], None] = lambda: None,
    queries: QueryCache | None = None,
) -> list[Evaluation]:
    """Evaluates every test set of a task and enters the accuracies in the matrices.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`.
        test_loader: Gives the batches of a test set.
        task: The task that was learned last.
        matrices: Accuracy matrix for each of `SELECTIONS`; column `task.index` is filled.
        options: See there.
        position: Which test sets are evaluated already; kept up to date.
        monitor: Is asked before every batch.
        on_test_set: Called after every test set.
        queries: Queries of test images that are known; kept up to date.

    Returns:
        One evaluation for each test set, in order; none where the task has no test sets.
    """
    position, monitor = position or Position(task.index), monitor or Monitor()
    queries = QueryCache() if queries is None else queries
    evaluations = position.evaluations
    for test_set in task.test_sets[len(evaluations) :]:
        start = time.monotonic()
        loader = test_loader(test_set)
        result = evaluate(model, loader, test_set, options, monitor, queries)
        for name in SELECTIONS:
            matrices[name][test_set.index, task.index] = result.stats[name]["Acc@1"]
        batch, alone = result.stats["batch"], result.stats["instance"]
        line = "* Acc@1 {Acc@1:.3f} Acc@5 {Acc@5:.3f} loss {Loss:.3f}".format(**batch)
        logger.info("%s  (instance-wise %.3f)  [%s]", line, alone["Acc@1"], title(test_set))
        evaluations.append(result)
        position.eval_seconds += time.monotonic() - start
        on_test_set()
    if evaluations:
        _log_averages(task, evaluations, matrices)
    return evaluations


def train_and_evaluate(
    model: PromptedVisionTransformer,
    tasks: Sequence[Task],
    train_loader: Callable[[Task], Loader],
    test_loader: Callable[[TestSet], Loader],
    make_optimizer: MakeOptimizer,
    make_scheduler: MakeScheduler,
    matrices: dict[str, metrics.Matrix],
    options: EngineOptions,
    monitor: Monitor | None = None,
    position: Position | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> None:
    """Learns the tasks one after the other and evaluates after each.

    A run that stopped goes on where `position` says, with the model, the matrices and the
    optimizer's state as they were then.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`.
        tasks: The stream.
        train_loader: Gives the training batches of a task.
        test_loader: Gives the batches of a test set.
        make_optimizer: Makes an optimizer over the model's trainable parameters.
        make_scheduler: Makes the learning rate schedule of one task, or None.
        matrices: Accuracy matrix for each of `SELECTIONS`, filled column by column.
        options: See there.
        monitor: Is told how the run goes.
        position: Where to begin; None: with the first task.
        optimizer_state: State dict of the optimizer at that position.

    Raises:
        NonFiniteLossError: See `train_one_epoch`.
    """
    monitor, position = monitor or Monitor(), position or Position()
    queries = QueryCache()
    updater = make_updater(model, make_optimizer, options)
    for task in tasks[position.task :]:
        if not position.inside_task:
            logger.info("%s (%d of %d)", title(task), task.index + 1, len(tasks))
            _begin_task(model, task.index, options)
            if task.index > 0 and options.reinit_optimizer:
                updater.renew(optimizer_state)
                optimizer_state = None
        scheduler = _continue_schedule(make_scheduler, updater, position, optimizer_state)
        optimizer_state = None
        loader = train_loader(task)
        while position.epoch < options.epochs:
            stats = train_one_epoch(
                model, loader, updater, task, position.epoch, options, position, monitor
            )
            position.end_epoch(stats)
            if scheduler is not None:
                scheduler.step(position.epoch, metric=stats["Acc@1"])
            monitor.at_boundary(position, updater)
        on_test_set = partial(monitor.at_boundary, position, updater)
        evaluate_till_now(
            model, test_loader, task, matrices, options, position, monitor, on_test_set, queries
        )
        monitor.at_task_end(position.report())
        position = Position(task.index + 1)
        monitor.at_boundary(position, updater)


def make_updater(
    model: PromptedVisionTransformer, make_optimizer: MakeOptimizer, options: EngineOptions
) -> Updater:
    """What updates the trainable parameters of a model, as the options say."""
    return Updater(
        *(model.parameters(), make_optimizer, options.device),
        clip_grad=options.clip_grad,
        loss_scaling=options.loss_scaling,
    )


def average_stats(evaluations: Sequence[Evaluation], selection: str) -> dict[str, float]:
    """Unweighted mean over test sets of `Acc@1`, `Acc@5` and `Loss`."""
    keys = ("Acc@1", "Acc@5", "Loss")
    return {k: sum(e.stats[selection][k] for e in evaluations) / len(evaluations) for k in keys}


def _log_averages(
    task: Task, evaluations: Sequence[Evaluation], matrices: dict[str, metrics.Matrix]
) -> None:
    labels = {"batch": "Average accuracy", "instance": "Instance-wise accuracy"}
    for name in SELECTIONS:
        means = average_stats(evaluations, name)
        line = f"[{labels[name]} till task{task.index + 1}]"
        line += "".join(f"\t{key}: {value:.4f}" for key, value in means.items())
        numbers = metrics.summarize(matrices[name], task.index)
        lost, backward = numbers.get("forgetting"), numbers.get("backward_transfer")
        if lost is not None and backward is not None:
            line += f"\tForgetting: {lost:.4f}\tBackward: {backward:.4f}"
        logger.info(line)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, allowed: Tensor | None, smoothing: float
) -> Tensor:
    """Mean cross-entropy over the classes that may be predicted.

    Args:
        logits: (B, C).
        targets: Class ids, (B,).
        allowed: Which classes may be predicted, bool (C,) or (B, C); None: all.
        smoothing: Part of the target that is spread over the allowed classes.
    """
    log_prob = F.log_softmax(restrict(logits, allowed), dim=1)  # (B, C)
    loss = F.nll_loss(log_prob, targets)
    if smoothing == 0:
        return loss
    if allowed is None:
        spread = log_prob.mean(dim=1)  # (B,)
    else:
        spread = log_prob.masked_fill(~allowed, 0).sum(dim=1) / allowed.sum(dim=-1)  # (B,)
    return (1 - smoothing) * loss - smoothing * spread.mean()


def _forward_backward(
    model: PromptedVisionTransformer,
    updater: Updater,
    batch: Sequence[Tensor],
    task_id: int,
    allowed: Tensor | None,
    global_size: int,
    options: EngineOptions,
) -> tuple[Tensor, Tensor]:
    """This process's part of a step, and its gradients.

    Returns:
        Loss, correct@1 and correct@5 (3,), and how often each prompt served (M,), empty without
        a pool.
    """
    images, targets, *flags = batch
    served = torch.zeros(0 if model.prompt is None else model.prompt.size, device=options.device)
    if len(images) == 0:
        return torch.zeros(3, device=options.device), served
    group = options.vote_group_size
    if flags:
        group += options.replayed_per_group
        allowed = None if allowed is None else allowed | flags[0][:, None]  # (B, C)
    out = model(images, task_id=task_id, vote_group_size=group)
    loss = masked_cross_entropy(out["logits"], targets, allowed, options.smoothing)
    if options.pull_coeff and "reduce_sim" in out:
        loss = loss - options.pull_coeff * out["reduce_sim"]
    loss = loss * (len(images) / global_size)
    updater.backward(loss)
    with torch.no_grad():
        correct = count_correct(restrict(out["logits"], allowed), targets).to(loss.dtype)
        if "prompt_idx" in out:
            served = count_ids(out["prompt_idx"], len(served))
    return torch.cat([loss.detach()[None], correct]), served


def _continue_schedule(
    make_scheduler: MakeScheduler,
    updater: Updater,
    position: Position,
    optimizer_state: dict[str, Any] | None,
) -> Scheduler | None:
    """The schedule of a task after its finished epochs; the updater gets its state, if any.

    A schedule follows from the accuracies of the epochs alone, so it is led through them again:
    the state dicts of timm's schedulers do not hold all that counts.
    """
    if optimizer_state is not None and not position.inside_task:
        updater.load_state_dict(optimizer_state)  # the schedule begins with what it finds
    scheduler = make_scheduler(updater.optimizer)
    if scheduler is not None:
        for epoch, stats in enumerate(position.epoch_stats):
            scheduler.step(epoch + 1, metric=stats["Acc@1"])
    if optimizer_state is not None and position.inside_task:
        updater.load_state_dict(optimizer_state)
    return scheduler


def _begin_task(model: PromptedVisionTransformer, task_id: int, options: EngineOptions) -> None:
    if model.prompt is None:
        return
    model.prompt.begin_task()
    wanted = {"prompts": options.shared_prompt_pool, "keys": options.shared_prompt_key}
    if model.prompt.inherit(task_id, **wanted):
        logger.info("Task %d starts from the prompts of task %d", task_id + 1, task_id)
    elif task_id > 0 and any(wanted.values()):
        logger.warning(
            "Task %d shares no prompts with task %d: the pool of %d has no slots left for it",
            *(task_id + 1, task_id, model.prompt.size),
        )
