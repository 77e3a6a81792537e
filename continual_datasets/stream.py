"""What a run learns: tasks one after the other, each with its data, classes and test sets.

The engine is handed a `TaskStream` and knows nothing of how it was made. Every scenario
(`scenarios.py`) is one way to make such a sequence: classes that come in portions, data sets or
domains in a row, hundreds of short tasks, everything at once.

Shapes: n images, T tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cli.kinds import Natural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from continual_datasets.images import ImageSource
    from continual_datasets.pipeline import ImagePipeline


def task_name(index: int) -> str:
    """Name of a task and its test set where they differ by their number only."""
    return f"task{index + 1}"


def display_names(names: Sequence[str], number: int, form: str) -> list[str]:
    """What to call so many test sets for people: by name, or by number if the names say no more.

    The names may be missing; `form` says how a number is shown, such as `test set {}`.
    """
    if list(names) in ([], [task_name(index) for index in range(number)]):
        return [form.format(index + 1) for index in range(number)]
    return list(names)


def title(part: Task | TestSet) -> str:
    """What to call a part of the stream: `Task 1` as the original, or a name that says more."""
    return f"Task {part.index + 1}" if part.name == task_name(part.index) else part.name


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of the images of a source, by position."""

    source: ImageSource
    indices: NDArray[np.int64]  # their numbers in the source, (n,)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        return self.source[int(self.indices[position])]


@dataclass(frozen=True)
class TestSet:
    """Images that are evaluated together and get one row of the accuracy matrix."""

    __test__ = False  # no test class, whatever pytest thinks of the name

    index: int  # row of the accuracy matrix, from 0
    name: str  # what people call it
    data: Subset
    classes: tuple[int, ...]  # ids of the classes in it


@dataclass(frozen=True)
class Task:
    """One step of the stream."""

    index: int  # column of the accuracy matrix, from 0
    name: str  # what people call it
    data: Subset  # of all training images; one that occurs again is augmented anew
    classes: tuple[int, ...]  # ids of the classes that may be predicted while it is trained
    test_sets: tuple[TestSet, ...]  # what to evaluate after it; nothing where it is empty


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A finished run that another one continues, as files hold it."""

    checkpoint: str  # the file from which the other started
    sha256: str  # of that file
    config: dict[str, Any]  # settings of the run
    class_names: list[str]  # by class id
    tasks: list[list[Natural]]  # class ids of each of its own tasks
    test_sets: list[str]  # names of its own test sets


@dataclass(frozen=True)
class TaskStream:
    """All tasks in the order in which they are learned.

    Those of earlier runs come first. They have no training images; a test set of theirs has images
    if its data are at hand.
    """

    tasks: tuple[Task, ...]
    train: ImageSource  # all training images of the run
    pipeline: ImagePipeline  # how the images are preprocessed
    earlier: tuple[Earlier, ...] = ()  # runs that this one continues, in order

    @cached_property
    def train_digest(self) -> str:
        """Identifies the training images, see `ImageSource.digest`."""
        return self.train.digest()

    @property
    def test_sources(self) -> list[ImageSource]:
        """What the images of the test sets are taken from, each once."""
        return list({id(one.data.source): one.data.source for one in self.test_sets}.values())

    @cached_property
    def test_digest(self) -> str:
        """Identifies the test images of all test sets."""
        digests = " ".join(source.digest() for source in self.test_sources)
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.tasks)

    @property
    def num_earlier(self) -> int:
        """How many of the tasks were learned in earlier runs."""
        return sum(len(one.tasks) for one in self.earlier)

    @property
    def num_classes(self) -> int:
        """Outputs that the head needs: all classes of the data set, in a task or not."""
        return len(self.train.classes)

    @property
    def class_order(self) -> list[list[int]]:
        """Class ids of every task, in the order in which they were drawn."""
        return [list(task.classes) for task in self.tasks]

    @property
    def classes(self) -> tuple[int, ...]:
        """Sorted ids of the classes that any task or test set holds."""
        held = [task.classes for task in self.tasks] + [part.classes for part in self.test_sets]
        return tuple(sorted({class_id for classes in held for class_id in classes}))

    @property
    def test_sets(self) -> list[TestSet]:
        """Every test set once, by its row of the accuracy matrix."""
        found = {test_set.index: test_set for task in self.tasks for test_set in task.test_sets}
        return [found[index] for index in sorted(found)]
