"""How data become tasks."""

import numpy as np
import pytest

from continual_datasets import task_splits
from continual_datasets.images import ArraySource, DataError, FileSource
from helpers.witnessed_loaders import make_source, make_stream, rows, without

TRAIN, TEST = make_source(7), make_source(5, seed=1)  # as of `make_stream`


def numbers_of(source, classes):
    return np.flatnonzero(np.isin(source.targets, classes)).tolist()


def test_class_incremental_splits_classes_and_keeps_ids():
    stream = make_stream()
    assert (stream.num_tasks, stream.num_classes) == (3, 6)
    assert stream.class_order == [[3, 1], [5, 0], [2, 4]]
    assert stream.classes == (0, 1, 2, 3, 4, 5)
    assert stream.train.targets.tolist() == TRAIN.targets.tolist()
    assert rows(stream) == [[0], [0, 1], [0, 1, 2]]
    for index, task in enumerate(stream.tasks):
        assert (task.index, task.name, len(task.data)) == (index, f"task{index + 1}", 14)
        assert task.data.source is stream.train
        assert task.data.indices.tolist() == numbers_of(TRAIN, task.classes)
        latest = task.test_sets[-1]
        assert (latest.name, latest.classes) == (task.name, task.classes)
        assert latest.data.indices.tolist() == numbers_of(TEST, task.classes)
        assert latest.data[3] == TEST[latest.data.indices[3]]
        assert task.test_sets[0] is stream.tasks[0].test_sets[0]
    fewer = task_splits.by_classes(TRAIN, TEST, [(4,), (2,), (0,)], stream.pipeline)
    assert (fewer.classes, fewer.num_classes, fewer.pipeline) == ((0, 2, 4), 6, stream.pipeline)


def test_fewer_images_of_each_class_follow_from_the_seed(tmp_path):
    """A class with fewer keeps all; which they are does not depend on where images are."""
    few, test = TRAIN.select(np.r_[:20]), {"all": TEST}
    fewer, same = task_splits.fewer_images(({"all": TRAIN, "few": few}, test), 4, 0)
    counts = [np.bincount(one.targets).tolist() for one in fewer.values()]
    assert counts == [[4] * 6, np.minimum(np.bincount(few.targets), 4).tolist()]
    assert (same, fewer["all"].classes) == (test, TRAIN.classes)
    names = [f"{i}.png" for i in range(len(TRAIN))]
    files = FileSource(names, TRAIN.targets, TRAIN.classes, tmp_path)
    parts = {"all": files, "again": files}, {}
    first, same, other = (task_splits.fewer_images(parts, 4, seed)[0] for seed in (0, 0, 1))
    assert first["all"].names == same["all"].names == sorted(first["all"].names, key=names.index)
    assert len({tuple(one.names) for one in (*first.values(), *other.values())}) == 4
    rows = [names.index(name) for name in first["all"].names]
    assert np.array_equal(fewer["all"].images, TRAIN.images[rows])


@pytest.mark.parametrize("split", ["training", "test"])
def test_class_without_images_is_named(split):
    sources = {"training": TRAIN, "test": TEST}
    sources[split] = without(sources[split], 4)
    task_splits.by_classes(*sources.values(), [(0, 1), (2, 3)], None)
    with pytest.raises(DataError, match=f"no {split} image of class name4: add images, or leave"):
        task_splits.by_classes(*sources.values(), [(0, 1), (2, 3), (4, 5)], None)
    with pytest.raises(DataError, match="no training image of class number 6"):
        task_splits.by_classes(TRAIN, TEST, [(0, 6)], None)


def test_domains_are_tasks_and_may_have_one_test_set():
    train = {name: make_source(3, seed=i) for i, name in enumerate(("sun", "rain", "snow"))}
    train["rain"] = without(train["rain"], 2)
    stream = task_splits.by_parts(train, {"the rest": TEST}, None)
    assert [task.name for task in stream.tasks] == list(train)
    assert stream.class_order == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert stream.num_classes == 6
    assert rows(stream) == [[0]] * 3
    (test_set,) = stream.test_sets
    assert (test_set.name, len(test_set.data)) == ("the rest", 30)
    for first, task, source in zip((0, 18, 33), stream.tasks, train.values(), strict=True):
        assert task.data.indices.tolist() == list(range(first, first + len(source)))
        assert task.data.source is stream.train
        assert task.data[5] == source[5]


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
    assert paper.argmax(axis=0).tolist() == list(range(1, 200, 2))  # at step 5, 15, ...
    release = task_splits.presence(100, 200, 1, 50).sum(axis=1)
    assert release.mean() == pytest.approx(50, abs=0.5)
    assert (release.min(), release.max()) == pytest.approx((31, 60), abs=1)


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
    empty = (1 - probabilities).prod(axis=1, keepdims=True)  # is drawn again
    expected = probabilities / (1 - empty)
    spread = np.sqrt(300 * expected * (1 - expected)) + 0.5
    assert (np.abs(present.sum(axis=0) - 300 * expected) < 5 * spread).all()
    sizes = present.sum(axis=2)  # of independent draws, so variances add up
    variances = (probabilities * (1 - probabilities)).sum(axis=1)
    assert sizes.var(axis=0)[5:35] == pytest.approx(variances[5:35], rel=0.4)
    together = np.corrcoef(sizes[:, 5:35].T)[~np.eye(30, dtype=bool)]
    assert np.abs(together).max() < 0.25  # nor does one episode depend on another


def test_episodes_of_a_seed_are_those_of_runs_that_are_resumed():
    assert drawn(seed=42, order=range(6), num_episodes=8, steps=1, sigma=1.5) == [
        (0, 1, 2, 3), (1, 2, 3), (2,), (1, 2, 3), (3, 4, 5), (3, 5), (5,), (4,)
    ]  # fmt: skip


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


def test_evaluations_are_left_after_every_nth_task_and_the_last_or_a_joint_one():
    stream = make_stream()
    for every, expected in {1: [0, 1, 2], 2: [1, 2], 3: [2], 9: [2]}.items():
        fewer = task_splits.evaluate_every(stream, every)
        assert [task.index for task in fewer.tasks if task.test_sets] == expected
        assert task_splits.evaluated_tasks(3, every) == set(expected)
        assert fewer.test_sets == stream.test_sets
        for task, same in zip(fewer.tasks, stream.tasks, strict=True):
            assert task.test_sets in ((), same.test_sets)
            assert task.data is same.data
    (task,) = task_splits.joint(stream).tasks
    assert task.test_sets == tuple(stream.test_sets)
    assert [task_splits.evaluated_tasks(7, n) for n in (2, 3)] == [{1, 3, 5, 6}, {2, 5, 6}]


def test_test_images_that_stand_class_by_class_are_mixed_in_one_way():
    """Else the images that vote together would be of one class, which the vote would tell."""
    test = make_source(20, seed=1)
    order = np.argsort(test.targets, kind="stable")
    test = ArraySource(test.images[order], test.targets[order], test.classes)
    assert task_splits.held_out(test).indices.tolist() == list(range(len(test)))
    test.by_class = True
    found = task_splits.held_out(test).indices
    assert sorted(found.tolist()) == list(range(len(test)))
    assert found[:8].tolist() == [14, 35, 71, 19, 53, 59, 8, 6]  # of every version
    groups = test.targets[found].reshape(-1, 10)
    assert min(len(set(group)) for group in groups.tolist()) > 1
    part = task_splits.held_out(test, np.arange(7, 60)).indices
    assert sorted(part.tolist()) == list(range(7, 60)) != part.tolist()
