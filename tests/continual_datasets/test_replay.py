"""The replay buffer, and the batches in which its images are shown again."""

import pickle
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from cli.settings import TransformSettings
from continual_dataloader import Loaders
from continual_datasets.images import ArraySource
from continual_datasets.pipeline import ToImages
from continual_datasets.replay import ReplayBuffer, even_shares
from continual_datasets.samplers import GlobalBatchSampler, LoaderOptions, ReplaySampler
from continual_datasets.task_data import Replayed, RunData
from continual_datasets.task_splits import Transforms, class_incremental
from continual_datasets.transforms import build_transform, to_input

# Shares


@pytest.mark.parametrize(
    ("available", "size", "expected"),
    [
        ([50, 50, 50, 50], 12, [3, 3, 3, 3]),
        ([50, 2, 50, 50], 20, [6, 2, 6, 6]),
        ([1, 0, 50], 9, [1, 0, 8]),
        ([3, 4, 5], 100, [3, 4, 5]),
        ([], 5, []),
    ],
)
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


def test_buffer_starts_empty():
    buffer = ReplayBuffer(np.zeros(5, dtype=np.int64), 0, size=3)
    assert len(buffer) == 0
    assert buffer.indices.dtype == np.int64


def test_buffer_is_shared_by_the_classes_seen_so_far():
    targets = np.repeat(np.arange(6), 40)
    buffer = ReplayBuffer(targets, 0, size=24)
    for task, expected in enumerate(([12, 12], [6] * 4, [4] * 6)):
        offered = np.flatnonzero(np.isin(targets, (2 * task, 2 * task + 1)))
        before = set(buffer.indices.tolist())
        buffer.add(offered)
        assert held(buffer, 2 * task + 2) == expected
        assert set(buffer.indices.tolist()) <= before | set(offered.tolist())
        assert buffer.indices.tolist() == sorted(buffer.indices.tolist())


