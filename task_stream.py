"""What a run learns: tasks one after the other, each with its data, classes and test sets.

The engine is handed a `TaskStream` and knows nothing of how it was made. Every scenario
(`scenarios.py`) is one way to make such a sequence: classes that come in portions, data sets or
domains in a row, hundreds of short tasks, everything at once.

Shapes: n images, S input size in pixels, T tasks. Images are (3, S, S).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class LabelledData(Protocol):
    """What the loaders need of a task's or a test set's data.

    `data[epoch, position]` (training) or `data[position]` (test) is an image (3, S, S) and its
    class id.
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
        class_names: Names of all classes of the data, indexed by class id.
        train_targets: Class id of every training image of the run; the tasks' `indices` refer to
            these.
        train_digest: What tells these images from others, see `ImageSource.digest`.
    """

    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    train_targets: NDArray[np.int64]
    train_digest: str

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
