"""Transforms, and the loaders of a run."""

import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from itertools import chain
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

import continual_dataloader
import utils
from cli.paths import ROOT
from cli.settings import ReplaySettings, TransformSettings
from continual_dataloader import Loaders, LostWorkerError
from continual_datasets import task_data
from continual_datasets.images import ArraySource, DataError
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.readers.class_folders import gather
from continual_datasets.replay import ReplayBuffer
from continual_datasets.samplers import GlobalBatchSampler, evaluation_batches
from continual_datasets.task_data import Replayed, RunData, TrainKey
from continual_datasets.task_splits import by_classes
from continual_datasets.transforms import CROP_RULES, NORMS, build_transform, policy_problem
from helpers.commands import command, wait_until
from helpers.witnessed_loaders import (
    CPU,
    DEVICES,
    SMALL,
    assert_same,
    batching,
    epoch_batches,
    joined,
    load,
    make_source,
    make_stream,
    pids,
    train_keys,
    witnessed,
)

RICH = replace(
    SMALL, aa="augmix-m5-w2-d2", color_jitter=0.4, reprob=0.5, train_interpolation="random"
)
FIXED = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


@pytest.fixture(autouse=True)
def enough_cores(monkeypatch):
    monkeypatch.setattr(utils, "usable_cores", lambda: 2)


def picture(width=90, height=70):
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def rng_states():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


# Transforms


def input_of(train, options, image):
    """What the model gets to see of an image."""
    pipeline = ImagePipeline(options, CPU)
    transform = pipeline.train_transform if train else pipeline.test_transform
    return pipeline.to_input(transform(image)[None], train)[0]


def input_as_always(image, norm):
    """Each image alone, by torchvision."""
    out, norm = to_tensor(image), NORMS.get(norm, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    return transforms.Normalize(*norm)(out) if norm else out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [*NORMS, "0.4,0.5,0.6,0.2,0.3,0.25"])
def test_input_is_bit_for_bit_that_of_each_image_alone(norm, device):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert {"none": (), "half": ((0.5,) * 3, (0.5,) * 3), "imagenet": (mean, std)} == NORMS
    rng = np.random.default_rng(5)  # every level once in every channel
    levels = [rng.permutation(256).astype(np.uint8).reshape(16, 16) for _ in range(3)]
    options, image = replace(SMALL, norm=norm), Image.fromarray(np.stack(levels, axis=2))
    pixels, pipeline = build_transform(False, options)(image), ImagePipeline(options, device)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor(np.asarray(image)).permute(2, 0, 1))
    given, expected = torch.stack([pixels, pixels.flip(1)]).to(device), input_as_always(image, norm)
    kept, batch = given.clone(), pipeline.to_input(given, train=False)
    assert (batch.dtype, batch.device.type) == (torch.float32, device.type)
    assert torch.equal(batch.cpu(), torch.stack([expected, expected.flip(1)]))
    assert torch.equal(given, kept)
    # With random erasing it is finished in the transform; a box of no size shows the arithmetic.
    out = build_transform(True, replace(options, **FIXED, reprob=1e-9))(image)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert pipeline.to_input(out[None], train=True).equal(out[None])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [1, 32, 48, 224])
def test_test_transform_resizes_and_above_32_pixels_crops(size, interpolation):
    options = TransformSettings(input_size=size, test_interpolation=interpolation)
    short = int(256 / 224 * size)
    sides = (size, size) if size <= 32 else (int(90 / 70 * short), short)
    resized = picture().resize(sides, Image.Resampling[interpolation.upper()])
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    pixels = build_transform(False, options)(picture())
    assert torch.equal(pixels, torch.tensor(expected).permute(2, 0, 1))
    assert pixels.is_contiguous()
    pixels += 1  # it is a copy


def outputs(options):
    """What the model gets to see of one training picture under 30 seeds."""
    result = []
    for seed in range(30):
        seed_all(seed)
        result.append(input_of(True, options, picture()))
    return result


def through_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return Image.open(file).convert("RGB")


def test_train_transform_is_torchvisions_crop_and_flip_behind_resize_and_jpeg():
    crop = transforms.RandomResizedCrop(16, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    both = transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])
    resized = picture().resize((48, 48), Image.Resampling.BILINEAR)
    more = replace(SMALL, train_resize=48, train_jpeg=95)
    for options, image in ((SMALL, picture()), (more, through_jpeg(resized))):
        for seed, found in enumerate(outputs(options)):
            torch.manual_seed(seed)
            assert torch.equal(found, to_tensor(both(image)))


