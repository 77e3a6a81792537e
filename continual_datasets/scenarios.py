"""The scenarios: number of tasks, settings that contradict a scenario, and the stream of tasks.

A scenario is one class, registered under the name that `--scenario` gives it. How images are split
into tasks is in `task_splits.py`.

Source: Wang et al., CVPR 2022, section 5.1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cli.parser import shown
from cli.settings import Settings, find_flag
from continual_datasets import class_order as orders
from continual_datasets import task_splits
from continual_datasets.class_order import check_split
from continual_datasets.images import ImageSource
from continual_datasets.readers import registry
from continual_datasets.readers.class_folders import DomainList
from continual_datasets.stream import TaskStream
from continual_datasets.task_splits import Transforms

#: Training and test images, by name of the data set or domain.
Parts = tuple[Mapping[str, ImageSource], Mapping[str, ImageSource]]

#: Class ids of each task, as a checkpoint stores them.
TaskClasses = list[list[int]]


@dataclass(frozen=True)
class StreamSource:
    """What a scenario makes its stream of tasks from.

    Attributes:
        parts: What `Scenario.load` gave, or the same images on another device.
        transforms: What happens to every image.
        global_batch: Images of all processes in a training step.
        task_classes: Class ids of each task, from a checkpoint; None: as the settings say.
    """

    parts: Parts
    transforms: Transforms
    global_batch: int
    task_classes: TaskClasses | None = None

    def only_part(self) -> tuple[ImageSource, ImageSource]:
        """Training and test images of a single data set."""
        (train,), (test,) = (split.values() for split in self.parts)
        return train, test


@dataclass(frozen=True)
class Scenario:
    """One way to make tasks of data.

    Attributes:
        settings: Settings of the run.
        own_flags: Settings that have no effect in scenarios which do not list them.
        tasks_are_folders: Whether the number of tasks is known only where the data are.
        _instead: What must change besides --scenario to leave this scenario, for messages.
    """

    settings: Settings

    name: ClassVar[str]
    own_flags: ClassVar[tuple[str, ...]] = ()
    tasks_are_folders: ClassVar[bool] = False
    _instead: ClassVar[str] = ""

    def problems(self) -> Iterator[str]:
        """Settings that contradict the scenario, a line each; reads no data."""
        yield from self._problems_of_several()
        for flag, value, owners in _flags_of_others(self):
            yield f"{flag} {value}: needs {self._instead}--scenario {' or '.join(owners)}"
        data = self.settings.data
        names = list(registry.find_sources(data.dataset))
        if data.file_lists is not None and names != ["CORe50"]:
            yield f"--file_lists are those of CORe50: leave them out with --dataset {data.dataset}"

    @property
    def splitting(self) -> "Scenario":
        """The scenario that splits the data: itself, unless it joins the tasks of another."""
        return self

    def num_tasks(self) -> int:
        """T, the number of tasks.

        Raises:
            DataError: If the folders that are the tasks are missing.
            ValueError: If there is no such data set.
        """
        raise NotImplementedError

    def num_classes(self) -> int:
        """C, the classes of the data; raises as `num_tasks`."""
        return registry.count_classes(self.settings.data.dataset, self._path)

    def check_classes(self) -> None:
        """Makes sure that the data are there, and the classes fit the number of tasks.

        Raises:
            ValueError: If they do not, with what would fit; or as `num_tasks`.
        """
        self.num_classes()

    def load(self) -> Parts:
        """Reads the data.

        Raises:
            ValueError: If something is wrong with them.
        """
        parts = registry.load_parts(self.settings.data.dataset, self._path)
        return (
            {name: train for name, (train, _) in parts.items()},
            {name: test for name, (_, test) in parts.items()},
        )

    def build(self, source: StreamSource) -> TaskStream:
        """Makes the stream of tasks.

        Raises:
            ValueError: If the data do not fit the settings.
        """
        raise NotImplementedError

    @property
    def _path(self) -> Path:
        return Path(self.settings.data.data_path)

    def _problems_of_several(self) -> Iterator[str]:
        names = list(registry.find_sources(self.settings.data.dataset))
        if len(names) > 1:
            yield (
                f"--scenario {self.name} takes one data set; several "
                f"({self.settings.data.dataset}) are learned one after the other: leave --scenario "
                "out"
            )

    def class_order(self, classes: Sequence[str], given: TaskClasses | None = None) -> list[int]:
        """Class ids in the order of their appearance: given, from a file, or shuffled."""
        tasks = self.settings.tasks
        if given is not None:
            order = [c for classes_of_task in given for c in classes_of_task]
            if len(set(order)) < len(order):
                raise ValueError(f"the class order {given} gives a class to more than one task")
            return order
        if tasks.class_order is not None:
            return orders.read_class_order(Path(tasks.class_order), classes)
        return orders.class_order(len(classes), self.settings.run.seed, tasks.shuffle)


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
    """The scenario that the settings describe.

    Raises:
        ValueError: If there is none of that name, or no such data set.
    """
    name = settings.tasks.scenario
    if name not in SCENARIOS:
        raise ValueError(f"--scenario {name} is unknown: choose one of {', '.join(SCENARIOS)}")
    several = len(registry.find_sources(settings.data.dataset)) > 1
    if several and name in ("class-incremental", "joint"):
        found: Scenario = DatasetIncremental(settings)
    else:
        found = SCENARIOS["class-incremental" if name == "joint" else name](settings)
    return Joint(settings, found) if settings.tasks.joint or name == "joint" else found


@scenario("class-incremental")
class ClassIncremental(Scenario):
    """A task is a portion of the classes, tested on its classes and those of each task so far."""

    own_flags = ("classes_per_task", "class_order")

    def num_tasks(self) -> int:
        """What `--num_tasks` says, or 10 as the original."""
        return self.settings.tasks.num_tasks or 10

    def check_classes(self) -> None:
        """Whether the classes can be split so."""
        per_task = self.settings.tasks.classes_per_task
        check_split(self.num_classes(), self.num_tasks(), per_task)

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.class_incremental`."""
        train, test = source.only_part()
        order = self.class_order(train.classes, source.task_classes)
        num_tasks = self.num_tasks()
        per_task = check_split(len(order), num_tasks, self.settings.tasks.classes_per_task)
        return task_splits.class_incremental(
            train, test, order, num_tasks, per_task, source.transforms
        )


