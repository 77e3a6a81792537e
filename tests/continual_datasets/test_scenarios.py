"""Which tasks the settings describe, what they contradict, and the stream of tasks."""

import numpy as np
import pytest
import torch

from continual_datasets import scenarios, task_splits
from continual_datasets.images import DataError
from continual_datasets.scenarios import SCENARIOS, Scenario, StreamSource, find_scenario, scenario
from continual_datasets.task_data import TrainKey
from experiment import build
from helpers.command_lines import SHALLOW, rejections, settings_of
from helpers.tables import cases
from helpers.true_formats import write
from helpers.witnessed_loaders import CPU, joined, load, make_source, rows, without

SEVERAL = "--dataset MNIST,SVHN,digits"


def problems_of(line):
    """Everything that is wrong with a scenario, wherever the data are."""
    return rejections(line, SHALLOW, elsewhere=True)


def stream_of(line, more="", global_batch=16, task_classes=None):
    settings = settings_of(line, more, "--input-size 16")
    return build.build_stream(settings, global_batch, CPU, task_classes)


def built(line, train, test, task_classes=None):
    """The stream that a scenario makes of images; a global batch has one."""
    parts = tuple(part if isinstance(part, dict) else {"all": part} for part in (train, test))
    scenario = find_scenario(settings_of(line))
    return scenario.stream(StreamSource(parts, None, 1, task_classes))


#: Settings, and the scenario with its tasks and classes, and whether its tasks are joined.
FOUND = f"""
--scenario class-incremental -> class-incremental 10 100
--dataset digits --num_tasks 5 -> class-incremental 5 10
--classes_per_task 10 -> class-incremental 10 100
--classes_per_task 50 10 10 -> class-incremental 3 100
--first_task_classes 50 --classes_per_task 10 -> class-incremental 6 100
--first_task_classes 50 --classes_per_task 10 --num_tasks 3 -> class-incremental 3 100
--first_task_classes 50 --num_tasks 6 -> class-incremental 6 100
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
    write("domains", tmp_path)
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
    "--first_task_classes 2": ["class-incremental"],
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
--classes_per_task 50 10 10 --num_tasks 5
  --classes_per_task 50 10 10 are the sizes of all 3 tasks: give no --first_task_classes, and \
--num_tasks 3 or none
--classes_per_task 50 10 10 --num_tasks 3
--scenario joint --buffer_size 200
  --joint learns all tasks at once and has nothing to replay: leave the buffer out
"""


def test_contradictions_are_named():
    for line, problems in cases(CONTRADICTIONS):
        assert list(find_scenario(settings_of(line)).problems()) == problems_of(line) == problems


TRAIN, TEST = make_source(8), make_source(5, seed=1)
EPISODES = [(0, 2), (2, 3), (1,), (3, 0, 1)]
GAUSSIAN = "--scenario gaussian --steps_per_task"
RELEASED = "--scenario gaussian --gaussian_reading released"


def make_parts():
    """Three data sets of 6, 2 and 3 classes; the last lacks images of a class it names."""
    pairs = {
        "big": (make_source(4), make_source(2, seed=1)),
        "few": (make_source(3, 2, 2, "x"), make_source(1, 2, 3, "x")),
        "more": (without(make_source(3, 4, 4, "y"), 1), without(make_source(1, 4, 5, "y"), 1)),
    }
    return [{name: pair[split] for name, pair in pairs.items()} for split in (0, 1)]


def test_several_data_sets_stand_one_behind_the_other():
    train_parts, test_parts = make_parts()
    stream = built(SEVERAL, train_parts, test_parts)
    assert [(t.index, t.name) for t in stream.tasks] == [*enumerate(("big", "few", "more"))]
    names = (
        [f"big/name{i}" for i in range(6)],
        ["few/x0", "few/x1"],
        [f"more/y{i}" for i in range(4)],
    )
    assert stream.train.classes == joined(names)
    assert stream.class_order == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 10, 11]]
    assert rows(stream) == [[0], [0, 1], [0, 1, 2]]
    used = joined(task.data.indices.tolist() for task in stream.tasks)
    assert used == list(range(24 + 6 + 9)) == list(range(len(stream.train)))
    sources = train_parts.values(), test_parts.values()
    for task, train, test, offset in zip(stream.tasks, *sources, (0, 6, 8), strict=True):
        assert (task.data.source, task.test_sets[-1].name) == (stream.train, task.name)
        for data, part in ((task.data, train), (task.test_sets[-1].data, test)):
            assert data.source.targets[data.indices].tolist() == (part.targets + offset).tolist()
            assert data[1] == (part[1][0], part[1][1] + offset)
        assert task.test_sets[-1].classes == task.classes


def times_shown(task):
    """How often a task has each of its images, in rising order."""
    return sorted(np.unique(task.data.indices, return_counts=True)[1].tolist())


def test_paper_trains_exactly_its_steps_on_the_classes_of_the_episode():
    stream, again, other = (
        built(f"{GAUSSIAN} 10 --seed {seed}", TRAIN, TEST, EPISODES) for seed in (42, 42, 43)
    )
    assert stream.class_order == [list(classes) for classes in EPISODES]
    assert rows(stream) == [[0]] * 4
    (test_set,) = stream.test_sets
    assert test_set.classes == stream.classes == (0, 1, 2, 3, 4, 5)  # two in no episode
    assert (test_set.data.source, test_set.data.indices.tolist()) == (TEST, list(range(30)))
    for index, task in enumerate(stream.tasks):
        assert (task.index, task.name, len(task.data)) == (index, f"episode{index + 1}", 10)
        assert set(TRAIN.targets[task.data.indices]) <= set(task.classes)
        twice = 2 if len(task.classes) == 1 else 0  # of one class there are eight images
        assert times_shown(task) == [1] * (10 - 2 * twice) + [2] * twice
        assert task.data.indices.tolist() == again.tasks[index].data.indices.tolist()
        assert task.data.indices.tolist() != other.tasks[index].data.indices.tolist()
    (few,) = built(f"{GAUSSIAN} 35", TRAIN, TEST, [(1,)]).tasks
    assert times_shown(few) == [4] * 5 + [5] * 3


