"""The images of a run, by key: all that a worker process knows.

What an image looks like in training is a pure function of (seed, task, epoch, image): the number of
processes, of workers, their order and the state of the global random generators have no say in it.
For that every key says where in the run its image is shown, and every image brings its own seed.
Replayed images are augmented as a pure function of (seed, task, epoch, draw).

Shapes: n images of a task. What a transform makes of an image is a tensor, mostly pixels (3, S, S);
nothing here looks into it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from continual_datasets.random_streams import Stream, random_words
from continual_datasets.stream import TaskStream


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


class RunData(Dataset):
    """Every image of a run and its class id, by key.

    Args:
        stream: The tasks with their test sets.
        seed: Seed of the run.
    """

    def __init__(self, stream: TaskStream, seed: int) -> None:
        self.train, self.seed = stream.train, seed
        self.tasks = {task.index: task.data.indices for task in stream.tasks}  # (n,) each
        self.test_sets = {test_set.index: test_set.data for test_set in stream.test_sets}
        self.train_transform = stream.pipeline.train_transform
        self.test_transform = stream.pipeline.test_transform

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """Load a batch; keeping the generators once for all of it costs less than per image."""
        with _global_rng_kept():
            return [self._load(key) for key in keys]

    def _load(self, key: Key) -> tuple[Tensor, int]:
        if isinstance(key, TestKey):
            image, target = self.test_sets[key.test_set][key.position]
            return self.test_transform(image), target
        if isinstance(key, Replayed):
            return self._augmented(key.image, Stream.REPLAY_AUGMENTATION, *key[:3])
        indices = self.tasks[key.task]
        index = int(indices[key.position])
        repeat = int(np.count_nonzero(indices[: key.position] == index))  # is augmented anew
        place = (key.task, key.epoch, index, *([repeat] if repeat else []))
        return self._augmented(index, Stream.AUGMENTATION, *place)

    def _augmented(self, index: int, stream: Stream, *place: int) -> tuple[Tensor, int]:
        image, target = self.train[index]
        words = random_words(self.seed, stream, *place, num_words=3)
        torch.default_generator.manual_seed(words[0])  # torch.manual_seed: accelerators', too
        random.seed(words[1])
        np.random.seed(words[2])
        return self.train_transform(image), target


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
