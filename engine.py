"""One epoch, one evaluation, and the loop over tasks.

The engine is given a model, a stream of tasks and loaders; it imports neither models nor data sets
and knows no scenario. Every evaluation gives two accuracies: batch-wise, where the images of a vote
group share the prompts that most of them choose (as published), and instance-wise, each image
alone.

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
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
import utils
from processes import rank, sum_gradients, sum_over_processes
from random_streams import seed_model
from task_stream import task_name

if TYPE_CHECKING:
    from task_stream import Task, TestSet
    from vision_transformer import PromptedVisionTransformer

#: The two ways of choosing prompts for test images.
SELECTIONS = ("batch", "instance")

logger = logging.getLogger(__name__)


class Scheduler(Protocol):
    """A timm learning rate scheduler."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Sets the learning rate of an epoch (0-based)."""


#: Batches of (images, targets), and their number as its length. For training its `batch_sampler`
#: has `set_epoch(epoch, first_step)` and `global_batch_size(step)`; a batch that holds replayed
#: images tells which ones by a third tensor, bool (B,).
Loader = Any
MakeOptimizer = Callable[[], torch.optim.Optimizer]
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


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of one test set gave.

    Attributes:
        index: Row of the test set in the accuracy matrix.
        stats: `Acc@1`, `Acc@5` (percent) and `Loss` for each of `SELECTIONS`.
        usage: How often each prompt served a test image, for each of `SELECTIONS`; empty without
            a pool.
        mean_similarity: Mean cosine similarity of the images to the keys they choose alone.
    """

    index: int
    stats: dict[str, dict[str, float]]
    usage: dict[str, list[int]] = field(default_factory=dict)
    mean_similarity: float | None = None


@dataclass(frozen=True)
class TaskReport:
    """What is known after a task.

    Attributes:
        task: 0-based number of the task.
        train_stats: Averages over the last epoch: `Lr`, `Loss`, `Acc@1`, `Acc@5`.
        evaluations: One for each test set.
        train_seconds: Wall time of training.
        eval_seconds: Wall time of evaluation.
    """

    task: int
    train_stats: dict[str, float]
    evaluations: list[Evaluation]
    train_seconds: float
    eval_seconds: float


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
        )


class Monitor:
    """Watches a run, saves it, stops it; this one does nothing."""

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop; if one was, all stop after the step."""
        return False

    def at_boundary(
        self, position: Position, optimizer: torch.optim.Optimizer, stop: bool = False
    ) -> None:
        """Called after every step, epoch, test set and task: the run can go on from here.

        Args:
            position: Where it stands.
            optimizer: The one in use.
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
    optimizer: torch.optim.Optimizer,
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
        optimizer: Over the trainable parameters.
        task: The task, for its class mask and prompt mask.
        epoch: 0-based epoch inside the task.
        options: See there.
        position: Where in the epoch to begin; kept up to date.
        monitor: Is told of every step.

    Returns:
        Averages over the epoch: `Lr`, `Loss` (mean over batches, pull term included), `Acc@1` and
        `Acc@5` (percent, among the classes that may be predicted).

    Raises:
        NonFiniteLossError: Naming task, epoch, step and value, before the step changes anything.
    """
    position = position or Position(task.index, epoch)
    monitor = monitor or Monitor()
    model.train()
    allowed = _mask(task.classes, model, options) if options.train_mask else None
    width = len(str(options.epochs))
    header = f"Train: Epoch[{epoch + 1:{width}d}/{options.epochs}]"
    progress = utils.Progress(header, options.print_freq, position.meters)
    sampler = loader.batch_sampler
    sampler.set_epoch(epoch, position.step)
    since = time.monotonic()
    for step, tensors in progress.over(loader, len(loader), position.step):
        size = sampler.global_batch_size(step)
        batch = [tensor.to(options.device) for tensor in tensors]
        seed_model(options.device, options.seed, task.index, epoch, step, rank())
        try:
            loss, correct1, correct5, stop = train_step(
                model,
                optimizer,
                batch,
                task.index,
                allowed,
                size,
                options,
                stop=monitor.wants_to_stop(),
            )
        except NonFiniteLossError as error:
            place = f"task {task.index + 1}, epoch {epoch + 1}, step {step + 1}"
            raise NonFiniteLossError(
                f"{error} in {place}: lower --lr, or set --clip-grad"
            ) from None
        progress.update({"Lr": optimizer.param_groups[0]["lr"], "Loss": loss})
        progress.update(
            {"Acc@1": 100 * correct1 / size, "Acc@5": 100 * correct5 / size}, count=size
        )
        now = time.monotonic()
        position.step, position.meters = step + 1, progress.sums()
        position.train_seconds, since = position.train_seconds + now - since, now
        monitor.at_boundary(position, optimizer, stop=stop > 0)
    averages = progress.averages()
    logger.info("Averaged stats: %s", "  ".join(f"{k}: {v:.4f}" for k, v in averages.items()))
    return averages


