"""What a run learns: tasks one after the other, each with its data, classes and test sets.

The engine is handed a `TaskStream` and knows nothing of how it was made. Every scenario
(`scenarios.py`) is one way to make such a sequence: classes that come in portions, data sets or
domains in a row, hundreds of short tasks, everything at once.

Shapes: n images, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from continual_datasets.images import ImageSource
    from continual_datasets.pipeline import ImagePipeline


def task_name(index: int) -> str:
    """Name of a task and its test set where they differ by their number only."""
    return f"task{index + 1}"


def display_names(names: Sequence[str], number: int, form: str) -> list[str]:
    """What to call test sets for people: by name, or by number if the names say no more.

    Args:
        names: Their names; may be empty.
        number: How many there are.
        form: How a number is shown, such as `test set {}`.
    """
    if list(names) in ([], [task_name(index) for index in range(number)]):
        return [form.format(index + 1) for index in range(number)]
    return list(names)


def title(part: Task | TestSet) -> str:
    """What to call a part of the stream: `Task 1` as the original, or a name that says more."""
    return f"Task {part.index + 1}" if part.name == task_name(part.index) else part.name


class LabelledData(Protocol):
    """What the loaders need of a task's or a test set's data.

    `data[epoch, position]` (training) or `data[position]` (test) is what the transform made of an
    image, a tensor, and its class id.
    """

    targets: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> tuple[Tensor, int]: ...


class TrainingData(LabelledData, Protocol):
    """The same of a task, which is a part of the run's training images.

    Attributes:
        indices: Which of all training images of the run these are, (n,).
    """

    indices: NDArray[np.int64]

    def replayed(self, epoch: int, draw: int, image: int) -> tuple[Tensor, int]:
        """A training image of the run, of any task, as a draw of this task's replay shows it."""


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
        test_sets: What to evaluate after it; nothing where it is empty.
    """

    index: int
    name: str
    data: TrainingData
    classes: tuple[int, ...]
    test_sets: tuple[TestSet, ...]


@dataclass(frozen=True)
class TaskStream:
    """All tasks in the order in which they are learned.

    Attributes:
        tasks: The tasks.
        train: All training images of the run; the tasks' `indices` refer to these.
        pipeline: How the images are preprocessed.
    """

    tasks: tuple[Task, ...]
    train: ImageSource
    pipeline: ImagePipeline | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the data, indexed by class id."""
        return tuple(self.train.classes)

    @property
    def train_targets(self) -> NDArray[np.int64]:
        """Class id of every training image of the run, (n,)."""
        return self.train.targets

    @cached_property
    def train_digest(self) -> str:
        """Identifies the training images, see `ImageSource.digest`."""
        return self.train.digest()

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
        """Sorted ids of the classes that any task or test set holds."""
        held = [task.classes for task in self.tasks] + [part.classes for part in self.test_sets]
        return tuple(sorted({class_id for classes in held for class_id in classes}))

    @property
    def test_sets(self) -> list[TestSet]:
        """Every test set once, by its row of the accuracy matrix."""
        found = {test_set.index: test_set for task in self.tasks for test_set in task.test_sets}
        return [found[index] for index in sorted(found)]
