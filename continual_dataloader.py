"""The loaders of a run: one set of worker processes serves every task, epoch and evaluation.

The workers return the output of the transforms, mostly uint8 pixels, which become the input of the
model on the device. Test images are the same in every evaluation, so they are cached in host memory
as far as `--test_cache` allows.

Shapes: B images of a batch, S input size in pixels.
"""

import atexit
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from weakref import ref

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from continual_datasets.pipeline import ToImages
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import (
    GlobalBatchSampler,
    LoaderOptions,
    ReplaySampler,
    TestSampler,
)
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.task_data import Key, Replayed, RunData, TrainKey

#: Seconds that a DataLoader worker runs on after SIGTERM; schedulers rarely wait longer to kill.
_WORKER_SECONDS = 30


class LostWorkerError(RuntimeError):
    """A DataLoader worker was killed; no traceback is available."""


class Loaders:
    """The batches of every task and every test set of a run.

    The workers start when the first batch is asked for, and serve one pass at a time: when another
    begins, the one before ends.

    Args:
        stream: The tasks with their test sets.
        options: See `LoaderOptions`.
        device: Where the batches are needed.
        to_images: Makes images there.
        buffer: Images of earlier tasks that are replayed; None: none are.
    """

    def __init__(
        self,
        stream: TaskStream,
        options: LoaderOptions,
        device: torch.device,
        to_images: ToImages,
        buffer: ReplayBuffer | None = None,
    ) -> None:
        self._options, self._buffer = options, buffer
        self._to_train = _ToDevice(device, to_images.train)
        self._to_test = _ToDevice(device, to_images.test)
        self._workers = _Workers(RunData(stream), options, _most_batches(stream, options))
        self._cache = _TestCache(options.test_cache_bytes)

    def train(self, task: Task) -> "TrainBatches":
        """The training batches of a task; with replayed images if the buffer holds any by now."""
        place = len(task.data), self._options, task.index
        if self._buffer is None or len(self._buffer) == 0:
            sampler = GlobalBatchSampler(*place)
        else:
            sampler = ReplaySampler(*place, self._buffer.indices)
        return TrainBatches(sampler, self._workers, self._to_train)

    def test(self, test_set: TestSet) -> "TestBatches":
        """The batches of this process's share of a test set."""
        sampler = TestSampler(len(test_set.data), self._options, test_set.index)
        return TestBatches(sampler, self._workers, self._cache, self._to_test)


@dataclass(frozen=True)
class TrainBatches:
    """Images (B, 3, S, S) and class ids (B,) of an epoch, on the device.

    Where images are replayed, a third tensor marks them, bool (B,). B may be 0, see
    `GlobalBatchSampler`.

    Attributes:
        batch_sampler: Call its `set_epoch(epoch)` before each epoch; it also has the
            `global_batch_size(step)` by which a mean over all processes divides.
    """

    batch_sampler: GlobalBatchSampler
    _workers: "_Workers"
    _deliver: "_ToDevice"

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Tensor]]:
        replaying = isinstance(self.batch_sampler, ReplaySampler)
        ahead, along = tee(self.batch_sampler)
        for keys, tensors in zip(along, self._workers.load(ahead), strict=True):
            flags = [_which_replayed(keys)] if replaying else []
            yield self._deliver([*tensors, *flags])


@dataclass(frozen=True)
class TestBatches:
    """Images (B, 3, S, S) and class ids (B,) of a test set, on the device."""

    __test__ = False  # no test class, whatever pytest thinks of the name

    _sampler: TestSampler
    _workers: "_Workers"
    _cache: "_TestCache"
    _deliver: "_ToDevice"

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Tensor]]:
        test_set = self._sampler.test_set
        batches = self._cache.get(test_set)
        if batches is None:
            batches = self._cache.caching(test_set, self._workers.load(self._sampler))
        return map(self._deliver, batches)


def _most_batches(stream: TaskStream, options: LoaderOptions) -> int:
    """Batches of the longest pass over a task or a test set."""
    tasks = [len(GlobalBatchSampler(len(t.data), options, t.index)) for t in stream.tasks]
    return max(tasks + [len(TestSampler(len(t.data), options, t.index)) for t in stream.test_sets])


def _which_replayed(keys: Sequence[Key]) -> Tensor:
    return torch.tensor([isinstance(key, Replayed) for key in keys], dtype=torch.bool)  # (B,)


@dataclass(frozen=True)
class _ToDevice:
    """Copies batches to the device, asynchronously, and makes images there."""

    device: torch.device
    to_images: Callable[[Tensor], Tensor]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        first, *others = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
        return [self.to_images(first), *others]


class _Workers:
    """Processes that load whatever comes, pass after pass.

    Args:
        data: All that may come.
        options: See `LoaderOptions`.
        most_batches: Batches of the longest pass; more processes would never be of use.
    """

    def __init__(self, data: RunData, options: LoaderOptions, most_batches: int) -> None:
        num_workers = min(options.num_workers, most_batches)
        self._sampler = _PassSampler()
        self._loader = DataLoader(
            data,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            collate_fn=_Collate(data),
            pin_memory=options.pin_memory and torch.accelerator.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_stop_signals,
            generator=torch.Generator(),  # else every iteration draws from the global one
        )
        atexit.register(_dismiss, ref(self))

    def load(self, batches: Iterable[list[Key]]) -> Iterator[list[Tensor]]:
        """Begins a pass with the first batch asked for; what the one before left over is lost."""
        self._sampler.batches = batches = iter(batches)
        try:
            for tensors in self._loader:
                yield tensors
                assert self._sampler.batches is batches, "another pass over the data has begun"
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


def _dismiss(workers: "ref[_Workers]") -> None:
    """Ends the workers at exit, since they ignore the SIGTERM that Python would send."""
    if (found := workers()) is not None:
        del found._loader


class _PassSampler:
    """Batch sampler of the current pass over the data; a DataLoader has one for its lifetime."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


class _Collate:
    """Stack samples; an empty batch, as only training has them, becomes empty tensors."""

    def __init__(self, data: RunData) -> None:
        self.data = data

    def __call__(self, samples: list[tuple[Tensor, int]]) -> list[Tensor]:
        if samples:
            return default_collate(samples)
        task = next(iter(self.data.tasks))
        return [tensor[:0] for tensor in default_collate([self.data[TrainKey(task, 0, 0)]])]


class _TestCache:
    """Caches the batches of whole test sets in host memory.

    Args:
        num_bytes: How much all of them may take together.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free = num_bytes
        self._cached: dict[int, list[list[Tensor]]] = {}
        self._too_large: set[int] = set()

    def get(self, test_set: int) -> Iterable[list[Tensor]] | None:
        """The batches of a test set, if they are cached."""
        return self._cached.get(test_set)

    def caching(self, test_set: int, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Yields the batches of a test set, and caches them at its end if there is room."""
        if test_set in self._too_large:
            yield from batches
            return
        held: list[list[Tensor]] = []
        size = 0
        for tensors in batches:
            yield tensors
            size += sum(tensor.nbytes for tensor in tensors)
            if size <= self._free:
                held.append(_in_own_memory(tensors))
            else:
                held.clear()
        if size <= self._free:
            self._cached[test_set] = held
            self._free -= size
        else:
            self._too_large.add(test_set)


def _in_own_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors in shared or page-locked memory, of which there is little."""
    scarce = [tensor.is_shared() or tensor.is_pinned() for tensor in tensors]
    return [t.clone() if is_scarce else t for t, is_scarce in zip(tensors, scarce, strict=True)]
