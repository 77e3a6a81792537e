"""From raw data to a stream of tasks, and from tasks to batches.

The engine is handed a `TaskStream`: a sequence of tasks, each with training data, the classes it
may predict in training, and the test sets to evaluate after it. Class-incremental learning is one
way to build such a sequence (`build_class_incremental`); nothing else in the program knows which
one it was. Labels are never remapped: a target is the data set's own class id.

What an image looks like in training is a pure function of (seed, task, epoch, image): the number of
processes, of workers, their order and the state of the global random generators have no say in it.
For that the batch sampler asks for (epoch, position) pairs and every image brings its own seed.

Shapes: B images of a batch, n images of a data set, S input size in pixels. Images are (3, S, S).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from datasets import DataError, ImageSource
from image_transforms import Transform
from preemption import outlive_stop_signals
from random_streams import Stream, random_words


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
        indices: Which of its images these are, (n,).
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

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """Load a batch; saving the generators once for all of it costs less than per image."""
        with _global_rng_kept():
            return [self._load(epoch, position) for epoch, position in keys]

    def _load(self, epoch: int, position: int) -> tuple[Tensor, int]:
        index = int(self.indices[position])
        image, target = self.source[index]
        place = (self.task, epoch, index)
        _seed_global_rng(random_words(self.seed, Stream.AUGMENTATION, *place, num_words=3))
        return self.transform(image), target


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


class LabelledData(Protocol):
    """What the loaders need of a task's or a test set's data.

    `data[epoch, position]` (training) or `data[position]` (test) is an image (3, S, S) and its
    class id.
    """

    targets: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> tuple[Tensor, int]: ...


# The stream of tasks


@dataclass(frozen=True)
class TestSet:
    """Images that are evaluated together and get one row of the accuracy matrix.

    Attributes:
        index: Row of the accuracy matrix, from 0.
        name: What people call it.
        data: Images by position.
        classes: Ids of the classes in it.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    index: int
    name: str
    data: LabelledData
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One step of the stream.

    Attributes:
        index: Column of the accuracy matrix, from 0.
        name: What people call it.
        data: Training images by (epoch, position).
        classes: Ids of the classes that may be predicted while it is trained.
        test_sets: What to evaluate after it.
    """

    index: int
    name: str
    data: LabelledData
    classes: tuple[int, ...]
    test_sets: tuple[TestSet, ...]


@dataclass(frozen=True)
class TaskStream:
    """All tasks in the order in which they are learned.

    Attributes:
        tasks: The tasks.
        class_names: Names of all classes of the data set, indexed by class id.
    """

    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.tasks)

    @property
    def num_classes(self) -> int:
        """Outputs that the head needs: all classes of the data set, in a task or not."""
        return len(self.class_names)

    @property
    def class_order(self) -> list[list[int]]:
        """Class ids of every task, in the order in which they were drawn."""
        return [list(task.classes) for task in self.tasks]

    @property
    def classes(self) -> tuple[int, ...]:
        """Sorted ids of the classes that any task holds."""
        return tuple(sorted({class_id for task in self.tasks for class_id in task.classes}))


def build_class_incremental(
    train: ImageSource,
    test: ImageSource,
    order: Sequence[int],
    num_tasks: int,
    classes_per_task: int,
    train_transform: Transform,
    test_transform: Transform,
    seed: int,
) -> TaskStream:
    """Split the classes into tasks; after each, evaluate on the classes of all tasks so far.

    Args:
        train: Training images.
        test: Test images of the same classes.
        order: Class ids in the order of their tasks; what num_tasks * classes_per_task leaves
            over is not used.
        num_tasks: T.
        classes_per_task: New classes of every task.
        train_transform: Augments a training image.
        test_transform: Prepares a test image.
        seed: Seed of the augmentation.

    Raises:
        DataError: If a class has no training or no test image.
    """
    assert num_tasks * classes_per_task <= len(order), "see check_split"
    used = np.asarray(order[: num_tasks * classes_per_task], dtype=np.int64)
    for split, source in (("training", train), ("test", test)):
        _check_all_present(used, source, split)
    tasks: list[Task] = []
    test_sets: list[TestSet] = []
    for index, ids in enumerate(used.reshape(num_tasks, classes_per_task)):
        name, classes = f"task{index + 1}", tuple(ids.tolist())
        test_data = TestData(test, _positions_of(ids, test), test_transform)
        test_sets.append(TestSet(index, name, test_data, classes))
        data = TrainData(train, _positions_of(ids, train), train_transform, seed, index)
        tasks.append(Task(index, name, data, classes, tuple(test_sets)))
    return TaskStream(tuple(tasks), tuple(train.classes))


def _positions_of(classes: NDArray[np.int64], source: ImageSource) -> NDArray[np.int64]:
    return np.flatnonzero(np.isin(source.targets, classes))  # (n,), in the data set's order


def _check_all_present(classes: NDArray[np.int64], source: ImageSource, split: str) -> None:
    missing = classes[~np.isin(classes, source.targets)]
    if len(missing):
        names = ", ".join(source.classes[class_id] for class_id in missing.tolist())
        raise DataError(
            f"no {split} image of class {names}: add images, or leave the class out of "
            "--class_order"
        )


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
    """

    batch_size: int
    vote_group_size: int
    num_workers: int = 4
    pin_memory: bool = True
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    global_batch: int | None = None

    @property
    def full_batch(self) -> int:
        """Images of all processes in a full training step."""
        return self.global_batch or self.batch_size * self.world_size

    def share(self, num_images: int) -> slice:
        """Which of so many consecutive images are this process's: whole vote groups."""
        num_groups = -(-num_images // self.vote_group_size)
        first, stop = (
            min(num_images, num_groups * rank // self.world_size * self.vote_group_size)
            for rank in (self.rank, self.rank + 1)
        )
        return slice(first, stop)


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """This process's piece of every global batch, as (epoch, position) pairs.

    The order of the images depends on seed, task and epoch alone. It is cut into global batches;
    of each, every process takes a run of whole vote groups, the same places of each batch. The last
    batch may be short: then a process may have fewer images or none, so that all take equally many
    steps, and nothing is padded or dropped.

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
        return -(-self.num_images // self.options.full_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.first_step)

    def global_batch_size(self, step: int) -> int:
        """Images of all processes together in a step of the epoch, counted from 0."""
        full = self.options.full_batch
        return min(full, self.num_images - step * full)

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        order = self._order(epoch)
        full = self.options.full_batch
        share = self.options.share(full)
        for start in range(first_step * full, self.num_images, full):
            yield [(epoch, i) for i in order[start : start + full][share]]

    def _order(self, epoch: int) -> list[int]:
        words = random_words(self.options.seed, Stream.ORDER, self.task, epoch, num_words=4)
        return np.random.default_rng(words).permutation(self.num_images).tolist()


class _Collate:
    """Stack samples; an empty batch becomes empty tensors of the right shape."""

    def __init__(self, data: LabelledData) -> None:
        self.data = data

    def __call__(self, samples: list[tuple[Tensor, int]]) -> list[Tensor]:
        if samples:
            return default_collate(samples)  # (B, 3, S, S), (B,)
        image, _ = self.data[0, 0]
        return [image.new_empty(0, *image.shape), torch.empty(0, dtype=torch.int64)]


def build_train_loader(task: Task, options: LoaderOptions) -> DataLoader:
    """Make the loader of a task's training images.

    Call `loader.batch_sampler.set_epoch(epoch)` before each epoch; the sampler also tells the
    `global_batch_size(step)` by which a mean over all processes divides.

    Returns:
        Loader of images (B, 3, S, S) and class ids (B,). B may be 0, see `GlobalBatchSampler`.
    """
    sampler = GlobalBatchSampler(len(task.data), options, task.index)
    return _loader(task.data, sampler, options, persistent=True)


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
    data: LabelledData,
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
