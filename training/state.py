"""What the training loop works on: a run, where it is in a task, and what it has found.

Shapes: n images, D width, M pool size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch

from cli.kinds import Finite, Natural
from continual_datasets.samplers import Batching
from reports.metrics import SELECTIONS
from utils import is_main_process

if TYPE_CHECKING:
    from pathlib import Path

    from timm.scheduler.scheduler import Scheduler
    from torch import Tensor

    from cli.settings import Settings
    from continual_datasets.replay import ReplayBuffer
    from continual_datasets.stream import Task, TaskStream, TestSet
    from reports.metrics import Matrix
    from training.objective import Computed
    from training.update import OptimizerStep
    from utils import Processes
    from vision_transformer import PromptedVisionTransformer

#: Batches of (images, targets) on the device; its length is their number. For training its
#: `batch_sampler` has `set_epoch(epoch, first_step)` and `global_batch_size(step)`; a batch with
#: replayed images marks them in a third tensor, bool (B,).
Loader = Any


#: Types of what is saved, see `cli.kinds`.
Stats = Annotated[
    dict[str, dict[str, Finite]],
    (
        "must have Acc@1, Acc@5 and Loss of batch and instance",
        lambda x: all(x.get(one, {}).keys() >= {"Acc@1", "Acc@5", "Loss"} for one in SELECTIONS),
    ),
]
Meter = Annotated[list[Finite], ("must be a sum and a count", lambda x: len(x) == 2 and x[1] > 0)]


#: Of each image of a test set: target, prediction batch-wise and instance-wise; with a pool also
#: its prompts batch-wise and instance-wise, (n, 3 + 2 K).
Images = Annotated[
    torch.Tensor, ("must be rows of int32", lambda x: x.dtype == torch.int32 and x.ndim == 2)
]


class NonFiniteLossError(RuntimeError):
    """The loss is not finite; the model has the values before that step."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation of one test set; without a pool, what concerns prompts is empty."""

    index: Natural  # row of the test set in the accuracy matrix
    stats: Stats  # of each selection: Acc@1, Acc@5 (percent) and Loss
    usage: dict[str, list[Natural]] = field(default_factory=dict)  # images that each prompt served
    mean_similarity: Finite | None = None  # mean cosine of images and the keys they select alone
    key_similarity: list[Finite] = field(default_factory=list)  # mean cosine to every key, (M,)
    #: Of each image in the order of the test set; None but after the last task.
    images: Images | None = field(default=None, compare=False, repr=False)


@dataclass
class TrainState:
    """Where a run is in a task, and the results of the task so far; at its end, all of them."""

    task: Natural = 0  # 0-based number; T when the run is complete
    epoch: Natural = 0  # finished epochs of the task; all of them when it is being evaluated
    step: Natural = 0  # finished steps of the epoch
    meters: dict[str, Meter] = field(default_factory=dict)  # of the epoch
    #: Averages over each finished epoch: Lr, Loss, Acc@1, Acc@5.
    epoch_stats: list[dict[str, Finite]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)  # of test sets that are done
    train_seconds: Finite = 0.0  # wall time
    eval_seconds: Finite = 0.0
    #: State dict that the optimizer of a resumed run starts with; None once it has.
    optimizer: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def inside_task(self) -> bool:
        """Whether the task has begun."""
        return self.epoch > 0 or self.step > 0

    @property
    def train_stats(self) -> dict[str, float]:
        """Averages over the last finished epoch; empty where none was trained."""
        return self.epoch_stats[-1] if self.epoch_stats else {}

    def end_epoch(self, stats: dict[str, float]) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch_stats.append(stats)
        self.epoch, self.step, self.meters = self.epoch + 1, 0, {}

    def take_optimizer(self) -> dict[str, Any] | None:
        """The state dict that the optimizer has yet to load, once."""
        found, self.optimizer = self.optimizer, None
        return found


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

    def at_task_end(self, state: TrainState) -> None:
        """Called after the evaluation of a task, with its results."""


@dataclass(kw_only=True)
class Run:
    """What training and evaluation need beside their state, and the results."""

    settings: Settings
    processes: Processes  # this process among all
    stream: TaskStream
    model: PromptedVisionTransformer  # on the device
    backbone: dict[str, str]  # `name`, `source`, `sha256` of the network before anything trained
    global_batch: int  # images of all processes in a training step, without replayed ones
    buffer: ReplayBuffer | None  # images of earlier tasks that are replayed; None: none are
    train_loader: Callable[[Task], Loader]
    test_loader: Callable[[TestSet], Loader]
    objective: Callable[..., Computed]  # `Objective.compute`, perhaps compiled
    make_optimizer: Callable[[], torch.optim.Optimizer]  # over the model's trainable parameters
    make_scheduler: Callable[[torch.optim.Optimizer], Scheduler | None]  # for one task
    matrices: dict[str, Matrix]  # accuracies of each selection, filled by column, percent
    queries_ahead: int = 1  # training batches whose queries are computed in one pass
    read_every: int = 1  # steps between host synchronisations (loss, accuracy, stop request)
    reports: list[TrainState] = field(default_factory=list)  # of each finished task, at its end
    monitor: Monitor = field(default_factory=Monitor)
    #: Queries of this process's test images, (n, D), by row of the test set, each with the model's
    #: `query_version()` at that time.
    queries: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def batching(self) -> Batching:
        """How its images are put into batches and shared by the processes."""
        return Batching(self.settings, self.processes, self.global_batch)

    @property
    def output_dir(self) -> Path | None:
        """Folder in which this process writes, if any: the main process alone does."""
        return self.settings.output_folder if is_main_process() else None
