"""The loaders of a run: one set of worker processes serves every task, epoch and evaluation.

The workers return the output of the transforms, mostly uint8 pixels, which become the input of the
model on the device. Test images are the same in every evaluation, so they are cached in host memory
as far as `--test_cache` allows.

Shapes: B images of a batch, S input size in pixels.
"""

import atexit
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import utils
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import Batching, GlobalBatchSampler, evaluation_batches
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.task_data import Key, Replayed, RunData, TrainKey

#: Seconds that a DataLoader worker runs on after SIGTERM; schedulers rarely wait longer to kill.
_WORKER_SECONDS = 30


class LostWorkerError(RuntimeError):
    """A DataLoader worker was killed; no traceback is available."""


@dataclass(frozen=True)
class Batches:
    """Images (B, 3, S, S) and class ids (B,) of a task's epoch or a test set, on the device.

    Where images are replayed, a third tensor marks them, bool (B,). In training, B may be 0.

    Attributes:
        batch_sampler: The keys of each batch; in training a `GlobalBatchSampler`, of which
            `set_epoch` chooses the epoch.
    """

    batch_sampler: Any
    _load: Callable[[Any], Iterator[list[Tensor]]]

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self._load(self.batch_sampler)


class Loaders:
    """The batches of every task and every test set of a run.

    The workers start when the first batch is asked for, and serve one pass over a task or a test
    set at a time: when another begins, the one before ends. Two workers that start for each pass
    instead take three times as long over the epochs of the digits (22 s instead of 7).

    Args:
        stream: The tasks with their test sets.
        batching: How images are put into batches, and on which device.
        buffer: Images of earlier tasks that are replayed; None: none are.
    """

    def __init__(
        self, stream: TaskStream, batching: Batching, buffer: ReplayBuffer | None = None
    ) -> None:
        self._batching, self._pipeline, self._buffer = batching, stream.pipeline, buffer
        self._device, data = batching.processes.device, batching.settings.data
        self._cached: dict[int, list[list[Tensor]]] = {}
        self._free_bytes = round(data.test_cache * 10**9)
        self._any_keys: list[Key] = [TrainKey(stream.tasks[0].index, 0, 0)]
        self._keys: list[list[Key]] = []  # of the current pass: a DataLoader's sampler is for life
        self._current: object = None
        passes = [*map(self.train, stream.tasks), *map(self.test, stream.test_sets)]
        num_workers = min(data.num_workers, utils.usable_cores(), max(map(len, passes)))
        self._loader = DataLoader(
            RunData(stream, batching.settings.run.seed),
            batch_sampler=self._keys,
            num_workers=num_workers,
            pin_memory=data.pin_mem and self._device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_stop_signals,
            generator=torch.Generator(),  # else every iteration draws from the global one
        )
        atexit.register(_dismiss, ref(self))

    def train(self, task: Task) -> Batches:
        """The training batches of a task; with replayed images if the buffer holds any by now."""
        buffer = () if self._buffer is None else self._buffer.indices
        sampler = GlobalBatchSampler(len(task.data), self._batching, task.index, buffer)
        return Batches(sampler, self._train_batches)

    def test(self, test_set: TestSet) -> Batches:
        """The batches of this process's share of a test set."""
        batches = evaluation_batches(len(test_set.data), self._batching, test_set.index)
        return Batches(batches, partial(self._test_batches, test_set.index))

    def _train_batches(self, sampler: GlobalBatchSampler) -> Iterator[list[Tensor]]:
        for keys, tensors in self._load(sampler):
            if sampler.replays:
                is_replayed = [isinstance(key, Replayed) for key in keys]
                tensors.append(torch.tensor(is_replayed, dtype=torch.bool))
            yield self._deliver(tensors, train=True)

    def _test_batches(self, test_set: int, batches: list[list[Key]]) -> Iterator[list[Tensor]]:
        for tensors in self._cached.get(test_set) or self._caching(test_set, batches):
            yield self._deliver(tensors, train=False)

    def _deliver(self, tensors: list[Tensor], train: bool) -> list[Tensor]:
        """Copies a batch to the device, asynchronously, and makes images there."""
        first, *others = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        return [self._pipeline.to_input(first, train), *others]

    def _caching(self, test_set: int, batches: list[list[Key]]) -> Iterator[list[Tensor]]:
        """Loads the batches of a test set, and caches all of them if there is room."""
        held: list[list[Tensor]] = []
        needed = 0
        for step, (keys, tensors) in enumerate(self._load(batches)):
            if step == 0:
                num_bytes = sum(tensor.nbytes for tensor in tensors)
                needed = num_bytes // len(keys) * sum(map(len, batches))
            if needed <= self._free_bytes:
                held.append([tensor.clone() for tensor in tensors])  # shared memory is scarce
            yield tensors
        if held:
            self._cached[test_set] = held
            self._free_bytes -= needed

    def _load(self, sampler: Iterable[list[Key]]) -> Iterator[tuple[list[Key], list[Tensor]]]:
        """Begins a pass with the first batch asked for; what the one before left over is lost."""
        self._current = batches = list(sampler)
        self._keys[:] = [keys or self._any_keys for keys in batches]  # an empty batch has a shape
        try:
            for keys, tensors in zip(batches, self._loader, strict=True):
                yield keys, [tensor[: len(keys)] for tensor in tensors]
                assert self._current is batches, "another pass over the data has begun"
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise LostWorkerError(f"{error} Was memory short? Give fewer --num_workers") from error


def outlive_stop_signals(_worker_id: int) -> None:
    """Lets a DataLoader worker serve the last step when a scheduler signals every process of a job.

    SIGTERM ends it after a while all the same: so does Python, when it clears up.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_SECONDS))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _dismiss(loaders: "ref[Loaders]") -> None:
    """Ends the workers at exit, since they ignore the SIGTERM that Python would send."""
    if (found := loaders()) is not None:
        del found._loader