def train_step(
    model: PromptedVisionTransformer,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Tensor],
    task_id: int,
    allowed: Tensor | None,
    global_size: int,
    options: EngineOptions,
    stop: bool = False,
) -> list[float]:
    """One step of all processes.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`, in training mode.
        optimizer: Over the trainable parameters.
        batch: This process's images (B, 3, S, S) and targets (B,), on the device, and which of them
            are replayed (B,), if any are; B may be 0.
        task_id: 0-based number of the task.
        allowed: Which classes may be predicted, bool (C,); None: all. Any for replayed images.
        global_size: Images of all processes in this step.
        options: See there.
        stop: Whether this process was asked to stop.

    Returns:
        Loss, correct@1 and correct@5 over all processes, and how many of them were asked to stop.

    Raises:
        NonFiniteLossError: If the loss or its gradient is not finite; nothing has changed then.
    """
    optimizer.zero_grad()
    values, served = _forward_backward(model, batch, task_id, allowed, global_size, options)
    sums = sum_over_processes(torch.cat([values, values.new_tensor([float(stop)]), served]))
    totals = sums[:4].tolist()
    if not math.isfinite(totals[0]):
        raise NonFiniteLossError(f"loss is {totals[0]}")
    sum_gradients(model.parameters())
    limit = math.inf if options.clip_grad is None else options.clip_grad
    norm = nn.utils.clip_grad_norm_(_trained(model), limit).item()
    if not math.isfinite(norm):
        raise NonFiniteLossError(f"the norm of the gradient is {norm} (loss {totals[0]})")
    optimizer.step()
    if model.prompt is not None:
        model.prompt.count_served(sums[4:])
    return totals


@torch.inference_mode()
def evaluate(
    model: PromptedVisionTransformer,
    loader: Loader,
    test_set: TestSet,
    options: EngineOptions,
    monitor: Monitor | None = None,
) -> Evaluation:
    """Evaluates one test set, batch-wise and instance-wise in one pass.

    Images whose own prompts are those of the vote need no second forward pass.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`.
        loader: Batches of (images, targets), each of whole vote groups of this process's share.
        test_set: What is evaluated.
        options: See there.
        monitor: Is asked before every batch.

    Returns:
        Accuracies over all images of all processes; `Loss` is the mean over vote groups of the
        group's mean cross-entropy, so it depends neither on the batch nor on the processes.
    """
    model.eval()
    monitor = monitor or Monitor()
    classes = test_set.classes if options.task_inc else options.all_classes
    allowed = _mask(classes, model, options)
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in SELECTIONS}
    usage = _Usage(model)
    num_images = torch.zeros((), dtype=torch.float64)
    progress = utils.Progress(f"Test: [{_name(test_set)}]", options.print_freq)
    for _, (images, targets) in progress.over(loader, len(loader)):
        monitor.in_evaluation()
        images, targets = images.to(options.device), targets.to(options.device)
        out = model(images, vote_group_size=options.vote_group_size)
        logits = {"batch": out["logits"], "instance": _instance_logits(model, images, out)}
        sums = {
            name: _test_sums(_restrict(logits[name], allowed), targets, options.vote_group_size)
            for name in SELECTIONS
        }
        for name in SELECTIONS:
            totals[name] += sums[name].cpu()
        usage.add(out)
        num_images += len(targets)
        progress.update({"Acc@1": 100 * sums["batch"][2].item() / len(targets)}, len(targets))
    return _evaluation(test_set, totals, num_images, usage, options)


