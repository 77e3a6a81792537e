"""Images on the device: the same 8-bit pixels as Pillow's in the workers."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cli.settings import TransformSettings
from continual_datasets.device_transforms import (
    DeviceImages,
    Place,
    PlacedSource,
    build_draw,
    num_bytes,
    why_not_on_device,
)
from continual_datasets.images import ArraySource, ConcatSource, FileSource
from continual_datasets.task_splits import Transforms, class_incremental, several_data_sets
from continual_datasets.transforms import build_transform

CPU = torch.device("cpu")
#: Grey and colour, square and not, smaller and larger than the input.
SHAPES = [(8, 8), (28, 28), (32, 32, 3), (40, 24, 3), (300, 260, 3)]


def make_array(shape, number=3, seed=0):
    """Coarse and fine patterns over the whole range, so that cubic overshoot is cut off."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (number, *shape), dtype=np.uint8)
    array[0] = np.where(array[0] > 127, 255, 0)
    array[1, shape[0] // 2 :] = 255
    return array


def to_pil(picture):
    return Image.fromarray(picture).convert("RGB")


def levels(pixels):
    """8-bit levels, whether they come as such or in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels
    return torch.round(255 * pixels).to(torch.uint8)


def places(arrays):
    sizes = [array.shape[1:3] for array in arrays for _ in array]
    return [Place(row, *size) for row, size in enumerate(sizes)]


def pixels_of_workers(train, arrays, options, seeds):
    transform = build_transform(train, options)
    made = []
    for picture, seed in zip([p for array in arrays for p in array], seeds, strict=True):
        torch.manual_seed(seed)
        made.append(levels(transform(to_pil(picture))))
    return torch.stack(made)


def make_draws(train, arrays, options, seeds):
    draw = build_draw(train, options)
    made = []
    for place, seed in zip(places(arrays), seeds, strict=True):
        torch.manual_seed(seed)
        made.append(draw(place))
    return torch.stack(made)


def pixels_on(device, train, arrays, options, draws):
    images = DeviceImages(arrays, device)
    make = images.train_pixels if train else images.test_pixels
    return make(draws.to(device), options).cpu()


def assert_as_workers(device, train, arrays, options, first_seed=0):
    number = sum(map(len, arrays))
    seeds = range(first_seed, first_seed + number)
    draws = make_draws(train, arrays, options, seeds)
    found = pixels_on(device, train, arrays, options, draws)
    expected = pixels_of_workers(train, arrays, options, seeds)
    assert found.dtype == torch.uint8
    assert found.shape == (number, 3, options.input_size, options.input_size)
    assert torch.equal(found, expected)


def make_options(input_size, interpolation):
    return TransformSettings(
        input_size=input_size,
        train_interpolation=interpolation,
        test_interpolation=interpolation,
    )


# Pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 48, 224])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_those_of_pillow(train, size, interpolation, shape):
    arrays = [make_array(shape)]
    assert_as_workers(CPU, train, arrays, make_options(size, interpolation))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 48, 224])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_on_cuda_are_those_of_pillow(train, size, interpolation):
    arrays = [make_array(shape) for shape in SHAPES]
    assert_as_workers(torch.device("cuda"), train, arrays, make_options(size, interpolation))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_making_pixels_does_not_wait_for_cuda():
    arrays = [make_array(shape) for shape in SHAPES]
    options = make_options(48, "bicubic")
    images = DeviceImages(arrays, torch.device("cuda"))
    draws = make_draws(True, arrays, options, range(15)).cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images.train_pixels(draws, options)
        images.test_pixels(draws, options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [16, 48])
def test_making_pixels_never_reads_a_value(train, size):
    meta = torch.device("meta")  # has no values: reading one is an error
    images = DeviceImages([make_array((32, 30, 3))], meta)
    make = images.train_pixels if train else images.test_pixels
    draws = torch.empty((5, 6), dtype=torch.int64, device=meta)
    pixels = make(draws, make_options(size, "bicubic"))
    assert (pixels.shape, pixels.dtype) == ((5, 3, size, size), torch.uint8)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [31, 33, 47])
def test_images_of_all_sizes_share_a_batch(train, size):
    arrays = [make_array(shape) for shape in (*SHAPES, (31, 33), (37, 90, 3), (1, 5, 3))]
    assert_as_workers(CPU, train, arrays, make_options(size, "bilinear"))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(60, 20, 3), (21, 60, 3), (60, 60), (60, 61, 3), (34, 33)])
def test_shrinking_keeps_the_order_of_pillows_passes(train, shape):
    arrays = [make_array(shape, 40)]
    options = replace(make_options(16, "bicubic"), scale=(0.3, 1.0), ratio=(0.2, 5.0))
    assert_as_workers(CPU, train, arrays, options)


@pytest.mark.parametrize("options", [
    TransformSettings(input_size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0),  # a copy
    TransformSettings(input_size=32, scale=(0.01, 0.02)),  # a few pixels
    replace(make_options(20, "bicubic"), scale=(0.5, 1.0), ratio=(0.2, 5.0)),
    TransformSettings(input_size=8, scale=(1.0, 1.0), ratio=(3.0, 4.0)),  # the central crop
])  # fmt: skip
def test_pixels_of_all_crops_are_those_of_pillow(options):
    arrays = [make_array((32, 32, 3), 60), make_array((28, 28), 60)]
    assert_as_workers(CPU, True, arrays, options, first_seed=500)


def test_order_and_repetition_within_a_batch_change_nothing():
    arrays = [make_array(shape) for shape in SHAPES[:4]]
    options = make_options(24, "bilinear")
    draws = make_draws(True, arrays, options, range(12))
    order = torch.tensor([7, 3, 3, 11, 0, 7])
    whole = pixels_on(CPU, True, arrays, options, draws)
    assert torch.equal(pixels_on(CPU, True, arrays, options, draws[order]), whole[order])
    assert len(whole.flatten(1).unique(dim=0)) == 12


def test_batch_without_images_has_no_pixels():
    draws = torch.empty((0, 6), dtype=torch.int64)
    for train in (True, False):
        pixels = pixels_on(CPU, train, [make_array((8, 8))], make_options(16, "bilinear"), draws)
        assert (pixels.shape, pixels.dtype) == ((0, 3, 16, 16), torch.uint8)


# Draws


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.01, 0.05), (1.0, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (2.0, 3.0), (0.2, 0.3)])
@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
def test_draw_is_what_the_transform_does(monkeypatch, scale, ratio, hflip):
    options = TransformSettings(input_size=4, scale=scale, ratio=ratio, hflip=hflip)
    done = []
    monkeypatch.setattr(
        transforms.functional,
        "resized_crop",
        lambda image, *box, **_: done.append([*box[:4], 0]) or image,
    )
    monkeypatch.setattr(
        transforms.functional, "hflip", lambda image: done[-1].__setitem__(4, 1) or image
    )
    transform, draw = build_transform(True, options), build_draw(True, options)
    for seed in range(120):
        height, width = [(32, 32), (28, 28), (40, 24), (9, 70)][seed % 4]
        torch.manual_seed(seed)
        transform(Image.new("RGB", (width, height)))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        drawn = draw(Place(seed, height, width))
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == [seed, *done[-1]]
        assert torch.equal(torch.get_rng_state(), state)
    assert len(done) == 120
    assert {flip for *_, flip in done} == {0.0: {0}, 0.3: {0, 1}, 1.0: {1}}[hflip]


def test_draw_falls_back_to_the_central_crop():
    draw = build_draw(True, TransformSettings(scale=(1.0, 1.0), ratio=(2.0, 3.0), hflip=0.0))
    assert draw(Place(7, 30, 30)).tolist() == [7, 7, 0, 15, 30, 0]


def test_draw_of_a_test_image_is_the_whole_and_draws_nothing():
    before = torch.get_rng_state()
    drawn = build_draw(False, TransformSettings())(Place(5, 40, 24))
    assert (drawn.tolist(), drawn.dtype) == ([5, 0, 0, 40, 24, 0], torch.int64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train", [True, False])
def test_draws_can_be_sent_to_workers(train):
    draw = build_draw(train, TransformSettings())
    again = pickle.loads(pickle.dumps(draw))
    torch.manual_seed(1)
    expected = draw(Place(0, 32, 32))
    torch.manual_seed(1)
    assert torch.equal(again(Place(0, 32, 32)), expected)


# Sources


def make_source(shape, seed, per_class=3, num_classes=4):
    targets = np.random.default_rng(seed).permutation(np.repeat(range(num_classes), per_class))
    array = make_array(shape, len(targets), seed)
    return ArraySource(array, targets, [f"name{i}" for i in range(num_classes)])


def test_arrays_of_sources_are_their_pictures_in_order():
    grey, colour = make_source((6, 6), 0), make_source((5, 7, 3), 1)
    both = ConcatSource([grey, colour], colour.classes)
    assert grey.arrays()[0] is grey.images
    assert [id(array) for array in both.arrays()] == [id(grey.images), id(colour.images)]
    pictures = [picture for array in both.arrays() for picture in array]
    assert len(pictures) == len(both)
    for picture, (image, _) in zip(pictures, (both[i] for i in range(len(both))), strict=True):
        assert to_pil(picture).tobytes() == image.tobytes()


def test_sources_of_files_have_no_arrays():
    files = FileSource(["a.png"], [0], ["name0"])
    assert files.arrays() is None
    assert ConcatSource([make_source((6, 6), 0), files], ["name0"] * 4).arrays() is None


def test_placed_source_tells_places_and_stands_for_its_source():
    source = ConcatSource([make_source((6, 6), 0), make_source((5, 7, 3), 1)], ["name"] * 4)
    placed = PlacedSource(source, 100)
    assert (len(placed), placed.classes, placed.by_class) == (24, source.classes, False)
    assert placed.digest() == source.digest()
    assert np.array_equal(placed.targets, source.targets)
    assert placed[0] == (Place(100, 6, 6), source.targets[0])
    assert placed[11] == (Place(111, 6, 6), source.targets[11])
    assert placed[12] == (Place(112, 5, 7), source.targets[12])
    assert placed[-1] == (Place(123, 5, 7), source.targets[23])
    assert placed.arrays() is None
    with pytest.raises(IndexError):
        placed[24]


def test_placed_source_is_sent_without_pictures():
    assert len(pickle.dumps(PlacedSource(make_source((200, 200, 3), 0), 0))) < 5000


def compare_streams(make_stream, sources, options):
    """All data of a stream of pictures and of one of places, by the same keys: the same images."""
    first_rows = np.cumsum([0, *map(len, sources)]).tolist()
    placed = [PlacedSource(s, row) for s, row in zip(sources, first_rows[:-1], strict=True)]
    images = DeviceImages([array for source in sources for array in source.arrays()], CPU)
    worked = make_stream(
        sources, Transforms(build_transform(True, options), build_transform(False, options), 42)
    )
    drawn = make_stream(
        placed, Transforms(build_draw(True, options), build_draw(False, options), 42)
    )
    assert worked.train_digest == drawn.train_digest
    for mine, other in zip(worked.tasks, drawn.tasks, strict=True):
        keys = [(epoch, position) for epoch in (0, 1) for position in range(len(mine.data))]
        compare_data(mine.data, other.data, keys, images.train_pixels, options)
    for mine, other in zip(worked.test_sets, drawn.test_sets, strict=True):
        compare_data(mine.data, other.data, range(len(mine.data)), images.test_pixels, options)
    return [len(part.data) for part in (*drawn.tasks, *drawn.test_sets)]


def compare_data(worked, drawn, keys, make, options):
    assert np.array_equal(worked.targets, drawn.targets)
    pixels, targets = zip(*[worked[key] for key in keys], strict=True)
    draws, same_targets = zip(*[drawn[key] for key in keys], strict=True)
    assert targets == same_targets
    assert torch.equal(make(torch.stack(draws), options), levels(torch.stack(pixels)))


def test_class_incremental_images_are_those_of_the_pictures():
    def make_stream(sources, prepare):
        train = ConcatSource(sources[:2], sources[0].classes)
        return class_incremental(train, sources[2], [2, 0, 3, 1], 2, 2, prepare)

    sources = [make_source((20, 24, 3), 0), make_source((28, 28), 1), make_source((40, 30, 3), 2)]
    assert compare_streams(make_stream, sources, make_options(48, "bilinear")) == [12, 12, 6, 6]


def test_several_data_sets_images_are_those_of_the_pictures():
    def make_stream(sources, prepare):
        train, test = ({"a": sources[at], "b": sources[2 + at]} for at in (0, 1))
        return several_data_sets(train, test, prepare)

    shapes = [(28, 28), (28, 28), (32, 32, 3), (32, 32, 3)]
    sources = [make_source(shape, seed) for seed, shape in enumerate(shapes)]
    assert compare_streams(make_stream, sources, make_options(24, "bicubic")) == [12] * 4


# Memory


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(28, 28)], (3, 1, 28, 28)),
        ([(28, 28), (32, 32, 3)], (6, 3, 32, 32)),
        ([(40, 24, 3), (8, 50)], (6, 3, 40, 50)),
    ],
)
def test_memory_is_as_foretold(shapes, expected):
    arrays = [make_array(shape) for shape in shapes]
    pixels = DeviceImages(arrays, CPU).pixels
    assert pixels.shape == expected
    assert num_bytes(arrays) == pixels.nbytes == np.prod(expected)


def test_pictures_are_placed_unchanged_however_they_lie_in_memory():
    colour = make_array((9, 11, 3), 600)
    across = np.ascontiguousarray(colour.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    across.flags.writeable = False
    grey = make_array((5, 6), 4)[::-1]
    pixels = DeviceImages([across, grey], CPU).pixels.numpy()
    assert np.array_equal(pixels[:600], colour.transpose(0, 3, 1, 2))
    for channel in range(3):
        assert np.array_equal(pixels[600:, channel, :5, :6], grey)
    assert not pixels[600:, :, 5:].any()


# Options


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"aa": "rand-m9-mstd0.5-inc1"}, "--aa rand-m9-mstd0.5-inc1 needs"),
        ({"color_jitter": 0.4}, "--color-jitter 0.4 needs"),
        ({"reprob": 0.25}, "--reprob 0.25 needs"),
        ({"train_resize": 256}, "--train_resize 256 needs"),
        ({"train_jpeg": 72}, "--train_jpeg 72 needs"),
        ({"train_interpolation": "nearest"}, "--train-interpolation nearest needs"),
        ({"train_interpolation": "random"}, "--train-interpolation random needs"),
        ({"train_jpeg": 72, "reprob": 0.5}, "--reprob 0.5, --train_jpeg 72 need the loader"),
    ],
)
def test_options_that_need_the_workers_are_named(changes, flag):
    assert flag in why_not_on_device(replace(TransformSettings(), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": 32, "scale": (0.5, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0},
        {"train_interpolation": "bicubic", "test_interpolation": "bilinear"},
        {"norm": "imagenet"},
        {"aa": "", "color_jitter": 0.0, "remode": "const", "recount": 3},
    ],
)
def test_other_options_do_not_need_the_workers(changes):
    assert why_not_on_device(replace(TransformSettings(), **changes)) is None