def test_crops_of_tensorflow_are_even_in_height_and_cover_less():
    image, scale, ratio = Image.new("RGB", (256, 256)), [0.05, 1.0], [0.75, 1.33]
    for rule, area, height in (("torchvision", 0.462, 0.648), ("tensorflow", 0.378, 0.562)):
        drawn = [CROP_RULES[rule].get_params(image, scale, ratio) for _ in range(4000)]
        top, left, rows, columns = np.array(drawn).T / 256
        assert abs((rows * columns).mean() - area) < 0.012
        assert abs(rows.mean() - height) < 0.012
        assert 0 == min(top.min(), left.min()) < (top + rows).max() <= 1 >= (left + columns).max()
    for scale, ratio in (((0.5, 0.5), (9, 9)), ((1e-9, 1e-9), (1, 1)), ((1, 1), (1e-9, 1e-9))):
        assert CROP_RULES["tensorflow"].get_params(image, scale, ratio) == (0, 0, 256, 256)


CHANGES = {
    "input_size": 24, "scale": (0.5, 0.6), "ratio": (1.0, 1.0), "hflip": 0.0,
    "train_interpolation": "bicubic", "test_interpolation": "bilinear", "norm": "half",
    "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "train_resize": 20, "train_jpeg": 30,
    "reprob": 0.5, "remode": "const", "recount": 3, "crop_rule": "tensorflow", "augment": False,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(TransformSettings)])
def test_every_transform_option_changes_what_it_is_for(name):
    base = replace(SMALL, reprob=float(name in ("remode", "recount")))
    changed = replace(base, **{name: CHANGES[name]})
    pairs = zip(outputs(base), outputs(changed), strict=True)
    assert all(map(torch.equal, *zip(*pairs, strict=True))) == (name == "test_interpolation")
    test, other = (input_of(False, options, picture()) for options in (base, changed))
    assert torch.equal(test, other) == (name not in ("input_size", "test_interpolation", "norm"))


def test_random_erasing_fills_as_its_mode_says():
    full = replace(SMALL, reprob=1.0, remode="const", recount=3)
    for out in outputs(full):
        assert (out == 0).all(dim=0).any()
    erasing = build_transform(True, full).transforms[-1]
    assert (erasing.min_count, erasing.max_count) == (3, 3)


@pytest.mark.parametrize(
    "policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "rand-m30-mmax30-inc1", "v0", "original"]
)
def test_policies_of_timm_never_fail(policy):
    assert policy_problem(policy) is None
    transform = build_transform(True, replace(SMALL, aa=policy))
    for _ in range(300):
        assert transform(picture(24, 24)).shape == (3, 16, 16)
    assert policy_problem("rand-q9").startswith("--aa rand-q9 is not a policy of timm: give ")


# Random augmentation


def epoch_images(stream, options):
    """All batches of an epoch as one list of (image bytes, target), in order."""
    pairs = (zip(*batch, strict=True) for batch in epoch_batches(stream, 1, options, epoch=3))
    return [(image.numpy().tobytes(), int(target)) for image, target in joined(pairs)]


def test_augmentation_is_the_same_for_any_number_of_workers_and_ranks():
    stream = make_stream(RICH, per_class=9)  # 18 images a task
    alone = epoch_images(stream, batching(8, 8))
    assert len(alone) == 18
    assert epoch_images(stream, batching(8, 8, num_workers=2)) == alone
    for world_size in (2, 4):
        size = 8 // world_size
        ranks = [batching(size, 2, rank=r, world_size=world_size) for r in range(world_size)]
        shares = [epoch_images(stream, options) for options in ranks]
        assert sorted(joined(shares)) == sorted(alone)
        first = joined(share[:size] for share in shares)
        assert first == alone[:8]  # rank after rank gives the global batch