def test_buffer_of_few_places_stays_within_one_of_even():
    targets = np.repeat(np.arange(6), 20)
    buffer = ReplayBuffer(targets, 0, size=10)
    for task in range(3):
        buffer.add(np.flatnonzero(targets // 2 == task))
        counts = held(buffer, 2 * task + 2)
        assert sum(counts) == 10
        assert max(counts) - min(counts) <= 1


def test_buffer_of_many_classes_and_few_places_holds_no_more_than_it_may():
    targets = np.repeat(np.arange(100), 5)
    for size in (1, 7, 99, 100, 101):
        buffer = filled(targets, [range(0, 250), range(250, 500)], size=size)
        assert len(buffer) == size
        assert max(held(buffer, 100)) - min(held(buffer, 100)) <= 1


def test_classes_that_lack_images_keep_all_and_others_fill_up():
    targets = np.repeat([0, 1, 2], [2, 30, 30])
    buffer = filled(targets, [range(0, 62)], size=20)
    assert held(buffer, 3) == [2, 9, 9]
    assert {0, 1} <= set(buffer.indices.tolist())
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


def test_tasks_of_the_same_classes_share_the_places_evenly():
    """Domain by domain: 3 x 40 images of each of two classes."""
    targets = np.tile([0, 1], 120)
    parts = np.split(np.arange(240), 3)
    by_part = np.zeros(3)
    for seed in range(400):
        buffer = filled(targets, parts, seed, size=20)
        assert held(buffer, 2) == [10, 10]
        by_part += np.histogram(buffer.indices, bins=[0, 80, 160, 240])[0]
    # 20 of 240 without putting back: variance 20 * 1/3 * 2/3 * 220/239 for each seed
    spread = np.sqrt(400 * 20 * 2 / 9 * 220 / 239)
    assert np.abs(by_part - 400 * 20 / 3).max() < 4 * spread


# Steps with replayed images


BUFFER = np.arange(100, 140)


def steps_of(num_images, options, task=1, epoch=2, first_step=0, buffer=BUFFER):
    sampler = ReplaySampler(num_images, options, task, buffer)
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def own(keys):
    return [key for key in keys if not isinstance(key, Replayed)]


def replayed(keys):
    return [key for key in keys if isinstance(key, Replayed)]


OPTIONS = LoaderOptions(12, 4, num_workers=0, replayed_per_group=3)


@pytest.mark.parametrize("num_images", [1, 4, 12, 18, 31])
@pytest.mark.parametrize("per_group", [1, 3, 4, 7])
def test_every_vote_group_is_followed_by_its_replayed_images(num_images, per_group):
    options = replace(OPTIONS, replayed_per_group=per_group)
    plain = GlobalBatchSampler(num_images, options, task=1)
    plain.set_epoch(2)
    sampler = ReplaySampler(num_images, options, 1, BUFFER)
    sampler.set_epoch(2)
    assert len(sampler) == len(plain)
    for step, (keys, without) in enumerate(zip(sampler, plain, strict=True)):
        assert own(keys) == without
        expected = [
            kind
            for first in range(0, len(without), 4)
            for kind in [False] * len(without[first : first + 4]) + [True] * per_group
        ]
        assert [isinstance(key, Replayed) for key in keys] == expected
        assert sampler.global_batch_size(step) == len(keys)
        assert all(key[:2] == (1, 2) and key.image in BUFFER for key in replayed(keys))
        images = [key.image for key in replayed(keys)]
        assert len(set(images)) == len(images)  # the buffer holds more than a step needs


@pytest.mark.parametrize("num_images", [1, 5, 24, 25, 40])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_pieces_of_all_processes_are_the_step_of_one(num_images, world_size):
    options = LoaderOptions(24, 4, num_workers=0, replayed_per_group=3)
    alone = steps_of(num_images, options)
    shared = replace(options, batch_size=4, world_size=world_size, global_batch=24)
    ranks = [steps_of(num_images, replace(shared, rank=rank)) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for step, expected in enumerate(alone):
        pieces = [steps[step] for steps in ranks]
        assert list(chain.from_iterable(pieces)) == expected
        for piece in pieces:  # whole groups
            assert not piece or (
                not isinstance(piece[0], Replayed) and piece[-3:] == replayed(piece)[-3:]
            )
    sampler = ReplaySampler(num_images, shared, 1, BUFFER)
    assert [sampler.global_batch_size(step) for step in range(len(alone))] == list(map(len, alone))


def test_replayed_images_are_drawn_uniformly():
    options = replace(OPTIONS, drop_last=True)
    counts = np.zeros(140)
    for epoch in range(40):
        for keys in steps_of(12 * 20, options, epoch=epoch):
            counts[[key.image for key in replayed(keys)]] += 1
    counts = counts[100:]
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


def test_draws_are_numbered_apart_within_an_epoch():
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


@pytest.mark.parametrize("rank", [0, 1])
def test_epoch_with_replay_can_begin_with_a_later_step(rank):
    options = LoaderOptions(8, 4, rank=rank, world_size=2, replayed_per_group=2)
    whole = steps_of(40, options)
    for first_step in range(4):
        assert steps_of(40, options, first_step=first_step) == whole[first_step:]


# What is loaded

SMALL = TransformSettings(input_size=16)
CPU = torch.device("cpu")
TO_INPUT = to_input(SMALL, CPU)


def make_stream(options=SMALL, per_class=9, seed=42):
    """Three tasks of two classes; no two images are alike."""
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.repeat(np.arange(6), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    source = ArraySource(images, targets, [f"name{i}" for i in range(6)])
    prepare = Transforms(build_transform(True, options), build_transform(False, options), seed)
    return class_incremental(source, source, range(6), 3, 2, prepare)


def buffer_after(stream, num_tasks, **size):
    buffer = ReplayBuffer(stream.train_targets, 42, **(size or {"size": 20}))
    for task in stream.tasks[:num_tasks]:
        buffer.add(task.data.indices)
    return buffer


def batches_of(stream, task, options, buffer):
    return Loaders(stream, options, CPU, ToImages(TO_INPUT, TO_INPUT), buffer).train(
        stream.tasks[task]
    )


def loaded(stream, task, options, buffer, epoch=1, first_step=0):
    batches = batches_of(stream, task, options, buffer)
    batches.batch_sampler.set_epoch(epoch, first_step)
    return list(batches)


def as_bytes(images):
    return [image.numpy().tobytes() for image in images]


def test_first_task_replays_nothing():
    stream = make_stream()
    plain = loaded(stream, 0, OPTIONS, None)
    for buffer in (None, buffer_after(stream, 0)):
        batches = batches_of(stream, 0, OPTIONS, buffer)
        assert not isinstance(batches.batch_sampler, ReplaySampler)
        batches.batch_sampler.set_epoch(1)
        for batch, expected in zip(batches, plain, strict=True):
            assert len(batch) == 2
            assert torch.equal(batch[0], expected[0])


def test_tasks_replay_what_the_buffer_holds_when_they_begin():
    stream = make_stream()
    buffer = ReplayBuffer(stream.train_targets, 42, size=20)
    loaders = Loaders(stream, OPTIONS, CPU, ToImages(TO_INPUT, TO_INPUT), buffer)
    for task, seen in zip(stream.tasks, ((), (0, 1), (0, 1, 2, 3)), strict=True):
        batches = list(loaders.train(task))
        assert {len(batch) for batch in batches} == {3 if seen else 2}
        shown = [set(targets[again].tolist()) for _, targets, *flags in batches for again in flags]
        assert set().union(*shown) <= set(seen)
        assert all(shown)
        buffer.add(task.data.indices)


def test_own_images_are_as_without_replay_and_flags_tell_them_apart():
    stream = make_stream()
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
    stream = make_stream()
    for task in stream.tasks:
        task.data.transform = plain
    buffer, source = buffer_after(stream, 1), stream.tasks[0].data.source
    sampler = ReplaySampler(18, OPTIONS, 1, buffer.indices)
    sampler.set_epoch(1)
    batches = loaded(stream, 1, OPTIONS, buffer)
    for keys, (images, targets, again) in zip(sampler, batches, strict=True):
        wanted = [source[key.image] for key in replayed(keys)]
        assert targets[again].tolist() == [target for _, target in wanted]
        pixels = torch.stack([plain(image) for image, _ in wanted])
        assert torch.equal(images[again], TO_INPUT(pixels))


def test_same_image_looks_different_in_every_draw():
    stream = make_stream()
    buffer = buffer_after(stream, 1, size=1)  # only ever this one
    batches = loaded(stream, 1, OPTIONS, buffer) + loaded(stream, 1, OPTIONS, buffer, 2)
    shown = [one for images, _, again in batches for one in as_bytes(images[again])]
    assert len(shown) == 2 * 5 * 3
    assert len(set(shown)) == len(shown)
    later = loaded(stream, 2, OPTIONS, buffer)
    assert not set(shown) & {one for images, _, again in later for one in as_bytes(images[again])}


def test_loading_with_replay_leaves_the_global_generators_untouched():
    stream = make_stream()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaded(stream, 1, OPTIONS, buffer_after(stream, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("first_step", [0, 1])
def test_batches_are_the_same_for_any_number_of_workers(first_step):
    stream = make_stream(replace(SMALL, aa="rand-m9-mstd0.5-inc1", reprob=0.5))
    buffer = buffer_after(stream, 1)
    expected = loaded(stream, 1, OPTIONS, buffer)[first_step:]
    for workers in (1, 2):
        options = replace(OPTIONS, num_workers=workers)
        found = loaded(stream, 1, options, buffer, first_step=first_step)
        for batch, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_images_of_all_processes_are_those_of_one(world_size):
    stream = make_stream()
    buffer = buffer_after(stream, 1)
    alone = loaded(stream, 1, OPTIONS, buffer)
    options = replace(OPTIONS, batch_size=4, world_size=world_size, global_batch=12)
    ranks = [loaded(stream, 1, replace(options, rank=rank), buffer) for rank in range(world_size)]
    for step, expected in enumerate(alone):
        pieces = zip(*(batches[step] for batches in ranks), strict=True)
        for parts, whole in zip(pieces, expected, strict=True):
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_images_gets_empty_tensors_of_all_three(num_workers):
    stream = make_stream()
    options = LoaderOptions(4, 4, num_workers, rank=3, world_size=4, replayed_per_group=3)
    full, empty = loaded(stream, 1, options, buffer_after(stream, 1))  # 18 images: 16 + 2
    assert full[0].shape == (7, 3, 16, 16)
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 3, 16, 16), (0,), (0,)]
    assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]


def test_batch_is_the_same_in_a_spawned_worker():
    stream = make_stream()
    data = RunData(stream)
    sent = pickle.loads(pickle.dumps(data))
    keys = next(iter(ReplaySampler(18, OPTIONS, 1, buffer_after(stream, 1).indices)))
    for found, wanted in zip(sent.__getitems__(keys), data.__getitems__(keys), strict=True):
        assert torch.equal(found[0], wanted[0])
        assert found[1:] == wanted[1:]


# Steps that are not full


def epoch_of(num_images, epoch, **changes):
    sampler = GlobalBatchSampler(num_images, replace(OPTIONS, **changes), task=0)
    sampler.set_epoch(epoch)
    return sampler, [[key.position for key in batch] for batch in sampler]


@pytest.mark.parametrize(("num_images", "num_steps"), [(11, 0), (12, 1), (23, 1), (24, 2), (40, 3)])
def test_drop_last_leaves_out_what_does_not_fill_a_step(num_images, num_steps):
    sampler, steps = epoch_of(num_images, 0, drop_last=True)
    assert len(sampler) == len(steps) == num_steps
    assert all(len(step) == 12 == sampler.global_batch_size(i) for i, step in enumerate(steps))
    used = list(chain.from_iterable(steps))
    assert len(set(used)) == len(used) == 12 * num_steps
    _, with_last = epoch_of(num_images, 0)
    assert steps == with_last[:num_steps]
    assert len(with_last) == -(-num_images // 12)


def test_drop_last_leaves_out_other_images_in_every_epoch():
    left_out = {
        frozenset(range(30)) - set(chain.from_iterable(epoch_of(30, epoch, drop_last=True)[1]))
        for epoch in range(5)
    }
    assert len(left_out) == 5
    assert all(len(images) == 6 for images in left_out)


def test_drop_last_drops_replayed_images_with_the_step():
    steps = steps_of(18, replace(OPTIONS, drop_last=True))
    assert steps == steps_of(18, OPTIONS)[:1]
    stream = make_stream()
    options = replace(OPTIONS, drop_last=True)
    batches = loaded(stream, 1, options, buffer_after(stream, 1))
    assert [len(targets) for _, targets, _ in batches] == [21]
