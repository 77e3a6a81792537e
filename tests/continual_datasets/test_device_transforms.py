"""Images on the device: the same 8-bit pixels as Pillow's in the workers."""

import pickle
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from cli.settings import TransformSettings
from continual_datasets import device_transforms
from continual_datasets import pipeline as pipelines
from continual_datasets.device_transforms import cropped
from continual_datasets.images import ArraySource, FileSource
from continual_datasets.pipeline import PlacedSource, build_pipeline, store, stored_shape
from continual_datasets.task_data import TestKey as HeldOutKey
from continual_datasets.task_splits import by_parts
from continual_datasets.transforms import build_transform
from helpers.witnessed_loaders import CPU, DEVICES, assert_same, load, train_keys

META = torch.device("meta")  # has no values: reading one is an error
#: Grey and colour, square and not.
SHAPES = [(8, 8), (1, 5, 3), (16, 9), (28, 28), (32, 32, 3), (31, 32, 3), (40, 24, 3), (60, 64, 3)]
FIXED = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def make_source(shape, seed=0, per_class=3, num_classes=4):
    """Coarse and fine patterns over the whole range, so that cubic overshoot is cut off."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(range(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), *shape), dtype=np.uint8)
    images[::2] = np.where(images[::2] > 127, 255, 0)
    images[1, shape[0] // 2 :] = 255
    return ArraySource(images, targets, [f"name{i}" for i in range(num_classes)])


def make_options(size, interpolation="bilinear", **changes):
    both = {"train_interpolation": interpolation, "test_interpolation": interpolation}
    return TransformSettings(input_size=size, **both, **changes)


def parts_of(*sources):
    """Parts by number, the first half for training."""
    half = len(sources) // 2
    return dict(enumerate(sources[:half])), dict(enumerate(sources[half:]))


def crops_of(sources, train, options):
    """Crop parameters of all images; the global generator is seeded with the image's number."""
    kind = device_transforms.random_crop if train else device_transforms.central_crop
    made, states = [], []
    for source in sources:
        for place, _ in PlacedSource(source, len(made)):
            torch.manual_seed(place[0])
            made.append(kind(place, options))
            states.append(torch.get_rng_state())
    return torch.stack(made), states


def assert_as_workers(sources, train, options, device=CPU):
    crops, states = crops_of(sources, train, options)
    assert crops.dtype == torch.int64
    size, interpolation = options.input_size, options.train_interpolation
    found = cropped(store(sources, device), crops.to(device), size, interpolation).cpu()
    transform = build_transform(train, options)
    expected = []
    for number, (image, _) in enumerate(chain.from_iterable(sources)):
        torch.manual_seed(number)
        expected.append(transform(image))
        assert torch.equal(torch.get_rng_state(), states[number])
    assert torch.equal(found, torch.stack(expected))
    assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)


# Pixels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 33, 64, 224])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_those_of_pillow(train, size, interpolation, device):
    shapes, number = [shape for shape in SHAPES if max(shape) <= size], 3 if size < 64 else 1
    sources = [make_source(shape, i, per_class=number) for i, shape in enumerate(shapes)]
    assert_as_workers(sources, train, make_options(size, interpolation), device)


@pytest.mark.parametrize("options", [
    make_options(32, "bilinear", **FIXED, hflip=1.0),  # a copy
    make_options(32, "bilinear", scale=(0.01, 0.02), hflip=0.0),  # a few pixels
    make_options(40, "bicubic", scale=(0.5, 1.0), ratio=(0.2, 5.0)),
    make_options(48, "bicubic", scale=(1.0, 1.0), ratio=(3.0, 4.0)),  # the central crop
    make_options(40, "bilinear", scale=(0.05, 1.0), crop_rule="tensorflow"),
    make_options(48, "bicubic", scale=(0.5, 0.5), ratio=(9.0, 9.0), crop_rule="tensorflow"),
])  # fmt: skip
def test_pixels_of_all_crops_are_those_of_pillow(options):
    assert_as_workers(
        [make_source((32, 32, 3), per_class=15), make_source((28, 28))], True, options
    )


