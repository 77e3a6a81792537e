"""From labelled images to tasks; the scenarios of `scenarios.py` are made of these functions.

Labels are never remapped, but those of several data sets stand one behind the other.

Shapes: C classes, T tasks, n images.

Source: Wang et al., CVPR 2022, section 5.1; the official release for the Gaussian schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from continual_datasets.images import ConcatSource, DataError, ImageSource, Parts
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.random_streams import Stream, generator
from continual_datasets.stream import Subset, Task, TaskStream, TestSet, task_name

ImageIds = NDArray[np.int64]


def by_classes(
    train: ImageSource,
    test: ImageSource,
    groups: Sequence[Sequence[int]],
    transforms: ImagePipeline,
) -> TaskStream:
    """Makes a task of each group of class ids; evaluates on the classes of all tasks so far.

    Raises:
        DataError: If a class has no training or no test image.
    """
    check_all_present(list(chain(*groups)), train, test)
    tasks: list[Task] = []
    test_sets: list[TestSet] = []
    for index, classes in enumerate(map(tuple, groups)):
        name, tested = task_name(index), held_out(test, images_of(classes, test))
        test_sets.append(TestSet(index, name, tested, classes))
        data = Subset(train, images_of(classes, train))
        tasks.append(Task(index, name, data, classes, tuple(test_sets)))
    return TaskStream(tuple(tasks), train, transforms)


def by_parts(
    train: Mapping[str, ImageSource], test: Mapping[str, ImageSource], transforms: ImagePipeline
) -> TaskStream:
    """Makes a task of each part of the training images, with all classes that occur in it.

    Args:
        train: Parts by name, in order; all name the same classes.
        test: Test images of each part by its name, evaluated from that part on; or one set under
            another name, evaluated after every task.
        transforms: How the images are preprocessed.
    """
    whole = ConcatSource(list(train.values()), next(iter(train.values())).classes)
    test_sets = tuple(
        TestSet(index, name, held_out(source), _classes_in(source))
        for index, (name, source) in enumerate(test.items())
    )
    ends = np.cumsum([len(source) for source in train.values()])
    tasks = []
    for index, (name, source) in enumerate(train.items()):
        data = Subset(whole, np.arange(ends[index] - len(source), ends[index]))
        tasks.append(Task(index, name, data, _classes_in(source), test_sets[: index + 1]))
    return TaskStream(tuple(tasks), whole, transforms)


def joint(stream: TaskStream) -> TaskStream:
    """Makes a single task of a whole stream: the upper bound of what learning in turn can reach."""
    classes = tuple(dict.fromkeys(c for task in stream.tasks for c in task.classes))
    indices = np.unique(np.concatenate([task.data.indices for task in stream.tasks]))
    data = Subset(stream.train, indices)
    task = Task(0, "all tasks", data, classes, tuple(stream.test_sets))
    return replace(stream, tasks=(task,))


def evaluated_tasks(num_tasks: int, every: int) -> set[int]:
    """Indices of the tasks that are followed by an evaluation: each so many, and the last."""
    return {*range(every - 1, num_tasks, every), num_tasks - 1}


def evaluate_every(stream: TaskStream, every: int) -> TaskStream:
    """Leaves evaluations only after every so many tasks, and after the last."""
    kept = evaluated_tasks(stream.num_tasks, every)
    tasks = [t if t.index in kept else replace(t, test_sets=()) for t in stream.tasks]
    return replace(stream, tasks=tuple(tasks))


def gaussian_episodes(
    order: Sequence[int], num_episodes: int, steps: int, sigma: float, seed: int
) -> list[tuple[int, ...]]:
    """Draws the classes of each episode of the Gaussian schedule, never none.

    Each class is present with the probability that `presence` gives, independently; an episode
    without any is drawn again. `order` has the class ids in the order of their peaks.
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

    An episode takes `steps` positions of the schedule; class j peaks at half the distance between
    two peaks, plus j such distances; `sigma` is the standard deviation of its presence, in
    positions.

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


def draw(indices: ImageIds, number: int, seed: int, episode: int) -> ImageIds:
    """So many of the images at random; where they do not suffice, all again as often as needed."""
    rng = generator(seed, Stream.SCHEDULE, episode, 1)
    rounds = -(-number // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(rounds)])[:number]


def fewer_images(parts: Parts, number: int | None, seed: int) -> Parts:
    """Leaves so many training images of each class of a part, at random; None or too few: all."""
    if number is None:
        return parts
    fewer = {}
    for part, (name, source) in enumerate(parts[0].items()):
        kept = np.zeros(len(source), bool)
        for class_id in _classes_in(source):
            rng = generator(seed, Stream.TRAINING_PART, part, class_id)
            kept[rng.permutation(images_of([class_id], source))[:number]] = True
        fewer[name] = source.select(kept)
    return fewer, parts[1]


def held_out(source: ImageSource, indices: ImageIds | None = None) -> Subset:
    """A part of the test images; None: all.

    Where images are sorted by class, as in folders, they are shuffled, in the same way in every
    run: the vote of a group of one class would reveal that class.
    """
    indices = np.arange(len(source)) if indices is None else indices
    if source.by_class:
        indices = generator(0, Stream.TEST_ORDER).permutation(indices)
    return Subset(source, indices)


def images_of(classes: Sequence[int], source: ImageSource) -> ImageIds:
    """Numbers of the images of some classes, (n,), in the data set's order."""
    return np.flatnonzero(np.isin(source.targets, classes))


def _classes_in(source: ImageSource) -> tuple[int, ...]:
    return tuple(np.unique(source.targets).tolist())


def check_all_present(classes: Sequence[int], train: ImageSource, test: ImageSource) -> None:
    """Raises DataError if a class has no training or no test image."""
    for split, source in (("training", train), ("test", test)):
        present, known = set(source.targets.tolist()), dict(enumerate(source.classes))
        if missing := [c for c in classes if c not in present]:
            names = ", ".join(known.get(c, f"number {c}") for c in missing)
            raise DataError(
                f"no {split} image of class {names}: add images, or leave the class out of "
                "--class_order"
            )
