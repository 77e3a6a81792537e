"""The loaders of a run: one set of worker processes serves every task, epoch and evaluation.

The workers return the output of the transforms, mostly uint8 pixels, which become the input of the
model on the device. Test images are the same in every evaluation, so they are cached in host memory
as far as `--test_cache` allows.

Shapes: B images of a batch, S input size in pixels.
"""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import Queue, active_children
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

import utils
from cli import terminal
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import Batching, GlobalBatchSampler, evaluation_batches
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.task_data import Key, Replayed, RunData, TrainKey

#: Seconds that a DataLoader worker runs on after SIGTERM; schedulers rarely wait longer to kill.
_WORKER_SECONDS = 30

#: The longest path of a temporary folder that leaves room for the name of a socket, in bytes.
_LONGEST_TMPDIR = 70

#: What error messages have if a worker was killed, or lacks shared memory or open files.
_LOST = ("DataLoader worker (", "(shm)", "ancdata")

logger = logging.getLogger(__name__)


class LostWorkerError(RuntimeError):
    """A DataLoader worker did not start, or was killed; no traceback is available."""


def as_arrays(samples: Sequence[tuple[Tensor, int]]) -> list[NDArray[Any]]:
    """Collates a batch that a worker sends through its pipe, not in shared memory."""
    images, targets = zip(*samples, strict=True)
    return [torch.stack(images).numpy(), np.array(targets)]  # (B, 3, S, S), (B,)


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
        self._pins = data.pin_mem and self._device.type == "cuda"  # batches in page-locked memory
        self._cached: dict[int, list[list[Tensor]]] = {}
        self._free_bytes = round(data.test_cache * 10**9)
        self._any_keys: list[Key] = [TrainKey(stream.tasks[-1].index, 0, 0)]
        self._keys: list[list[Key]] = []  # of the current pass: a DataLoader's sampler is for life
        self._current: object = None
        passes = [*map(self.train, stream.tasks), *map(self.test, stream.test_sets)]
        num_workers = min(data.num_workers, utils.usable_cores(), max(map(len, passes)))
        self._num_workers = num_workers
        with _starting(num_workers):  # reported here, as DataLoader would add a traceback
            queues: list[Queue[Any]] = [Queue() for _ in range(3 * num_workers)]
        del queues
        if reason := _why_no_shared_memory(num_workers, batching):
            logger.info("Batches come through pipes, slower than through shared memory: %s", reason)
        self._loader = DataLoader(
            RunData(stream, batching.settings.run.seed),
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=as_arrays if reason else None,
            pin_memory=self._pins,
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
                sizes = [tensor.nbytes for tensor in tensors]
                if self._pins:  # in blocks of torch's allocator: powers of two
                    sizes = [1 << (size - 1).bit_length() for size in sizes]
                needed = sum(sizes) // len(keys) * sum(map(len, batches))
            if needed <= self._free_bytes:  # copied, as shared memory is scarce
                held.append([t.pin_memory() if self._pins else t.clone() for t in tensors])
            yield tensors
        if held:
            self._cached[test_set] = held
            self._free_bytes -= needed

    def _load(self, sampler: Iterable[list[Key]]) -> Iterator[tuple[list[Key], list[Tensor]]]:
        """Begins a pass with the first batch asked for; what the one before left over is lost."""
        self._current = batches = list(sampler)
        self._keys[:] = [keys or self._any_keys for keys in batches]  # an empty batch has a shape
        try:
            with _starting(self._num_workers):
                loaded = iter(self._loader)
            for keys, batch in zip(batches, loaded, strict=True):
                yield keys, [torch.as_tensor(part)[: len(keys)] for part in batch]
                assert self._current is batches, "another pass over the data has begun"
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _LOST):
                raise
            what = str(error).strip().splitlines()[-1]
            raise LostWorkerError(
                f"{what} Was memory short (in Docker also docker run --shm-size), or ulimit -n? "
                "Give fewer --num_workers, 0 for none, or smaller --batch-size, --eval_batch_size"
            ) from error


@contextmanager
def _starting(num_workers: int) -> Iterator[None]:
    """Reports that workers cannot start, and ends those that did, which would wait forever."""
    others = set(active_children())
    try:
        yield
    except OSError as error:
        for worker in set(active_children()) - others:
            worker.kill()
        raise LostWorkerError(
            f"the workers of --num_workers {num_workers} cannot start ({terminal.reason(error)}): "
            "give fewer, or 0 for none; they need open files (ulimit -n), processes (ulimit -u), "
            "a short TMPDIR, and a /dev/shm with room to write in"
        ) from error


def _why_no_shared_memory(num_workers: int, batching: Batching) -> str | None:
    """What workers lack to hand over batches in shared memory; None: nothing."""
    if num_workers == 0:
        return None
    options, batches = batching.settings.transforms, 2 * num_workers + 2  # loaded ahead, and in use
    image_bytes = 3 * options.input_size**2 * (4 if options.reprob else 1)
    needed = image_bytes * max(batching.full_batches) * batches * batching.processes.world_size
    try:
        if len(os.fsencode(folder := tempfile.gettempdir())) > _LONGEST_TMPDIR:
            return f"TMPDIR {folder} is too long for the name of a socket"
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return terminal.reason(error)
    if free < needed:
        sizes = f"/dev/shm has {free / 1e6:.0f} MB left of {needed / 1e6:.0f} MB"
        return f"{sizes} that they may take (in Docker: docker run --shm-size)"
    import resource  # not on every system

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 100 + 16 * num_workers  # of the program, and for the batches of each worker
    return f"ulimit -n is {limit}, less than {needed}" if 0 <= limit < needed else None


def outlive_stop_signals(_worker_id: int) -> None:
    """Lets a DataLoader worker serve the last step when every process of a job gets a signal.

    A scheduler sends it, or a terminal; after Ctrl-C the main process ends its workers. SIGTERM
    ends a worker after a while all the same: so does Python, when it clears up.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_SECONDS))
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _dismiss(loaders: "ref[Loaders]") -> None:
    """Ends the workers at exit, since they ignore the SIGTERM that Python would send."""
    if (found := loaders()) is not None:
        del found._loader