@pytest.mark.parametrize("train", [True, False])
def test_order_and_repetition_within_a_batch_change_nothing(train):
    sources, options = [make_source((8, 8)), make_source((20, 24, 3))], make_options(24, "bicubic")
    crops, images = crops_of(sources, train, options)[0], store(sources, CPU)
    order = torch.tensor([7, 3, 3, 23, 0, 7])
    whole = cropped(images, crops, 24, "bicubic")
    assert torch.equal(cropped(images, crops[order], 24, "bicubic"), whole[order])
    assert len(whole.flatten(1).unique(dim=0)) == 24
    assert cropped(images, crops[:0], 24, "bicubic").shape == (0, 3, 24, 24)


def test_making_pixels_never_reads_a_value():
    """So it never waits for a GPU."""
    images = torch.empty((9, 3, 32, 30), dtype=torch.uint8, device=META)
    crops = torch.empty((5, 10), dtype=torch.int64, device=META)
    for interpolation in device_transforms.FILTERS:
        pixels = cropped(images, crops, 48, interpolation)
        assert (pixels.shape, pixels.dtype) == ((5, 3, 48, 48), torch.uint8)


# Sources and streams


def test_placed_source_gives_places_and_replaces_its_source():
    source = make_source((200, 190, 3))
    placed = PlacedSource(source, 100)
    assert (len(placed), placed.classes, placed.by_class) == (12, source.classes, False)
    assert placed.digest() == source.digest()
    assert np.array_equal(placed.targets, source.targets)
    assert placed[0] == ((100, 200, 190), source.targets[0])
    assert placed[-1] == ((111, 200, 190), source.targets[11])
    with pytest.raises(IndexError):
        placed[12]
    assert len(pickle.dumps(placed)) < 5000


