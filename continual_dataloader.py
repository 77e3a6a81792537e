"""The data of a task, and its batches.

What an image looks like in training is a pure function of (seed, task, epoch, image): the number of
processes, of workers, their order and the state of the global random generators have no say in it.
For that the batch sampler asks for (epoch, position) pairs and every image brings its own seed.
Replayed images are drawn, and augmented, as a pure function of (seed, task, epoch, step).

Shapes: B images of a batch, n images of a data set, S input size in pixels, V images that vote
together, R replayed images that join each of these groups. Images are (3, S, S).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from image_sources import ImageSource
from image_transforms import Transform
from preemption import outlive_stop_signals
from random_streams import Stream, generator, random_words
from replay import ReplayBuffer
from task_stream import LabelledData, Task, TestSet


@contextmanager
def _global_rng_kept() -> Iterator[None]:
    """Leave the CPU generators of torch, Python and NumPy as they were found."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _seed_global_rng(words: Sequence[int]) -> None:
    # Not torch.manual_seed: that would reset the accelerator's generators too.
    torch.default_generator.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[2])


# Data of a task


class TrainData(Dataset):
    """Part of a source, augmented; indexed by (epoch, position).

    Args:
        source: Where the images come from.
        indices: Which of its images these are, (n,); one that occurs again is augmented anew.
        transform: From `build_transform(train=True, ...)`; may draw from the global generators.
        seed: Seed of the run.
        task: Index of the task.

    Attributes:
        targets: Class id of every image, (n,).
    """

    def __init__(
        self,
        source: ImageSource,
        indices: NDArray[np.int64],
        transform: Transform,
        seed: int,
        task: int,
    ) -> None:
        self.source = source
        self.indices = indices
        self.targets = source.targets[indices]
        self.transform = transform
        self.seed = seed
        self.task = task

    @cached_property
    def repeats(self) -> NDArray[np.int64]:
        """How often each image has occurred before its position, (n,)."""
        return _times_before(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, int]]:
        """Load a batch; saving the generators once for all of it costs less than per image."""
        with _global_rng_kept():
            return [self._load(epoch, position) for epoch, position in keys]

    def _load(self, epoch: int, position: int) -> tuple[Tensor, int]:
        index, repeat = int(self.indices[position]), int(self.repeats[position])
        place = (self.task, epoch, index, *([repeat] if repeat else []))
        return self.augmented(index, Stream.AUGMENTATION, *place)

    def augmented(self, index: int, stream: Stream, *place: int) -> tuple[Tensor, int]:
        """An image of the source, of this task or not, augmented as its place in the run says.

        Leaves the global generators changed.
        """
        image, target = self.source[index]
        _seed_global_rng(random_words(self.seed, stream, *place, num_words=3))
        return self.transform(image), target


