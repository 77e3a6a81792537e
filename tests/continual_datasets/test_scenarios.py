"""Which tasks the settings describe, what they contradict, and the stream of tasks."""

import itertools

import pytest
import torch

from continual_datasets import scenarios, task_splits
from continual_datasets.images import DataError
from continual_datasets.scenarios import SCENARIOS, Scenario, find_scenario, scenario
from experiment import build
from helpers.command_lines import SHALLOW, rejections, settings_of
from helpers.tables import cases
from helpers.true_formats import TRUE_FORMATS

CPU = torch.device("cpu")
SEVERAL = "--dataset MNIST,SVHN,digits"


def problems_of(line):
    """Everything that is wrong with a scenario, wherever the data are."""
    return rejections(line, SHALLOW, elsewhere=True)


def stream_of(line, more="", global_batch=16, task_classes=None):
    settings = settings_of(line, more, "--input-size 16")
    return build.build_stream(settings, global_batch, CPU, task_classes)


def describe(stream):
    """Everything about a stream of tasks but its pixels."""

    def part(one):
        return one.index, one.name, one.classes, one.data.indices.tolist()

    return [(part(task), list(map(part, task.test_sets))) for task in stream.tasks]


#: Settings, and the scenario with its tasks and classes, and whether its tasks are joined.
FOUND = f"""
--scenario class-incremental -> class-incremental 10 100
--dataset digits --num_tasks 5 -> class-incremental 5 10
{SEVERAL} -> dataset-incremental 3 30
{SEVERAL} --scenario dataset-incremental -> dataset-incremental 3 30
--dataset MNIST --scenario dataset-incremental -> dataset-incremental 1 10
--scenario gaussian -> gaussian 200 100
--scenario gaussian --num_tasks 20 -> gaussian 20 100
--joint -> class-incremental 10 100 joint
--scenario joint -> class-incremental 10 100 joint
--scenario gaussian --joint -> gaussian 200 100 joint
{SEVERAL} --scenario joint -> dataset-incremental 3 30 joint
"""


def test_scenario_is_found_by_name_data_and_joint():
    for name, kind in SCENARIOS.items():
        assert kind.name == name
        assert kind.__name__ == name.title().replace("-", "")
    for line, wanted in (line.split(" -> ") for line in FOUND.strip().splitlines()):
        one = find_scenario(settings_of(line))
        found = f"{one.name} {one.num_tasks()} {one.num_classes()}" + " joint" * one.is_joint
        assert (found, type(one)) == (wanted, SCENARIOS[one.name]), line


def test_domains_are_counted_in_their_folders(tmp_path):
    TRUE_FORMATS["domains"](tmp_path, None)
    line = f"--scenario domain-incremental --dataset ImageFolder --data-path {tmp_path}"
    found = find_scenario(settings_of(line))
    assert (found.name, found.num_tasks(), found.num_classes()) == ("domain-incremental", 3, 2)
    with pytest.raises(DataError):
        find_scenario(settings_of(f"{line}/nowhere")).num_classes()


def test_unknown_names_are_rejected():
    known = "class-incremental, dataset-incremental, domain-incremental, gaussian, joint"
    for line, message in {
        "--scenario online": f"--scenario online is unknown: choose one of {known}",
        "--dataset CIFAR11": "--dataset CIFAR11 is unknown: choose one of ",
        "--dataset CIFAR11 --scenario joint": "--dataset CIFAR11 is unknown: choose one of ",
    }.items():
        with pytest.raises(ValueError) as caught:
            find_scenario(settings_of(line))
        assert str(caught.value).startswith(message)
        (problem,) = problems_of(line)
        assert problem.startswith(message)


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


@pytest.mark.parametrize("name", CHOSEN)
def test_flag_of_another_scenario_is_rejected_with_the_one_that_has_it(name):
    named = {flag.split()[0][2:] for flag in OWN_FLAGS} | {"file_lists"}
    assert {flag for kind in SCENARIOS.values() for flag in kind.own_flags} == named
    assert problems_of(CHOSEN[name]) == []
    single = "a single data set and " if name == "dataset-incremental" else ""
    for flag, owners in OWN_FLAGS.items():
        expected = [f"{flag}: needs {single}--scenario {' or '.join(owners)}"]
        if ("class-incremental" if name == "joint" else name) in owners:
            expected = []
        line = f"{CHOSEN[name]} {flag}"
        assert list(find_scenario(settings_of(line)).problems()) == problems_of(line) == expected


#: Settings; below, what contradicts them.
CONTRADICTIONS = f"""
--scenario dataset-incremental --dataset MNIST
  --scenario dataset-incremental makes a task of each data set: name several in --dataset
{SEVERAL} --scenario gaussian --epochs 1
  --scenario gaussian takes one data set; several (MNIST,SVHN,digits) are learned one after the \
other: leave --scenario out
{SEVERAL} --scenario domain-incremental
  --scenario domain-incremental takes one data set; several (MNIST,SVHN,digits) are learned one \
after the other: leave --scenario out
--scenario gaussian --epochs 5
  --epochs 5: --gaussian_reading paper trains every batch once, give --epochs 1, or more \
--steps_per_task
--scenario gaussian --epochs 5 --gaussian_reading released
--scenario gaussian --epochs 5 --joint
--file_lists x
  --file_lists x: needs --scenario domain-incremental
  --file_lists are those of CORe50: leave them out with --dataset CIFAR100
--dataset CORe50 --file_lists x --num_tasks 5
  --file_lists x: needs --scenario domain-incremental
--dataset CORe50 --scenario domain-incremental --file_lists x
--scenario joint --buffer_size 200
  --joint learns all tasks at once and has nothing to replay: leave the buffer out
"""