def test_images_are_stored_unchanged_however_they_lie_in_memory():
    colour = make_source((9, 11, 3), per_class=20).images
    across = np.ascontiguousarray(colour.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    across.flags.writeable = False
    grey = make_source((5, 6)).images[::-1]
    sources = [ArraySource(images, range(len(images)), "") for images in (across, grey)]
    images = store(sources, CPU)
    assert images.shape == stored_shape(sources) == (92, 3, 9, 11)
    assert np.array_equal(images[:80], colour.transpose(0, 3, 1, 2))
    assert all(np.array_equal(images[80:, channel, :5, :6], grey) for channel in range(3))
    assert not images[80:, :, 5:].any()
    assert store(sources[1:], CPU).shape == (12, 1, 5, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_images_of_a_stream_are_those_of_the_workers(device):
    """On CUDA a graph makes those of the second task again."""
    options = replace(make_options(48, "bilinear", norm="imagenet"), test_interpolation="bicubic")
    shapes = [(28, 28), (32, 32, 3), (28, 28), (40, 30, 3)]
    sources = [make_source(shape, seed) for seed, shape in enumerate(shapes)]
    made = []
    for on_device in (True, False):
        pipeline, (placed,) = build_pipeline(on_device, options, [parts_of(*sources)], device)
        assert pipeline.on_device is on_device
        pipeline.graph_sizes = {24, 12} if device.type == "cuda" else set()
        stream, found = by_parts(*placed, pipeline), []
        for task in stream.tasks:
            number = range(len(task.data))
            keys = [*train_keys(task.index, 0, number), *train_keys(task.index, 1, number)]
            held_out = [HeldOutKey(task.index, i) for i in range(len(task.test_sets[-1].data))]
            for part, train in ((keys, True), (held_out, False)):
                batch, targets = load(stream, *part)
                found.append((pipeline.to_input(batch.to(device), train), torch.tensor(targets)))
        made.append(([(images.cpu(), targets) for images, targets in found], stream.train_digest))
    device, workers = made
    assert device[1] == workers[1]
    assert_same(device[0], workers[0])


@pytest.mark.parametrize("on_device", [True, False])
def test_training_images_without_augmentation_are_those_of_a_test(on_device):
    options = replace(make_options(48, "bilinear"), test_interpolation="bicubic", augment=False)
    options = replace(options, **({} if on_device else {"reprob": 1.0, "aa": "v0"}))
    same = [make_source((40, 30, 3))] * 2
    pipeline, (placed,) = build_pipeline(on_device, options, [parts_of(*same)], CPU)
    stream = by_parts(*placed, pipeline)
    train, _ = load(stream, *train_keys(0, 0, range(12)))
    test, _ = load(stream, *(HeldOutKey(0, i) for i in range(12)))
    assert torch.equal(pipeline.to_input(train, True), pipeline.to_input(test, False))


def test_full_batches_have_a_graph_each(monkeypatch):
    recorded = []
    monkeypatch.setattr(
        pipelines, "RecordedGraph", lambda work, batch: recorded.append(batch.shape) or work
    )
    pipeline = pipelines.ImagePipeline(make_options(8), CPU)
    pipeline.graph_sizes = {4}
    for size in (4, 3, 4):
        batch = torch.full((size, 3, 8, 8), 51, dtype=torch.uint8)
        for train in (True, False):
            assert torch.equal(pipeline.to_input(batch, train), torch.full((size, 3, 8, 8), 0.2))
            assert pipeline.to_input(batch.float(), train).equal(batch.float())
    assert recorded == [(4, 3, 8, 8)] * 2  # of training, and of tests


# Options


@pytest.mark.parametrize(("changes", "reason"), [
    ({"aa": "rand-m9-mstd0.5-inc1"}, "--aa rand-m9-mstd0.5-inc1 needs"),
    ({"color_jitter": 0.4}, "--color-jitter 0.4 needs"),
    ({"train_resize": 256}, "--train_resize 256 needs"),
    ({"train_interpolation": "nearest"}, "--train-interpolation nearest needs"),
    ({"train_interpolation": "random"}, "--train-interpolation random needs"),
    ({"train_jpeg": 72, "reprob": 0.5}, "--reprob 0.5, --train_jpeg 72 need"),
    ({"input_size": 63}, "shrinking 64 pixels to --input-size 63 needs"),
    ({"input_size": 64, "hflip": 0.0, **FIXED}, None),
    ({"train_interpolation": "bicubic", "test_interpolation": "bilinear"}, None),
    ({"norm": "imagenet", "color_jitter": 0.0, "remode": "const", "recount": 3}, None),
])  # fmt: skip
def test_reason_against_images_on_the_device_is_named(changes, reason):
    parts = parts_of(make_source((60, 64, 3)), make_source((8, 8)))
    options = TransformSettings(**changes)
    if reason is None:
        assert build_pipeline(True, options, [parts], CPU)[0].on_device
        return
    with pytest.raises(ValueError, match=f"^--data_on_device true: {reason} the loader's workers"):
        build_pipeline(True, options, [parts], CPU)
    assert not build_pipeline("auto", options, [parts], META)[0].on_device


def test_images_in_files_and_by_default_on_the_cpu_are_loaded_by_workers(caplog):
    caplog.set_level("INFO")
    parts = parts_of(make_source((8, 8)), FileSource(["a.png"], [0], ["name0"]))
    options = make_options(16)
    with pytest.raises(ValueError, match="the images are files, which are read when they are"):
        build_pipeline(True, options, [parts], CPU)
    for given, device in (("auto", CPU), (False, META), ("auto", META)):
        assert caplog.text == ""
        built, (same,) = build_pipeline(given, options, [parts], device)
        assert (built.on_device, same) == (False, parts)
    assert "Images are not stored on meta: the images are files" in caplog.text
    assert not build_pipeline("auto", options, [(parts[0], {})], CPU)[0].on_device


def test_images_may_take_a_quarter_of_the_free_memory(monkeypatch, caplog):
    caplog.set_level("INFO")
    parts = parts_of(make_source((8, 8)), make_source((10, 20, 3)))  # 24 of 3 x 10 x 20 bytes
    for free in (4 * 14_400, 4 * 14_400 - 1):
        assert caplog.text == ""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        built, _ = build_pipeline("auto", make_options(24), [parts], META)
        assert built.on_device == (free == 4 * 14_400)
    assert "Images are not stored on meta: they take 0.0 GB" in caplog.text
    assert build_pipeline(True, make_options(24), [parts], META)[0].on_device
