"""How data become tasks."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cli.settings import TransformSettings
from continual_datasets import task_splits
from continual_datasets.images import ArraySource, DataError
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


TRAIN, TEST = make_source(7), make_source(5, seed=1)


def make_stream(order=(3, 1, 5, 0, 2, 4), num_tasks=3):
    size = len(order) // num_tasks
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    return task_splits.by_classes(TRAIN, TEST, groups, PREPARE)


def without(source, class_id):
    keep = source.targets != class_id
    return ArraySource(source.images[keep], source.targets[keep], source.classes)


def rows(stream):
    """Rows of the accuracy matrix that are filled after each task."""
    return [[test_set.index for test_set in task.test_sets] for task in stream.tasks]


def assert_shows(data, position, source, index, offset=0):
    """Whether data give this image of a source, with its label, where nothing augments it."""
    image, target = data[position]
    assert torch.equal(image, PLAIN(source[index][0]))
    assert target == source.targets[index] + offset


def assert_augments_as(data, task, position=0):
    """Whether crop and flip of an image are those of its place and task."""
    same, other = (
        PREPARE.train(data.source, data.indices, index)[0, position][0]
        for index in (task, task + 1)
    )
    assert torch.equal(data[0, position][0], same)
    assert not torch.equal(same, other)


def unaugmented(data):
    data.transform = PLAIN
    return data


def test_class_incremental_splits_classes_and_keeps_ids():
    stream = make_stream()
    assert (stream.num_tasks, stream.num_classes) == (3, 6)
    assert stream.class_order == [[3, 1], [5, 0], [2, 4]]
    assert stream.classes == (0, 1, 2, 3, 4, 5)
    assert stream.class_names == tuple(TRAIN.classes)
    assert stream.train_targets.tolist() == TRAIN.targets.tolist()
    assert rows(stream) == [[0], [0, 1], [0, 1, 2]]
    for index, task in enumerate(stream.tasks):
        assert (task.index, task.name, len(task.data)) == (index, f"task{index + 1}", 14)
        positions = np.flatnonzero(np.isin(TRAIN.targets, task.classes))
        assert task.data.indices.tolist() == positions.tolist()
        assert task.data.targets.tolist() == TRAIN.targets[positions].tolist()
        assert_augments_as(task.data, index)
        latest = task.test_sets[-1]
        assert (latest.name, latest.classes) == (task.name, task.classes)
        positions = np.flatnonzero(np.isin(TEST.targets, task.classes))
        assert latest.data.targets.tolist() == TEST.targets[positions].tolist()
        assert_shows(latest.data, 3, TEST, positions[3])
        assert task.test_sets[0] is stream.tasks[0].test_sets[0]


def test_class_incremental_leaves_the_rest_of_the_order_out():
    stream = make_stream(order=(4, 2, 0), num_tasks=3)
    assert (stream.classes, stream.num_classes) == ((0, 2, 4), 6)


@pytest.mark.parametrize("split", ["training", "test"])
def test_class_without_images_is_named(split):
    sources = {"training": TRAIN, "test": TEST}
    sources[split] = without(sources[split], 4)
    make = partial(task_splits.by_classes, *sources.values(), transforms=PREPARE)
    with pytest.raises(DataError, match=f"no {split} image of class name4"):
        make([(0, 1), (2, 3), (4, 5)])
    make([(0, 1), (2, 3)])


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
    stream = task_splits.several_data_sets(train_parts, test_parts, PREPARE)
    assert [(task.index, task.name) for task in stream.tasks] == [
        *enumerate(("big", "few", "more"))
    ]
    assert stream.num_classes == 6 + 2 + 4
    assert stream.class_names[:2] == ("big/name0", "big/name1")
    assert stream.class_names[6:9] == ("few/x0", "few/x1", "more/y0")
    assert stream.class_order == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 10, 11]]
    assert rows(stream) == [[0], [0, 1], [0, 1, 2]]
    used = np.concatenate([task.data.indices for task in stream.tasks])
    assert used.tolist() == list(range(24 + 6 + 9)) == list(range(len(stream.train_targets)))
    sources = train_parts.values(), test_parts.values()
    for task, train, test, offset in zip(stream.tasks, *sources, (0, 6, 8), strict=True):
        assert task.data.targets.tolist() == (train.targets + offset).tolist()
        assert stream.train_targets[task.data.indices].tolist() == task.data.targets.tolist()
        assert_augments_as(task.data, task.index)
        latest = task.test_sets[-1]
        assert (latest.name, latest.classes) == (task.name, task.classes)
        assert latest.data.targets.tolist() == (test.targets + offset).tolist()
        assert_shows(latest.data, 1, test, 1, offset)
        assert_shows(unaugmented(task.data), (0, 2), train, 2, offset)


def make_domains():
    return {name: make_source(3, seed=i) for i, name in enumerate(("sun", "rain", "snow"))}


def test_domains_are_tested_on_one_set_or_on_each_so_far():
    train = make_domains()
    train["rain"] = without(train["rain"], 2)
    stream = task_splits.domain_incremental(train, {"the rest": TEST}, PREPARE)
    assert [task.name for task in stream.tasks] == list(train)
    assert stream.class_order == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert stream.num_classes == 6
    assert rows(stream) == [[0]] * 3
    (test_set,) = stream.test_sets
    assert (test_set.name, len(test_set.data)) == ("the rest", 30)
    for first, task, source in zip((0, 18, 33), stream.tasks, train.values(), strict=True):
        assert task.data.indices.tolist() == list(range(first, first + len(source)))
        assert task.data.targets.tolist() == source.targets.tolist()
        assert_shows(unaugmented(task.data), (0, 5), source, 5)
    test = {name: make_source(2, seed=10 + i) for i, name in enumerate(train)}
    stream = task_splits.domain_incremental(train, test, PREPARE)
    assert rows(stream) == [[0], [0, 1], [0, 1, 2]]
    assert [test_set.name for test_set in stream.test_sets] == list(train)
    for test_set, source in zip(stream.test_sets, test.values(), strict=True):
        assert test_set.data.targets.tolist() == source.targets.tolist()


def test_presence_is_that_of_its_formula_the_paper_and_the_release():
    """200 episodes of five steps, or of one; 100 classes, a standard deviation of 50 steps."""
    found = task_splits.presence(3, 4, 2, 1.5)
    for episode, class_id in np.ndindex(4, 3):
        distance = episode * 2 - (1 + class_id * 2)  # the peaks are two of eight steps apart
        assert found[episode, class_id] == pytest.approx(np.exp(-(distance**2) / (2 * 1.5**2)))
    paper = task_splits.presence(100, 200, 5, 50)
    assert (paper.shape, paper.max()) == ((200, 100), 1)
    assert paper.sum(axis=1).mean() == pytest.approx(12.0, abs=0.05)
    assert paper[80:120].sum(axis=1) == pytest.approx(np.full(40, 12.53), abs=0.02)
    assert paper[[0, -1]].sum(axis=1) == pytest.approx([6.3, 6.3], abs=0.5)
    assert paper.argmax(axis=0).tolist() == list(range(1, 200, 2))  # at step 5, 15, ...
    release = task_splits.presence(100, 200, 1, 50).sum(axis=1)
    assert release.mean() == pytest.approx(50, abs=0.5)
    assert (release.min(), release.max()) == pytest.approx((31, 60), abs=1)
    assert release.argmin() in (0, 199)


def test_schedule_without_room_for_its_classes_is_rejected():
    """Fewer positions than classes; or so short a presence that drawing again would never end."""
    with pytest.raises(ValueError, match="4 tasks x 2 steps = 8 positions for the peaks of 9"):
        task_splits.presence(9, 4, 2, 50)
    with pytest.raises(ValueError, match="use at least 9"):
        task_splits.gaussian_episodes(range(9), 4, 2, 50, 0)
    assert task_splits.presence(8, 4, 2, 50).shape == (4, 8)
    with pytest.raises(ValueError, match="leaves an episode without classes"):
        task_splits.presence(10, 60, 1, 0.01)


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


def test_episodes_are_never_empty_and_follow_from_seed_and_order_alone():
    natural, turned = drawn(), drawn(order=range(19, -1, -1))
    np.random.seed(5)
    assert drawn() == natural != drawn(seed=1)
    assert len(set(natural)) > 20
    assert [tuple(19 - c for c in classes) for classes in natural] == turned
    assert 0 in natural[0] + natural[1]
    assert 19 in natural[-1] + natural[-2]
    chance_of_none = (1 - task_splits.presence(9, 15, 7, 2.2)).prod(axis=1)
    assert chance_of_none.max() > 0.9  # so some were drawn again
    assert all(drawn(sigma=2.2, num_episodes=15, steps=7, order=range(9)))


EPISODES = [(0, 2), (2, 3), (1,), (3, 0, 1)]


def make_gaussian(images_per_episode, episodes=EPISODES, seed=42):
    transforms = replace(PREPARE, seed=seed)
    return task_splits.gaussian(make_source(8), TEST, episodes, images_per_episode, transforms)


def times_shown(task):
    """How often a task has each of its images, in rising order."""
    return sorted(np.unique(task.data.indices, return_counts=True)[1].tolist())


def test_paper_trains_exactly_its_steps_on_the_classes_of_the_episode():
    stream, again, other = make_gaussian(10), make_gaussian(10), make_gaussian(10, seed=43)
    assert stream.class_order == [list(classes) for classes in EPISODES]
    assert stream.num_classes == 6
    assert rows(stream) == [[0]] * 4
    (test_set,) = stream.test_sets
    assert test_set.classes == stream.classes == (0, 1, 2, 3, 4, 5)  # two in no episode
    assert test_set.data.targets.tolist() == TEST.targets.tolist()
    for index, task in enumerate(stream.tasks):
        assert (task.index, task.name, len(task.data)) == (index, f"episode{index + 1}", 10)
        assert_augments_as(task.data, index)
        assert set(task.data.targets.tolist()) <= set(task.classes)
        twice = 2 if len(task.classes) == 1 else 0  # of one class there are eight images
        assert times_shown(task) == [1] * (10 - 2 * twice) + [2] * twice
        assert task.data.indices.tolist() == again.tasks[index].data.indices.tolist()
        assert task.data.indices.tolist() != other.tasks[index].data.indices.tolist()
    few = make_gaussian(35, episodes=[(1,)])
    assert times_shown(few.tasks[0]) == [4] * 5 + [5] * 3


def test_paper_draws_anew_in_every_episode_and_from_all_images():
    stream = make_gaussian(4, episodes=[(0, 1)] * 60)
    counts = np.bincount(np.concatenate([t.data.indices for t in stream.tasks]), minlength=48)
    shown = counts[np.isin(stream.train_targets, (0, 1))]
    assert counts.sum() == shown.sum() == 240
    assert (shown > 3).all()
    assert shown.max() < 32


def test_release_trains_all_images_of_the_classes():
    stream = make_gaussian(None)
    for task in stream.tasks:
        wanted = np.flatnonzero(np.isin(stream.train_targets, task.classes))
        assert task.data.indices.tolist() == wanted.tolist()


#: A stream; the images and the classes of its joint task, and the rows of its accuracies.
STREAMS = {
    "classes": (make_stream, 42, (3, 1, 5, 0, 2, 4), [0, 1, 2]),
    "some classes": (lambda: make_stream(order=(4, 2, 0)), 21, (4, 2, 0), [0, 1, 2]),
    "data sets": (lambda: task_splits.several_data_sets(*make_parts(), PREPARE),
                  39, (*range(9), 10, 11), [0, 1, 2]),
    "domains": (lambda: task_splits.domain_incremental(make_domains(), {"all": TEST}, PREPARE),
                54, tuple(range(6)), [0]),
    "episodes": (lambda: make_gaussian(None), 32, (0, 2, 3, 1), [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_joint_is_one_task_of_every_image_tested_on_everything(name):
    make, num_images, classes, tested = STREAMS[name]
    stream = make()
    joint = task_splits.joint(stream, PREPARE)
    (task,) = joint.tasks
    assert (task.index, task.name, task.classes) == (0, "all tasks", classes)
    assert rows(joint) == [tested]
    assert list(task.test_sets) == joint.test_sets == stream.test_sets
    for field in ("classes", "num_classes", "class_names"):
        assert getattr(joint, field) == getattr(stream, field)
    wanted = set(np.concatenate([one.data.indices for one in stream.tasks]).tolist())
    assert len(task.data) == num_images == len(wanted)
    assert set(task.data.indices.tolist()) == wanted
    assert set(task.data.targets.tolist()) == set(classes)
    assert task.data.targets.tolist() == stream.train_targets[task.data.indices].tolist()
    assert_augments_as(task.data, 0, num_images - 1)
    data, last = unaugmented(task.data), num_images - 1
    assert_shows(data, (0, last), data.source, int(data.indices[last]))


def test_evaluations_are_left_after_every_nth_task_and_the_last():
    stream = make_gaussian(3, episodes=[(0, 1)] * 7)
    for every, expected in {
        1: [*range(1, 8)],
        2: [2, 4, 6, 7],
        3: [3, 6, 7],
        7: [7],
        9: [7],
    }.items():
        fewer = task_splits.evaluate_every(stream, every)
        assert [task.index + 1 for task in fewer.tasks if task.test_sets] == expected
        assert len(fewer.test_sets) == 1
        for task, same in zip(fewer.tasks, stream.tasks, strict=True):
            assert task.test_sets in ((), same.test_sets)
            assert task.data is same.data
    fewer = task_splits.evaluate_every(make_stream(), 2)  # which test all tasks so far
    assert rows(fewer) == [[], [0, 1], [0, 1, 2]]
    assert [test_set.index for test_set in fewer.test_sets] == [0, 1, 2]


def test_test_images_that_stand_class_by_class_are_mixed_in_one_way():
    """Else the images that vote together would be of one class, which the vote would tell."""
    test = make_source(20, seed=1)
    order = np.argsort(test.targets, kind="stable")
    test = ArraySource(test.images[order], test.targets[order], test.classes)
    assert PREPARE.test(test).indices.tolist() == list(range(len(test)))
    test.by_class = True
    data = PREPARE.test(test)
    assert sorted(data.indices.tolist()) == list(range(len(test)))
    assert data.indices[:8].tolist() == [14, 35, 71, 19, 53, 59, 8, 6]  # of every version
    groups = data.targets[: len(test) // 10 * 10].reshape(-1, 10)
    assert min(len(set(group)) for group in groups.tolist()) > 1
    assert replace(PREPARE, seed=7).test(test).indices.tolist() == data.indices.tolist()


def test_image_that_occurs_again_is_augmented_anew():
    data = PREPARE.train(TRAIN, np.array([4, 2, 4, 4, 2]), 0)
    images = [data[0, position][0] for position in range(5)]
    for one, other in ((0, 2), (0, 3), (2, 3), (1, 4)):
        assert not torch.equal(images[one], images[other])
    alone = PREPARE.train(TRAIN, np.array([2, 4]), 0)
    assert torch.equal(alone[0, 0][0], images[1])
    assert torch.equal(alone[0, 1][0], images[0])
