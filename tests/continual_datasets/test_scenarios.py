"""Which tasks the settings describe, what they contradict, and the stream of tasks."""

import numpy as np
import pytest
import torch

from cli.parser import UsageError, parse
from continual_datasets import task_splits
from continual_datasets.images import DataError
from continual_datasets.scenarios import (
    SCENARIOS,
    ClassIncremental,
    DatasetIncremental,
    DomainIncremental,
    Gaussian,
    Joint,
    Scenario,
    find_scenario,
    scenario,
)
from experiment import build
from experiment.validate import validate
from helpers.true_formats import TRUE_FORMATS

CPU = torch.device("cpu")

#: A model that is built in no time, where only the scenario matters.
SHALLOW = ("--model-kwargs", "depth=1", "weight_init=skip")


def settings_of(line):
    settings, problems = parse(line.split())
    assert problems == []
    return settings


def problems_of(line):
    """Everything that is wrong with a scenario, wherever the data are."""
    settings, problems = parse([*line.split(), *SHALLOW])
    try:
        validate(settings, problems, elsewhere=True)
    except UsageError as error:
        return error.problems
    return []


def stream_of(line, global_batch=16):
    return build.build_stream(settings_of(f"{line} --input-size 16"), global_batch, CPU)


def describe(stream):
    """Everything about a stream of tasks but its pixels."""
    return [
        (
            task.index,
            task.name,
            task.classes,
            task.data.indices.tolist(),
            [(t.index, t.name, t.classes, t.data.indices.tolist()) for t in task.test_sets],
        )
        for task in stream.tasks
    ]


@pytest.fixture
def registered():
    """Scenarios that a test registers are gone after it."""
    before = dict(SCENARIOS)
    yield
    SCENARIOS.clear()
    SCENARIOS.update(before)


# Names


def test_scenarios_have_names():
    assert {
        "class-incremental": ClassIncremental,
        "dataset-incremental": DatasetIncremental,
        "domain-incremental": DomainIncremental,
        "gaussian": Gaussian,
        "joint": Joint,
    } == SCENARIOS
    assert {name: kind.name for name, kind in SCENARIOS.items()} == {n: n for n in SCENARIOS}


SEVERAL = "--dataset MNIST,SVHN,digits"

#: Settings; the scenario; of joint training the one that is joined; tasks; classes.
FOUND = [
    ("", ClassIncremental, None, 10, 100),
    ("--dataset digits --num_tasks 5", ClassIncremental, None, 5, 10),
    ("--scenario class-incremental", ClassIncremental, None, 10, 100),
    (SEVERAL, DatasetIncremental, None, 3, 30),
    (f"{SEVERAL} --scenario class-incremental", DatasetIncremental, None, 3, 30),
    (f"{SEVERAL} --scenario dataset-incremental", DatasetIncremental, None, 3, 30),
    ("--dataset MNIST --scenario dataset-incremental", DatasetIncremental, None, 1, 10),
    ("--scenario gaussian", Gaussian, None, 200, 100),
    ("--scenario gaussian --num_tasks 20", Gaussian, None, 20, 100),
    ("--joint", Joint, ClassIncremental, 1, 100),
    ("--scenario joint", Joint, ClassIncremental, 1, 100),
    ("--scenario joint --joint", Joint, ClassIncremental, 1, 100),
    ("--scenario gaussian --joint", Joint, Gaussian, 1, 100),
    (f"{SEVERAL} --joint", Joint, DatasetIncremental, 1, 30),
    (f"{SEVERAL} --scenario joint", Joint, DatasetIncremental, 1, 30),
    (f"{SEVERAL} --scenario dataset-incremental --joint", Joint, DatasetIncremental, 1, 30),
]


@pytest.mark.parametrize(("line", "kind", "joined", "num_tasks", "num_classes"), FOUND)
def test_scenario_is_found_by_name_data_and_joint(line, kind, joined, num_tasks, num_classes):
    found = find_scenario(settings_of(line))
    assert type(found) is kind
    assert found.num_tasks() == num_tasks
    assert found.num_classes() == num_classes
    assert (type(found.joined) if isinstance(found, Joint) else None) is joined


