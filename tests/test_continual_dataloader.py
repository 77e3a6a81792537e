"""Transforms, and the loaders of a run."""

import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from dataclasses import fields, replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from cli.settings import TransformSettings
from continual_dataloader import Loaders, LostWorkerError
from continual_datasets import task_data
from continual_datasets.images import ArraySource, DataError
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.readers.class_folders import gather
from continual_datasets.samplers import GlobalBatchSampler, LoaderOptions, evaluation_batches
from continual_datasets.task_data import RunData, TrainKey
from continual_datasets.task_splits import Transforms, by_classes
from continual_datasets.transforms import NORMS, build_transform, policy_problem, to_input
from helpers.witnessed_loaders import (
    CPU,
    SMALL,
    assert_same,
    epoch_batches,
    make_loaders,
    make_source,
    make_stream,
    pids,
    witnessed,
)

RICH = replace(
    SMALL, aa="augmix-m5-w2-d2", color_jitter=0.4, reprob=0.5, train_interpolation="random"
)
FIXED = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


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
    return to_input(options, CPU)(build_transform(train, options)(image)[None])[0]


def input_as_always(image, norm):
    """Each image alone, by torchvision."""
    out = to_tensor(image)
    return out if NORMS[norm] is None else transforms.Normalize(*NORMS[norm])(out)


def all_levels():
    """A picture of 16 x 16 with every level once in every channel."""
    rng = np.random.default_rng(5)
    levels = [rng.permutation(256).astype(np.uint8).reshape(16, 16) for _ in range(3)]
    return Image.fromarray(np.stack(levels, axis=2))


@pytest.mark.parametrize("norm", NORMS)
def test_input_is_bit_for_bit_that_of_each_image_alone(norm):
    options, image = replace(SMALL, norm=norm), all_levels()
    pixels = build_transform(False, options)(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor(np.asarray(image)).permute(2, 0, 1))
    kept, expected = pixels.clone(), input_as_always(image, norm)
    batch = to_input(options, CPU)(torch.stack([pixels, pixels.flip(1)]))
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([expected, expected.flip(1)]))
    assert torch.equal(pixels, kept)
    # With random erasing it is finished in the transform; a box of no size shows the arithmetic.
    out = build_transform(True, replace(options, **FIXED, reprob=1e-9))(image)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert to_input(options, CPU)(out[None]).equal(out[None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("norm", NORMS)
def test_input_has_the_same_bits_on_every_device(norm):
    options, cuda = replace(SMALL, norm=norm), torch.device("cuda")
    pixels = build_transform(False, options)(all_levels())[None]
    found = to_input(options, cuda)(pixels.to(cuda))
    assert torch.equal(found.cpu(), to_input(options, CPU)(pixels))


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


def test_train_transform_is_torchvisions_crop_and_flip():
    crop = transforms.RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    reference = transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])
    for seed in range(8):
        torch.manual_seed(seed)
        expected = to_tensor(reference(picture()))
        torch.manual_seed(seed)
        assert torch.equal(input_of(True, TransformSettings(), picture()), expected)


def outputs(options):
    """What the model gets to see of one training picture under 30 seeds."""
    result = []
    for seed in range(30):
        seed_all(seed)
        result.append(input_of(True, options, picture()))
    return result


CHANGES = {
    "input_size": 24, "scale": (0.5, 0.6), "ratio": (1.0, 1.0), "hflip": 0.0,
    "train_interpolation": "bicubic", "test_interpolation": "bilinear", "norm": "half",
    "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "train_resize": 20, "train_jpeg": 30,
    "reprob": 0.5, "remode": "const", "recount": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(TransformSettings)])
def test_every_transform_option_changes_what_it_is_for(name):
    base = replace(SMALL, reprob=float(name in ("remode", "recount")))
    changed = replace(base, **{name: CHANGES[name]})
    pairs = zip(outputs(base), outputs(changed), strict=True)
    same_training = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    assert same_training == (name == "test_interpolation")
    test, other = (input_of(False, options, picture()) for options in (base, changed))
    same_test = test.shape == other.shape and torch.equal(test, other)
    assert same_test == (name not in ("input_size", "test_interpolation", "norm"))


