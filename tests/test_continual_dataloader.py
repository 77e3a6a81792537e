import io
import json
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

import continual_dataloader
from cli.settings import TransformSettings
from continual_dataloader import Loaders
from continual_datasets import task_data
from continual_datasets.class_order import check_split, class_order, read_class_order
from continual_datasets.images import ArraySource, DataError, FolderSource
from continual_datasets.pipeline import ToImages
from continual_datasets.samplers import GlobalBatchSampler, LoaderOptions, TestSampler
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.task_data import RunData, TrainKey
from continual_datasets.task_splits import Transforms, class_incremental
from continual_datasets.transforms import NORMS, build_transform, policy_problem, to_input
from helpers.witnessed_loaders import Witness, make_source, pids, witnessed

SMALL = TransformSettings(input_size=16)
RICH = replace(
    SMALL, aa="augmix-m5-w2-d2", color_jitter=0.4, reprob=0.5, train_interpolation="random"
)
CPU = torch.device("cpu")


def make_stream(options=SMALL, per_class=7, order=(3, 1, 5, 0, 2, 4), num_tasks=3, seed=42):
    prepare = Transforms(build_transform(True, options), build_transform(False, options), seed)
    return class_incremental(
        make_source(per_class),
        make_source(5, seed=1),
        order,
        num_tasks,
        len(order) // num_tasks,
        prepare,
    )


def loaders_of(stream, options, transform_options=SMALL):
    convert = to_input(transform_options, CPU)
    return Loaders(stream, options, CPU, ToImages(convert, convert))


def picture(width=90, height=70):
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def rng_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2:]


# Transforms


def input_of(train, options, image):
    """What the model gets to see of an image."""
    return to_input(options, CPU)(build_transform(train, options)(image)[None])[0]


def input_as_always(image, norm):
    """The arithmetic by which every image was converted alone, in a worker."""
    pixels = np.asarray(image).transpose(2, 0, 1)
    out = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255))
    return out if NORMS[norm] is None else transforms.Normalize(*NORMS[norm])(out)


def all_levels():
    """A picture of 16 x 16 with every level once in every channel."""
    rng = np.random.default_rng(5)
    levels = [rng.permutation(256).astype(np.uint8).reshape(16, 16) for _ in range(3)]
    return Image.fromarray(np.stack(levels, axis=2))


@pytest.mark.parametrize("norm", NORMS)
def test_input_is_bit_for_bit_that_of_each_image_alone(norm):
    options = replace(SMALL, norm=norm)
    image = all_levels()
    pixels = build_transform(False, options)(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor(np.asarray(image)).permute(2, 0, 1))
    kept = pixels.clone()
    batch = to_input(options, CPU)(torch.stack([pixels, pixels.flip(1)]))
    expected = input_as_always(image, norm)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([expected, expected.flip(1)]))
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("norm", NORMS)
def test_input_with_random_erasing_is_finished_in_the_transform(norm):
    """An erased box of no size shows the arithmetic alone."""
    options = replace(SMALL, norm=norm, hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), reprob=1e-9)
    out = build_transform(True, options)(all_levels())
    assert out.dtype == torch.float32
    assert torch.equal(out, input_as_always(all_levels(), norm))
    assert to_input(options, CPU)(out[None]).equal(out[None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("norm", NORMS)
def test_input_has_the_same_bits_on_every_device(norm):
    options, cuda = replace(SMALL, norm=norm), torch.device("cuda")
    pixels = build_transform(False, options)(all_levels())[None]
    found = to_input(options, cuda)(pixels.to(cuda))
    assert torch.equal(found.cpu(), to_input(options, CPU)(pixels))


@pytest.mark.parametrize("size", [1, 2])
def test_pixels_are_copied_out_of_the_picture(size):
    out = build_transform(False, TransformSettings(input_size=size))(Image.new("RGB", (size, size)))
    assert out.is_contiguous()
    out += 1


def test_test_transform_above_32_pixels_resizes_and_crops():
    out = input_of(False, TransformSettings(input_size=48), picture())
    resized = picture().resize((int(90 / 70 * 54), 54), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 48) / 2), round((resized.height - 48) / 2)
    expected = np.asarray(resized.crop((left, top, left + 48, top + 48)))
    assert torch.equal(out, torch.tensor(expected).permute(2, 0, 1) / 255)


def test_test_transform_resizes_short_side_to_256_for_224():
    steps = build_transform(False, TransformSettings()).transforms
    assert (steps[0].size, steps[1].size) == (256, (224, 224))
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC


def test_test_transform_up_to_32_pixels_keeps_native_size_untouched():
    image = picture(32, 32)
    out = input_of(False, TransformSettings(input_size=32), image)
    assert torch.equal(out, torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255)
    assert build_transform(False, TransformSettings(input_size=32))(picture()).shape == (3, 32, 32)


def test_train_transform_is_torchvisions_crop_and_flip():
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
        ]
    )
    for seed in range(8):
        torch.manual_seed(seed)
        expected = reference(picture())
        torch.manual_seed(seed)
        out = input_of(True, TransformSettings(), picture())
        assert torch.equal(out, expected)
        assert out.dtype == torch.float32
        assert 0 <= out.min() <= out.max() <= 1


