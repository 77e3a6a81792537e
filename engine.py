"""The method's loop: one epoch, one evaluation, and all tasks with an evaluation after each.

The engine is given a run, with its model, settings and loaders, and tasks; it imports neither data
sets nor launchers and knows no scenario. Every evaluation gives two accuracies: batch-wise, where
the images of a vote group share the prompts that most of them select (as published), and
instance-wise, each image on its own (`training/evaluation.py`).

Steps are asynchronous: losses and counts stay on the device and are copied to the host every
`read_every` steps. A scaled loss (fp16) is the exception.

Shapes: B images, C classes, K prompts selected, M pool size.

Source: Wang et al., CVPR 2022, equation 5 and section 5; the order of events as in l2p-pytorch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import utils
from continual_datasets.random_streams import seed_model
from continual_datasets.stream import title
from reports import metrics
from reports.metrics import SELECTIONS
from training.evaluation import average_stats, evaluate
from training.losses import class_mask
from training.queries import with_queries
from training.state import Evaluation, Loader, NonFiniteLossError, Run, TrainState
from training.update import OptimizerStep
from utils import rank, sum_over_processes

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

    from continual_datasets.stream import Task

logger = logging.getLogger(__name__)


def train_and_evaluate(run: Run, tasks: Sequence[Task], state: TrainState) -> None:
    """Learns the tasks one after the other, from where `state` is, and evaluates after each."""
    update = OptimizerStep(run)
    for task in tasks[state.task :]:
        if not state.inside_task:
            logger.info("%s (%d of %d)", title(task), task.index + 1, len(tasks))
            _begin_task(run, task, state, update)
        scheduler = _continue_schedule(run, state, update)
        loader = run.train_loader(task)
        while state.epoch < run.settings.optimizer.epochs:
            stats = train_one_epoch(run, loader, update, task, state)
            state.end_epoch(stats)
            if scheduler is not None:
                scheduler.step(state.epoch, metric=stats["Acc@1"])
            run.monitor.at_boundary(state, update)
        evaluate_till_now(run, task, state, update)
        run.monitor.at_task_end(state)
        state = TrainState(task.index + 1)
        run.monitor.at_boundary(state, update)


def train_one_epoch(
    run: Run, loader: Loader, update: OptimizerStep, task: Task, state: TrainState
) -> dict[str, float]:
    """Trains one epoch of one task, or what is left of it; keeps `state` up to date.

    Returns:
        Averages over the epoch: `Lr`, `Loss` (mean over batches, pull term included), `Acc@1` and
        `Acc@5` (percent, among the classes that may be predicted).

    Raises:
        NonFiniteLossError: Naming task, epoch, step and value; the model has the values before that
            step.
    """
    settings, epoch, epochs = run.settings, state.epoch, run.settings.optimizer.epochs
    run.model.train()
    mask = class_mask(task.classes, run.model.num_classes, run.device)
    allowed = mask if settings.tasks.train_mask else None
    task_id = torch.tensor(task.index, device=run.device)  # a number would be compiled in
    header = f"Train: Epoch[{epoch + 1:{len(str(epochs))}d}/{epochs}]"
    progress = utils.Progress(header, settings.output.print_freq, state.meters)
    sampler = loader.batch_sampler
    sampler.set_epoch(epoch, state.step)
    unread: list[Tensor] = []
    since = time.monotonic()
    batches = with_queries(run, loader, first=state.step)
    for step, (batch, query) in progress.over(batches, len(loader), state.step):
        seed_model(run.device, settings.run.seed, task.index, epoch, step, rank())
        stop = run.monitor.wants_to_stop()
        target = StepTarget(task_id, allowed, sampler.global_batch_size(step), query, stop)
        unread.append(train_step(run, update, batch, target))
        if step % run.read_every and step + 1 < len(loader):
            continue
        sizes = [sampler.global_batch_size(s) for s in range(state.step, step + 1)]
        stop = _read_steps(unread, sizes, update, progress, state)
        unread.clear()
        now = time.monotonic()
        state.step, state.meters = step + 1, progress.sums()
        state.train_seconds += now - since
        run.monitor.at_boundary(state, update, stop=stop)
        since = time.monotonic()
    averages = progress.averages()
    logger.info("Averaged stats: %s", "  ".join(f"{k}: {v:.4f}" for k, v in averages.items()))
    return averages


class StepTarget(NamedTuple):
    """What a training step needs besides its batch."""

    task_id: Tensor  # 0-based, ()
    allowed: Tensor | None  # classes that images may have unless replayed, bool (C,); None: all
    global_size: int  # images of all processes in this step
    query: Tensor | None = None  # of the images, (B, D); None: the step computes it
    stop: bool = False  # this process was asked to stop


def train_step(
    run: Run, update: OptimizerStep, batch: Sequence[Tensor], target: StepTarget
) -> Tensor:
    """One step of all processes; asynchronous, unless the loss is scaled.

    A batch is this process's images (B, 3, S, S) and targets (B,), on the device, and which of them
    are replayed (B,), if any are; B may be 0. If the loss or its gradient is not finite, neither
    this step nor a later one changes the model.

    Returns:
        Loss over all processes, how many of them were asked to stop, correct@1 and correct@5, and
        the norm of the gradient before clipping, (5,), on the device.
    """
    model, (images, targets, *flags) = run.model, batch
    update.begin()
    found = run.objective(images, targets, target.allowed, target.task_id, target.query, *flags)
    loss = found.loss * (len(images) / target.global_size)
    if loss.requires_grad:  # this process has images, and something trains by gradients
        update.backward(loss)
    stopping = loss.new_full((1,), float(target.stop))
    sums = sum_over_processes(torch.cat([loss.detach()[None], stopping, found.counts]))
    norm = update.step(sums[0])
    if model.prompt is not None:
        model.prompt.count_served(torch.where(update.sound, sums[4:], 0))
    model.observe(found.features, targets, update.sound)
    return torch.cat([sums[:4], norm[None]])


def evaluate_till_now(
    run: Run, task: Task, state: TrainState, update: OptimizerStep | None = None
) -> None:
    """Evaluates the test sets of the task learned last, and fills column `task.index` of matrices.

    Those that `state` has are left out; without `update` nothing is saved between two test sets.
    After the last task, and with `--eval`, the results of each image are kept.
    """
    each_image = run.settings.run.eval or task.index == len(run.stream.tasks) - 1
    for test_set in task.test_sets[len(state.evaluations) :]:
        start = time.monotonic()
        result = evaluate(run, run.test_loader(test_set), test_set, each_image)
        for name in SELECTIONS:
            run.matrices[name][test_set.index, task.index] = result.stats[name]["Acc@1"]
        batch, alone = result.stats["batch"], result.stats["instance"]
        line = "* Acc@1 {Acc@1:.3f} Acc@5 {Acc@5:.3f} loss {Loss:.3f}".format(**batch)
        logger.info("%s  (instance-wise %.3f)  [%s]", line, alone["Acc@1"], title(test_set))
        state.evaluations.append(result)
        state.eval_seconds += time.monotonic() - start
        if update is not None:
            run.monitor.at_boundary(state, update)
    if state.evaluations:
        _log_averages(run, task, state.evaluations)


def _read_steps(
    steps: list[Tensor],
    sizes: list[int],
    update: OptimizerStep,
    progress: utils.Progress,
    state: TrainState,
) -> bool:
    """Copies the results of steps to the host; returns whether a process was asked to stop."""
    rows = torch.stack(steps).tolist()  # each as `train_step` returns it
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True), state.step + 1):
        loss, _, correct1, correct5, norm = row
        if not (math.isfinite(loss) and (math.isfinite(norm) or update.may_overflow)):
            what = f"the norm of the gradient is {norm} (loss {loss})"
            what = what if math.isfinite(loss) else f"loss is {loss}"
            place = f"task {state.task + 1}, epoch {state.epoch + 1}, step {number}"
            raise NonFiniteLossError(f"{what} in {place}: lower --lr, or set --clip-grad")
        progress.update({"Lr": update.lr, "Loss": loss})
        percent = {"Acc@1": 100 * correct1 / size, "Acc@5": 100 * correct5 / size}
        progress.update(percent, count=size)
    return any(stop > 0 for _, stop, *_ in rows)


def _begin_task(run: Run, task: Task, state: TrainState, update: OptimizerStep) -> None:
    """Prepares prompts and optimizer for a task that has not begun."""
    before, number = task.index, task.index + 1
    prompts, pool = run.settings.prompts, run.model.prompt
    if pool is not None:
        pool.begin_task()
        wanted = {"prompts": prompts.shared_prompt_pool, "keys": prompts.shared_prompt_key}
        if pool.inherit(task.index, **wanted):
            logger.info("Task %d starts from the prompts of task %d", number, before)
        elif before > 0 and any(wanted.values()):
            line = "Task %d shares no prompts with task %d: the pool of %d has no slots left for it"
            logger.warning(line, number, before, pool.size)
    if before > 0 and run.settings.optimizer.reinit_optimizer:
        update.renew(state.take_optimizer())


def _continue_schedule(run: Run, state: TrainState, update: OptimizerStep) -> Scheduler | None:
    """The schedule of a task after its finished epochs; loads the optimizer of a resumed run.

    The state dicts of timm's schedulers are incomplete, so the schedule is stepped through the
    finished epochs again; it depends on their number and accuracies alone.
    """
    stored = state.take_optimizer()
    if stored is not None and not state.inside_task:
        update.load_state_dict(stored)  # before the schedule reads the learning rate
    scheduler = run.make_scheduler(update.optimizer)
    if scheduler is not None:
        for epoch, stats in enumerate(state.epoch_stats):
            scheduler.step(epoch + 1, metric=stats["Acc@1"])
    if stored is not None and state.inside_task:
        update.load_state_dict(stored)
    return scheduler


def _log_averages(run: Run, task: Task, evaluations: Sequence[Evaluation]) -> None:
    for name, label in (("batch", "Average accuracy"), ("instance", "Instance-wise accuracy")):
        means = average_stats(evaluations, name)
        numbers = metrics.summarize(run.matrices[name], task.index)
        if numbers.get("forgetting") is not None:
            means |= {"Forgetting": numbers["forgetting"], "Backward": numbers["backward_transfer"]}
        line = "".join(f"\t{key}: {value:.4f}" for key, value in means.items())
        logger.info("[%s till task%d]%s", label, task.index + 1, line)
