"""The replay buffer, and the batches in which its images are shown again."""

import numpy as np
import pytest
import torch

from cli.settings import ReplaySettings
from continual_dataloader import Loaders
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import GlobalBatchSampler
from continual_datasets.task_data import Replayed
from continual_datasets.transforms import build_transform
from helpers.witnessed_loaders import (
    SMALL,
    assert_same,
    batching,
    epoch_batches,
    joined,
    make_stream,
)

# What the buffer holds


def filled(targets, parts, seed=0, size=None, per_class=None):
    """A buffer to which parts of the images were offered in turn."""
    buffer = ReplayBuffer(np.asarray(targets), seed, ReplaySettings(size, per_class))
    for part in parts:
        buffer.add(np.asarray(part, dtype=np.int64))
    return buffer


@pytest.mark.parametrize("size", [{"size": 13}, {"per_class": 3}])
def test_buffer_depends_neither_on_order_repetition_nor_global_generators(size):
    targets = np.random.default_rng(1).integers(0, 5, 200)
    parts = [np.arange(0, 90), np.arange(90, 200)]
    expected = filled(targets, parts, **size).indices.tolist()
    np.random.seed(7)
    mixed = [np.random.default_rng(2).permutation(np.tile(part, 2)) for part in parts]
    assert filled(targets, [*mixed, range(5)], **size).indices.tolist() == expected
    assert filled(targets, parts, seed=1, **size).indices.tolist() != expected


@pytest.mark.parametrize(
    "size", [{"size": 10}, {"size": 12}, {"size": 2}, {"size": 999}, {"per_class": 4}]
)
def test_buffer_holds_the_lowest_priorities_of_all_that_each_class_has_shown(size):
    """So it is a uniform sample, however the shares of the classes move from task to task."""
    rng = np.random.default_rng(3)
    for seed in range(40):
        targets = rng.integers(0, 3, 150)
        buffer = filled(targets, [], seed, **size)
        assert (len(buffer), buffer.indices.dtype) == (0, np.int64)
        parts = np.split(rng.permutation(150), [0, *np.sort(rng.integers(1, 150, 4))])
        shown = np.empty(0, dtype=np.int64)
        for part in parts:
            buffer.add(part)
            shown = np.union1d(shown, part)
            counts = np.bincount(targets[buffer.indices], minlength=3)
            for class_id, count in enumerate(counts):
                images = shown[targets[shown] == class_id]
                first = images[np.argsort(buffer.priorities[images])][:count]
                kept = buffer.indices[targets[buffer.indices] == class_id]
                assert sorted(first.tolist()) == kept.tolist()
            assert sorted(buffer.indices.tolist()) == buffer.indices.tolist()
            assert (len(buffer), buffer.indices.dtype) == (sum(counts), np.int64)
            available = np.bincount(targets[shown], minlength=3)
            if "per_class" in size:
                assert counts.tolist() == np.minimum(available, 4).tolist()
                continue
            assert len(buffer) == min(size["size"], len(shown))
            shares = counts[counts < available]  # of classes that do not lack images
            assert all(max(counts) - shares <= 1)
            assert shares.tolist() == sorted(shares, reverse=True)  # the lowest ids first


# Steps with replayed images


BUFFER = np.arange(100, 140)
OPTIONS = batching(12, 4, replayed=3)


def steps_of(num_images, options=OPTIONS, task=1, epoch=2, first_step=0, buffer=BUFFER):
    sampler = GlobalBatchSampler(num_images, options, task, buffer)
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def own(keys):
    return [key for key in keys if not isinstance(key, Replayed)]


def replayed(keys):
    return [key for key in keys if isinstance(key, Replayed)]


def images_of(keys):
    return [key.image for key in replayed(keys)]


@pytest.mark.parametrize("num_images", [1, 12, 31])
@pytest.mark.parametrize("per_group", [1, 3, 7])
def test_every_vote_group_is_followed_by_its_replayed_images(num_images, per_group):
    options = batching(12, 4, replayed=per_group)
    sampler = GlobalBatchSampler(num_images, options, 1, BUFFER)
    steps = [steps_of(num_images, options, buffer=buffer) for buffer in (BUFFER, ())]
    assert len(sampler) == len(steps[0])
    for step, (keys, without) in enumerate(zip(*steps, strict=True)):
        assert own(keys) == without
        groups = [len(without[first : first + 4]) for first in range(0, len(without), 4)]
        expected = joined([False] * group + [True] * per_group for group in groups)
        assert [isinstance(key, Replayed) for key in keys] == expected
        assert sampler.global_batch_size(step) == len(keys)
        assert all(key[:2] == (1, 2) and key.image in BUFFER for key in replayed(keys))
        assert len(set(images_of(keys))) == len(replayed(keys))  # there are more than needed