def test_training_images_pass_through_resize_and_jpeg_before_the_crop():
    file = io.BytesIO()
    resized = picture().resize((48, 48), Image.Resampling.BILINEAR)
    resized.save(file, "JPEG", quality=95)
    compressed = Image.open(file).convert("RGB")
    crop = transforms.RandomResizedCrop(16)
    options = replace(SMALL, train_resize=48, train_jpeg=95, hflip=0.0)
    for seed, found in enumerate(outputs(options)):
        torch.manual_seed(seed)
        assert torch.equal(found, to_tensor(crop(compressed)))


def test_norm_maps_as_its_name_says():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert {"none": None, "half": ((0.5,) * 3, (0.5,) * 3), "imagenet": (mean, std)} == NORMS


def test_random_erasing_fills_as_its_mode_says():
    full = replace(SMALL, reprob=1.0, remode="const")
    for out in outputs(full):
        assert (out == 0).all(dim=0).any()
    noise = torch.stack(outputs(replace(full, remode="pixel")))
    assert noise.min() < 0 < 1 < noise.max()
    erasing = build_transform(True, replace(full, recount=3)).transforms[-1]
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


def epoch_images(stream, task, options, epoch):
    """All batches of an epoch as one list of (image bytes, target), in order."""
    return [
        (image.numpy().tobytes(), int(target))
        for images, targets in epoch_batches(stream, task, options, epoch, transforms=RICH)
        for image, target in zip(images, targets, strict=True)
    ]