def _times_before(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each index has occurred before its position, (n,)."""
    by_index = np.argsort(indices, kind="stable")
    places = np.arange(len(indices))
    is_first = np.diff(indices[by_index], prepend=-1) != 0
    times = np.empty_like(places)
    times[by_index] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return times


class Replayed(NamedTuple):
    """Key of a replayed image.

    Attributes:
        epoch: 0-based epoch of the task.
        draw: Number of the draw in the epoch.
        image: Number of the image in the source.
    """

    epoch: int
    draw: int
    image: int


class MixedData(Dataset):
    """A task's data and replayed images; tells which of them are replayed.

    Args:
        data: The task's, indexed by (epoch, position); its source holds the replayed images, too,
            which are asked for by a `Replayed`.
    """

    def __init__(self, data: TrainData) -> None:
        self.data = data
        self.targets = data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, int, bool]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, int, bool]]:
        """Load a batch."""
        own = iter(self.data.__getitems__([k for k in keys if not isinstance(k, Replayed)]))
        with _global_rng_kept():
            return [
                (*self._again(key), True) if isinstance(key, Replayed) else (*next(own), False)
                for key in keys
            ]

    def _again(self, key: Replayed) -> tuple[Tensor, int]:
        place = (self.data.task, key.epoch, key.draw)
        return self.data.augmented(key.image, Stream.REPLAY_AUGMENTATION, *place)


class TestData(Dataset):
    """Part of a source, not augmented; indexed by position.

    Args:
        source: Where the images come from.
        indices: Which of its images these are, (n,).
        transform: From `build_transform(train=False, ...)`.

    Attributes:
        targets: Class id of every image, (n,).
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __init__(
        self, source: ImageSource, indices: NDArray[np.int64], transform: Transform
    ) -> None:
        self.source = source
        self.indices = indices
        self.targets = source.targets[indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, target = self.source[int(self.indices[position])]
        return self.transform(image), target


# Loaders


@dataclass(frozen=True)
class LoaderOptions:
    """How images are put into batches.

    Attributes:
        batch_size: Images of one process in a batch.
        vote_group_size: Images that choose their prompts together.
        num_workers: Worker processes of a loader; 0 loads in the process itself.
        pin_memory: Whether to load into pinned memory, when there is an accelerator.
        seed: Seed of the run; decides the order of training images.
        rank: This process among `world_size`.
        world_size: Processes that share the work.
        global_batch: Images of all processes in a training step; None: as many as their batches
            hold together.
        drop_last: Whether the images that do not fill a last training step are left out.
        replayed_per_group: R, replayed images that join each vote group once the buffer has any.
    """

    batch_size: int
    vote_group_size: int
    num_workers: int = 4
    pin_memory: bool = True
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    global_batch: int | None = None
    drop_last: bool = False
    replayed_per_group: int = 0

    @property
    def full_batch(self) -> int:
        """Images of all processes in a full training step."""
        return self.global_batch or self.batch_size * self.world_size

    def num_groups(self, num_images: int) -> int:
        """Vote groups of so many images; the last may be smaller."""
        return -(-num_images // self.vote_group_size)

    def share(self, num_images: int) -> slice:
        """Which of so many consecutive images are this process's: whole vote groups."""
        num_groups = self.num_groups(num_images)
        first, stop = (
            min(num_images, num_groups * rank // self.world_size * self.vote_group_size)
            for rank in (self.rank, self.rank + 1)
        )
        return slice(first, stop)


class GlobalBatchSampler(Sampler[list[tuple[int, ...]]]):
    """This process's piece of every global batch, as (epoch, position) pairs.

    The order of the images depends on seed, task and epoch alone. It is cut into global batches;
    of each, every process takes a run of whole vote groups, the same places of each batch. The last
    batch may be short: then a process may have fewer images or none, so that all take equally many
    steps. Nothing is padded, and nothing dropped unless `drop_last` asks for it.

    Args:
        num_images: n, the images of the task.
        options: See `LoaderOptions`.
        task: Index of the task.
    """

    def __init__(self, num_images: int, options: LoaderOptions, task: int) -> None:
        self.num_images = num_images
        self.options = options
        self.task = task
        self.epoch = 0
        self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, and from which step on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        full_steps, rest = divmod(self.num_images, self.options.full_batch)
        return full_steps + (rest > 0 and not self.options.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        return self._batches(self.epoch, self.first_step)

    def global_batch_size(self, step: int) -> int:
        """Images of all processes together in a step of the epoch, counted from 0."""
        full = self.options.full_batch
        return min(full, self.num_images - step * full)

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, ...]]]:
        order = self._order(epoch)
        full = self.options.full_batch
        share = self.options.share(full)
        for step in range(first_step, len(self)):
            piece = order[step * full : (step + 1) * full][share]
            yield self._keys(epoch, step, piece)

    def _keys(self, epoch: int, step: int, piece: list[int]) -> list[tuple[int, ...]]:
        """Keys of this process's images of a step, given their positions."""
        return [(epoch, position) for position in piece]

    def _order(self, epoch: int) -> list[int]:
        rng = generator(self.options.seed, Stream.ORDER, self.task, epoch)
        return rng.permutation(self.num_images).tolist()


class ReplaySampler(GlobalBatchSampler):
    """Lets R replayed images follow the images of every vote group, with which they vote.

    Args:
        num_images: n, the images of the task.
        options: See `LoaderOptions`.
        task: Index of the task.
        buffer: Numbers of the images that may be replayed, (m,).
    """

    def __init__(
        self, num_images: int, options: LoaderOptions, task: int, buffer: NDArray[np.int64]
    ) -> None:
        super().__init__(num_images, options, task)
        self.buffer = buffer

    def global_batch_size(self, step: int) -> int:
        """Images of all processes together in a step of the epoch, replayed ones included."""
        own = super().global_batch_size(step)
        return own + self.options.replayed_per_group * self.options.num_groups(own)

    def _keys(self, epoch: int, step: int, piece: list[int]) -> list[tuple[int, ...]]:
        size, replayed = self.options.vote_group_size, self.options.replayed_per_group
        first_group = self.options.share(self.options.full_batch).start // size
        drawn = self._draw(epoch, step)  # (R * groups of a full step,)
        keys: list[tuple[int, ...]] = []
        for group in range(self.options.num_groups(len(piece))):
            own = piece[group * size : (group + 1) * size]
            keys += super()._keys(epoch, step, own)
            first = (first_group + group) * replayed
            keys += [
                Replayed(epoch, step * len(drawn) + at, int(drawn[at]))
                for at in range(first, first + replayed)
            ]
        return keys

    def _draw(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Images replayed in a step by all processes: each once, if there are enough."""
        number = self.options.replayed_per_group * self.options.num_groups(self.options.full_batch)
        rng = generator(self.options.seed, Stream.REPLAY, self.task, epoch, step)
        return rng.choice(self.buffer, number, replace=number > len(self.buffer))


class _Collate:
    """Stack samples; an empty batch becomes empty tensors of the right shape."""

    def __init__(self, data: LabelledData | MixedData) -> None:
        self.data = data

    def __call__(self, samples: list[tuple]) -> list[Tensor]:
        if samples:
            return default_collate(samples)  # (B, 3, S, S), (B,), with replay (B,)
        return [tensor[:0] for tensor in default_collate([self.data[0, 0]])]


def build_train_loader(
    task: Task, options: LoaderOptions, buffer: ReplayBuffer | None = None
) -> DataLoader:
    """Make the loader of a task's training images, and of replayed ones if there are any.

    Call `loader.batch_sampler.set_epoch(epoch)` before each epoch; the sampler also tells the
    `global_batch_size(step)` by which a mean over all processes divides.

    Args:
        task: The task.
        options: See `LoaderOptions`.
        buffer: Images of earlier tasks.

    Returns:
        Loader of images (B, 3, S, S) and class ids (B,), with replayed images also of which they
        are, bool (B,). B may be 0, see `GlobalBatchSampler`.
    """
    if buffer is None or len(buffer) == 0:
        sampler = GlobalBatchSampler(len(task.data), options, task.index)
        return _loader(task.data, sampler, options, persistent=True)
    assert isinstance(task.data, TrainData)
    replaying = ReplaySampler(len(task.data), options, task.index, buffer.indices)
    return _loader(MixedData(task.data), replaying, options, persistent=True)


def build_test_loader(test_set: TestSet, options: LoaderOptions) -> DataLoader:
    """Make the loader of this process's share of a test set, in the data set's order.

    Vote groups are consecutive images of the whole set. Each process gets a run of whole groups (or
    none at all), and a batch holds whole groups: as many as fit into batch_size, at least one.
    Every image is seen exactly once by one of the processes.

    Returns:
        Loader of images (B, 3, S, S) and class ids (B,).
    """
    batches = _test_batches(len(test_set.data), options)
    return _loader(test_set.data, batches, options, persistent=False)


def _test_batches(num_images: int, options: LoaderOptions) -> list[list[int]]:
    share = options.share(num_images)
    size = max(1, options.batch_size // options.vote_group_size) * options.vote_group_size
    return [
        list(range(at, min(at + size, share.stop))) for at in range(share.start, share.stop, size)
    ]


def _loader(
    data: LabelledData | MixedData,
    batches: GlobalBatchSampler | list[list[int]],
    options: LoaderOptions,
    persistent: bool,
) -> DataLoader:
    num_workers = min(options.num_workers, len(batches))
    return DataLoader(
        data,  # type: ignore[arg-type]  # a Dataset in all but its base class
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_Collate(data),
        pin_memory=options.pin_memory and torch.accelerator.is_available(),
        persistent_workers=persistent and num_workers > 0,
        worker_init_fn=outlive_stop_signals,
        generator=torch.Generator(),  # else every iteration draws from the global one
    )
