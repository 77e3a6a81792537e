"""A stream of tasks that continues the streams of earlier runs.

Classes have the ids that they got when they were first learned; new ones follow. A class is known
by its name.

Shapes: n images.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from continual_datasets.images import ArraySource, ConcatSource, DataError, ImageSource, join_names
from continual_datasets.scenarios import Scenario, StreamSource
from continual_datasets.stream import Earlier, Subset, Task, TaskStream, TestSet, task_name


def all_classes(known: Sequence[str], found: Sequence[str]) -> list[str]:
    """Known class names, then those found that are new.

    Raises:
        DataError: If a new name differs from a known one by its letter case only.
    """
    new = [name for name in found if name not in known]
    lower = {name.lower(): name for name in known}
    if twins := [f"{name} ({lower[name.lower()]})" for name in new if name.lower() in lower]:
        raise DataError(
            "these classes of the data differ from a known one, in brackets, by letter case only: "
            f"{join_names(twins)}; rename them"
        )
    return [*known, *new]


def own_ids(
    tasks: Sequence[Sequence[int]], classes: Sequence[str], own: Sequence[str]
) -> list[list[int]]:
    """Class ids of tasks, by the names that the data themselves give their classes.

    Raises:
        DataError: If the data lack a class.
    """
    names = [[classes[class_id] for class_id in task] for task in tasks]
    if missing := [name for task in names for name in task if name not in own]:
        raise DataError(f"there are no images of the classes {join_names(missing)}")
    return [[own.index(name) for name in task] for task in names]


def stream_of_earlier(
    earlier: Earlier, scenario: Scenario | None, source: StreamSource
) -> TaskStream:
    """The stream of an earlier run again; without a scenario, its test sets have no images.

    Raises:
        DataError: If the data lack a class.
    """
    if scenario is not None:
        ids = own_ids(earlier.tasks, earlier.class_names, scenario.class_names(source.parts))
        return scenario.stream(replace(source, task_classes=ids))
    nothing = Subset(
        ArraySource(np.zeros((0, 1, 1), np.uint8), [], earlier.class_names),
        np.empty(0, dtype=np.int64),
    )
    rows = tuple(TestSet(i, name, nothing, ()) for i, name in enumerate(earlier.test_sets))
    tasks = [
        Task(index, task_name(index), nothing, tuple(classes), rows)
        for index, classes in enumerate(earlier.tasks)
    ]
    return TaskStream(tuple(tasks), nothing.source, source.transforms)


def joined(
    earlier: Sequence[Earlier], streams: Sequence[TaskStream], classes: Sequence[str], replays: bool
) -> TaskStream:
    """One stream of those of earlier runs and, the last, that of a new run.

    Args:
        earlier: The earlier runs.
        streams: The stream of each of them, and the new one.
        classes: Names of all classes, by class id.
        replays: Whether images of earlier runs are replayed, so that they belong to the training
            images, in front of the new ones.

    Raises:
        DataError: If an earlier run has other test sets than it had.
    """
    *before, new = streams
    tasks: list[Task] = []
    rows: list[TestSet] = []
    for one, stream in zip(earlier, before, strict=True):
        own = _renumbered(stream, classes, len(tasks), len(rows))[: len(one.tasks)]
        found = [row.name for row in own[-1].test_sets] if own else []
        if found != one.test_sets:
            raise DataError(
                f"the data of {one.checkpoint} have the test sets {join_names(found)}, when it was "
                f"written {join_names(one.test_sets)}: give those data with --earlier_data"
            )
        tasks += [replace(task, test_sets=(*rows, *task.test_sets)) for task in own]
        rows = list(tasks[-1].test_sets)
    at_hand = [row for row in rows if len(row.data)]
    sources = [stream.train for stream in (streams if replays else [new])]
    train = ConcatSource(sources, classes, [_ids(source, classes) for source in sources])
    nothing, first = Subset(train, np.empty(0, dtype=np.int64)), len(train) - len(new.train)
    tasks = [replace(task, data=nothing) for task in tasks]
    for task in _renumbered(new, classes, len(tasks), len(rows)):
        tested = (*at_hand, *task.test_sets) if task.test_sets else ()
        data = Subset(train, task.data.indices + first)
        tasks.append(replace(task, data=data, test_sets=tested))
    return replace(new, tasks=tuple(tasks), train=train, earlier=tuple(earlier))


def _renumbered(
    stream: TaskStream, classes: Sequence[str], first_task: int, first_row: int
) -> list[Task]:
    """The tasks of a stream under the numbers and class ids of a longer one."""
    ids = _ids(stream.train, classes)
    sources = {
        id(one): ConcatSource([one], classes, [_ids(one, classes)]) for one in stream.test_sources
    }
    rows: dict[int, TestSet] = {}

    def changed(part: Any, first: int) -> dict[str, Any]:
        name = part.name if part.name != task_name(part.index) else task_name(part.index + first)
        ids_of_part = tuple(ids[class_id] for class_id in part.classes)
        return {"index": part.index + first, "name": name, "classes": ids_of_part}

    for row in stream.test_sets:
        data = Subset(sources[id(row.data.source)], row.data.indices)
        rows[row.index] = replace(row, data=data, **changed(row, first_row))
    return [
        replace(
            task,
            **changed(task, first_task),
            test_sets=tuple(rows[r.index] for r in task.test_sets),
        )
        for task in stream.tasks
    ]


def _ids(source: ImageSource, classes: Sequence[str]) -> list[int]:
    """The ids that the classes of a source get."""
    return [classes.index(name) for name in source.classes]
