"""From labelled images to a stream of tasks, in one function for each scenario.

| scenario | a task is | it is tested on |
|---|---|---|
| class-incremental | a portion of the classes | its classes; each task so far |
| several data sets | a data set, with labels of its own | it; each data set so far |
| domain-incremental | the same classes in another domain | one common set, or each domain so far |
| gaussian (task-free) | a few steps on classes that come and go | one common set, now and then |
| joint | all of it at once | all test sets |

Labels are never remapped, but those of several data sets stand one behind the other.

Shapes: C classes, T tasks, n images.

Source: Wang et al., CVPR 2022, section 5.1; the official release for the Gaussian schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from continual_datasets.images import ConcatSource, DataError, ImageSource
from continual_datasets.random_streams import Stream, generator
from continual_datasets.stream import Task, TaskStream, TestSet, task_name
from continual_datasets.task_data import TestData, TrainData
from continual_datasets.transforms import Transform


@dataclass(frozen=True)
class Transforms:
    """Transforms of every image, whatever the scenario."""

    train_transform: Transform  # augments a training image
    test_transform: Transform  # prepares a test image
    seed: int  # of augmentation and schedule

    def train(self, source: ImageSource, indices: NDArray[np.int64], task: int) -> TrainData:
        """A task's part of the training images."""
        return TrainData(source, indices, self.train_transform, self.seed, task)

    def test(self, source: ImageSource, indices: NDArray[np.int64] | None = None) -> TestData:
        """A part of the test images; None: all.

        Where images are sorted by class, as in folders, they are shuffled, in the same way in every
        run: the vote of a group of one class would reveal that class.
        """
        indices = np.arange(len(source)) if indices is None else indices
        if source.by_class:
            indices = generator(0, Stream.TEST_ORDER).permutation(indices)
        return TestData(source, indices, self.test_transform)


def by_classes(
    train: ImageSource, test: ImageSource, groups: Sequence[Sequence[int]], transforms: Transforms
) -> TaskStream:
    """Makes a task of each group of classes; evaluates on the classes of all tasks so far.

    Args:
        train: Training images.
        test: Test images of the same classes.
        groups: Class ids of each task.
        transforms: What happens to every image.

    Raises:
        DataError: If a class has no training or no test image.
    """
    _check_all_present([c for classes in groups for c in classes], train, test)
    tasks: list[Task] = []
    test_sets: list[TestSet] = []
    for index, classes in enumerate(map(tuple, groups)):
        name, test_data = task_name(index), transforms.test(test, _images_of(classes, test))
        test_sets.append(TestSet(index, name, test_data, classes))
        data = transforms.train(train, _images_of(classes, train), index)
        tasks.append(Task(index, name, data, classes, tuple(test_sets)))
    return TaskStream(tuple(tasks), train)


def several_data_sets(
    train: Mapping[str, ImageSource], test: Mapping[str, ImageSource], transforms: Transforms
) -> TaskStream:
    """Makes a task of each data set; class ids of a data set follow those of the one before.

    Args:
        train: Training images by name of the data set, in order.
        test: Test images by the same names.
        transforms: What happens to every image.
    """
    names = [f"{name}/{c}" for name, source in train.items() for c in source.classes]
    ends = np.cumsum([len(source.classes) for source in train.values()]).tolist()
    offsets = dict(zip(train, [0, *ends], strict=False))

    def shifted(parts: Mapping[str, ImageSource]) -> dict[str, ImageSource]:
        return {name: ConcatSource([part], names, [offsets[name]]) for name, part in parts.items()}

    return domain_incremental(shifted(train), shifted(test), transforms)


def domain_incremental(
    train: Mapping[str, ImageSource], test: Mapping[str, ImageSource], transforms: Transforms
) -> TaskStream:
    """Makes a task of each part of the training images, with all classes that occur in it.

    Args:
        train: Parts by name, in order; all name the same classes.
        test: Test images of each part by its name, evaluated from that part on; or one set under
            another name, evaluated after every task.
        transforms: What happens to every image.
    """
    whole = ConcatSource(list(train.values()), next(iter(train.values())).classes)
    test_sets = [
        TestSet(index, name, transforms.test(source), _classes_in(source.targets))
        for index, (name, source) in enumerate(test.items())
    ]
    common = train.keys() != test.keys()
    tasks: list[Task] = []
    first = 0
    for index, (name, source) in enumerate(train.items()):
        indices = np.arange(first, first + len(source))
        first += len(source)
        data = transforms.train(whole, indices, index)
        tested = tuple(test_sets if common else test_sets[: index + 1])
        tasks.append(Task(index, name, data, _classes_in(source.targets), tested))
    return TaskStream(tuple(tasks), whole)