def test_augmentation_is_the_same_for_any_number_of_workers_and_ranks():
    stream = make_stream(RICH, per_class=9)  # 18 images a task
    alone = epoch_images(stream, 1, LoaderOptions(8, 8, num_workers=0), epoch=3)
    assert len(alone) == 18
    assert epoch_images(stream, 1, LoaderOptions(8, 8, num_workers=2), epoch=3) == alone
    for world_size in (2, 4):
        options = LoaderOptions(8 // world_size, 2, num_workers=0, world_size=world_size)
        shares = [epoch_images(stream, 1, replace(options, rank=r), 3) for r in range(world_size)]
        assert sorted(chain.from_iterable(shares)) == sorted(alone)
        first = [image for share in shares for image in share[: options.batch_size]]
        assert first == alone[:8]  # rank after rank gives the global batch


def test_augmentation_ignores_the_global_generators_and_the_order():
    data = RunData(make_stream(RICH))
    expected = [data[TrainKey(0, 2, i)][0] for i in range(5)]
    seed_all(1)
    again = data.__getitems__([TrainKey(0, 2, i) for i in reversed(range(5))])
    assert all(torch.equal(a, b) for a, (b, _) in zip(expected, reversed(again), strict=True))


def test_augmentation_differs_by_seed_task_epoch_and_image():
    def image(seed=42, task=0, epoch=0):
        source = make_source(7)
        same = ArraySource(source.images[[0] * 4], [0] * 4, source.classes)
        data = make_stream(RICH, seed=seed).tasks[task].data
        data.source, data.indices = same, np.arange(4)
        return [data[epoch, i][0] for i in range(4)]

    images = image() + image(seed=43) + image(task=1) + image(epoch=1)
    assert len({one.numpy().tobytes() for one in images}) == 16
    assert torch.equal(image()[2], images[2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_untouched(num_workers):
    stream = make_stream(RICH)
    options = LoaderOptions(4, 4, num_workers=num_workers)
    before = rng_states()
    epoch_images(stream, 0, options, epoch=0)
    list(make_loaders(stream, options, RICH).test(stream.test_sets[0]))
    assert rng_states() == before

    def fail(_image):
        torch.rand(1)
        raise DataError("broken")

    stream.tasks[0].data.transform = fail
    with pytest.raises(DataError, match="broken"):
        RunData(stream)[TrainKey(0, 0, 0)]
    assert rng_states() == before


def test_data_survives_the_way_into_a_spawned_worker():
    data = RunData(make_stream(RICH))
    sent = pickle.loads(pickle.dumps(data))
    for key in (TrainKey(1, 1, 2), task_data.Replayed(1, 1, 2, 0), task_data.TestKey(0, 2)):
        assert torch.equal(sent[key][0], data[key][0])
        assert sent[key][1] == data[key][1]


# Samplers and batches


@pytest.mark.parametrize("num_images", [1, 11, 12, 13, 33])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("full", [None, 12])
@pytest.mark.parametrize("buffer", [None, np.arange(100, 140)], ids=["plain", "replay"])
def test_pieces_of_all_processes_are_the_global_batches_of_one(
    num_images, world_size, full, buffer
):
    """Also if the global batch is that of a run which began in another number of processes."""
    alone_options = LoaderOptions(full or 3 * world_size, 3, replayed_per_group=2)
    options = replace(alone_options, batch_size=3, world_size=world_size, global_batch=full)
    ranks = [replace(options, rank=rank) for rank in range(world_size)]
    samplers = [GlobalBatchSampler(num_images, o, 2, buffer) for o in (alone_options, *ranks)]
    alone = samplers[0]
    for sampler in samplers:
        sampler.set_epoch(5)
    assert {len(sampler) for sampler in samplers} == {len(list(alone))}
    size = 3 if buffer is None else 5  # of a vote group
    for step, (expected, *pieces) in enumerate(zip(*samplers, strict=True)):
        assert list(chain.from_iterable(pieces)) == expected
        assert {sampler.global_batch_size(step) for sampler in samplers} == {len(expected)}
        places = [rank for rank, piece in enumerate(pieces) for _ in piece]
        groups = [set(places[i : i + size]) for i in range(0, len(places), size)]
        assert all(len(group) == 1 for group in groups)  # each in one process
    own = [key for keys in alone for key in keys if isinstance(key, TrainKey)]
    assert sorted(own) == [TrainKey(2, 5, i) for i in range(num_images)]
    assert (sum(map(len, alone)) > num_images) == (buffer is not None)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_epoch_can_begin_with_a_later_step(rank, num_workers):
    stream = make_stream(per_class=9)  # 18 images a task: 8 + 8 + 2
    options = LoaderOptions(4, 4, num_workers, rank=rank, world_size=2)
    batches = make_loaders(stream, options).train(stream.tasks[0])
    batches.batch_sampler.set_epoch(2)
    whole, keys = list(batches), list(batches.batch_sampler)
    assert len(batches) == len(whole) == 3
    for first_step in (1, 2, 3, 0):
        batches.batch_sampler.set_epoch(2, first_step)
        assert list(batches.batch_sampler) == keys[first_step:]
        assert_same(batches, whole[first_step:])
        assert len(batches) == 3
    batches.batch_sampler.set_epoch(1)
    assert_same(batches, epoch_batches(stream, 0, replace(options, num_workers=0), 1))


def test_order_depends_on_seed_task_and_epoch_alone():
    def order(seed=42, task=0, epoch=0):
        sampler = GlobalBatchSampler(64, LoaderOptions(64, 4, seed=seed), task)
        sampler.set_epoch(epoch)
        return [key.position for key in next(iter(sampler))]

    assert order() == order()
    orders = [order(), order(seed=43), order(task=1), order(epoch=1), list(range(64))]
    assert len({tuple(one) for one in orders}) == 5


@pytest.mark.parametrize("num_images", [1, 10, 23, 24])
@pytest.mark.parametrize("world_size", [1, 3, 9])
@pytest.mark.parametrize(("options", "full"), [
    (LoaderOptions(8, 8), 8), (LoaderOptions(20, 4), 20), (LoaderOptions(3, 5), 5),
    (LoaderOptions(64, 1, eval_batch_size=17), 17), (LoaderOptions(8, 4, eval_batch_size=7), 4),
])  # fmt: skip
def test_test_batches_hold_whole_groups_in_order(num_images, world_size, options, full):
    group, seen, groups = options.vote_group_size, [], []
    for rank in range(world_size):
        share = replace(options, rank=rank, world_size=world_size)
        batches = evaluation_batches(num_images, share, test_set=3)
        for batch in batches:
            assert batch[0].position % group == 0
            assert len(batch) % group == 0 or batch[-1].position == num_images - 1
        sizes = [len(batch) for batch in batches]
        assert all(size == full for size in sizes[:-1])
        assert max(sizes, default=0) <= full
        groups.append(-(-sum(sizes) // group))
        seen += chain.from_iterable(batches)
    assert seen == [task_data.TestKey(3, position) for position in range(num_images)]
    assert max(groups) - min(groups) <= 1


def test_test_images_are_bit_for_bit_what_they_always_were():
    options, came = replace(SMALL, norm="imagenet"), []

    class Watched(ImagePipeline):
        def to_input(self, batch, train):
            came.append(batch.dtype)
            return super().to_input(batch, train)

    stream = make_stream(options)
    loaders = Loaders(stream, LoaderOptions(4, 4, 1), CPU, Watched(options, CPU))
    data, batches = stream.test_sets[1].data, list(loaders.test(stream.test_sets[1]))
    pictures = [data.source[i][0].resize((16, 16), Image.Resampling.BICUBIC) for i in data.indices]
    expected = torch.stack([input_as_always(image, "imagenet") for image in pictures])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)
    assert set(came) == {torch.uint8}  # small, and finished on the device


# One set of workers


def children():
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_start_once_for_all_tasks_epochs_and_evaluations():
    before = children()
    stream, loaders, _ = witnessed(LoaderOptions(4, 4, num_workers=2))
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
from continual_datasets.samplers import LoaderOptions
from helpers.witnessed_loaders import pids, witnessed
stream, loaders, _ = witnessed(LoaderOptions(4, 4, 2))
batches = loaders.train(stream.tasks[0])
assert len(pids(batches)) == 2
"""


@pytest.mark.slow
def test_workers_that_are_left_do_not_hold_up_the_end_of_the_program():
    """Python would wait for them as long as they outlive its signal, half a minute."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LEFT_AT_THE_END]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=25)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("num_workers", "batch_size", "eval_batch_size", "expected"), [
    (2, 14, 14, 1), (2, 7, 14, 2), (2, 14, 7, 2), (0, 4, 4, 0),
])  # fmt: skip
def test_no_more_workers_than_the_longest_pass_has_batches(
    num_workers, batch_size, eval_batch_size, expected
):
    before = children()
    options = LoaderOptions(batch_size, 1, num_workers, eval_batch_size=eval_batch_size)
    stream, loaders, _ = witnessed(options)
    found = pids(loaders.test(stream.test_sets[0]))
    assert len(children() - before) == expected
    assert (found == {os.getpid()}) == (expected == 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_images_gets_an_empty_batch_of_what_the_workers_return(num_workers):
    options = LoaderOptions(4, 4, num_workers, rank=3, world_size=4, test_cache_bytes=10**6)
    stream = make_stream(per_class=9)  # 18 images a task: 16 + 2
    full, empty = list(make_loaders(stream, options).train(stream.tasks[0]))
    assert [tuple(tensor.shape) for tensor in full] == [(4, 3, 16, 16), (4,)]
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 3, 16, 16), (0,)]
    assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]
    stream, loaders, _ = witnessed(options, per_class=6)  # 12 images: none for the last process
    ((images, targets),) = loaders.train(stream.tasks[0])
    assert (images.shape, images.dtype) == ((0, 2), torch.int64)
    assert (targets.shape, targets.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pass_given_up_leaves_nothing_to_the_next(num_workers):
    stream = make_stream(RICH, per_class=9)
    options = LoaderOptions(2, 2, num_workers=num_workers)
    loaders, alone = make_loaders(stream, options, RICH), replace(options, num_workers=0)
    train = [epoch_batches(stream, task, alone, 1, transforms=RICH) for task in range(3)]
    test = list(make_loaders(stream, alone, RICH).test(stream.test_sets[0]))
    for task in range(3):
        batches = loaders.train(stream.tasks[task])
        batches.batch_sampler.set_epoch(1)
        given_up = iter(batches)
        assert_same([next(given_up), next(given_up)], train[task][:2])
        if task == 1:
            assert_same(loaders.test(stream.test_sets[0]), test)
        if task == 2:
            batches.batch_sampler.set_epoch(1, 4)
            assert_same(batches, train[task][4:])
    with pytest.raises(AssertionError, match="another pass"):
        next(given_up)


# Cached test images

TEST_BYTES = 14 * (2 * 8 + 8)  # of a test set of `witnessed`: two numbers and a class id an image


def loads(loaders, test_sets, witness):
    """How many images each test set has loaded in this process."""
    numbers = []
    for test_set in test_sets:
        before = witness.calls
        list(loaders.test(test_set))
        numbers.append(witness.calls - before)
    return numbers


@pytest.mark.parametrize("eval_batch_size", [None, 5, 100])
@pytest.mark.parametrize(("num_bytes", "again"), [
    (0, [14, 14, 14]), (TEST_BYTES - 1, [14, 14, 14]), (TEST_BYTES, [0, 14, 14]),
    (3 * TEST_BYTES - 1, [0, 0, 14]), (3 * TEST_BYTES, [0, 0, 0]),
])  # fmt: skip
def test_test_images_are_loaded_once_as_far_as_they_fit(num_bytes, again, eval_batch_size):
    options = LoaderOptions(
        4, 1, num_workers=0, eval_batch_size=eval_batch_size, test_cache_bytes=num_bytes
    )
    stream, loaders, witness = witnessed(options)
    assert loads(loaders, stream.test_sets, witness) == [14, 14, 14]
    for _ in range(2):
        assert loads(loaders, stream.test_sets, witness) == again


def test_smaller_test_set_is_cached_where_a_larger_one_does_not_fit():
    stream, loaders, witness = witnessed(LoaderOptions(2, 2, 0, test_cache_bytes=5 * 24))
    for test_set, images in zip(stream.test_sets, (6, 4, 14), strict=True):
        test_set.data.indices = test_set.data.indices[:images]
    assert loads(loaders, stream.test_sets, witness) == [6, 4, 14]
    assert loads(loaders, stream.test_sets, witness) == [6, 0, 14]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_batches_are_the_loaded_ones_in_memory_of_their_own(num_workers):
    stream = make_stream()
    options = LoaderOptions(4, 4, num_workers, test_cache_bytes=10**9)
    loaders, fresh = make_loaders(stream, options), make_loaders(stream, LoaderOptions(4, 4, 0))
    test_set = stream.test_sets[0]
    for _ in range(3):
        batches = list(loaders.test(test_set))
        assert_same(batches, fresh.test(test_set))
        assert len(batches) == len(loaders.test(test_set)) == 3
    assert not any(targets.is_shared() for _, targets in batches)


def test_evaluation_that_is_given_up_or_fails_caches_nothing():
    stream, loaders, witness = witnessed(LoaderOptions(4, 4, 0, test_cache_bytes=10**6))
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
    options = LoaderOptions(4, 4, 0, world_size=3, test_cache_bytes=8 * 24)
    shares = []
    for rank in range(3):  # 4, 4 and 6 of 14 images
        stream, loaders, witness = witnessed(replace(options, rank=rank))
        shares += loads(loaders, stream.test_sets[:1] * 2, witness)
    assert shares == [4, 0, 4, 0, 6, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_cuda_are_those_on_the_cpu(pin_memory, num_workers):
    options = replace(SMALL, norm="imagenet")
    stream, cuda = make_stream(options), torch.device("cuda")
    loading = LoaderOptions(4, 4, num_workers, pin_memory, test_cache_bytes=10**9)
    loaders = Loaders(stream, loading, cuda, ImagePipeline(options, cuda))
    plain = make_loaders(stream, loading, options)
    passes = [(loaders.train(stream.tasks[0]), plain.train(stream.tasks[0]))]
    passes += [(loaders.test(stream.test_sets[0]), plain.test(stream.test_sets[0]))] * 2
    for found, expected in passes:
        batches = list(found)
        assert all(tensor.device.type == "cuda" for batch in batches for tensor in batch)
        assert_same([[tensor.cpu() for tensor in batch] for batch in batches], expected)


# Errors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_named_from_a_loader(tmp_path, num_workers):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(20, 20).save(tmp_path / name / f"{i}.png")
    source = gather(tmp_path, ["ant", "bee"])
    transform = build_transform(False, SMALL)
    stream = by_classes(source, source, [(0, 1)], Transforms(transform, transform, 0))
    broken = tmp_path / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loaders = make_loaders(stream, LoaderOptions(2, 2, num_workers=num_workers))
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


def test_lost_worker_is_reported_in_a_line():
    def fail(message):
        raise RuntimeError(message)
        yield

    stream = make_stream()
    loaders = make_loaders(stream, LoaderOptions(4, 4, 0))
    loaders._loader = fail("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(LostWorkerError, match=r"Killed\. Was memory short\? Give fewer --num_wor"):
        list(loaders.train(stream.tasks[0]))
    loaders._loader = fail("something else")
    with pytest.raises(RuntimeError, match="something else"):
        list(loaders.train(stream.tasks[0]))
