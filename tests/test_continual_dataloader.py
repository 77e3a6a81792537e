import io
import json
import pickle
import random
from dataclasses import fields, replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from class_order import check_split, class_order, read_class_order
from continual_dataloader import (
    GlobalBatchSampler,
    LoaderOptions,
    build_test_loader,
    build_train_loader,
)
from image_sources import ArraySource, DataError, FolderSource
from image_transforms import TransformOptions, build_transform
from scenarios import Preparation, class_incremental
from task_stream import TestSet

SMALL = TransformOptions(input_size=16)
RICH = replace(SMALL, aa="augmix-m5-w2-d2", color_jitter=0.4, reprob=0.5, interpolation="random")


def make_source(per_class, num_classes=6, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    return ArraySource(images, targets, [f"name{i}" for i in range(num_classes)])


def make_stream(options=SMALL, per_class=7, order=(3, 1, 5, 0, 2, 4), num_tasks=3, seed=42):
    prepare = Preparation(build_transform(True, options), build_transform(False, options), seed)
    return class_incremental(
        make_source(per_class),
        make_source(5, seed=1),
        order,
        num_tasks,
        len(order) // num_tasks,
        prepare,
    )


def picture(width=90, height=70):
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def rng_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2:]


# Transforms


def test_test_transform_above_32_pixels_resizes_and_crops():
    out = build_transform(False, TransformOptions(input_size=48))(picture())
    resized = picture().resize((int(90 / 70 * 54), 54), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 48) / 2), round((resized.height - 48) / 2)
    expected = np.asarray(resized.crop((left, top, left + 48, top + 48)))
    assert torch.equal(out, torch.tensor(expected).permute(2, 0, 1) / 255)


def test_test_transform_resizes_short_side_to_256_for_224():
    steps = build_transform(False, TransformOptions()).transforms
    assert (steps[0].size, steps[1].size) == (256, (224, 224))
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC


def test_test_transform_up_to_32_pixels_keeps_native_size_untouched():
    image = picture(32, 32)
    out = build_transform(False, TransformOptions(input_size=32))(image)
    assert torch.equal(out, torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255)
    assert build_transform(False, TransformOptions(input_size=32))(picture()).shape == (3, 32, 32)


def test_train_transform_is_torchvisions_crop_and_flip():
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
        ]
    )
    transform = build_transform(True, TransformOptions())
    for seed in range(8):
        torch.manual_seed(seed)
        expected = reference(picture())
        torch.manual_seed(seed)
        out = transform(picture())
        assert torch.equal(out, expected)
        assert out.dtype == torch.float32
        assert 0 <= out.min() <= out.max() <= 1


def outputs(train, options):
    """What a transform makes of one picture under 30 seeds."""
    transform = build_transform(train, options)
    result = []
    for seed in range(30):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        result.append(transform(picture()))
    return result