def outputs(train, options):
    """What the model gets to see of one picture under 30 seeds."""
    result = []
    for seed in range(30):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        result.append(input_of(train, options, picture()))
    return result


ERASING = replace(SMALL, reprob=1.0)
CHANGES = {
    "input_size": (SMALL, 24, True),
    "scale": (SMALL, (0.5, 0.6), True),
    "ratio": (SMALL, (1.0, 1.0), True),
    "hflip": (SMALL, 0.0, True),
    "train_interpolation": (SMALL, "bicubic", True),
    "aa": (SMALL, "rand-m9-mstd0.5-inc1", True),
    "color_jitter": (SMALL, 0.4, True),
    "reprob": (SMALL, 0.5, True),
    "remode": (ERASING, "const", True),
    "recount": (ERASING, 3, True),
    "norm": (SMALL, "half", False),
    "train_resize": (SMALL, 20, True),
    "train_jpeg": (SMALL, 30, True),
}


def test_test_interpolation_is_that_of_test_images_alone():
    changed = replace(SMALL, input_size=40, test_interpolation="bilinear")
    resized = transforms.Resize(45, transforms.InterpolationMode.BILINEAR)(picture())
    expected = transforms.functional.to_tensor(transforms.CenterCrop(40)(resized))
    assert torch.equal(input_of(False, changed, picture()), expected)
    plain = replace(changed, test_interpolation="bicubic")
    assert not torch.equal(input_of(False, plain, picture()), expected)
    for found, wanted in zip(outputs(True, changed), outputs(True, plain), strict=True):
        assert torch.equal(found, wanted)


def test_training_images_pass_through_resize_and_jpeg_before_the_crop():
    options = replace(SMALL, train_resize=48, train_jpeg=95, hflip=0.0)
    resized = picture().resize((48, 48), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=95)
    compressed = Image.open(file).convert("RGB")
    crop = transforms.RandomResizedCrop(16)
    for seed, found in enumerate(outputs(True, options)):
        torch.manual_seed(seed)
        assert torch.equal(found, transforms.functional.to_tensor(crop(compressed)))


@pytest.mark.parametrize(
    "name", [f.name for f in fields(TransformSettings) if f.name != "test_interpolation"]
)
def test_every_transform_option_changes_something(name):
    base, value, train_only = CHANGES[name]
    changed = replace(base, **{name: value})
    same = [
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(outputs(True, base), outputs(True, changed), strict=True)
    ]
    assert not all(same)
    if train_only and name != "input_size":
        test, other = (input_of(False, options, picture()) for options in (base, changed))
        assert torch.equal(test, other)


def test_norm_maps_as_its_name_says():
    plain, half, imagenet = (
        input_of(False, replace(SMALL, norm=norm), picture())
        for norm in ("none", "half", "imagenet")
    )
    assert torch.allclose(half, plain * 2 - 1, atol=1e-6)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(imagenet, (plain - mean) / std, atol=1e-6)


def test_random_erasing_fills_as_its_mode_says():
    full = replace(SMALL, reprob=1.0, remode="const")
    for out in outputs(True, full):
        assert (out == 0).all(dim=0).any()
    noise = torch.stack(outputs(True, replace(full, remode="pixel")))
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


def test_policy_that_timm_does_not_know_is_reported():
    assert policy_problem("rand-q9").startswith("--aa rand-q9 is not a policy of timm: give ")


