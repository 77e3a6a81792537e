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

# Keys


class TrainKey(NamedTuple):
    """Key of a task's own image.

    Attributes:
        task: Index of the task.
        epoch: 0-based epoch of the task.
        position: Number of the image in the task.
    """

    task: int
    epoch: int
    position: int


class Replayed(NamedTuple):
    """Key of a replayed image.

    Attributes:
        task: Index of the task in which it is replayed.
        epoch: 0-based epoch of the task.
        draw: Number of the draw in the epoch.
        image: Number of the image in the source.
    """

    task: int
    epoch: int
    draw: int
    image: int


class TestKey(NamedTuple):
    """Key of a test image.

    Attributes:
        test_set: Index of the test set.
        position: Number of the image in it.
    """

    test_set: int
    position: int


Key = TrainKey | Replayed | TestKey


# Data of a task, of a test set, of a run


class TrainData:
    """Part of a source, augmented; indexed by (epoch, position).

    Loading an image changes the global generators: `RunData` restores them, once for a whole batch.

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
        epoch, position = key
        index, repeat = int(self.indices[position]), int(self.repeats[position])
        place = (self.task, epoch, index, *([repeat] if repeat else []))
        return self._augmented(index, Stream.AUGMENTATION, *place)

    def replayed(self, epoch: int, draw: int, image: int) -> tuple[Tensor, int]:
        """An image of the source, of this task or not, as a draw of this task shows it."""
        return self._augmented(image, Stream.REPLAY_AUGMENTATION, self.task, epoch, draw)

    def _augmented(self, index: int, stream: Stream, *place: int) -> tuple[Tensor, int]:
        image, target = self.source[index]
        _seed_global_rng(random_words(self.seed, stream, *place, num_words=3))
        return self.transform(image), target


class TestData:
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


def _times_before(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each index has occurred before its position, (n,)."""
    by_index = np.argsort(indices, kind="stable")
    places = np.arange(len(indices))
    is_first = np.diff(indices[by_index], prepend=-1) != 0
    times = np.empty_like(places)
    times[by_index] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return times


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