ERASING = replace(SMALL, reprob=1.0)
CHANGES = {
    "input_size": (SMALL, 24, True),
    "scale": (SMALL, (0.5, 0.6), True),
    "ratio": (SMALL, (1.0, 1.0), True),
    "hflip": (SMALL, 0.0, True),
    "interpolation": (SMALL, "bicubic", True),
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
    assert torch.equal(build_transform(False, changed)(picture()), expected)
    plain = replace(changed, test_interpolation="bicubic")
    assert not torch.equal(build_transform(False, plain)(picture()), expected)
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
    "name", [f.name for f in fields(TransformOptions) if f.name != "test_interpolation"]
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
        test, other = (build_transform(False, options)(picture()) for options in (base, changed))
        assert torch.equal(test, other)


def test_norm_maps_as_its_name_says():
    plain, half, imagenet = (
        build_transform(False, replace(SMALL, norm=norm))(picture())
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
    transform = build_transform(True, replace(SMALL, aa=policy))
    for _ in range(300):
        assert transform(picture(24, 24)).shape == (3, 16, 16)


def test_transform_options_report_everything_wrong_at_once():
    with pytest.raises(ValueError) as caught:
        TransformOptions(
            input_size=0,
            scale=(0.5, 0.1),
            ratio=(0.0, 1.0),
            hflip=1.5,
            interpolation="cubic",
            aa="rand-q9",
            color_jitter=-1.0,
            reprob=-0.1,
            remode="noise",
            recount=0,
            norm="cifar",
            train_resize=0,
            train_jpeg=101,
            test_interpolation="nearest",
        )
    message = str(caught.value)
    flags = "--input-size 0|--scale|--ratio|--hflip 1.5|--train-interpolation cubic|--aa rand-q9"
    flags += "|--color-jitter -1.0|--reprob -0.1|--remode noise|--recount 0|--norm cifar"
    flags += "|--train_resize 0|--train_jpeg 101|--test_interpolation nearest"
    for flag in flags.split("|"):
        assert flag in message
    assert "none, half, imagenet" in message


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


def test_read_class_order_refuses_numbers_that_mean_two_things(tmp_path):
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


def epoch_images(task, options, epoch):
    """All batches of an epoch as one list of (image bytes, target), in order."""
    loader = build_train_loader(task, options)
    loader.batch_sampler.set_epoch(epoch)
    return [
        (image.numpy().tobytes(), int(target))
        for images, targets in loader
        for image, target in zip(images, targets, strict=True)
    ]


def test_augmentation_is_the_same_for_any_number_of_workers_and_ranks():
    task = make_stream(RICH, per_class=9).tasks[1]  # 18 images
    alone = epoch_images(task, LoaderOptions(8, 8, num_workers=0), epoch=3)
    assert len(alone) == 18
    assert epoch_images(task, LoaderOptions(8, 8, num_workers=2), epoch=3) == alone
    for world_size in (2, 4):
        options = LoaderOptions(8 // world_size, 2, num_workers=0, world_size=world_size)
        shares = [epoch_images(task, replace(options, rank=r), 3) for r in range(world_size)]
        assert sorted(chain.from_iterable(shares)) == sorted(alone)
        first = [image for share in shares for image in share[: options.batch_size]]
        assert first == alone[:8]  # rank after rank gives the global batch


def test_augmentation_ignores_the_global_generators_and_the_order():
    data = make_stream(RICH).tasks[0].data
    expected = [data[2, i][0] for i in range(5)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = data.__getitems__([(2, i) for i in reversed(range(5))])
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
    epoch_images(stream.tasks[0], options, epoch=0)
    list(build_test_loader(stream.tasks[0].test_sets[0], options))
    assert rng_states() == before


def test_data_survives_the_way_into_a_spawned_worker():
    task = make_stream(RICH).tasks[1]
    for data, key in ((task.data, (1, 2)), (task.test_sets[0].data, 2)):
        assert torch.equal(pickle.loads(pickle.dumps(data))[key][0], data[key][0])


def test_generators_are_restored_after_an_error():
    data = make_stream().tasks[0].data
    before = rng_states()

    def fail(_image):
        torch.rand(1)
        raise DataError("broken")

    data.transform = fail
    with pytest.raises(DataError, match="broken"):
        data[0, 0]
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
    assert sorted(seen) == [(5, i) for i in range(num_images)]


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
    task = make_stream(per_class=9).tasks[0]  # 18 images: 8 + 8 + 2
    for rank in (0, 1):
        options = LoaderOptions(4, 4, rank=rank, world_size=2)
        sampler = GlobalBatchSampler(18, options, task=0)
        loaders = [build_train_loader(task, replace(options, num_workers=n)) for n in (0, 1)]
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
        return [position for _, position in next(iter(sampler))]

    assert order() == order()
    orders = [order(), order(seed=43), order(task=1), order(epoch=1), list(range(64))]
    assert len({tuple(one) for one in orders}) == 5


def test_set_epoch_reaches_persistent_workers():
    task = make_stream(RICH).tasks[0]
    loader = build_train_loader(task, LoaderOptions(8, 8, num_workers=2))
    assert loader.persistent_workers
    plain = build_train_loader(task, LoaderOptions(8, 8, num_workers=0))
    for epoch in (0, 1, 0):
        for one in (loader, plain):
            one.batch_sampler.set_epoch(epoch)
        for (images, targets), (same, same_targets) in zip(loader, plain, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(targets, same_targets)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_images_gets_an_empty_batch(num_workers):
    task = make_stream(per_class=9).tasks[0]  # 18 images: 16 + 2
    options = LoaderOptions(4, 4, num_workers=num_workers, rank=3, world_size=4)
    full, empty = list(build_train_loader(task, options))
    assert full[0].shape == (4, 3, 16, 16)
    assert empty[0].shape == (0, 3, 16, 16)
    assert empty[0].dtype == full[0].dtype
    assert empty[1].shape == (0,)
    assert empty[1].dtype == full[1].dtype == torch.int64


@pytest.mark.parametrize("num_images", [1, 10, 23, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize(("batch_size", "group"), [(8, 8), (20, 4), (3, 5), (64, 1)])
def test_test_batches_hold_whole_groups_in_order(num_images, world_size, batch_size, group):
    test_set = TestSet(0, "x", range_data(num_images), (0,))
    seen = []
    for rank in range(world_size):
        options = LoaderOptions(batch_size, group, 0, rank=rank, world_size=world_size)
        loader = build_test_loader(test_set, options)
        batches = [targets.tolist() for _, targets in loader]
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch[0] % group == 0
            assert len(batch) <= max(group, batch_size)
            assert len(batch) % group == 0 or batch[-1] == num_images - 1
        for batch in batches[:-1]:
            assert len(batch) == max(group, batch_size // group * group)
        seen += chain.from_iterable(batches)
    assert seen == list(range(num_images))


class RangeData(torch.utils.data.Dataset):
    def __init__(self, num_images):
        self.targets = np.arange(num_images)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.zeros(3, 1, 1), int(self.targets[index])


def range_data(num_images):
    return RangeData(num_images)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_named_from_a_loader(tmp_path, num_workers):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(20, 20).save(tmp_path / name / f"{i}.png")
    source = FolderSource(tmp_path, ["ant", "bee"])
    transform = build_transform(False, SMALL)
    prepare = Preparation(transform, transform, 0)
    stream = class_incremental(source, source, (0, 1), 1, 2, prepare)
    broken = tmp_path / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = LoaderOptions(2, 2, num_workers=num_workers)
    for loader in (
        build_train_loader(stream.tasks[0], options),
        build_test_loader(stream.tasks[0].test_sets[0], options),
    ):
        message = ""
        try:
            list(loader)
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
