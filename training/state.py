"""What the training loop works on: its options, its state, what it reports.

Shapes: B images, C classes, M pool size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from continual_datasets.stream import Task, TestSet
    from reports.metrics import Matrix
    from training.update import OptimizerStep


class Scheduler(Protocol):
    """A timm learning rate scheduler."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Sets the learning rate of an epoch (0-based)."""


#: Batches of (images, targets) on the device; its length is their number. For training its
#: `batch_sampler` has `set_epoch(epoch, first_step)` and `global_batch_size(step)`; a batch with
#: replayed images marks them in a third tensor, bool (B,).
Loader = Any
MakeOptimizer = Callable[[], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Scheduler | None]


class NonFiniteLossError(RuntimeError):
    """The loss is not finite; the model has the values before that step."""


@dataclass(frozen=True)
class EngineOptions:
    """What stays the same for the whole run."""

    device: torch.device
    epochs: int  # of each task
    vote_group_size: int  # images that vote for prompts together
    all_classes: tuple[int, ...]  # of the whole stream; test images may be given any of them
    train_mask: bool = True  # training may predict the task's own classes only
    task_inc: bool = False  # evaluation may predict the test set's own classes only
    pull_coeff: float = 0.1  # weight of the pull term; 0 leaves it out
    smoothing: float = 0.0  # label smoothing, spread over the classes that may be predicted
    clip_grad: float | None = 1.0  # largest norm of the gradient; None: no clipping
    reinit_optimizer: bool = True  # each task starts with a fresh optimizer
    shared_prompt_pool: bool = False  # a task's prompts start from those of the task before
    shared_prompt_key: bool = False  # the same for the keys
    print_freq: int = 10  # steps between two progress lines
    seed: int = 42  # of the random numbers of the model in training (dropout)
    replayed_per_group: int = 0  # replayed images that join each vote group, if a batch has any
    read_every: int = 1  # steps between host synchronisations (loss, accuracy, stop request)
    loss_scaling: bool = False  # scale the loss against underflow, see `OptimizerStep`


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation of one test set; the last three are empty without a pool."""

    index: int  # row of the test set in the accuracy matrix
    stats: dict[str, dict[str, float]]  # of each selection: Acc@1, Acc@5 (percent) and Loss
    usage: dict[str, list[int]] = field(default_factory=dict)  # images that each prompt served
    mean_similarity: float | None = None  # mean cosine of images and the keys they select alone
    key_similarity: list[float] = field(default_factory=list)  # mean cosine to every key, (M,)


@dataclass(frozen=True)
class TaskReport:
    """Results of a finished task."""

    task: int  # 0-based number
    train_stats: dict[str, float]  # averages over the last epoch: Lr, Loss, Acc@1, Acc@5
    evaluations: list[Evaluation]  # one for each test set
    train_seconds: float  # wall time
    eval_seconds: float
    epoch_stats: list[dict[str, float]] = field(default_factory=list)  # averages over each epoch


@dataclass
class TrainState:
    """Where a run is: what comes next, and the results of the task so far."""

    task: int = 0  # 0-based number; T when the run is complete
    epoch: int = 0  # finished epochs of the task; all of them when it is being evaluated
    step: int = 0  # finished steps of the epoch
    meters: dict[str, list[float]] = field(default_factory=dict)  # sum and count of each, in epoch
    epoch_stats: list[dict[str, float]] = field(default_factory=list)  # of each finished epoch
    evaluations: list[Evaluation] = field(default_factory=list)  # of test sets that are done
    train_seconds: float = 0.0  # wall time
    eval_seconds: float = 0.0
    #: State dict that the optimizer of a resumed run starts with; None once it has.
    optimizer: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def inside_task(self) -> bool:
        """Whether the task has begun."""
        return self.epoch > 0 or self.step > 0

    def end_epoch(self, stats: dict[str, float]) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch_stats.append(stats)
        self.epoch, self.step, self.meters = self.epoch + 1, 0, {}

    def take_optimizer(self) -> dict[str, Any] | None:
        """The state dict that the optimizer has yet to load, once."""
        found, self.optimizer = self.optimizer, None
        return found

    def report(self) -> TaskReport:
        """Results of the task, at its end."""
        curve, seconds = self.epoch_stats, (self.train_seconds, self.eval_seconds)
        return TaskReport(self.task, curve[-1], self.evaluations, *seconds, curve)


class Monitor:
    """Called as a run proceeds; may save it, report it, or stop it. This one does nothing."""

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop; if one was, all stop at the next boundary."""
        return False

    def at_boundary(self, state: TrainState, update: OptimizerStep, stop: bool = False) -> None:
        """Called when steps are read, after every epoch, test set and task: a run can resume here.

        `update` has the state of the optimizer; `stop`: the run shall end, by an exception of this.
        """

    def in_evaluation(self) -> None:
        """Called before every batch of an evaluation; may end the run by an exception."""

    def at_task_end(self, report: TaskReport) -> None:
        """Called after the evaluation of a task."""


class QueryCache:
    """Queries of this process's test images, by row of the test set; (n, D) each."""

    def __init__(self) -> None:
        self._queries: dict[int, Tensor] = {}
        self._version: Any = None

    def of(self, test_set: TestSet, version: Any) -> Tensor | None:
        """Queries of a test set in the order of its images; None: not cached.

        Another `version`, the model's `query_version()`, than before empties the cache.
        """
        if version != self._version:
            self._queries.clear()
            self._version = version
        return self._queries.get(test_set.index)

    def store(self, test_set: TestSet, queries: list[Tensor]) -> None:
        """Stores the queries of all batches of a test set."""
        if queries:
            self._queries[test_set.index] = torch.cat(queries)


@dataclass
class Run:
    """What the loop needs beside the model, the tasks, and its state."""

    options: EngineOptions
    train_loader: Callable[[Task], Loader]
    test_loader: Callable[[TestSet], Loader]
    make_optimizer: MakeOptimizer  # over the model's trainable parameters
    make_scheduler: MakeScheduler  # the learning rates of one task, or None
    matrices: dict[str, Matrix]  # accuracies of each selection, filled by column, percent
    monitor: Monitor = field(default_factory=Monitor)
    queries: QueryCache = field(default_factory=QueryCache)
