"""How data become tasks."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cli.settings import TransformSettings
from continual_datasets import task_splits
from continual_datasets.images import ArraySource, DataError
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.task_splits import Transforms
from continual_datasets.transforms import build_transform

SMALL = TransformSettings(input_size=16)
PLAIN = build_transform(False, SMALL)
PREPARE = Transforms(build_transform(True, SMALL), PLAIN, seed=42)


def make_source(per_class, num_classes=6, seed=0, name="name"):
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    return ArraySource(images, targets, [f"{name}{i}" for i in range(num_classes)])


def make_stream(order=(3, 1, 5, 0, 2, 4), num_tasks=3):
    train, test = make_source(7), make_source(5, seed=1)
    return task_splits.class_incremental(
        train, test, order, num_tasks, len(order) // num_tasks, PREPARE
    )


def without(source, class_id):
    keep = source.targets != class_id
    return ArraySource(source.images[keep], source.targets[keep], source.classes)


def rows(task):
    """Rows of the accuracy matrix that are filled after a task."""
    return [test_set.index for test_set in task.test_sets]


# Class-incremental


def test_class_incremental_splits_classes_and_keeps_ids():
    train, test = make_source(7), make_source(5, seed=1)
    stream = make_stream()
    assert (stream.num_tasks, stream.num_classes) == (3, 6)
    assert stream.class_order == [[3, 1], [5, 0], [2, 4]]
    assert stream.classes == (0, 1, 2, 3, 4, 5)
    assert stream.class_names == tuple(train.classes)
    assert stream.train_targets.tolist() == train.targets.tolist()
    for index, task in enumerate(stream.tasks):
        assert (task.index, len(task.data)) == (index, 14)
        positions = np.flatnonzero(np.isin(train.targets, task.classes))
        assert task.data.indices.tolist() == positions.tolist()
        assert task.data.targets.tolist() == train.targets[positions].tolist()
        assert rows(task) == list(range(index + 1))
        latest = task.test_sets[-1]
        assert latest.classes == task.classes
        positions = np.flatnonzero(np.isin(test.targets, task.classes))
        assert latest.data.targets.tolist() == test.targets[positions].tolist()
        image, target = latest.data[3]
        assert torch.equal(image, PLAIN(test[positions[3]][0]))
        assert target == test.targets[positions[3]]
    first_sets = [task.test_sets[0] for task in stream.tasks]
    assert all(test_set is first_sets[0] for test_set in first_sets)


def test_class_incremental_leaves_the_rest_of_the_order_out():
    stream = make_stream(order=(4, 2, 0), num_tasks=3)
    assert stream.classes == (0, 2, 4)
    assert stream.num_classes == 6
    stream = task_splits.class_incremental(
        make_source(7), make_source(5), (4, 2, 0, 1), 3, 1, PREPARE
    )
    assert stream.class_order == [[4], [2], [0]]


@pytest.mark.parametrize("split", ["training", "test"])
def test_class_without_images_is_named(split):
    sources = {"training": make_source(3), "test": make_source(3, seed=1)}
    sources[split] = without(sources[split], 4)
    make = partial(task_splits.class_incremental, *sources.values())
    with pytest.raises(DataError, match=f"no {split} image of class name4"):
        make(range(6), 3, 2, PREPARE)
    make((0, 1, 2, 3), 2, 2, PREPARE)


def test_other_scenarios_fit_the_same_types():
    stream = make_stream()
    shared = stream.tasks[0].test_sets
    tasks = tuple(Task(i, f"s{i}", stream.tasks[0].data, (0, 1), shared) for i in range(300))
    long = TaskStream(tasks, stream.train)
    assert long.num_tasks == 300
    assert [test_set.index for test_set in long.test_sets] == [0]
    assert isinstance(shared[0], TestSet)


# Several data sets


def make_parts():
    """Three data sets of 6, 2 and 3 classes; the second lacks images of a class it names."""
    pairs = {
        "big": (make_source(4), make_source(2, seed=1)),
        "few": (make_source(3, 2, 2, "x"), make_source(1, 2, 3, "x")),
        "more": (without(make_source(3, 4, 4, "y"), 1), without(make_source(1, 4, 5, "y"), 1)),
    }
    return [{name: pair[split] for name, pair in pairs.items()} for split in (0, 1)]


def test_several_data_sets_stand_one_behind_the_other():
    train_parts, test_parts = make_parts()
    stream = task_splits.several_data_sets(train_parts, test_parts, PREPARE)
    assert [task.name for task in stream.tasks] == ["big", "few", "more"]
    assert stream.num_classes == 6 + 2 + 4
    assert stream.class_names[:2] == ("big/name0", "big/name1")
    assert stream.class_names[6:9] == ("few/x0", "few/x1", "more/y0")
    assert stream.class_order == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 10, 11]]
    assert [rows(task) for task in stream.tasks] == [[0], [0, 1], [0, 1, 2]]
    used = np.concatenate([task.data.indices for task in stream.tasks])
    assert used.tolist() == list(range(24 + 6 + 9)) == list(range(len(stream.train_targets)))
    sources = train_parts.values(), test_parts.values()
    for task, train, test, offset in zip(stream.tasks, *sources, (0, 6, 8), strict=True):
        assert task.data.targets.tolist() == (train.targets + offset).tolist()
        assert stream.train_targets[task.data.indices].tolist() == task.data.targets.tolist()
        latest = task.test_sets[-1]
        assert (latest.name, latest.classes) == (task.name, task.classes)
        assert latest.data.targets.tolist() == (test.targets + offset).tolist()
        image, target = latest.data[1]
        assert torch.equal(image, PLAIN(test[1][0]))
        assert target == test.targets[1] + offset
        task.data.transform = PLAIN
        image, target = task.data[0, 2]
        assert torch.equal(image, PLAIN(train[2][0]))
        assert target == train.targets[2] + offset


# Domain-incremental


def make_domains():
    return {name: make_source(3, seed=i) for i, name in enumerate(("sun", "rain", "snow"))}


def test_domains_with_one_test_set_are_all_tested_on_it():
    train, test = make_domains(), make_source(2, seed=9)
    stream = task_splits.domain_incremental(train, {"the rest": test}, PREPARE)
    assert [task.name for task in stream.tasks] == list(train)
    assert stream.num_classes == 6
    assert stream.class_order == [[0, 1, 2, 3, 4, 5]] * 3
    assert [rows(task) for task in stream.tasks] == [[0]] * 3
    (test_set,) = stream.test_sets
    assert (test_set.name, len(test_set.data)) == ("the rest", 12)
    for first, task, source in zip((0, 18, 36), stream.tasks, train.values(), strict=True):
        assert task.data.indices.tolist() == list(range(first, first + 18))
        assert task.data.targets.tolist() == source.targets.tolist()
        task.data.transform = PLAIN
        assert torch.equal(task.data[0, 5][0], PLAIN(source[5][0]))


def test_domains_with_test_sets_of_their_own_are_tested_so_far():
    train = make_domains()
    test = {name: make_source(2, seed=10 + i) for i, name in enumerate(train)}
    stream = task_splits.domain_incremental(train, test, PREPARE)
    assert [rows(task) for task in stream.tasks] == [[0], [0, 1], [0, 1, 2]]
    assert [test_set.name for test_set in stream.test_sets] == list(train)
    for test_set, source in zip(stream.test_sets, test.values(), strict=True):
        assert test_set.data.targets.tolist() == source.targets.tolist()


def test_classes_of_a_domain_are_those_that_occur_in_it():
    train = make_domains()
    train["rain"] = without(train["rain"], 2)
    stream = task_splits.domain_incremental(train, {"all": make_source(2)}, PREPARE)
    assert stream.class_order[1] == [0, 1, 3, 4, 5]
    assert stream.num_classes == 6


# Gaussian schedule


def test_presence_is_that_of_the_paper():
    """200 episodes of five steps, 100 classes, a standard deviation of 50 steps."""
    probabilities = task_splits.presence(100, 200, 5, 50)
    assert probabilities.shape == (200, 100)
    expected = probabilities.sum(axis=1)
    assert expected.mean() == pytest.approx(12.0, abs=0.05)
    assert expected[80:120] == pytest.approx(np.full(40, 12.53), abs=0.02)
    assert expected[0] == pytest.approx(6.3, abs=0.5)
    assert expected[-1] == pytest.approx(6.3, abs=0.5)
    assert probabilities.max() == 1
    peaks = probabilities.argmax(axis=0)
    assert (np.diff(peaks) == 2).all()  # a class every ten steps
    assert peaks[0] == 1  # at step five


def test_presence_is_that_of_the_release():
    expected = task_splits.presence(100, 200, 1, 50).sum(axis=1)
    assert expected.mean() == pytest.approx(50, abs=0.5)
    assert expected.min() == pytest.approx(31, abs=1)
    assert expected.max() == pytest.approx(60, abs=1)
    assert expected.argmin() in (0, 199)


def test_presence_equals_its_formula():
    found = task_splits.presence(3, 4, 2, 1.5)
    spacing = 8 // 3
    for episode in range(4):
        for class_id in range(3):
            distance = episode * 2 - (spacing // 2 + class_id * spacing)
            wanted = np.exp(-(distance**2) / (2 * 1.5**2))
            assert found[episode, class_id] == pytest.approx(wanted)


def test_schedule_of_fewer_positions_than_classes_is_rejected():
    with pytest.raises(ValueError, match="4 tasks x 2 steps = 8 positions for the peaks of 9"):
        task_splits.presence(9, 4, 2, 50)
    with pytest.raises(ValueError, match="use at least 9"):
        task_splits.gaussian_episodes(range(9), 4, 2, 50, 0)
    assert task_splits.presence(8, 4, 2, 50).shape == (4, 8)


def drawn(seed=0, order=range(20), num_episodes=40, steps=5, sigma=10.0):
    return task_splits.gaussian_episodes(order, num_episodes, steps, sigma, seed)


def test_drawn_episodes_agree_with_the_probabilities():
    probabilities = task_splits.presence(20, 40, 5, 10)
    present = np.zeros((300, *probabilities.shape), dtype=bool)
    for seed in range(300):
        for index, classes in enumerate(drawn(seed)):
            present[seed, index, list(classes)] = True
    counts = present.sum(axis=0)
    empty = (1 - probabilities).prod(axis=1, keepdims=True)  # is drawn again
    expected = probabilities / (1 - empty)
    spread = np.sqrt(300 * expected * (1 - expected)) + 0.5
    assert (np.abs(counts - 300 * expected) < 5 * spread).all()
    sizes = present.sum(axis=2)  # of independent draws, so variances add up
    variances = (probabilities * (1 - probabilities)).sum(axis=1)
    assert sizes.var(axis=0)[5:35] == pytest.approx(variances[5:35], rel=0.4)
    together = np.corrcoef(sizes[:, 5:35].T)[~np.eye(30, dtype=bool)]
    assert np.abs(together).max() < 0.25  # nor does one episode depend on another


def test_episodes_are_never_empty_and_follow_from_the_seed_alone():
    np.random.seed(5)
    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)
    narrow = drawn(sigma=2.2, num_episodes=15, steps=7, order=range(9))
    assert all(narrow)
    chance_of_none = (1 - task_splits.presence(9, 15, 7, 2.2)).prod(axis=1)
    assert chance_of_none.max() > 0.9  # so some were drawn again
    assert len(set(drawn())) > 20


def test_presence_too_short_to_fill_every_episode_is_rejected():
    """Else drawing again an episode without classes would never end."""
    with pytest.raises(ValueError, match="sigma"):
        task_splits.presence(10, 60, 1, 0.01)


def test_episodes_keep_the_order_of_classes():
    natural, turned = drawn(), drawn(order=[19 - i for i in range(20)])
    assert [tuple(19 - c for c in classes) for classes in natural] == turned
    assert 0 in natural[0] + natural[1]
    assert 19 in natural[-1] + natural[-2]


EPISODES = [(0, 2), (2, 3), (1,), (3, 0, 1)]


def make_gaussian(images_per_episode, episodes=EPISODES, seed=42):
    train, test = make_source(8), make_source(2, seed=1)
    prepare = replace(PREPARE, seed=seed)
    return task_splits.gaussian(train, test, episodes, images_per_episode, prepare)


def test_episodes_are_tasks_with_one_test_set():
    stream = make_gaussian(10)
    assert stream.class_order == [list(classes) for classes in EPISODES]
    assert stream.num_classes == 6
    assert [task.index for task in stream.tasks] == [0, 1, 2, 3]
    assert [rows(task) for task in stream.tasks] == [[0]] * 4
    (test_set,) = stream.test_sets
    assert test_set.classes == stream.classes == (0, 1, 2, 3, 4, 5)  # two in no episode
    assert sorted(test_set.data.targets.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_paper_trains_exactly_its_steps_on_the_classes_of_the_episode():
    stream = make_gaussian(10)
    for task in stream.tasks:
        assert len(task.data) == 10
        assert set(task.data.targets.tolist()) <= set(task.classes)
        times = np.unique(task.data.indices, return_counts=True)[1]
        if len(task.classes) > 1:
            assert times.max() == 1
        else:  # eight images: two of them twice
            assert sorted(times.tolist()) == [1] * 6 + [2] * 2
    again, other = make_gaussian(10), make_gaussian(10, seed=43)
    for task, same, differing in zip(stream.tasks, again.tasks, other.tasks, strict=True):
        assert task.data.indices.tolist() == same.data.indices.tolist()
        assert task.data.indices.tolist() != differing.data.indices.tolist()


def test_paper_draws_anew_in_every_episode_and_from_all_images():
    stream = make_gaussian(4, episodes=[(0, 1)] * 60)
    counts = np.zeros(48)
    for task in stream.tasks:
        counts[task.data.indices] += 1
    shown = counts[np.isin(stream.train_targets, (0, 1))]
    assert counts.sum() == shown.sum() == 240
    assert (shown > 3).all()
    assert shown.max() < 32


def test_images_of_episodes_need_many_rounds_where_there_are_few():
    stream = make_gaussian(35, episodes=[(1,)])
    times = np.unique(stream.tasks[0].data.indices, return_counts=True)[1]
    assert sorted(times.tolist()) == [4] * 5 + [5] * 3


def test_release_trains_all_images_of_the_classes():
    stream = make_gaussian(None)
    for task in stream.tasks:
        wanted = np.flatnonzero(np.isin(stream.train_targets, task.classes))
        assert task.data.indices.tolist() == wanted.tolist()


# All at once


def assert_joint(stream, num_images):
    """One task of every image and class, tested on everything."""
    joint = task_splits.joint(stream, PREPARE)
    (task,) = joint.tasks
    assert task.index == 0
    assert sorted(task.classes) == sorted({c for one in stream.tasks for c in one.classes})
    assert joint.classes == stream.classes
    assert joint.num_classes == stream.num_classes
    assert joint.class_names == stream.class_names
    wanted = set(np.concatenate([one.data.indices for one in stream.tasks]).tolist())
    assert len(task.data) == num_images == len(wanted)
    assert set(task.data.indices.tolist()) == wanted
    assert task.data.targets.tolist() == stream.train_targets[task.data.indices].tolist()
    assert list(task.test_sets) == joint.test_sets == stream.test_sets
    task.data.transform = PLAIN
    last = len(task.data) - 1
    image, target = task.data.source[int(task.data.indices[last])]
    assert torch.equal(task.data[0, last][0], PLAIN(image))
    assert task.data[0, last][1] == target
    return task


def test_joint_of_classes():
    task = assert_joint(make_stream(), 42)
    assert task.classes == (3, 1, 5, 0, 2, 4)
    assert rows(task) == [0, 1, 2]


def test_joint_of_some_classes_has_their_images_alone():
    task = assert_joint(make_stream(order=(4, 2, 0)), 21)
    assert set(task.data.targets.tolist()) == {0, 2, 4}


def test_joint_of_several_data_sets():
    task = assert_joint(task_splits.several_data_sets(*make_parts(), PREPARE), 39)
    assert rows(task) == [0, 1, 2]
    assert set(task.data.targets.tolist()) == {*range(8), 8, 10, 11}


def test_joint_of_domains_with_one_test_set():
    stream = task_splits.domain_incremental(make_domains(), {"all": make_source(2)}, PREPARE)
    assert rows(assert_joint(stream, 54)) == [0]


def test_joint_of_episodes_has_every_image_once():
    task = assert_joint(make_gaussian(None), 32)
    assert task.classes == (0, 2, 3, 1)
    assert rows(task) == [0]


# Evaluating now and then


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7]),
        (2, [2, 4, 6, 7]),
        (3, [3, 6, 7]),
        (7, [7]),
        (100, [7]),
    ],
)
def test_evaluations_are_left_after_every_nth_task_and_the_last(every, expected):
    stream = make_gaussian(3, episodes=[(0, 1)] * 7)
    fewer = task_splits.evaluate_every(stream, every)
    assert [task.index + 1 for task in fewer.tasks if task.test_sets] == expected
    assert len(fewer.test_sets) == 1
    for task, same in zip(fewer.tasks, stream.tasks, strict=True):
        assert task.test_sets in ((), same.test_sets)
        assert task.data is same.data


def test_evaluations_that_are_left_test_all_tasks_so_far():
    fewer = task_splits.evaluate_every(make_stream(), 2)
    assert [rows(task) for task in fewer.tasks] == [[], [0, 1], [0, 1, 2]]
    assert [test_set.index for test_set in fewer.test_sets] == [0, 1, 2]


def test_test_images_that_stand_class_by_class_are_mixed_in_one_way():
    """Else the images that vote together would be of one class, which the vote would tell."""
    test = make_source(20, seed=1)
    order = np.argsort(test.targets, kind="stable")
    test = ArraySource(test.images[order], test.targets[order], test.classes)
    test.by_class = True
    data = PREPARE.test(test)
    assert sorted(data.indices.tolist()) == list(range(len(test)))
    groups = data.targets[: len(test) // 10 * 10].reshape(-1, 10)
    assert min(len(set(group)) for group in groups.tolist()) > 1
    other = Transforms(PREPARE.train_transform, PREPARE.test_transform, seed=7)
    assert other.test(test).indices.tolist() == data.indices.tolist()
    test.by_class = False
    assert PREPARE.test(test).indices.tolist() == list(range(len(test)))


def test_image_that_occurs_again_is_augmented_anew():
    indices = np.array([4, 2, 4, 4, 2])
    data = PREPARE.train(make_source(7), indices, 0)
    images = [data[0, position][0] for position in range(5)]
    for one, other in ((0, 2), (0, 3), (2, 3), (1, 4)):
        assert not torch.equal(images[one], images[other])
    alone = PREPARE.train(make_source(7), np.array([2, 4]), 0)
    assert torch.equal(alone[0, 0][0], images[1])
    assert torch.equal(alone[0, 1][0], images[0])
