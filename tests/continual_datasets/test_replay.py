"""The replay buffer, and the batches in which its images are shown again."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from continual_datasets.replay import ReplayBuffer, even_shares
from continual_datasets.samplers import GlobalBatchSampler, LoaderOptions
from continual_datasets.task_data import Replayed
from continual_datasets.transforms import build_transform
from helpers.witnessed_loaders import SMALL, assert_same, epoch_batches, make_loaders, make_stream

# Shares


@pytest.mark.parametrize(("available", "size", "expected"), [
    ([50, 50, 50, 50], 12, [3, 3, 3, 3]), ([50, 2, 50, 50], 20, [6, 2, 6, 6]),
    ([50, 50, 50], 5, [2, 2, 1]), ([1, 0, 50], 9, [1, 0, 8]), ([3, 4, 5], 100, [3, 4, 5]),
    ([], 5, []),
])  # fmt: skip
def test_shares_are_even_where_images_suffice(available, size, expected):
    assert even_shares(np.array(available, dtype=np.int64), size).tolist() == expected


def test_shares_fill_the_places_within_one_of_each_other():
    rng = np.random.default_rng(0)
    for _ in range(300):
        available = rng.integers(0, 12, rng.integers(1, 9))
        size = int(rng.integers(0, 60))
        shares = even_shares(available, size)
        assert shares.sum() == min(size, available.sum())
        assert (shares <= available).all()
        lacking = shares == available
        if not lacking.all():
            level = shares[~lacking]
            assert level.max() - level.min() <= 1
            assert shares.max() <= level.min() + 1  # who lacks images keeps no more than others


# What the buffer holds


def filled(targets, parts, seed=0, **size):
    """A buffer to which parts of the images were offered in turn."""
    buffer = ReplayBuffer(np.asarray(targets), seed, **size)
    for part in parts:
        buffer.add(np.asarray(part))
    return buffer


def held(buffer, num_classes):
    """How many images of each class the buffer holds."""
    return np.bincount(buffer.targets[buffer.indices], minlength=num_classes).tolist()


@pytest.mark.parametrize(("num_classes", "images", "size"), [
    (6, 40, 24), (6, 20, 10), (100, 5, 1), (100, 5, 7), (100, 5, 99), (100, 5, 100), (100, 5, 101),
])  # fmt: skip
def test_buffer_is_shared_by_the_classes_seen_so_far(num_classes, images, size):
    targets = np.repeat(np.arange(num_classes), images)
    buffer = ReplayBuffer(targets, 0, size=size)
    assert (len(buffer), buffer.indices.dtype) == (0, np.int64)
    for offered in np.split(np.arange(len(targets)), 2):
        before = set(buffer.indices.tolist())
        buffer.add(offered)
        counts = held(buffer, num_classes)[: targets[offered[-1]] + 1]
        assert sum(counts) == len(buffer) == size
        assert max(counts) - min(counts) <= 1
        assert set(buffer.indices.tolist()) <= before | set(offered.tolist())
        assert buffer.indices.tolist() == sorted(buffer.indices.tolist())


def test_classes_that_lack_images_keep_all_and_others_fill_up():
    targets = np.repeat([0, 1, 2], [2, 30, 30])
    assert held(filled(targets, [range(62)], size=20), 3) == [2, 9, 9]
    assert len(filled(targets, [range(62)], size=1000)) == 62


def test_limit_of_each_class():
    targets = np.repeat(np.arange(4), [3, 20, 20, 20])
    buffer = ReplayBuffer(targets, 0, per_class=5)
    buffer.add(np.arange(23))
    assert held(buffer, 2) == [3, 5]
    first = buffer.indices
    buffer.add(np.arange(23, 63))
    assert held(buffer, 4) == [3, 5, 5, 5]
    assert set(first.tolist()) <= set(buffer.indices.tolist())


def test_images_offered_again_are_held_once():
    targets = np.repeat([0, 1], 10)
    buffer = filled(targets, [[*range(20), *range(20)], range(20), range(5)], size=12)
    assert len(set(buffer.indices.tolist())) == len(buffer) == 12
    assert buffer.indices.tolist() == filled(targets, [range(20)], size=12).indices.tolist()


@pytest.mark.parametrize("size", [{"size": 13}, {"per_class": 3}])
def test_buffer_depends_neither_on_order_nor_on_process_nor_on_global_generators(size):
    targets = np.random.default_rng(1).integers(0, 5, 200)
    parts = [np.arange(0, 90), np.arange(90, 200)]
    expected = filled(targets, parts, **size).indices.tolist()
    np.random.seed(7)
    mixed = [np.random.default_rng(2).permutation(part) for part in parts]
    assert filled(targets, mixed, **size).indices.tolist() == expected
    assert filled(targets, parts, seed=1, **size).indices.tolist() != expected


@pytest.mark.parametrize("size", [{"size": 10}, {"size": 12}, {"size": 3}, {"per_class": 4}])
def test_buffer_holds_the_lowest_priorities_of_all_that_each_class_has_shown(size):
    """So it is a uniform sample, however the shares of the classes move from task to task."""
    rng = np.random.default_rng(3)
    for seed in range(40):
        targets = rng.integers(0, 3, 150)
        buffer = ReplayBuffer(targets, seed, **size)
        parts = np.split(rng.permutation(150), np.sort(rng.integers(1, 150, 4)))
        shown = np.empty(0, dtype=np.int64)
        for part in parts:
            buffer.add(part)
            shown = np.union1d(shown, part)
            for class_id, count in enumerate(held(buffer, 3)):
                images = shown[targets[shown] == class_id]
                first = images[np.argsort(buffer.priorities[images])][:count]
                kept = buffer.indices[targets[buffer.indices] == class_id]
                assert sorted(first.tolist()) == kept.tolist()


def test_buffer_is_a_uniform_sample_of_each_class():
    targets = np.repeat([0, 1], 30)
    counts = np.zeros(60)
    for seed in range(600):
        buffer = filled(targets, [range(0, 30), range(30, 60)], seed, size=12)
        counts[buffer.indices] += 1
    expected = 600 * 6 / 30
    assert counts.sum() == 600 * 12
    chi_square = ((counts - expected) ** 2 / (expected * (1 - 6 / 30))).sum()  # 58 free
    assert chi_square < 103  # exceeded once in 5,000 times


# Steps with replayed images


BUFFER = np.arange(100, 140)


def steps_of(num_images, options, task=1, epoch=2, first_step=0, buffer=BUFFER):
    sampler = GlobalBatchSampler(num_images, options, task, buffer)
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def own(keys):
    return [key for key in keys if not isinstance(key, Replayed)]


def replayed(keys):
    return [key for key in keys if isinstance(key, Replayed)]


OPTIONS = LoaderOptions(12, 4, num_workers=0, replayed_per_group=3)


@pytest.mark.parametrize("num_images", [1, 12, 31])
@pytest.mark.parametrize("per_group", [1, 3, 7])
def test_every_vote_group_is_followed_by_its_replayed_images(num_images, per_group):
    options = replace(OPTIONS, replayed_per_group=per_group)
    sampler = GlobalBatchSampler(num_images, options, 1, BUFFER)
    steps = [steps_of(num_images, options, buffer=buffer) for buffer in (BUFFER, None)]
    assert len(sampler) == len(steps[0])
    for step, (keys, without) in enumerate(zip(*steps, strict=True)):
        assert own(keys) == without
        groups = [len(without[first : first + 4]) for first in range(0, len(without), 4)]
        expected = [[False] * group + [True] * per_group for group in groups]
        assert [isinstance(key, Replayed) for key in keys] == [*chain.from_iterable(expected)]
        assert sampler.global_batch_size(step) == len(keys)
        assert all(key[:2] == (1, 2) and key.image in BUFFER for key in replayed(keys))
        images = [key.image for key in replayed(keys)]
        assert len(set(images)) == len(images)  # the buffer holds more than a step needs


def test_replayed_images_are_drawn_uniformly():
    options = replace(OPTIONS, drop_last=True)
    counts = np.zeros(40)
    for epoch in range(40):
        for keys in steps_of(12 * 20, options, epoch=epoch):
            counts[[key.image - 100 for key in replayed(keys)]] += 1
    draws = 40 * 20 * 9
    assert counts.sum() == draws
    chi_square = ((counts - draws / 40) ** 2 / (draws / 40 * (1 - 9 / 40))).sum()  # 39 free
    assert chi_square < 80  # exceeded once in 7,000 times


def test_small_buffer_is_drawn_with_repetition():
    (keys,) = steps_of(12, OPTIONS, buffer=np.array([5, 9]))
    assert len(replayed(keys)) == 9
    assert {key.image for key in replayed(keys)} == {5, 9}
    assert len({key.draw for key in replayed(keys)}) == 9
    (keys,) = steps_of(12, OPTIONS, buffer=np.arange(9))
    assert sorted(key.image for key in replayed(keys)) == list(range(9))
    draws = [key.draw for keys in steps_of(40, OPTIONS) for key in replayed(keys)]
    assert len(set(draws)) == len(draws) == 30


def test_draws_depend_on_seed_task_epoch_and_step_alone():
    def images(seed=42, **place):
        steps = steps_of(24, replace(OPTIONS, seed=seed), **place)
        return [tuple(key.image for key in replayed(keys)) for keys in steps]

    np.random.seed(3)
    assert images() == images()
    drawn = images() + images(seed=43) + images(task=2) + images(epoch=3)
    assert len(set(drawn)) == 8
    more = steps_of(36, OPTIONS)  # a task of more steps draws the same in the first of them
    assert [tuple(key.image for key in replayed(keys)) for keys in more[:2]] == images()


def test_epoch_with_replay_can_begin_with_a_later_step():
    options = LoaderOptions(8, 4, rank=1, world_size=2, replayed_per_group=2)
    whole = steps_of(40, options)
    for first_step in range(4):
        assert steps_of(40, options, first_step=first_step) == whole[first_step:]


# What is loaded


def buffer_after(stream, num_tasks, **size):
    buffer = ReplayBuffer(stream.train_targets, 42, **(size or {"size": 20}))
    for task in stream.tasks[:num_tasks]:
        buffer.add(task.data.indices)
    return buffer


def loaded(stream, task, options, buffer, epoch=1, **more):
    return epoch_batches(stream, task, options, epoch, buffer=buffer, **more)


def three_tasks(options=SMALL):
    return make_stream(options, per_class=9, order=range(6))


def test_tasks_replay_what_the_buffer_holds_when_they_begin():
    stream = three_tasks()
    buffer = buffer_after(stream, 0)
    assert_same(loaded(stream, 0, OPTIONS, buffer), loaded(stream, 0, OPTIONS, None))
    loaders = make_loaders(stream, OPTIONS, buffer=buffer)
    for task, seen in zip(stream.tasks, ((), (0, 1), (0, 1, 2, 3)), strict=True):
        batches = list(loaders.train(task))
        assert {len(batch) for batch in batches} == {3 if seen else 2}
        shown = [set(targets[again].tolist()) for _, targets, *flags in batches for again in flags]
        assert set().union(*shown) <= set(seen)
        assert all(shown)
        buffer.add(task.data.indices)


def test_own_images_are_as_without_replay_and_flags_tell_them_apart():
    stream = three_tasks()
    buffer = buffer_after(stream, 1)
    plain = loaded(stream, 1, OPTIONS, None)
    mixed = loaded(stream, 1, OPTIONS, buffer)
    assert len(mixed) == len(plain) == 2  # 18 images: 12 and 6, a short last group
    for (images, targets, again), (own_images, own_targets) in zip(mixed, plain, strict=True):
        assert again.dtype == torch.bool
        assert torch.equal(images[~again], own_images)
        assert torch.equal(targets[~again], own_targets)
        assert set(targets[again].tolist()) <= {0, 1}
        assert set(targets[~again].tolist()) <= {2, 3}
    own_group, again_group = [False] * 4, [True] * 3
    assert mixed[0][2].tolist() == (own_group + again_group) * 3
    assert mixed[1][2].tolist() == own_group + again_group + [False] * 2 + again_group


def test_replayed_images_are_read_raw_and_not_augmented_twice():
    plain = build_transform(False, SMALL)
    stream = make_stream(per_class=9, order=range(6), prepare=(plain, plain))
    buffer, source = buffer_after(stream, 1), stream.tasks[0].data.source
    steps = steps_of(18, OPTIONS, epoch=1, buffer=buffer.indices)
    batches = loaded(stream, 1, OPTIONS, buffer)
    for keys, (images, targets, again) in zip(steps, batches, strict=True):
        wanted = [source[key.image] for key in replayed(keys)]
        assert targets[again].tolist() == [target for _, target in wanted]
        pixels = torch.stack([plain(image) for image, _ in wanted])
        assert torch.equal(images[again], pixels / 255)


def test_same_image_looks_different_in_every_draw():
    stream = three_tasks()
    buffer = buffer_after(stream, 1, size=1)  # only ever this one
    batches = loaded(stream, 1, OPTIONS, buffer) + loaded(stream, 1, OPTIONS, buffer, 2)
    batches += loaded(stream, 2, OPTIONS, buffer)
    shown = torch.cat([images[again] for images, _, again in batches])
    assert len(shown) == len(shown.flatten(1).unique(dim=0)) == 3 * 5 * 3


def test_batches_are_the_same_for_any_number_of_workers():
    rich = replace(SMALL, aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    stream = three_tasks(rich)
    buffer, options = buffer_after(stream, 1), replace(OPTIONS, num_workers=2)
    expected = loaded(stream, 1, OPTIONS, buffer, transforms=rich)
    for first_step in (0, 1):
        found = loaded(stream, 1, options, buffer, first_step=first_step, transforms=rich)
        assert_same(found, expected[first_step:])


def test_process_without_images_gets_empty_tensors_of_all_three():
    stream = three_tasks()
    options = LoaderOptions(4, 4, 0, rank=3, world_size=4, replayed_per_group=3)
    full, empty = loaded(stream, 1, options, buffer_after(stream, 1))  # 18 images: 16 + 2
    assert full[0].shape == (7, 3, 16, 16)
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 3, 16, 16), (0,), (0,)]
    assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]


@pytest.mark.parametrize(("num_images", "num_steps"), [(11, 0), (12, 1), (23, 1), (24, 2), (40, 3)])
def test_drop_last_leaves_out_what_does_not_fill_a_step(num_images, num_steps):
    options, left_out = replace(OPTIONS, drop_last=True), set()
    for epoch in range(5):
        steps = steps_of(num_images, options, epoch=epoch)
        assert len(steps) == num_steps
        assert all(len(own(keys)) == 12 and len(replayed(keys)) == 9 for keys in steps)
        with_last = steps_of(num_images, OPTIONS, epoch=epoch)
        assert steps == with_last[:num_steps]
        assert len(with_last) == -(-num_images // 12)
        used = {key.position for keys in steps for key in own(keys)}
        assert len(used) == 12 * num_steps
        left_out.add(frozenset(range(num_images)) - used)
    assert len(left_out) == (5 if num_steps and num_images % 12 else 1)
    sampler = GlobalBatchSampler(num_images, options, 1, BUFFER)
    assert [sampler.global_batch_size(step) for step in range(len(sampler))] == [21] * num_steps
