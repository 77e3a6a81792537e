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
    """What stays the same for the whole run.

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
        seed: Seed of the random numbers of the model in training (dropout).
        read_every: Steps between host synchronisations (loss, accuracy, stop request).
        loss_scaling: Whether the loss is scaled against underflow, see `OptimizerStep`.
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
class Evaluation:
    """Result of one evaluation of one test set.

    Attributes:
        index: Row of the test set in the accuracy matrix.
        stats: `Acc@1`, `Acc@5` (percent) and `Loss` for each of `SELECTIONS`.
        usage: How often each prompt served a test image, for each of `SELECTIONS`; empty without
            a pool.
        mean_similarity: Mean cosine similarity of the images to the keys that they select alone.
        key_similarity: Mean cosine similarity of the images to every key (M,); empty without a
            pool.
    """

    index: int
    stats: dict[str, dict[str, float]]
    usage: dict[str, list[int]] = field(default_factory=dict)
    mean_similarity: float | None = None
    key_similarity: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TaskReport:
    """Results of a finished task.

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
class TrainState:
    """Where a run is: what comes next, and the results of the task so far.

    Attributes:
        task: 0-based number of the task; T when the run is complete.
        epoch: Finished epochs of the task; all of them when it is being evaluated.
        step: Finished steps of the epoch.
        meters: Sum and count of every meter of the epoch.
        epoch_stats: Averages over each finished epoch.
        evaluations: Of the test sets that are evaluated already.
        train_seconds: Wall time of training.
        eval_seconds: Wall time of evaluation.
        optimizer: State dict that the optimizer of a resumed run starts with; None once it has.
    """

    task: int = 0
    epoch: int = 0
    step: int = 0
    meters: dict[str, list[float]] = field(default_factory=dict)
    epoch_stats: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
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
        return TaskReport(
            self.task,
            self.epoch_stats[-1],
            self.evaluations,
            self.train_seconds,
            self.eval_seconds,
            self.epoch_stats,
        )


class Monitor:
    """Called as a run proceeds; may save it, report it, or stop it. This one does nothing."""

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop; if one was, all stop at the next boundary."""
        return False

    def at_boundary(self, state: TrainState, update: OptimizerStep, stop: bool = False) -> None:
        """Called when steps are read, after every epoch, test set and task: a run can resume here.

        Args:
            state: Where the run is.
            update: Has the state of the optimizer.
            stop: Whether the run shall end here, by an exception that this raises.
        """

    def in_evaluation(self) -> None:
        """Called before every batch of an evaluation; may end the run by an exception."""

    def at_task_end(self, report: TaskReport) -> None:
        """Called after the evaluation of a task."""


class QueryCache:
    """Queries of this process's test images, by row of the test set; (n, D) each.

    They are valid as long as the tensors that they were computed from do not change.
    """

    def __init__(self) -> None:
        self._queries: dict[int, Tensor] = {}
        self._version: Any = None

    def of(self, test_set: TestSet, version: Any) -> Tensor | None:
        """Queries of a test set in the order of its images; None: not cached.

        Args:
            test_set: The test set.
            version: `query_version()` of the model; another one than before empties the cache.
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
    """What the loop needs beside the model, the tasks, and its state.

    Attributes:
        options: What stays the same for the whole run.
        train_loader: Gives the training batches of a task.
        test_loader: Gives the batches of a test set.
        make_optimizer: Makes an optimizer over the model's trainable parameters.
        make_scheduler: Makes the learning rate schedule of one task, or None.
        matrices: Accuracy matrix for each of `SELECTIONS`, filled column by column, percent.
        monitor: Called as the run proceeds.
        queries: Queries of test images that are computed already.
    """

    options: EngineOptions
    train_loader: Callable[[Task], Loader]
    test_loader: Callable[[TestSet], Loader]
    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler
    matrices: dict[str, Matrix]
    monitor: Monitor = field(default_factory=Monitor)
    queries: QueryCache = field(default_factory=QueryCache)