# Class order and split


def test_class_order_is_the_originals():
    expected = list(range(100))
    random.seed(42)
    random.shuffle(expected)
    random.seed(7)
    before = rng_states()
    assert class_order(100, 42, shuffle=True) == expected
    assert rng_states() == before
    assert class_order(5, 42, shuffle=False) == [0, 1, 2, 3, 4]


NAMES = ["maple tree", "oak", "zebra", "1st", "12"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flat.json", "[4, 0, 2, 1, 3]", [4, 0, 2, 1, 3]),
        ("tasks.json", "[[4, 0], [2, 1]]", [4, 0, 2, 1]),
        ("names.json", '["oak", ["maple tree", "12"]]', [1, 0, 4]),
        ("lines.txt", "\ufeffoak\r\nmaple tree\n\n3\n", [1, 0, 3]),
        ("commas.txt", "zebra, maple tree, 1st\n1", [2, 0, 3, 1]),
        ("blanks.txt", "2 1\t0\n3,12", [2, 1, 0, 3, 4]),
        ("json.txt", " [1, 0] ", [1, 0]),
    ],
)
def test_read_class_order_understands(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_order(tmp_path / name, NAMES) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("twice.txt", b"1 2 1", "class 1 appears twice"),
        ("same.json", b'[1, "oak"]', "class oak appears twice"),
        ("range.txt", b"0 5", "unknown class '5': give class names or ids from 0 to 4"),
        ("negative.json", b"[-1]", "unknown class -1"),
        ("unknown.txt", b"oak, pine", "unknown class 'pine'"),
        ("float.json", b"[1.0]", "unknown class 1.0"),
        ("bool.json", b"[true]", "unknown class True"),
        ("deep.json", b"[[[1]]]", "unknown class [1]"),
        ("bad.json", b"[1, 2", "not valid JSON"),
        ("word.json", b"oak", "not valid JSON"),
        ("object.json", b'{"order": [1]}', "expected a list"),
        ("empty.txt", b" \n", "no classes"),
        ("empty.json", b"[]", "no classes"),
        ("binary.txt", b"\xff\xfe\x00", "not a text file"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_read_class_order_names_file_and_problem(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_class_order(path, NAMES)
    assert str(caught.value).startswith(f"--class_order {path}: ")
    assert expected in str(caught.value)


def test_read_class_order_rejects_numbers_that_mean_two_things(tmp_path):
    (tmp_path / "order").write_text("1\n2")
    with pytest.raises(ValueError, match="1 is the name of class 0 but could mean the id 1"):
        read_class_order(tmp_path / "order", ["1", "2", "3"])
    (tmp_path / "order.json").write_text("[1, 2]")
    assert read_class_order(tmp_path / "order.json", ["1", "2", "3"]) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((100, 10), 10), ((100, 10, None), 10), ((100, 7, 14), 14), ((5, 5), 1), ((7, 1), 7)],
)
def test_check_split_returns_classes_per_task(arguments, expected):
    assert check_split(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (100, 7),
            "100 classes cannot be split evenly over --num_tasks 7: choose one of "
            "1, 2, 4, 5, 10, 20, 25, 50, 100, or give --classes_per_task 14",
        ),
        (
            (100, 6, 20),
            "--num_tasks 6 x --classes_per_task 20 = 120 exceeds the 100 classes: lower "
            "--num_tasks to 5 or --classes_per_task to 16",
        ),
        ((10, 11), "--num_tasks 11 exceeds the 10 classes"),
        ((10, 0), "--num_tasks 0: must be at least 1"),
        ((10, 2, 0), "--classes_per_task 0: must be at least 1"),
        ((10, 2, -3), "--classes_per_task -3: must be at least 1"),
    ],
)
def test_check_split_says_what_would_fit(arguments, expected):
    with pytest.raises(ValueError) as caught:
        check_split(*arguments)
    assert str(caught.value).startswith(expected)


# Random augmentation


def epoch_batches(stream, task, options, epoch, first_step=0):
    """The batches of an epoch of a task, loaded by workers of their own."""
    batches = loaders_of(stream, options, RICH).train(stream.tasks[task])
    batches.batch_sampler.set_epoch(epoch, first_step)
    return list(batches)


