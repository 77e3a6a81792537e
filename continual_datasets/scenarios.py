"""The scenarios: number of tasks, settings that contradict a scenario, and the stream of tasks.

A scenario is one class, registered under the name that `--scenario` gives it. How images are split
into tasks is in `task_splits.py`.

Source: Wang et al., CVPR 2022, section 5.1.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import ClassVar

from cli.flags import choose
from cli.parser import shown
from cli.settings import FLAGS, Settings
from continual_datasets import task_splits
from continual_datasets.class_order import read_class_order, task_sizes
from continual_datasets.images import ConcatSource, ImageSource, Parts
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.readers import registry
from continual_datasets.readers.class_folders import DomainList
from continual_datasets.stream import Subset, Task, TaskStream, TestSet

#: Class ids of each task, as a checkpoint stores them.
TaskClasses = list[list[int]]


@dataclass(frozen=True)
class StreamSource:
    """What a scenario makes its stream of tasks from."""

    parts: Parts  # what `Scenario.load` gave, or the same images on another device
    transforms: ImagePipeline
    global_batch: int  # images of all processes in a training step
    task_classes: TaskClasses | None = None  # from a checkpoint; None: as the settings say

    def only_part(self) -> tuple[ImageSource, ImageSource]:
        """Training and test images of a single data set."""
        (train,), (test,) = (split.values() for split in self.parts)
        return train, test


@dataclass(frozen=True)
class Scenario:
    """One way to make tasks of data."""

    settings: Settings

    name: ClassVar[str]
    #: Settings that have no effect in scenarios which do not list them.
    own_flags: ClassVar[tuple[str, ...]] = ()
    #: Whether the number of tasks is known only where the data are.
    tasks_are_folders: ClassVar[bool] = False
    #: Whether it takes several data sets instead of one.
    takes_several: ClassVar[bool] = False

    def problems(self) -> Iterator[str]:
        """Settings that contradict the scenario, a line each; reads no data."""
        data = self.settings.data
        names = list(registry.find_sources(data.dataset))
        if self.takes_several and len(names) == 1:
            yield f"--scenario {self.name} makes a task of each data set: name several in --dataset"
        if not self.takes_several and len(names) > 1:
            yield (
                f"--scenario {self.name} takes one data set; several ({data.dataset}) are learned "
                "one after the other: leave --scenario out"
            )
        instead = "a single data set and " if self.takes_several else ""
        for name in dict.fromkeys(name for kind in SCENARIOS.values() for name in kind.own_flags):
            owners = [owner for owner, kind in SCENARIOS.items() if name in kind.own_flags]
            flag, value = FLAGS[name], self.settings[name]
            if self.name not in owners and value != flag.default:
                needed = f"{instead}--scenario {' or '.join(owners)}"
                yield f"{flag.spelling} {shown(value)}: needs {needed}"
        if data.file_lists is not None and names != ["CORe50"]:
            yield f"--file_lists are those of CORe50: leave them out with --dataset {data.dataset}"
        if self.is_joint and self.settings.replay.has_buffer:
            yield "--joint learns all tasks at once and has nothing to replay: leave the buffer out"

    @property
    def is_joint(self) -> bool:
        """Whether all tasks are learned at once and tested on all test sets: the upper bound."""
        return self.settings.tasks.joint or self.settings.tasks.scenario == "joint"

    def stream(self, source: StreamSource) -> TaskStream:
        """What `build` makes, with all tasks joined where the settings say so."""
        split = self.build(source)
        return task_splits.joint(split) if self.is_joint else split

    def num_tasks(self) -> int:
        """The tasks that the data are split into; DataError if the folders of tasks are missing."""
        raise NotImplementedError

    def num_classes(self) -> int:
        """C, the classes of the data; raises as `num_tasks`."""
        return registry.count_classes(self.settings.data.dataset, self._path)

    def check_classes(self) -> None:
        """Raises ValueError if data are missing, or the classes do not fit the number of tasks."""
        self.num_classes()

    def load(self) -> Parts:
        """Reads the data; ValueError if something is wrong with them."""
        return registry.load_parts(self.settings.data.dataset, self._path)

    def part(self) -> Parts:
        """Reads the data, or as much of them as `--images_per_class` allows; raises as `load`."""
        number, seed = self.settings.data.images_per_class, self.settings.run.seed
        return task_splits.fewer_images(self.load(), number, seed)

    def class_names(self, parts: Parts) -> list[str]:
        """The names of the classes of the stream, by class id."""
        return next(iter(parts[0].values())).classes

    def build(self, source: StreamSource) -> TaskStream:
        """Splits the data into a stream of tasks; ValueError if they do not fit the settings."""
        raise NotImplementedError

    @property
    def _path(self) -> Path:
        return Path(self.settings.data.data_path)

    def class_order(self, classes: Sequence[str], given: TaskClasses | None = None) -> list[int]:
        """Class ids in the order of their appearance: given, from a file, or shuffled."""
        tasks = self.settings.tasks
        if given is not None:
            order = list(chain(*given))
            if len(set(order)) < len(order):
                raise ValueError(f"the class order {given} gives a class to more than one task")
            return order
        if tasks.class_order is not None:
            return read_class_order(Path(tasks.class_order), classes)
        order = list(range(len(classes)))
        if tasks.shuffle:  # as the original, which seeds Python's generator
            random.Random(self.settings.run.seed).shuffle(order)
        return order


#: Scenarios by name.
SCENARIOS: dict[str, type[Scenario]] = {}


def scenario(name: str) -> Callable[[type[Scenario]], type[Scenario]]:
    """Registers a scenario under the name that `--scenario` gives it."""

    def register(kind: type[Scenario]) -> type[Scenario]:
        kind.name = name
        SCENARIOS[name] = kind
        return kind

    return register


def find_scenario(settings: Settings) -> Scenario:
    """The scenario of the settings; ValueError if it is unknown, or the data set is."""
    kind = choose({**SCENARIOS, "joint": ClassIncremental}, "--scenario", settings.tasks.scenario)
    if kind is ClassIncremental and len(registry.find_sources(settings.data.dataset)) > 1:
        kind = DatasetIncremental
    return kind(settings)


@scenario("class-incremental")
class ClassIncremental(Scenario):
    """A task is a portion of the classes, tested on its classes and those of each task so far."""

    own_flags = ("classes_per_task", "first_task_classes", "class_order")

    def problems(self) -> Iterator[str]:
        """Those of every scenario, and sizes of tasks that contradict each other."""
        yield from super().problems()
        tasks = self.settings.tasks
        number = len(sizes := tasks.classes_per_task or ())
        if number > 1 and (tasks.first_task_classes or tasks.num_tasks not in (None, number)):
            yield (
                f"--classes_per_task {shown(sizes)} are the sizes of all {number} tasks: give no "
                f"--first_task_classes, and --num_tasks {number} or none"
            )

    def num_tasks(self) -> int:
        """What the settings say, or 10 as the original; it may follow from the classes."""
        tasks, sizes = self.settings.tasks, self.settings.tasks.classes_per_task or ()
        if tasks.num_tasks is None and tasks.first_task_classes and len(sizes) == 1:
            return len(self._sizes(self.num_classes()))
        return tasks.num_tasks or (len(sizes) if len(sizes) > 1 else 10)

    def check_classes(self) -> None:
        """Whether the classes can be split so; a file of the class order may leave some out."""
        num_classes = self.num_classes()
        if self.settings.tasks.class_order is None:
            self._sizes(num_classes)

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.by_classes`."""
        train, test = source.only_part()
        groups = None if self.is_joint else source.task_classes
        order = self.class_order(train.classes, source.task_classes)
        if groups is None:
            rest = iter(order)
            groups = [[*islice(rest, size)] for size in self._sizes(len(order))]
        return task_splits.by_classes(train, test, groups, source.transforms)

    def _sizes(self, num_classes: int) -> list[int]:
        tasks = self.settings.tasks
        given = tasks.num_tasks, tasks.classes_per_task, tasks.first_task_classes
        return task_sizes(num_classes, *given)