def test_augmentation_depends_on_seed_task_epoch_image_and_occurrence_alone():
    stream, source = make_stream(RICH), make_source(7)
    same = ArraySource(source.images[[0] * 4], [0] * 4, source.classes)
    tasks = [replace(t, data=replace(t.data, indices=np.arange(4))) for t in stream.tasks]
    stream = replace(stream, train=same, tasks=tuple(tasks))

    def shown(seed=42, task=0, epoch=0):
        return load(stream, *train_keys(task, epoch, range(4)), seed=seed)[0]

    different = torch.cat([shown(), shown(seed=43), shown(task=1), shown(epoch=1)])
    assert len(different.flatten(1).unique(dim=0)) == 16
    seed_all(1)  # makes no difference
    assert torch.equal(shown(), different[:4])
    often = replace(tasks[0].data, indices=np.array([3, 1, 3, 3, 1]))
    stream = replace(stream, tasks=(replace(tasks[0], data=often),))
    often = load(stream, *train_keys(0, 0, range(5)))[0]
    assert len(often.flatten(1).unique(dim=0)) == 5
    assert torch.equal(often[:2], different[[3, 1]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_untouched(num_workers):
    stream, options = make_stream(RICH), batching(4, 4, num_workers=num_workers)
    before = rng_states()
    epoch_batches(stream, 0, options, epoch=0)
    list(Loaders(stream, options).test(stream.test_sets[0]))
    assert rng_states() == before

    def fail(_image):
        torch.rand(1)
        raise DataError("broken")

    stream.pipeline.train_transform = fail
    with pytest.raises(DataError, match="broken"):
        load(stream, TrainKey(0, 0, 0))
    assert rng_states() == before


def test_data_survives_the_way_into_a_spawned_worker():
    data = RunData(make_stream(RICH), 42)
    keys = [TrainKey(1, 1, 2), Replayed(1, 1, 2, 0), task_data.TestKey(0, 2)]
    loaded = (one.__getitems__(keys) for one in (pickle.loads(pickle.dumps(data)), data))
    for (found, found_target), (image, target) in zip(*loaded, strict=True):
        assert torch.equal(found, image)
        assert found_target == target


# Samplers and batches


@pytest.mark.parametrize("num_images", [1, 11, 12, 13, 33])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("total", [None, 12])
@pytest.mark.parametrize("buffer", [(), np.arange(100, 140)], ids=["plain", "replay"])
def test_pieces_of_all_processes_are_the_global_batches_of_one(
    num_images, world_size, total, buffer
):
    """Also if the global batch is that of a run which began in another number of processes."""
    shared = {"world_size": world_size, "total": total, "replayed": 2}
    alone = batching(total or 3 * world_size, 3, replayed=2)
    ranks = [batching(3, 3, rank=rank, **shared) for rank in range(world_size)]
    samplers = [GlobalBatchSampler(num_images, options, 2, buffer) for options in (alone, *ranks)]
    for sampler in samplers:
        sampler.set_epoch(5)
    alone = list(samplers[0])
    samplers[0].set_epoch(5, first_step=1)
    assert list(samplers[0]) == alone[1:]
    samplers[0].set_epoch(5)
    assert {len(sampler) for sampler in samplers} == {len(alone)}
    size = 5 if len(buffer) else 3  # of a vote group
    for step, (expected, *pieces) in enumerate(zip(*samplers, strict=True)):
        assert joined(pieces) == expected
        assert {sampler.global_batch_size(step) for sampler in samplers} == {len(expected)}
        places = [rank for rank, piece in enumerate(pieces) for _ in piece]
        groups = [set(places[i : i + size]) for i in range(0, len(places), size)]
        assert all(len(group) == 1 for group in groups)  # each in one process
    own = [key for key in joined(alone) if isinstance(key, TrainKey)]
    assert sorted(own) == train_keys(2, 5, range(num_images))
    assert (sum(map(len, alone)) > num_images) == (len(buffer) > 0)


def test_full_batches_are_those_of_training_with_and_without_replay_and_of_tests():
    for rank, own in enumerate((3, 6, 5)):  # of 14 images in groups of 3, 3, 3, 3 and 2
        options = batching(6, 3, rank=rank, world_size=3, total=14, replayed=2, eval_batch_size=10)
        assert options.full_batches == {own, own + (2 if own == 3 else 4), 9}
    assert batching(4, 4).full_batches == {4}
    assert batching(4, 3, device=torch.device("cuda")).test_batch == 255  # whole groups of 256


def test_queries_of_small_batches_are_computed_together_on_a_gpu():
    for size, ahead in ((1, 10), (16, 10), (32, 5), (64, 2), (96, 2), (128, 1)):
        options = batching(size, size, device=torch.device("cuda"))
        assert options.queries_ahead == ahead
        assert options.pass_sizes == {size, 256 // size * size, ahead * size}
        assert batching(size, size).queries_ahead == 1


@pytest.mark.parametrize(
    ("size", "sizes"), [(None, (64, 128, 255)), (5, (1, 2, 3)), (1, (1, 1, 1))]
)
def test_images_computed_again_fill_few_sizes_on_a_gpu_alone(size, sizes):
    votes = 1 if size == 1 else 3
    on_gpu = batching(4, votes, device=torch.device("cuda"), eval_batch_size=size)
    assert on_gpu.fill_sizes == sizes
    filled = [next(size for size in sizes if size >= n) for n in range(1, sizes[-1] + 1)]
    assert [on_gpu.filled(n) for n in range(1, sizes[-1] + 1)] == filled
    assert [batching(4, votes).filled(n) for n in (1, 3, 4)] == [1, 3, 4]


@pytest.mark.parametrize("kind", [TrainKey, Replayed])
def test_order_and_draws_depend_on_seed_task_epoch_and_step_alone(kind):
    def numbers(seed=42, task=0, epoch=0, num_images=64):
        options = batching(32, 4, seed=seed, replayed=3)
        sampler = GlobalBatchSampler(num_images, options, task, range(100, 140))
        sampler.set_epoch(epoch)
        return [tuple(key[-1] for key in keys if isinstance(key, kind)) for keys in sampler]

    np.random.seed(3)
    assert numbers() == numbers()
    different = numbers() + numbers(seed=43) + numbers(task=1) + numbers(epoch=1)
    assert len({*different, tuple(range(32))}) == 9
    if kind is Replayed:  # a task of more steps draws the same in the first of them
        assert numbers(num_images=96)[:2] == numbers()


@pytest.mark.parametrize("num_images", [1, 10, 23, 24])
@pytest.mark.parametrize("world_size", [1, 3, 9])
@pytest.mark.parametrize(("sizes", "full"), [
    ((8, 8), 8), ((20, 4), 20), ((3, 5), 5), ((64, 1, 17), 17), ((8, 4, 7), 4),
])  # fmt: skip
def test_test_batches_hold_whole_groups_in_order(num_images, world_size, sizes, full):
    (batch_size, group, *more), seen, groups = sizes, [], []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "eval_batch_size": [*more, None][0]}
        batches = evaluation_batches(num_images, batching(batch_size, group, **options), test_set=3)
        for batch in batches:
            assert batch[0].position % group == 0
            assert len(batch) % group == 0 or batch[-1].position == num_images - 1
        sizes = [len(batch) for batch in batches]
        assert all(size == full for size in sizes[:-1])
        assert max(sizes, default=0) <= full
        groups.append(-(-sum(sizes) // group))
        seen += joined(batches)
    assert seen == [task_data.TestKey(3, position) for position in range(num_images)]
    assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_test_images_are_bit_for_bit_what_they_always_were(device, num_workers):
    options, came = replace(SMALL, norm="imagenet"), []

    class Watched(ImagePipeline):
        def to_input(self, batch, train):
            came.append((batch.dtype, train))
            return super().to_input(batch, train)

    stream = replace(make_stream(), pipeline=Watched(options, device))
    data, flags = stream.test_sets[1].data, {"eval_batch_size": 4, "test_cache": 1.0}
    loaders = Loaders(stream, batching(4, 4, device=device, num_workers=num_workers, **flags))
    pictures = [data[i][0].resize((16, 16), Image.Resampling.BICUBIC) for i in range(len(data))]
    expected = torch.stack([input_as_always(picture, "imagenet") for picture in pictures])
    for _ in range(2):  # loaded, then cached
        batches = list(loaders.test(stream.test_sets[1]))
        assert torch.equal(torch.cat([images.cpu() for images, _ in batches]), expected)
        targets = torch.cat([targets.cpu() for _, targets in batches])
        assert targets.tolist() == data.source.targets[data.indices].tolist()
        assert len(batches) == len(loaders.test(stream.test_sets[1])) == 3
        assert {one.device.type for batch in batches for one in batch} == {device.type}
    cached = joined(joined(loaders._cached.values()))
    assert not any(part.is_shared() for part in cached)  # but in memory of its own
    assert [part.is_pinned() for part in cached] == 3 * 2 * [device.type == "cuda"]
    assert set(came) == {(torch.uint8, False)}  # small, and finished on the device
    next(iter(loaders.train(stream.tasks[0])))
    assert came[-1] == (torch.uint8, True)


# One set of workers


def children():
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_start_once_for_all_tasks_epochs_and_evaluations():
    before = children()
    stream, loaders, _ = witnessed(batching(4, 4, num_workers=2))
    assert children() == before
    for task in stream.tasks:
        batches = loaders.train(task)
        for epoch in (0, 1):
            batches.batch_sampler.set_epoch(epoch)
            found = pids(batches)
            assert len(found) == 2
            assert found == children() - before
        for test_set in task.test_sets:
            assert pids(loaders.test(test_set)) == found
    assert os.getpid() not in found
    del loaders, batches
    assert children() == before


LEFT_AT_THE_END = """
from helpers.commands import command, wait_until
from helpers.witnessed_loaders import batching, pids, witnessed
stream, loaders, _ = witnessed(batching(4, 4, num_workers=1))
batches = loaders.train(stream.tasks[0])
assert len(pids(batches)) == 1
"""


@pytest.mark.slow
def test_workers_that_are_left_do_not_hold_up_the_end_of_the_program():
    """Python would wait for them as long as they outlive its signal, half a minute."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LEFT_AT_THE_END]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=25)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("num_workers", "batch_size", "eval_batch_size", "expected"), [
    (2, 14, 14, 1), (2, 7, 14, 2), (2, 14, 7, 2), (0, 4, 4, 0), (9, 2, 2, 2),
])  # fmt: skip
def test_no_more_workers_than_cores_and_than_the_longest_pass_has_batches(
    num_workers, batch_size, eval_batch_size, expected
):
    before = children()
    options = batching(batch_size, 1, num_workers=num_workers, eval_batch_size=eval_batch_size)
    stream, loaders, _ = witnessed(options)
    found = pids(loaders.test(stream.test_sets[0]))
    assert len(children() - before) == expected
    assert (found == {os.getpid()}) == (expected == 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_images_gets_an_empty_batch_of_what_the_workers_return(num_workers):
    options = batching(4, 4, rank=3, world_size=4, num_workers=num_workers, replayed=3)
    stream = make_stream(per_class=9)
    buffer = ReplayBuffer(stream.train.targets, 42, ReplaySettings(20))
    for number in (4, 7):  # without and with replay
        full, empty = epoch_batches(stream, 0, options, 0, buffer=buffer)  # 18 images: 16 + 2
        shapes = [(3, 16, 16), (), ()][: len(full)]
        assert [tuple(tensor.shape) for tensor in full] == [(number, *shape) for shape in shapes]
        assert [tuple(tensor.shape) for tensor in empty] == [(0, *shape) for shape in shapes]
        assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]
        buffer.add(stream.tasks[1].data.indices)
    assert full[2].dtype == torch.bool
    stream, loaders, _ = witnessed(options, per_class=6)  # 12 images: none for the last process
    ((images, targets),) = loaders.train(stream.tasks[0])
    assert (images.shape, targets.shape, targets.dtype) == ((0, 2), (0,), torch.int64)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pass_given_up_leaves_nothing_to_the_next(num_workers):
    stream = make_stream(RICH, per_class=9)
    loaders, alone = Loaders(stream, batching(2, 2, num_workers=num_workers)), batching(2, 2)
    test = list(Loaders(stream, alone).test(stream.test_sets[0]))
    for task in range(3):
        train, batches = epoch_batches(stream, task, alone, 1), loaders.train(stream.tasks[task])
        batches.batch_sampler.set_epoch(1)
        given_up = iter(batches)
        assert_same([next(given_up), next(given_up)], train[:2])
        if task == 1:
            assert_same(loaders.test(stream.test_sets[0]), test)
        if task == 2:
            for first_step in (4, 9, 0):
                batches.batch_sampler.set_epoch(1, first_step)
                assert_same(batches, train[first_step:])
                assert len(batches) == 9
    with pytest.raises(AssertionError, match="another pass"):
        next(given_up)


# Cached test images

IMAGE_BYTES = 2 * 4 + 8  # of an image of `witnessed`: two numbers and a class id


def loads(loaders, test_sets, witness):
    """How many images each test set has loaded in this process."""
    numbers = []
    for test_set in test_sets:
        before = witness.calls
        list(loaders.test(test_set))
        numbers.append(witness.calls - before)
    return numbers


@pytest.mark.parametrize("eval_batch_size", [None, 5, 100])
@pytest.mark.parametrize(("images", "missing", "again"), [
    (0, 0, [14, 14, 14]), (14, 1, [14, 14, 14]), (14, 0, [0, 14, 14]), (42, 1, [0, 0, 14]),
    (42, 0, [0, 0, 0]),
])  # fmt: skip
def test_test_images_are_loaded_once_as_far_as_they_fit(images, missing, again, eval_batch_size):
    cache = (images * IMAGE_BYTES - missing) / 1e9
    stream, loaders, witness = witnessed(
        batching(4, 1, eval_batch_size=eval_batch_size, test_cache=cache)
    )
    assert loads(loaders, stream.test_sets, witness) == [14, 14, 14]
    for _ in range(2):
        assert loads(loaders, stream.test_sets, witness) == again


def test_page_locked_images_count_as_the_blocks_that_they_take(monkeypatch):
    """Five images and their class ids are 40 bytes each, in blocks of 64."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    for missing, again in ((0, 0), (1, 14)):
        cache = (14 * (2 * 64 // 5) - missing) / 1e9
        options = batching(4, 1, eval_batch_size=5, test_cache=cache)
        stream, loaders, witness = witnessed(options)
        loaders._pins = True
        assert loads(loaders, 2 * stream.test_sets[:1], witness) == [14, again]


def test_smaller_test_set_is_cached_where_a_larger_one_does_not_fit():
    parts = {number: np.arange(size) for number, size in enumerate((6, 4, 14))}
    stream, _, witness = witnessed(batching(2, 2))
    sets = [replace(s, data=replace(s.data, indices=parts[s.index])) for s in stream.test_sets]
    stream = replace(stream, tasks=(replace(stream.tasks[0], test_sets=tuple(sets)),))
    loaders = Loaders(stream, batching(2, 2, test_cache=5 * IMAGE_BYTES / 1e9))
    assert loads(loaders, sets, witness) == [6, 4, 14]
    assert loads(loaders, sets, witness) == [6, 0, 14]


def test_evaluation_that_is_given_up_or_fails_caches_nothing():
    stream, loaders, witness = witnessed(batching(4, 4, test_cache=1.0))
    test_set = stream.test_sets[0]
    for _ in range(2):
        given_up = iter(loaders.test(test_set))
        next(given_up), next(given_up)
        del given_up
    assert witness.calls == 2 * 8
    last, test_set.data.indices[-1] = test_set.data.indices[-1], 10**6
    with pytest.raises(IndexError):
        list(loaders.test(test_set))
    test_set.data.indices[-1] = last
    assert loads(loaders, [test_set, test_set], witness) == [14, 0]


def test_every_process_caches_its_own_share():
    shares = []
    for rank in range(3):  # 4, 4 and 6 of 14 images
        options = batching(4, 4, rank=rank, world_size=3, test_cache=8 * IMAGE_BYTES / 1e9)
        stream, loaders, witness = witnessed(options)
        shares += loads(loaders, stream.test_sets[:1] * 2, witness)
    assert shares == [4, 0, 4, 0, 6, 0]


# Errors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_named_from_a_loader(tmp_path, num_workers):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(20, 20).save(tmp_path / name / f"{i}.png")
    source = gather(tmp_path, ["ant", "bee"])
    stream = by_classes(source, source, [(0, 1)], ImagePipeline(SMALL, CPU))
    broken = tmp_path / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loaders = Loaders(stream, batching(2, 2, num_workers=num_workers))
    for _ in range(2):
        for batches in (loaders.train(stream.tasks[0]), loaders.test(stream.test_sets[0])):
            message = ""
            try:
                list(batches)
            except DataError as error:  # not pytest.raises: it would keep the workers alive
                message = str(error)
                error.__traceback__ = None
            assert message.startswith(f"{broken}: ")
            assert "\n" not in message


@pytest.mark.parametrize(("what", "kind"), [
    ("DataLoader worker (pid 7) is killed by signal: Bus error.", LostWorkerError),
    ("Caught RuntimeError\nTraceback\nRuntimeError: unable to allocate (shm)", LostWorkerError),
    ("received 0 items of ancdata", LostWorkerError), ("something else", RuntimeError),
])  # fmt: skip
def test_lost_worker_is_reported_in_a_line(what, kind):
    stream = make_stream()
    loaders = Loaders(stream, batching(4, 4))
    loaders._loader = MagicMock(__iter__=Mock(side_effect=RuntimeError(what)))
    with pytest.raises(RuntimeError) as error:
        list(loaders.train(stream.tasks[0]))
    assert error.type is kind
    hint = r" Was memory short \(.*docker run --shm-size\), or ulimit -n\? Give fewer --num_w"
    hint = hint * (kind is LostWorkerError)
    assert re.match(re.escape(what.splitlines()[-1]) + hint, str(error.value))


# What workers need of the machine


LACKS = {
    "TMPDIR /xxxxx": (tempfile, "tempdir", "/" + "x" * 80),
    "No such file or dir": (
        shutil,
        "disk_usage",
        Mock(side_effect=OSError(2, "No such file or dir")),
    ),
    "/dev/shm has 0 MB left of 4 MB": (shutil, "disk_usage", lambda _: SimpleNamespace(free=9)),
    "ulimit -n is 40, less than 132": (resource, "getrlimit", lambda _: (40, 40)),
}


def test_batches_come_through_pipes_where_memory_cannot_be_shared(monkeypatch, caplog):
    caplog.set_level("INFO")
    stream, options = make_stream(RICH), batching(4, 4, num_workers=2)
    for lack, patch in LACKS.items():
        caplog.clear()
        with monkeypatch.context() as context:
            context.setattr(*patch)
            given = Loaders(stream, options).train(stream.tasks[0])
            Loaders(stream, batching(4, 4))
        assert caplog.text.count(lack) == caplog.text.count("through pipes") == 1
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    Loaders(stream, options)
    assert caplog.text.count("through pipes") == 1
    batches = list(given)
    assert not any(one.is_shared() for one in chain.from_iterable(batches))
    assert_same(batches, epoch_batches(stream, 0, batching(4, 4), 0))


no_files = Mock(side_effect=OSError(24, "Too many open files"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("late", [False, True])
def test_workers_that_cannot_start_are_an_error_that_names_the_flag(late, monkeypatch):
    """Whether that is seen before the first starts, or when it runs already."""
    failing = (multiprocessing.Process, "start") if late else (continual_dataloader, "Queue")
    stream, before, starts = make_stream(), children(), []

    def start(process):
        starts.append(process)
        return really_start(process) if len(starts) == 1 else no_files()

    really_start = multiprocessing.Process.start
    monkeypatch.setattr(*failing, start if late else no_files)
    with pytest.raises(LostWorkerError, match=r"--num_workers 2 cannot start \(OSError.*ulimit -n"):
        next(iter(Loaders(stream, batching(4, 4, num_workers=2)).train(stream.tasks[0])))
    assert len(starts) == 2 * late
    wait_until(lambda: children() == before, seconds=5)


SHORT = {
    "few files": "ulimit -n 40",
    "no file": "ulimit -n 15",
    "long TMPDIR": f"export TMPDIR=$PWD/{'x' * 120}; mkdir $TMPDIR",
    "small shm": "unshare -m true || exit 77; mount -t tmpfs -o size=400k tmpfs /dev/shm",
    "read-only shm": "unshare -m true || exit 77; mount -t tmpfs -o ro tmpfs /dev/shm",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHORT)
def test_a_run_ends_whatever_its_workers_lack(kind, tiny, tmp_path):
    script = tmp_path / "run.sh"
    flags = "--num_workers 2 --output_dir out --input-size 96 --batch-size 8 --epochs 1".split()
    words = sys.executable, ROOT / "main.py", *tiny, *flags
    script.write_text(f"cd {tmp_path}; {SHORT[kind]}\nexec {shlex.join(map(str, words))}\n")
    done = command(*["unshare", "-m"] * ("shm" in kind), "bash", script, timeout=60)
    if done.returncode == 77:
        pytest.skip("no mount namespaces here")
    *_, last = done.stdout.splitlines()
    assert done.returncode == (kind in ("no file", "read-only shm")), done.stdout + done.stderr
    assert last.startswith("error: the workers of --num_workers 2" if done.returncode else "Evalu")
