"""The images of a run, by key: all that a worker process knows.

What an image looks like in training is a pure function of (seed, task, epoch, image): the number of
processes, of workers, their order and the state of the global random generators have no say in it.
For that every key says where in the run its image is shown, and every image brings its own seed.
Replayed images are augmented as a pure function of (seed, task, epoch, draw).

Shapes: n images of a data set, S input size in pixels. What a transform makes of an image is a
tensor, mostly pixels (3, S, S); nothing here looks into it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from continual_datasets.images import ImageSource
from continual_datasets.random_streams import Stream, random_words
from continual_datasets.stream import TaskStream
from continual_datasets.transforms import Transform


class TrainKey(NamedTuple):
    """Key of a task's own image."""

    task: int
    epoch: int  # 0-based epoch of the task
    position: int  # number of the image in the task


class Replayed(NamedTuple):
    """Key of a replayed image."""

    task: int  # in which it is replayed
    epoch: int  # 0-based epoch of the task
    draw: int  # number of the draw in the epoch
    image: int  # number of the image in the source


class TestKey(NamedTuple):
    """Key of a test image."""

    test_set: int
    position: int  # number of the image in the test set


Key = TrainKey | Replayed | TestKey


class _Subset:
    """Part of a source.

    Args:
        source: Where the images come from.
        indices: Which of its images these are, (n,).
        transform: From `build_transform`.

    Attributes:
        targets: Class id of every image, (n,).
    """

    def __init__(
        self, source: ImageSource, indices: NDArray[np.int64], transform: Transform
    ) -> None:
        self.source, self.indices, self.transform = source, indices, transform
        self.targets = source.targets[indices]

    def __len__(self) -> int:
        return len(self.indices)


class TestData(_Subset):
    """Images that are not augmented; indexed by position."""

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, target = self.source[int(self.indices[position])]
        return self.transform(image), target


class TrainData(_Subset):
    """Images that are augmented; indexed by (epoch, position).

    Loading an image changes the global generators: `RunData` restores them, once for a whole batch.

    Args:
        source: Where the images come from.
        indices: Which of its images these are, (n,); one that occurs again is augmented anew.
        transform: From `build_transform`; may draw from the global generators.
        seed: Seed of the run.
        task: Index of the task.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: NDArray[np.int64],
        transform: Transform,
        seed: int,
        task: int,
    ) -> None:
        super().__init__(source, indices, transform)
        self.seed, self.task = seed, task

    @cached_property
    def repeats(self) -> NDArray[np.int64]:
        """How often each image has occurred before its position, (n,)."""
        by_index = np.argsort(self.indices, kind="stable")
        places = np.arange(len(by_index))
        is_first = np.diff(self.indices[by_index], prepend=-1) != 0
        repeats = np.empty_like(places)
        repeats[by_index] = places - np.maximum.accumulate(np.where(is_first, places, 0))
        return repeats

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key
        index, repeat = int(self.indices[position]), int(self.repeats[position])
        place = (self.task, epoch, index, *([repeat] if repeat else []))
        return self._augmented(index, Stream.AUGMENTATION, *place)

    def replayed(self, epoch: int, draw: int, image: int) -> tuple[Tensor, int]:
        """An image of the source, of this task or not, as a draw of this task shows it."""
        return self._augmented(image, Stream.REPLAY_AUGMENTATION, self.task, epoch, draw)

    def _augmented(self, index: int, stream: Stream, *place: int) -> tuple[Tensor, int]:
        image, target = self.source[index]
        words = random_words(self.seed, stream, *place, num_words=3)
        torch.default_generator.manual_seed(words[0])  # torch.manual_seed: accelerators', too
        random.seed(words[1])
        np.random.seed(words[2])
        return self.transform(image), target


class RunData(Dataset):
    """Every image of a run, by `TrainKey`, `Replayed` or `TestKey`.

    Args:
        stream: The tasks with their test sets.
    """

    def __init__(self, stream: TaskStream) -> None:
        self.tasks = {task.index: task.data for task in stream.tasks}
        self.test_sets = {test_set.index: test_set.data for test_set in stream.test_sets}

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """Load a batch; keeping the generators once for all of it costs less than per image."""
        with _global_rng_kept():
            return [self._load(key) for key in keys]

    def _load(self, key: Key) -> tuple[Tensor, int]:
        if isinstance(key, TestKey):
            return self.test_sets[key.test_set][key.position]
        if isinstance(key, Replayed):
            return self.tasks[key.task].replayed(key.epoch, key.draw, key.image)
        return self.tasks[key.task][key.epoch, key.position]


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