def test_paper_draws_anew_in_every_episode_and_from_all_images_and_the_release_trains_all():
    stream = built(f"{GAUSSIAN} 4", TRAIN, TEST, [(0, 1)] * 60)
    counts = np.bincount(joined(t.data.indices.tolist() for t in stream.tasks), minlength=48)
    shown = counts[np.isin(TRAIN.targets, (0, 1))]
    assert counts.sum() == shown.sum() == 240
    assert (shown > 3).all()
    assert shown.max() < 32
    for task in built(RELEASED, TRAIN, TEST, EPISODES).tasks:
        wanted = np.flatnonzero(np.isin(TRAIN.targets, task.classes))
        assert task.data.indices.tolist() == wanted.tolist()


def test_episodes_are_drawn_from_all_classes_which_all_have_images(tmp_path):
    line, few = f"{GAUSSIAN} 5 --num_tasks 20", tmp_path / "few"
    stream = built(line, TRAIN, TEST)
    order = find_scenario(settings_of(line)).class_order(TRAIN.classes)
    assert stream.class_order == [
        list(classes) for classes in task_splits.gaussian_episodes(order, 20, 5, 50.0, 42)
    ]
    with pytest.raises(DataError, match="no test image of class name3"):
        built(line, TRAIN, without(TEST, 3), EPISODES[:1])
    few.write_text("1 2 3")
    with pytest.raises(ValueError, match="few names 3 of 6 classes: --scenario gaussian takes all"):
        built(f"{line} --class_order {few}", TRAIN, TEST)


DOMAINS = {name: make_source(3, seed=i) for i, name in enumerate(("sun", "rain", "snow"))}

#: Settings and what they split; how many images the joint task has, its classes and test sets.
JOINT = {
    "classes": ("--num_tasks 3 --no-shuffle", (TRAIN, TEST), 48, (0, 1, 2, 3, 4, 5), 3),
    "some": ("--num_tasks 3 --classes_per_task 1", (TRAIN, TEST, [[4], [2], [0]]), 24,
             (4, 2, 0), 3),
    "data sets": (SEVERAL, make_parts(), 39, (*range(9), 10, 11), 3),
    "domains": ("--scenario domain-incremental --dataset CORe50", (DOMAINS, {"all": TEST}),
                54, tuple(range(6)), 1),
    "episodes": (RELEASED, (TRAIN, TEST, EPISODES), 32, (0, 2, 3, 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINT)
def test_joint_is_one_task_of_every_image_tested_on_everything(name):
    line, images, number, classes, num_test_sets = JOINT[name]
    stream, joint = built(line, *images), built(f"{line} --joint", *images)
    (task,) = joint.tasks
    assert (task.index, task.name, task.classes) == (0, "all tasks", classes)
    assert [(s.index, s.name, s.classes) for s in joint.test_sets] == [
        (s.index, s.name, s.classes) for s in stream.test_sets
    ]
    assert rows(joint) == [list(range(num_test_sets))]
    assert (joint.classes, joint.num_classes) == (stream.classes, stream.num_classes)
    wanted = sorted(set(joined(one.data.indices.tolist() for one in stream.tasks)))
    assert (len(task.data), task.data.indices.tolist()) == (number, wanted)
    assert set(joint.train.targets[wanted].tolist()) == set(classes)
    assert task.data.source is joint.train
    if "--scenario" not in line:
        assert built(f"{line} --scenario joint", *images).class_order == joint.class_order


def test_classes_that_fill_no_task_are_left_out():
    stream = stream_of("--dataset digits --num_tasks 3 --classes_per_task 2 --no-shuffle")
    assert stream.class_order == [[0, 1], [2, 3], [4, 5]]
    assert (stream.classes, stream.num_classes) == ((0, 1, 2, 3, 4, 5), 10)
    for sizes, order in {
        "--classes_per_task 4 1 2": [[0, 1, 2, 3], [4], [5, 6]],
        "--first_task_classes 4 --classes_per_task 3": [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]],
    }.items():
        assert stream_of(f"--dataset digits --no-shuffle {sizes}").class_order == order


def test_images_per_class_leaves_test_images_in_every_scenario(tmp_path):
    write("domains", tmp_path)
    domains = f"--dataset ImageFolder --data-path {tmp_path} --scenario domain-incremental"
    gaussian = "--dataset digits --scenario gaussian --num_tasks 20 --gaussian_reading released"
    for line in ("--dataset digits --num_tasks 5", gaussian, domains):
        whole, fewer = stream_of(line), stream_of(line, "--images_per_class 1")
        assert fewer.class_order == whole.class_order
        assert fewer.test_digest == whole.test_digest
        for task in fewer.tasks:
            assert sorted(task.data.source.targets[task.data.indices]) == sorted(task.classes)


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
    (image,), (target,) = load(stream, TrainKey(1, 0, 0))
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