def evaluate_till_now(
    model: PromptedVisionTransformer,
    test_loader: Callable[[TestSet], Loader],
    task: Task,
    matrices: dict[str, metrics.Matrix],
    options: EngineOptions,
    position: Position | None = None,
    monitor: Monitor | None = None,
    on_test_set: Callable[[], None] = lambda: None,
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

    Returns:
        One evaluation for each test set, in order; none where the task has no test sets.
    """
    position = position or Position(task.index)
    evaluations = position.evaluations
    for test_set in task.test_sets[len(evaluations) :]:
        start = time.monotonic()
        result = evaluate(model, test_loader(test_set), test_set, options, monitor)
        for name in SELECTIONS:
            matrices[name][test_set.index, task.index] = result.stats[name]["Acc@1"]
        batch, alone = result.stats["batch"], result.stats["instance"]
        line = "* Acc@1 {Acc@1:.3f} Acc@5 {Acc@5:.3f} loss {Loss:.3f}".format(**batch)
        logger.info("%s  (instance-wise %.3f)", line, alone["Acc@1"])
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
    optimizer = make_optimizer()
    for task in tasks[position.task :]:
        if not position.inside_task:
            logger.info("%s (%d of %d)", _name(task), task.index + 1, len(tasks))
            _begin_task(model, task.index, options)
            if task.index > 0 and options.reinit_optimizer:
                optimizer, optimizer_state = make_optimizer(), None
        scheduler = _continue_schedule(make_scheduler, optimizer, position, optimizer_state)
        optimizer_state = None
        loader = train_loader(task)
        while position.epoch < options.epochs:
            stats = train_one_epoch(
                model, loader, optimizer, task, position.epoch, options, position, monitor
            )
            position.end_epoch(stats)
            if scheduler is not None:
                scheduler.step(position.epoch, metric=stats["Acc@1"])
            monitor.at_boundary(position, optimizer)
        on_test_set = partial(monitor.at_boundary, position, optimizer)
        evaluate_till_now(
            model, test_loader, task, matrices, options, position, monitor, on_test_set
        )
        monitor.at_task_end(position.report())
        position = Position(task.index + 1)
        monitor.at_boundary(position, optimizer)


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
    log_prob = F.log_softmax(_restrict(logits, allowed), dim=1)  # (B, C)
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
    loss.backward()
    with torch.no_grad():
        correct = _correct(_restrict(out["logits"], allowed), targets)
        if "prompt_idx" in out:
            idx = out["prompt_idx"].flatten()  # (B*K,)
            served.scatter_add_(0, idx, served.new_ones(1).expand_as(idx))
    return torch.cat([loss.detach()[None], correct.sum(dim=0).to(loss.dtype)]), served


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is the first, and among the first five, bool (B, 2)."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    hits = best == targets[:, None]
    return torch.stack([hits[:, 0], hits.any(dim=1)], dim=1)


def _test_sums(logits: Tensor, targets: Tensor, group_size: int) -> Tensor:
    """Sum of the vote groups' mean losses, their number, correct@1 and correct@5, (4,)."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    means = torch.stack([group.mean() for group in losses.split(group_size)])
    sums = torch.stack([means.sum(), means.new_tensor(float(len(means)))]).double()
    return torch.cat([sums, _correct(logits, targets).sum(dim=0).double()])


def _instance_logits(
    model: PromptedVisionTransformer, images: Tensor, out: dict[str, Tensor]
) -> Tensor:
    """Logits with each image's own prompts; only images that the vote overruled are computed."""
    if "prompt_idx" not in out:
        return out["logits"]
    served, own = out["prompt_idx"], out["own_prompt_idx"]
    if not model.prompt_order_matters:
        served, own = served.sort(dim=1).values, own.sort(dim=1).values
    overruled = (served != own).any(dim=1)  # (B,)
    if not overruled.any():
        return out["logits"]
    logits = out["logits"].clone()
    again = model(images[overruled], query=out["query"][overruled], vote_group_size=1)
    logits[overruled] = again["logits"]
    return logits


class _Usage:
    """Counts which prompts served the test images, and how near their keys were."""

    def __init__(self, model: PromptedVisionTransformer) -> None:
        self.size = 0 if model.prompt is None else model.prompt.size
        self.counts = {name: torch.zeros(self.size, dtype=torch.float64) for name in SELECTIONS}
        self.similarity = torch.zeros(2, dtype=torch.float64)  # sum, number

    def add(self, out: dict[str, Tensor]) -> None:
        if not self.size:
            return
        for name, key in zip(SELECTIONS, ("prompt_idx", "own_prompt_idx"), strict=True):
            self.counts[name] += torch.bincount(out[key].flatten(), minlength=self.size).cpu()
        own = out["similarity"].gather(1, out["own_prompt_idx"]).double()  # (B, K)
        self.similarity += torch.stack([own.sum(), own.new_tensor(float(own.numel()))]).cpu()


def _evaluation(
    test_set: TestSet,
    totals: dict[str, Tensor],
    num_images: Tensor,
    usage: _Usage,
    options: EngineOptions,
) -> Evaluation:
    stats = {}
    total_images = sum_over_processes(_on(num_images, options)).item()
    for name in SELECTIONS:
        loss, groups, *correct = sum_over_processes(_on(totals[name], options)).tolist()
        top1, top5 = (100 * c / total_images for c in correct)
        stats[name] = {"Acc@1": top1, "Acc@5": top5, "Loss": loss / groups}
    if not usage.size:
        return Evaluation(test_set.index, stats)
    counts = {
        name: [int(c) for c in sum_over_processes(_on(usage.counts[name], options))]
        for name in SELECTIONS
    }
    total, number = sum_over_processes(_on(usage.similarity, options)).tolist()
    return Evaluation(test_set.index, stats, counts, total / number)


def _continue_schedule(
    make_scheduler: MakeScheduler,
    optimizer: torch.optim.Optimizer,
    position: Position,
    optimizer_state: dict[str, Any] | None,
) -> Scheduler | None:
    """The schedule of a task after its finished epochs; the optimizer gets its state, if any.

    A schedule follows from the accuracies of the epochs alone, so it is led through them again:
    the state dicts of timm's schedulers do not hold all that counts.
    """
    if optimizer_state is not None and not position.inside_task:
        optimizer.load_state_dict(optimizer_state)  # the schedule begins with what it finds
    scheduler = make_scheduler(optimizer)
    if scheduler is not None:
        for epoch, stats in enumerate(position.epoch_stats):
            scheduler.step(epoch + 1, metric=stats["Acc@1"])
    if optimizer_state is not None and position.inside_task:
        optimizer.load_state_dict(optimizer_state)
    return scheduler


def _name(part: Task | TestSet) -> str:
    """What to call a part of the stream: `Task 1` as the original, or a name that says more."""
    return f"Task {part.index + 1}" if part.name == task_name(part.index) else part.name


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


def _mask(
    classes: Sequence[int], model: PromptedVisionTransformer, options: EngineOptions
) -> Tensor:
    """Which classes may be predicted, bool (C,)."""
    mask = torch.zeros(model.num_classes, dtype=torch.bool)
    mask[list(classes)] = True
    return mask.to(options.device)


def _restrict(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits with -inf for the classes that may not be predicted, (B, C)."""
    return logits if allowed is None else logits.masked_fill(~allowed, -math.inf)


def _trained(model: PromptedVisionTransformer) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _on(values: Tensor, options: EngineOptions) -> Tensor:
    return values.to(options.device)