def gaussian(
    train: ImageSource,
    test: ImageSource,
    episodes: Sequence[Sequence[int]],
    images_per_episode: int | None,
    transforms: Transforms,
) -> TaskStream:
    """Makes a task of each episode; all are tested on the same set, of all classes.

    Args:
        train: Training images.
        test: Test images.
        episodes: Class ids of each episode, see `gaussian_episodes`.
        images_per_episode: Images drawn for an episode, each once if its classes have enough;
            None: all images of its classes.
        transforms: What happens to every image.

    Raises:
        DataError: If a class has no training or no test image.
    """
    classes = tuple(range(len(train.classes)))
    _check_all_present(classes, train, test)
    test_set = TestSet(0, "all classes", transforms.test(test), classes)
    tasks = []
    for index, episode in enumerate(episodes):
        indices = _images_of(episode, train)
        if images_per_episode is not None:
            indices = _draw(indices, images_per_episode, transforms.seed, index)
        data = transforms.train(train, indices, index)
        tasks.append(Task(index, f"episode{index + 1}", data, tuple(episode), (test_set,)))
    return TaskStream(tuple(tasks), train)


def joint(stream: TaskStream, transforms: Transforms) -> TaskStream:
    """Makes a single task of a whole stream: the upper bound of what learning in turn can reach."""
    classes = tuple(dict.fromkeys(c for task in stream.tasks for c in task.classes))
    indices = np.unique(np.concatenate([task.data.indices for task in stream.tasks]))
    data = transforms.train(stream.train, indices, 0)
    task = Task(0, "all tasks", data, classes, tuple(stream.test_sets))
    return replace(stream, tasks=(task,))


def evaluated_tasks(num_tasks: int, every: int) -> set[int]:
    """Indices of the tasks that are followed by an evaluation: each so many, and the last."""
    return {*range(every - 1, num_tasks, every), num_tasks - 1}


def evaluate_every(stream: TaskStream, num_tasks: int) -> TaskStream:
    """Leaves evaluations only after every so many tasks, and after the last."""
    kept = evaluated_tasks(stream.num_tasks, num_tasks)
    tasks = [t if t.index in kept else replace(t, test_sets=()) for t in stream.tasks]
    return replace(stream, tasks=tuple(tasks))


def gaussian_episodes(
    order: Sequence[int], num_episodes: int, steps: int, sigma: float, seed: int
) -> list[tuple[int, ...]]:
    """Draws the classes of each episode of the Gaussian schedule.

    Each class is present with the probability that `presence` gives, independently; an episode
    without any is drawn again.

    Args:
        order: Class ids in the order of their peaks.
        num_episodes: T.
        steps: Positions of the schedule that an episode takes.
        sigma: Standard deviation of a class's presence, in positions.
        seed: Seed of the run.

    Returns:
        Class ids of each episode, never empty.

    Raises:
        ValueError: As `presence`.
    """
    probabilities = presence(len(order), num_episodes, steps, sigma)  # (T, C)
    episodes = []
    for index, row in enumerate(probabilities):
        rng = generator(seed, Stream.SCHEDULE, index, 0)
        present = rng.random(len(order)) < row
        while not present.any():
            present = rng.random(len(order)) < row
        episodes.append(tuple(order[i] for i in np.flatnonzero(present).tolist()))
    return episodes


def presence(num_classes: int, num_episodes: int, steps: int, sigma: float) -> NDArray[np.float64]:
    """Probability that a class takes part in an episode of the Gaussian schedule, (T, C).

    The schedule has num_episodes * steps positions; class j peaks at half the distance between two
    peaks, plus j such distances.

    Raises:
        ValueError: If there are fewer positions than classes, so that all peaks would coincide, or
            if an episode would hardly ever have a class.

    Source: the official release's input pipeline.
    """
    length = num_episodes * steps
    spacing = length // num_classes
    if spacing < 1:
        raise ValueError(
            f"the Gaussian schedule has {num_episodes} tasks x {steps} steps = {length} positions "
            f"for the peaks of {num_classes} classes: use at least {num_classes}, by more "
            "--num_tasks, or --steps_per_task in the paper's variant"
        )
    peaks = spacing // 2 + spacing * np.arange(num_classes)  # (C,)
    positions = steps * np.arange(num_episodes)  # (T,)
    probabilities = np.exp(-((positions[:, None] - peaks) ** 2) / (2 * sigma**2))  # (T, C)
    if (1 - probabilities).prod(axis=1).max() > 0.999:
        raise ValueError(
            f"--gaussian_sigma {sigma:g} leaves an episode without classes: enlarge it"
        )
    return probabilities


def _draw(indices: NDArray[np.int64], number: int, seed: int, episode: int) -> NDArray[np.int64]:
    """So many of the images at random; where they do not suffice, all again as often as needed."""
    rng = generator(seed, Stream.SCHEDULE, episode, 1)
    rounds = -(-number // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(rounds)])[:number]


def _images_of(classes: Sequence[int], source: ImageSource) -> NDArray[np.int64]:
    return np.flatnonzero(np.isin(source.targets, classes))  # (n,), in the data set's order


def _classes_in(targets: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(np.unique(targets).tolist())


def _check_all_present(classes: Sequence[int], train: ImageSource, test: ImageSource) -> None:
    for split, source in (("training", train), ("test", test)):
        present, known = set(source.targets.tolist()), dict(enumerate(source.classes))
        if missing := [c for c in classes if c not in present]:
            names = ", ".join(known.get(c, f"number {c}") for c in missing)
            raise DataError(
                f"no {split} image of class {names}: add images, or leave the class out of "
                "--class_order"
            )