@pytest.mark.parametrize(("flags", "joined"), [("", False), ("--joint", True)])
def test_domains_are_counted_in_their_folders(tmp_path, flags, joined):
    TRUE_FORMATS["domains"](tmp_path, None)
    line = f"--scenario domain-incremental --dataset ImageFolder --data-path {tmp_path} {flags}"
    found = find_scenario(settings_of(line))
    assert isinstance(found, Joint if joined else DomainIncremental)
    assert (found.num_tasks(), found.num_classes()) == (1 if joined else 3, 2)
    nowhere = find_scenario(settings_of(f"{line} --data-path {tmp_path / 'nowhere'}"))
    with pytest.raises(DataError):
        nowhere.num_classes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--scenario online", "--scenario online is unknown: choose one of class-incremental, "
         "dataset-incremental, domain-incremental, gaussian, joint"),
        ("--dataset CIFAR11", "--dataset CIFAR11 is unknown: choose one of "),
        ("--dataset CIFAR11 --scenario joint", "--dataset CIFAR11 is unknown: choose one of "),
    ],
)  # fmt: skip
def test_unknown_names_are_rejected(line, message):
    with pytest.raises(ValueError) as caught:
        find_scenario(settings_of(line))
    assert str(caught.value).startswith(message)
    (problem,) = problems_of(line)
    assert problem.startswith(message)


# Contradictions

#: Flag with a value, and the scenarios that have it.
OWN_FLAGS = {
    "--classes_per_task 2": ["class-incremental"],
    "--class_order order.txt": ["class-incremental", "gaussian"],
    "--domains a b": ["domain-incremental"],
    "--gaussian_reading released": ["gaussian"],
    "--steps_per_task 3": ["gaussian"],
    "--gaussian_sigma 9.0": ["gaussian"],
}
CHOSEN = {
    "class-incremental": "--num_tasks 5",
    "dataset-incremental": SEVERAL,
    "domain-incremental": "--scenario domain-incremental --dataset CORe50",
    "gaussian": "--scenario gaussian --epochs 1",
    "joint": "--scenario joint",
}


def test_table_of_own_flags_is_complete():
    named = {flag.split()[0][2:] for flag in OWN_FLAGS} | {"file_lists"}
    assert {flag for kind in SCENARIOS.values() for flag in kind.own_flags} == named


@pytest.mark.parametrize("flag", OWN_FLAGS)
@pytest.mark.parametrize("name", CHOSEN)
def test_flag_of_another_scenario_is_rejected_with_the_one_that_has_it(name, flag):
    owners = OWN_FLAGS[flag]
    single = "a single data set and " if name == "dataset-incremental" else ""
    expected = [f"{flag}: needs {single}--scenario {' or '.join(owners)}"]
    if ("class-incremental" if name == "joint" else name) in owners:
        expected = []
    assert problems_of(f"{CHOSEN[name]} {flag}") == expected
    assert list(find_scenario(settings_of(f"{CHOSEN[name]} {flag}")).problems()) == expected


@pytest.mark.parametrize("name", CHOSEN)
def test_scenario_alone_contradicts_nothing(name):
    assert problems_of(CHOSEN[name]) == []


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        (
            "--scenario dataset-incremental --dataset MNIST",
            ["--scenario dataset-incremental makes a task of each data set: name several in "
             "--dataset"],
        ),
        (
            f"{SEVERAL} --scenario gaussian --epochs 1",
            ["--scenario gaussian takes one data set; several (MNIST,SVHN,digits) are learned one "
             "after the other: leave --scenario out"],
        ),
        (
            f"{SEVERAL} --scenario domain-incremental",
            ["--scenario domain-incremental takes one data set; several (MNIST,SVHN,digits) are "
             "learned one after the other: leave --scenario out"],
        ),
        (
            "--scenario gaussian --epochs 5",
            ["--epochs 5: --gaussian_reading paper trains every batch once, give --epochs 1, or "
             "more --steps_per_task"],
        ),
        ("--scenario gaussian --epochs 5 --gaussian_reading released", []),
        ("--scenario gaussian --epochs 5 --joint", []),
        (
            "--file_lists x",
            ["--file_lists x: needs --scenario domain-incremental",
             "--file_lists are those of CORe50: leave them out with --dataset CIFAR100"],
        ),
        ("--dataset CORe50 --scenario domain-incremental --file_lists x", []),
        (
            "--scenario joint --buffer_size 200",
            ["--joint learns all tasks at once and has nothing to replay: leave the buffer out"],
        ),
    ],
)  # fmt: skip
def test_contradictions_are_named(line, problems):
    assert list(find_scenario(settings_of(line)).problems()) == problems
    assert problems_of(line) == problems


# Streams