def test_contradictions_are_named():
    for line, problems in cases(CONTRADICTIONS):
        assert list(find_scenario(settings_of(line)).problems()) == problems_of(line) == problems


def test_joint_by_flag_and_by_name_give_the_same_stream(tmp_path):
    TRUE_FORMATS["MNIST"](tmp_path, None)
    for data in (
        "digits --num_tasks 2 --classes_per_task 3",
        f"MNIST,digits --data-path {tmp_path}",
    ):
        line = f"--dataset {data}"
        apart, joint, by_name = (stream_of(line, f) for f in ("", "--joint", "--scenario joint"))
        assert describe(joint) == describe(by_name)
        (task,) = joint.tasks
        assert sorted(task.classes) == sorted(itertools.chain(*(t.classes for t in apart.tasks)))
        assert len(task.data) == sum(len(t.data) for t in apart.tasks)
        assert task.test_sets == tuple(joint.test_sets)
        assert [(t.name, t.classes) for t in task.test_sets] == [
            (t.name, t.classes) for t in apart.tasks
        ]


def test_data_sets_in_a_row_by_name_and_by_themselves(tmp_path):
    TRUE_FORMATS["MNIST"](tmp_path, None)
    line = f"--dataset digits,MNIST --data-path {tmp_path}"
    found, named = stream_of(line), stream_of(line, "--scenario dataset-incremental")
    assert describe(found) == describe(named)
    assert [task.name for task in found.tasks] == ["digits", "MNIST"]
    assert found.num_classes == 20


def test_classes_that_fill_no_task_are_left_out():
    stream = stream_of("--dataset digits --num_tasks 3 --classes_per_task 2 --no-shuffle")
    assert stream.class_order == [[0, 1], [2, 3], [4, 5]]
    assert (stream.classes, stream.num_classes) == ((0, 1, 2, 3, 4, 5), 10)


def test_scenario_that_is_registered_runs_through_the_same_build(monkeypatch):
    monkeypatch.setattr(scenarios, "SCENARIOS", dict(SCENARIOS))

    @scenario("two-halves")
    class TwoHalves(Scenario):
        """The even classes, then the odd ones."""

        own_flags = ("class_order",)

        def num_tasks(self):
            return 2

        def build(self, source):
            train, test = source.only_part()
            order = [*range(0, len(train.classes), 2), *range(1, len(train.classes), 2)]
            groups = order[: len(order) // 2], order[len(order) // 2 :]
            return task_splits.by_classes(train, test, groups, source.transforms)

    line = "--dataset digits --scenario two-halves"
    assert problems_of(line) == []
    stream, joint = stream_of(line), stream_of(line, "--joint")
    assert stream.class_order == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert stream.pipeline is not None
    image, target = stream.tasks[1].data[0, 0]
    assert (image.shape, image.dtype, target % 2) == ((3, 16, 16), torch.uint8, 1)
    assert (joint.num_tasks, len(joint.test_sets)) == (1, 2)
    fewer = stream_of(line, "--eval_every 2")
    assert [len(task.test_sets) for task in fewer.tasks] == [0, 2]
    for said, problem in {
        f"{line} --steps_per_task 3": "--steps_per_task 3: needs --scenario gaussian",
        "--scenario domain-incremental --dataset CORe50 --class_order x":
            "--class_order x: needs --scenario class-incremental or gaussian or two-halves",
        f"{line} --num_tasks 3":
            "--num_tasks 3: the data are 2 tasks (digits, two-halves), give 2 or none",
    }.items():  # fmt: skip
        assert problems_of(said) == [problem]
    assert problems_of(f"{line},MNIST --dataset digits,MNIST")[0].startswith("--scenario two-")


def test_data_that_do_not_fit_are_reported_as_such():
    assert "two-halves" not in SCENARIOS
    line, message = "--dataset digits --num_tasks 3", "10 classes cannot be split evenly over"
    with pytest.raises(DataError, match=message):
        stream_of(line)
    with pytest.raises(ValueError, match=message):  # without the data
        find_scenario(settings_of(line)).check_classes()
    with pytest.raises(DataError, match="--scenario online is unknown"):
        stream_of("--scenario online")
    line = "--dataset digits --num_tasks 5"
    smallest = min(len(task.data) for task in stream_of(line).tasks)
    stream_of(line, "--drop_last", smallest)
    rejection = (
        rf"--drop_last leaves no step of task\d: it has {smallest} images, a step {smallest + 1}"
        "; lower --batch-size or leave --drop_last out"
    )
    with pytest.raises(DataError, match=rejection):
        stream_of(line, "--drop_last", smallest + 1)


def test_classes_of_tasks_are_in_natural_order_or_given():
    line, given = "--dataset digits --num_tasks 2", [[9, 1, 2, 3, 4], [5, 6, 7, 8, 0]]
    assert stream_of(line, "--no-shuffle").class_order == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert stream_of(line, task_classes=given).class_order == given
    with pytest.raises(DataError, match="gives a class to more than one task"):
        stream_of(line, task_classes=[[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