def test_replayed_images_are_drawn_uniformly():
    options = batching(12, 4, replayed=3, drop_last=True)
    steps = joined(steps_of(12 * 20, options, epoch=epoch) for epoch in range(40))
    counts = np.bincount(joined(map(images_of, steps)), minlength=140)
    draws = 40 * 20 * 9
    assert counts.sum() == counts[100:].sum() == draws
    chi_square = ((counts[100:] - draws / 40) ** 2 / (draws / 40 * (1 - 9 / 40))).sum()  # 39 free
    assert chi_square < 80  # exceeded once in 7,000 times


def test_small_buffer_is_drawn_with_repetition():
    (keys,) = steps_of(12, buffer=np.array([5, 9]))
    assert len(replayed(keys)) == 9
    assert set(images_of(keys)) == {5, 9}
    assert len({key.draw for key in replayed(keys)}) == 9
    (keys,) = steps_of(12, buffer=np.arange(9))
    assert sorted(images_of(keys)) == list(range(9))
    draws = [key.draw for keys in steps_of(40) for key in replayed(keys)]
    assert len(set(draws)) == len(draws) == 30


@pytest.mark.parametrize(("num_images", "num_steps"), [(11, 0), (12, 1), (23, 1), (24, 2), (40, 3)])
def test_drop_last_leaves_out_what_does_not_fill_a_step(num_images, num_steps):
    options = batching(12, 4, replayed=3, drop_last=True)
    steps, with_last = steps_of(num_images, options), steps_of(num_images)
    assert steps == with_last[:num_steps]
    assert (len(steps), len(with_last)) == (num_steps, -(-num_images // 12))
    sampler = GlobalBatchSampler(num_images, options, 1, BUFFER)
    sizes = [sampler.global_batch_size(step) for step in range(len(sampler))]
    assert sizes == list(map(len, steps)) == [21] * num_steps


# What is loaded


def three_tasks(options=SMALL, prepare=None):
    return make_stream(options, per_class=9, order=range(6), prepare=prepare)


def buffer_after(stream, num_tasks, size=20):
    parts = [task.data.indices for task in stream.tasks[:num_tasks]]
    return filled(stream.train.targets, parts, 42, size)


def test_tasks_replay_what_the_buffer_holds_when_they_begin():
    stream = three_tasks()
    buffer = buffer_after(stream, 0)
    assert_same(
        epoch_batches(stream, 0, OPTIONS, 1, buffer=buffer), epoch_batches(stream, 0, OPTIONS, 1)
    )
    loaders = Loaders(stream, OPTIONS, buffer)
    for task, seen in zip(stream.tasks, ((), (0, 1), (0, 1, 2, 3)), strict=True):
        batches = list(loaders.train(task))
        assert {len(batch) for batch in batches} == {3 if seen else 2}
        shown = [set(targets[again].tolist()) for _, targets, *flags in batches for again in flags]
        assert set().union(*shown) <= set(seen)
        assert all(shown)
        buffer.add(task.data.indices)


def test_own_images_are_as_without_replay_and_replayed_ones_are_read_raw():
    plain = build_transform(False, SMALL)
    for stream in (three_tasks(), three_tasks(prepare=(plain, plain))):
        buffer = buffer_after(stream, 1)
        alone = epoch_batches(stream, 1, OPTIONS, 1)
        mixed = epoch_batches(stream, 1, OPTIONS, 1, buffer=buffer)
        keys = steps_of(18, epoch=1, buffer=buffer.indices)
        assert len(mixed) == len(alone) == 2  # 18 images: 12 and 6, a short last group
        for step, (images, targets, again), (own_images, own_targets) in zip(
            keys, mixed, alone, strict=True
        ):
            assert again.tolist() == [isinstance(key, Replayed) for key in step]
            assert torch.equal(images[~again], own_images)
            assert torch.equal(targets[~again], own_targets)
            assert set(own_targets.tolist()) <= {2, 3}
            wanted = [stream.train[number] for number in images_of(step)]
            assert targets[again].tolist() == [target for _, target in wanted]
    pixels = torch.stack([plain(image) for image, _ in wanted])  # not augmented twice
    assert torch.equal(images[again], pixels / 255)


def test_same_image_looks_different_in_every_draw():
    stream = three_tasks()
    buffer = buffer_after(stream, 1, size=1)  # only ever this one
    places = ((1, 1), (1, 2), (2, 1))
    batches = joined(epoch_batches(stream, *at[:1], OPTIONS, at[1], buffer=buffer) for at in places)
    shown = torch.cat([images[again] for images, _, again in batches])
    assert len(shown) == len(shown.flatten(1).unique(dim=0)) == 3 * 5 * 3