@scenario("dataset-incremental")
class DatasetIncremental(Scenario):
    """A task is a data set with classes of its own, tested on it and each data set so far.

    Chosen by itself where `--dataset` names several.
    """

    _instead = "a single data set and "

    def _problems_of_several(self) -> Iterator[str]:
        if self.num_tasks() == 1:
            yield f"--scenario {self.name} makes a task of each data set: name several in --dataset"

    def num_tasks(self) -> int:
        """As many as there are data sets."""
        return len(registry.find_sources(self.settings.data.dataset))

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.several_data_sets`."""
        return task_splits.several_data_sets(*source.parts, source.transforms)


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
        data = self.settings.data
        return registry.load_domains(data.dataset, self._path, self._lists, data.domains)

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.domain_incremental`."""
        return task_splits.domain_incremental(*source.parts, source.transforms)

    @property
    def _lists(self) -> Path | None:
        lists = self.settings.data.file_lists
        return None if lists is None else Path(lists).expanduser()

    def _domains(self) -> DomainList:
        data = self.settings.data
        return registry.list_domains(data.dataset, self._path, self._lists, data.domains)


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
        tasks = self.settings.tasks
        task_splits.presence(
            self.num_classes(), self.num_tasks(), tasks.schedule_steps, tasks.gaussian_sigma
        )

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.gaussian`."""
        train, test = source.only_part()
        episodes = source.task_classes or self._episodes(train.classes)
        num_images = self.settings.tasks.images_per_episode(source.global_batch)
        return task_splits.gaussian(train, test, episodes, num_images, source.transforms)

    def _episodes(self, classes: Sequence[str]) -> list[tuple[int, ...]]:
        tasks = self.settings.tasks
        order = self.class_order(classes)
        if len(order) < len(classes):
            raise ValueError(
                f"--class_order {tasks.class_order} names {len(order)} of {len(classes)} classes: "
                "--scenario gaussian takes all of them"
            )
        return task_splits.gaussian_episodes(
            order,
            self.num_tasks(),
            tasks.schedule_steps,
            tasks.gaussian_sigma,
            self.settings.run.seed,
        )


@scenario("joint")
@dataclass(frozen=True)
class Joint(Scenario):
    """All tasks of another scenario at once, tested on all of its test sets: the upper bound.

    Attributes:
        joined: The scenario whose tasks are joined.
    """

    joined: Scenario

    @property
    def splitting(self) -> Scenario:
        """The scenario whose tasks are joined."""
        return self.joined

    def problems(self) -> Iterator[str]:
        """Those of the joined scenario, and a replay buffer."""
        yield from self.joined.problems()
        if self.settings.replay.has_buffer:
            yield "--joint learns all tasks at once and has nothing to replay: leave the buffer out"

    def num_tasks(self) -> int:
        """One."""
        return 1

    def num_classes(self) -> int:
        """Those of the joined scenario."""
        return self.joined.num_classes()

    def check_classes(self) -> None:
        """Whether the joined scenario is possible."""
        self.joined.check_classes()

    def load(self) -> Parts:
        """Reads the data of the joined scenario."""
        return self.joined.load()

    def build(self, source: StreamSource) -> TaskStream:
        """See `task_splits.joint`."""
        return task_splits.joint(self.joined.build(source), source.transforms)


def _flags_of_others(chosen: Scenario) -> Iterator[tuple[str, str, list[str]]]:
    """Flags that are set although only other scenarios have them: spelling, value, scenarios."""
    owners: dict[str, list[str]] = {}
    for name, kind in SCENARIOS.items():
        for flag in kind.own_flags:
            owners.setdefault(flag, []).append(name)
    for flag, names in owners.items():
        declared = find_flag(flag)
        value = chosen.settings[flag]
        if chosen.name not in names and value != declared.default:
            yield declared.spelling, shown(value), names