@pytest.mark.parametrize("flags", ["", "--no-shuffle", "--num_tasks 2 --classes_per_task 3"])
def test_joint_by_flag_and_by_name_give_the_same_stream(flags):
    line = f"--dataset digits --num_tasks 5 {flags}"
    by_flag, by_name = stream_of(f"{line} --joint"), stream_of(f"{line} --scenario joint")
    both = stream_of(f"{line} --scenario joint --joint")
    assert describe(by_flag) == describe(by_name) == describe(both)
    assert by_flag.class_order == by_name.class_order
    (task,) = by_flag.tasks
    apart = stream_of(line)
    assert sorted(task.classes) == sorted(c for one in apart.tasks for c in one.classes)
    assert [t.name for t in task.test_sets] == [t.name for t in apart.tasks]


def test_joint_of_several_data_sets_by_flag_and_by_name(tmp_path):
    TRUE_FORMATS["MNIST"](tmp_path, None)
    line = f"--dataset MNIST,digits --data-path {tmp_path}"
    by_flag, by_name = stream_of(f"{line} --joint"), stream_of(f"{line} --scenario joint")
    assert describe(by_flag) == describe(by_name)
    assert [test_set.name for test_set in by_name.test_sets] == ["MNIST", "digits"]


def test_data_sets_in_a_row_by_name_and_by_themselves(tmp_path):
    TRUE_FORMATS["MNIST"](tmp_path, None)
    line = f"--dataset digits,MNIST --data-path {tmp_path}"
    found, named = stream_of(line), stream_of(f"{line} --scenario dataset-incremental")
    assert describe(found) == describe(named)
    assert [task.name for task in found.tasks] == ["digits", "MNIST"]
    assert found.num_classes == 20


def test_scenario_that_is_registered_runs_through_the_same_build(registered):
    @scenario("two-halves")
    class TwoHalves(Scenario):
        """The even classes, then the odd ones."""

        own_flags = ("class_order",)

        def num_tasks(self):
            return 2

        def build(self, source):
            train, test = source.only_part()
            order = [*range(0, len(train.classes), 2), *range(1, len(train.classes), 2)]
            half = len(order) // 2
            return task_splits.class_incremental(train, test, order, 2, half, source.transforms)

    line = "--dataset digits --scenario two-halves"
    assert problems_of(line) == []
    stream = stream_of(line)
    assert stream.class_order == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert stream.pipeline is not None
    image, target = stream.tasks[1].data[0, 0]
    assert (image.shape, image.dtype, target % 2) == ((3, 16, 16), torch.uint8, 1)
    joint = stream_of(f"{line} --joint")
    assert (joint.num_tasks, len(joint.test_sets)) == (1, 2)
    fewer = stream_of(f"{line} --eval_every 2")
    assert [len(task.test_sets) for task in fewer.tasks] == [0, 2]
    assert problems_of(f"{line} --steps_per_task 3") == [
        "--steps_per_task 3: needs --scenario gaussian"
    ]
    assert problems_of("--scenario domain-incremental --dataset CORe50 --class_order x") == [
        "--class_order x: needs --scenario class-incremental or gaussian or two-halves"
    ]
    assert problems_of(f"{line} --num_tasks 3") == [
        "--num_tasks 3: the data are 2 tasks (digits, two-halves), give 2 or none"
    ]
    assert problems_of(f"{line},MNIST --dataset digits,MNIST")[0].startswith("--scenario two-")


def test_registered_scenario_is_gone_after_its_test():
    assert "two-halves" not in SCENARIOS


def test_data_that_do_not_fit_are_reported_as_such():
    with pytest.raises(DataError, match="10 classes cannot be split evenly over --num_tasks 3"):
        stream_of("--dataset digits --num_tasks 3")
    with pytest.raises(DataError, match="--scenario online is unknown"):
        stream_of("--scenario online")


def test_classes_of_tasks_can_be_given():
    settings = settings_of("--dataset digits --num_tasks 2 --input-size 16")
    given = [[9, 1, 2, 3, 4], [5, 6, 7, 8, 0]]
    assert build.build_stream(settings, 16, CPU, given).class_order == given
    with pytest.raises(DataError, match="gives a class to more than one task"):
        build.build_stream(settings, 16, CPU, [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])


def test_drop_last_that_leaves_no_step_is_rejected():
    line = "--dataset digits --num_tasks 5 --drop_last"
    assert np.min([len(task.data) for task in stream_of(line, 100).tasks]) >= 100
    with pytest.raises(DataError, match="--drop_last leaves no step of task1"):
        stream_of(line, 1000)