@scenario("dataset-incremental")
class DatasetIncremental(Scenario):
    """A task is a data set with classes of its own, tested on it and each data set so far.

    Chosen by itself where `--dataset` names several.
    """

    takes_several = True

    def num_tasks(self) -> int:
        """As many as there are data sets."""
        return len(registry.find_sources(self.settings.data.dataset))

    def class_names(self, parts: Parts) -> list[str]:
        """Those of every data set, each behind the name of its set."""
        return [f"{name}/{c}" for name, part in parts[0].items() for c in part.classes]

    def build(self, source: StreamSource) -> TaskStream:
        """Class ids of a data set follow those of the one before."""
        train, test = source.parts
        classes, first = self.class_names(source.parts), count()
        ids = {name: [next(first) for _ in part.classes] for name, part in train.items()}

        def shifted(parts: Mapping[str, ImageSource]) -> dict[str, ImageSource]:
            return {k: ConcatSource([part], classes, [ids[k]]) for k, part in parts.items()}

        return task_splits.by_parts(shifted(train), shifted(test), source.transforms)


@scenario("domain-incremental")
class DomainIncremental(Scenario):
    """A task is a domain of the same classes, tested on one common set or each domain so far."""

    own_flags = ("domains", "file_lists")
    tasks_are_folders = True

    def num_tasks(self) -> int:
        """As many as there are domains."""
        return len(self._domains().names)

    def num_classes(self) -> int:
        """C, the classes that all domains share."""
        return self._domains().classes

    def load(self) -> Parts:
        """Reads the data by domain."""
        return self._domains().load()

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.by_parts`."""
        return task_splits.by_parts(*source.parts, source.transforms)

    def _domains(self) -> DomainList:
        data = self.settings.data
        lists = None if data.file_lists is None else Path(data.file_lists)
        return registry.list_domains(data.dataset, self._path, lists, data.domains)


@scenario("gaussian")
class Gaussian(Scenario):
    """Task-free: episodes of classes that come and go, tested on one common set."""

    own_flags = ("class_order", "gaussian_reading", "steps_per_task", "gaussian_sigma")

    def problems(self) -> Iterator[str]:
        """Those of every scenario, and several epochs where every batch is trained once."""
        yield from super().problems()
        tasks, epochs = self.settings.tasks, self.settings.optimizer.epochs
        if tasks.gaussian_reading == "paper" and epochs != 1 and not tasks.joint:
            yield (
                f"--epochs {epochs}: --gaussian_reading paper trains every batch once, give "
                "--epochs 1, or more --steps_per_task"
            )

    def num_tasks(self) -> int:
        """What `--num_tasks` says, or 200 episodes as the paper."""
        return self.settings.tasks.num_tasks or 200

    def check_classes(self) -> None:
        """Whether the schedule has room for the peaks of all classes."""
        task_splits.presence(self.num_classes(), *self._schedule)

    def build(self, source: StreamSource) -> TaskStream:
        """Makes a task of each episode; all are tested on the same set, of all classes."""
        train, test = source.only_part()
        classes = tuple(range(len(train.classes)))
        task_splits.check_all_present(classes, train, test)
        test_set = TestSet(0, "all classes", task_splits.held_out(test), classes)
        number = self.settings.tasks.images_per_episode(source.global_batch)
        tasks = []
        for index, episode in enumerate(source.task_classes or self._episodes(train.classes)):
            indices = task_splits.images_of(episode, train)
            if number is not None:
                indices = task_splits.draw(indices, number, self.settings.run.seed, index)
            data = Subset(train, indices)
            tasks.append(Task(index, f"episode{index + 1}", data, tuple(episode), (test_set,)))
        return TaskStream(tuple(tasks), train, source.transforms)

    @property
    def _schedule(self) -> tuple[int, int, float]:
        tasks = self.settings.tasks
        return self.num_tasks(), tasks.schedule_steps, tasks.gaussian_sigma

    def _episodes(self, classes: Sequence[str]) -> list[tuple[int, ...]]:
        order = self.class_order(classes)
        if len(order) < len(classes):
            raise ValueError(
                f"--class_order {self.settings.tasks.class_order} names {len(order)} of "
                f"{len(classes)} classes: --scenario gaussian takes all of them"
            )
        return task_splits.gaussian_episodes(order, *self._schedule, self.settings.run.seed)