def epoch_images(stream, task, options, epoch):
    """All batches of an epoch as one list of (image bytes, target), in order."""
    return [
        (image.numpy().tobytes(), int(target))
        for images, targets in epoch_batches(stream, task, options, epoch)
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
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
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
    list(loaders_of(stream, options, RICH).test(stream.test_sets[0]))
    assert rng_states() == before


def test_data_survives_the_way_into_a_spawned_worker():
    data = RunData(make_stream(RICH))
    sent = pickle.loads(pickle.dumps(data))
    for key in (TrainKey(1, 1, 2), task_data.Replayed(1, 1, 2, 0), task_data.TestKey(0, 2)):
        assert torch.equal(sent[key][0], data[key][0])


def test_generators_are_restored_after_an_error():
    stream = make_stream()
    before = rng_states()

    def fail(_image):
        torch.rand(1)
        raise DataError("broken")

    stream.tasks[0].data.transform = fail
    with pytest.raises(DataError, match="broken"):
        RunData(stream)[TrainKey(0, 0, 0)]
    assert rng_states() == before


# Samplers and loaders


@pytest.mark.parametrize("num_images", [1, 5, 16, 33])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_global_batches_hold_every_image_once(num_images, world_size):
    alone = GlobalBatchSampler(num_images, LoaderOptions(4 * world_size, 4), task=2)
    ranks = [
        GlobalBatchSampler(num_images, LoaderOptions(4, 4, rank=r, world_size=world_size), task=2)
        for r in range(world_size)
    ]
    for sampler in (alone, *ranks):
        sampler.set_epoch(5)
    steps = [list(sampler) for sampler in ranks]
    assert {len(batches) for batches in steps} == {len(alone)} == {len(ranks[0])}
    for step, expected in enumerate(alone):
        pieces = [batches[step] for batches in steps]
        assert list(chain.from_iterable(pieces)) == expected
        assert all(len(piece) == 4 for piece in pieces[: len(expected) // 4])
        assert ranks[0].global_batch_size(step) == len(expected)
    seen = [key for batch in alone for key in batch]
    assert sorted(seen) == [TrainKey(2, 5, i) for i in range(num_images)]


@pytest.mark.parametrize("num_images", [1, 11, 12, 13, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7])
def test_global_batch_of_a_run_holds_in_any_number_of_processes(num_images, world_size):
    """As when it goes on in another number: four vote groups a step, of which each has a few."""
    options = LoaderOptions(6, 3, world_size=world_size, global_batch=12)
    alone = GlobalBatchSampler(num_images, LoaderOptions(12, 3), task=1)
    ranks = [
        GlobalBatchSampler(num_images, replace(options, rank=r), task=1) for r in range(world_size)
    ]
    assert {len(sampler) for sampler in ranks} == {len(alone)}
    pieces = list(zip(*ranks, strict=True))
    assert len(pieces) == len(alone)
    for step, (expected, pieces_of_step) in enumerate(zip(alone, pieces, strict=True)):
        assert list(chain.from_iterable(pieces_of_step)) == expected
        assert {s.global_batch_size(step) for s in ranks} == {len(expected)}
        places = [i for i, piece in enumerate(pieces_of_step) for _ in piece]
        groups = [places[i : i + 3] for i in range(0, len(places), 3)]
        assert all(len(set(group)) == 1 for group in groups)  # each in one process


@pytest.mark.parametrize("num_images", [0, 1, 7, 24, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_shares_are_whole_vote_groups_evenly(num_images, world_size, group):
    shares = [
        LoaderOptions(8, group, rank=rank, world_size=world_size).share(num_images)
        for rank in range(world_size)
    ]
    images = range(num_images)
    assert list(chain.from_iterable(images[share] for share in shares)) == list(images)
    assert all(share.start % group == 0 or share.start == num_images for share in shares)
    groups = [-(-len(images[share]) // group) for share in shares]
    assert sum(groups) == -(-num_images // group)
    assert max(groups) - min(groups) <= 1


def test_epoch_can_begin_with_a_later_step():
    stream = make_stream(per_class=9)  # 18 images a task: 8 + 8 + 2
    for rank in (0, 1):
        options = LoaderOptions(4, 4, rank=rank, world_size=2)
        sampler = GlobalBatchSampler(18, options, task=0)
        loaders = [
            loaders_of(stream, replace(options, num_workers=n)).train(stream.tasks[0])
            for n in (0, 1)
        ]
        for one in (sampler, *(loader.batch_sampler for loader in loaders)):
            one.set_epoch(2)
        whole = list(sampler)
        targets = [targets.tolist() for _, targets in loaders[0]]
        for first_step in (0, 1, 2, 3):
            sampler.set_epoch(2, first_step)
            assert list(sampler) == whole[first_step:]
            assert len(sampler) == 3
            for loader in loaders:
                loader.batch_sampler.set_epoch(2, first_step)
                assert [targets.tolist() for _, targets in loader] == targets[first_step:]
        sampler.set_epoch(2)
        assert list(sampler) == whole


def test_order_depends_on_seed_task_and_epoch_alone():
    def order(seed=42, task=0, epoch=0):
        sampler = GlobalBatchSampler(64, LoaderOptions(64, 4, seed=seed), task)
        sampler.set_epoch(epoch)
        return [key.position for key in next(iter(sampler))]

    assert order() == order()
    orders = [order(), order(seed=43), order(task=1), order(epoch=1), list(range(64))]
    assert len({tuple(one) for one in orders}) == 5


def test_set_epoch_reaches_persistent_workers():
    stream = make_stream(RICH)
    options = LoaderOptions(8, 8, num_workers=2)
    batches = loaders_of(stream, options, RICH).train(stream.tasks[0])
    for epoch in (0, 1, 0):
        batches.batch_sampler.set_epoch(epoch)
        expected = epoch_batches(stream, 0, replace(options, num_workers=0), epoch)
        assert_same(list(batches), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_images_gets_an_empty_batch(num_workers):
    stream = make_stream(per_class=9)  # 18 images a task: 16 + 2
    options = LoaderOptions(4, 4, num_workers=num_workers, rank=3, world_size=4)
    full, empty = list(loaders_of(stream, options).train(stream.tasks[0]))
    assert full[0].shape == (4, 3, 16, 16)
    assert empty[0].shape == (0, 3, 16, 16)
    assert empty[0].dtype == full[0].dtype
    assert empty[1].shape == (0,)
    assert empty[1].dtype == full[1].dtype == torch.int64


@pytest.mark.parametrize("num_images", [1, 10, 23, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize(("batch_size", "group"), [(8, 8), (20, 4), (3, 5), (64, 1)])
@pytest.mark.parametrize("eval_batch_size", [None, 17])
def test_test_batches_hold_whole_groups_in_order(
    num_images, world_size, batch_size, group, eval_batch_size
):
    seen = []
    for rank in range(world_size):
        options = LoaderOptions(
            batch_size, group, rank=rank, world_size=world_size, eval_batch_size=eval_batch_size
        )
        sampler = TestSampler(num_images, options, test_set=3)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert {key.test_set for batch in keys for key in batch} <= {3}
        batches = [[key.position for key in batch] for batch in keys]
        size = eval_batch_size or batch_size
        for batch in batches:
            assert batch[0] % group == 0
            assert len(batch) <= max(group, size)
            assert len(batch) % group == 0 or batch[-1] == num_images - 1
        for batch in batches[:-1]:
            assert len(batch) == max(group, size // group * group)
        seen += chain.from_iterable(batches)
    assert seen == list(range(num_images))


def assert_same(batches, expected):
    for batch, wanted in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("options", [SMALL, RICH], ids=["plain", "erasing"])
def test_pixels_travel_as_bytes_and_become_images_on_the_device(num_workers, options):
    stream = make_stream(options)
    came = {"train": [], "test": []}
    convert = to_input(options, CPU)
    to_images = ToImages(
        *[lambda batch, to=to: (to.append(batch), convert(batch))[1] for to in came.values()]
    )
    loaders = Loaders(stream, LoaderOptions(8, 8, num_workers), CPU, to_images)
    for images, _ in (*loaders.train(stream.tasks[0]), *loaders.test(stream.test_sets[0])):
        assert images.dtype == torch.float32
    erasing = options.reprob > 0
    assert {t.dtype for t in came["train"]} == {torch.float32 if erasing else torch.uint8}
    assert {t.dtype for t in came["test"]} == {torch.uint8}


@pytest.mark.parametrize("norm", NORMS)
def test_test_images_are_bit_for_bit_what_they_always_were(norm):
    options = replace(SMALL, norm=norm)
    stream = make_stream(options)
    data = stream.test_sets[1].data
    batches = loaders_of(stream, LoaderOptions(4, 4, 1), options).test(stream.test_sets[1])
    pictures = [data.source[i][0] for i in data.indices]
    small = [image.resize((16, 16), Image.Resampling.BICUBIC) for image in pictures]
    expected = torch.stack([input_as_always(image, norm) for image in small])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


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
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", LEFT_AT_THE_END]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=25
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_workers_the_process_itself_loads():
    before = children()
    stream, loaders, _ = witnessed(LoaderOptions(4, 4, num_workers=0))
    for task in stream.tasks:
        assert pids(loaders.train(task)) == pids(loaders.test(task.test_sets[0])) == {os.getpid()}
    assert children() == before


@pytest.mark.parametrize(
    ("batch_size", "eval_batch_size", "expected"), [(14, 14, 1), (7, 14, 2), (14, 7, 2)]
)
def test_no_more_workers_than_the_longest_pass_has_batches(batch_size, eval_batch_size, expected):
    before = children()
    options = LoaderOptions(batch_size, 1, num_workers=2, eval_batch_size=eval_batch_size)
    stream, loaders, _ = witnessed(options)
    list(loaders.test(stream.test_sets[0]))
    assert len(children() - before) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_need_not_hold_pixels(num_workers):
    options = LoaderOptions(4, 4, num_workers, rank=3, world_size=4, test_cache_bytes=10**6)
    stream, loaders, _ = witnessed(options)  # 14 images a task: 4 + 4 + 4 + 2
    (images, targets), *_ = loaders.train(stream.tasks[0])
    assert (images.shape, images.dtype) == ((2, 2), torch.int64)
    assert (images[:, 0] > 0).all()
    stream, loaders, _ = witnessed(options, per_class=6)  # 12 images: none for the last process
    ((images, targets),) = loaders.train(stream.tasks[0])
    assert (images.shape, images.dtype) == ((0, 2), torch.int64)
    assert (targets.shape, targets.dtype) == ((0,), torch.int64)
    for _ in range(2):
        ((images, _),) = loaders.test(stream.test_sets[0])
        assert (images[:, 0] < 0).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pass_given_up_leaves_nothing_to_the_next(num_workers):
    stream = make_stream(RICH, per_class=9)
    options = LoaderOptions(2, 2, num_workers=num_workers)
    loaders = loaders_of(stream, options, RICH)
    alone = replace(options, num_workers=0)
    train = [epoch_batches(stream, task, alone, epoch=1) for task in range(3)]
    test = list(loaders_of(stream, alone, RICH).test(stream.test_sets[0]))
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


# Test images that are kept

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
@pytest.mark.parametrize(
    ("num_bytes", "again"),
    [
        (0, [14, 14, 14]),
        (TEST_BYTES - 1, [14, 14, 14]),
        (TEST_BYTES, [0, 14, 14]),
        (3 * TEST_BYTES - 1, [0, 0, 14]),
        (3 * TEST_BYTES, [0, 0, 0]),
    ],
)
def test_test_images_are_loaded_once_as_far_as_they_fit(num_bytes, again, eval_batch_size):
    options = LoaderOptions(
        4, 1, num_workers=0, eval_batch_size=eval_batch_size, test_cache_bytes=num_bytes
    )
    stream, loaders, witness = witnessed(options)
    assert loads(loaders, stream.test_sets, witness) == [14, 14, 14]
    for _ in range(2):
        assert loads(loaders, stream.test_sets, witness) == again


def test_smaller_test_set_is_kept_where_a_larger_one_does_not_fit():
    options = LoaderOptions(2, 2, num_workers=0, test_cache_bytes=5 * 24)
    data = [task_data.TestData(make_source(1), np.arange(n), Witness()) for n in (6, 4)]
    test_sets = tuple(TestSet(i, f"set{i}", part, (0,)) for i, part in enumerate(data))
    train = make_stream().tasks[0].data
    stream = TaskStream((Task(0, "task1", train, (0,), test_sets),), train.source)
    loaders = Loaders(stream, options, CPU, ToImages(torch.neg, torch.neg))
    for _ in range(3):
        for test_set in test_sets:
            list(loaders.test(test_set))
    assert [part.transform.calls for part in data] == [3 * 6, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kept_batches_are_the_loaded_ones_in_memory_of_their_own(num_workers):
    stream = make_stream()
    options = LoaderOptions(4, 4, num_workers, test_cache_bytes=10**9)
    loaders, fresh = (loaders_of(stream, replace(options, num_workers=n)) for n in (num_workers, 0))
    list(loaders.test(stream.test_sets[0]))
    for _ in range(2):
        kept = list(loaders.test(stream.test_sets[0]))
        assert_same(kept, fresh.test(stream.test_sets[0]))
        assert len(kept) == len(loaders.test(stream.test_sets[0])) == 3
        assert not any(targets.is_shared() for _, targets in kept)


def test_evaluation_given_up_keeps_nothing():
    stream, loaders, witness = witnessed(LoaderOptions(4, 4, 0, test_cache_bytes=10**6))
    test_set = stream.test_sets[0]
    for _ in range(2):
        given_up = iter(loaders.test(test_set))
        next(given_up), next(given_up)
        del given_up
    assert witness.calls == 2 * 8
    assert loads(loaders, [test_set], witness) == [14]
    assert loads(loaders, [test_set], witness) == [0]


def test_evaluation_that_fails_keeps_nothing():
    stream, loaders, witness = witnessed(LoaderOptions(4, 4, 0, test_cache_bytes=10**6))
    data = stream.test_sets[0].data
    last, data.indices[-1] = data.indices[-1], 10**6
    with pytest.raises(IndexError):
        list(loaders.test(stream.test_sets[0]))
    data.indices[-1] = last
    assert loads(loaders, stream.test_sets[:1], witness) == [14]


def test_every_process_keeps_its_own_share():
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
    convert = to_input(options, cuda)
    loading = LoaderOptions(4, 4, num_workers, pin_memory, test_cache_bytes=10**9)
    loaders = Loaders(stream, loading, cuda, ToImages(convert, convert))
    plain = loaders_of(stream, loading, options)
    passes = [(loaders.train(stream.tasks[0]), plain.train(stream.tasks[0]))]
    passes += [(loaders.test(stream.test_sets[0]), plain.test(stream.test_sets[0]))] * 2
    for found, expected in passes:
        batches = list(found)
        assert all(tensor.device.type == "cuda" for batch in batches for tensor in batch)
        assert_same([[tensor.cpu() for tensor in batch] for batch in batches], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_named_from_a_loader(tmp_path, num_workers):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(20, 20).save(tmp_path / name / f"{i}.png")
    source = FolderSource(tmp_path, ["ant", "bee"])
    transform = build_transform(False, SMALL)
    prepare = Transforms(transform, transform, 0)
    stream = class_incremental(source, source, (0, 1), 1, 2, prepare)
    broken = tmp_path / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = LoaderOptions(2, 2, num_workers=num_workers)
    loaders = loaders_of(stream, options)
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


def test_read_class_order_reads_back_what_a_stream_reports(tmp_path):
    stream = make_stream()
    (tmp_path / "order.json").write_text(json.dumps(stream.class_order))
    order = read_class_order(tmp_path / "order.json", stream.class_names)
    assert make_stream(order=order).class_order == stream.class_order


def test_test_set_beyond_the_budget_is_held_once_at_most():
    cache, copied = continual_dataloader._TestCache(10), []

    class Batch(torch.Tensor):
        def is_shared(self):
            copied.append(1)
            return False

    for _ in range(3):
        batches = [[torch.zeros(4, dtype=torch.uint8).as_subclass(Batch)] for _ in range(4)]
        assert len(list(cache.caching(0, batches))) == 4
    assert sum(copied) == 2
    assert cache.get(0) is None


def test_lost_worker_is_reported_in_a_line(monkeypatch):
    class Killed:
        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    class Broken:
        def __iter__(self):
            raise RuntimeError("something else")

    workers = object.__new__(continual_dataloader._Workers)
    workers._sampler, workers._loader = continual_dataloader._PassSampler(), Killed()
    with pytest.raises(continual_dataloader.LostWorkerError, match="Give fewer --num_workers"):
        list(workers.load([]))
    workers._loader = Broken()
    with pytest.raises(RuntimeError, match="something else"):
        list(workers.load([]))
